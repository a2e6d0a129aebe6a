"""Weights in fewer bits: the effect of rounding on a layer, on the language model and on a policy's plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from vla_parts import CAMERAS, INSTRUCTIONS, S, ready_module, small_vlm

from keygrip.evaluation import trained_policy
from keygrip.models.nn.low_precision import Int8Linear, lower_precision


def test_int8_weights_are_within_half_a_step() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 12)
    with torch.no_grad():
        layer.weight[3] *= 100  # a row of a different scale
        layer.weight[5] = 0.0
    small = Int8Linear(layer)
    back = small.weight_int8 * small.scale
    step = layer.weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((back - layer.weight).abs() <= step / 2 + 1e-7).all()
    x = torch.randn(7, 40)
    bound = x.abs().sum(dim=1, keepdim=True) * step.T / 2  # if all rounding errors have the same sign
    assert ((small(x) - layer(x)).abs() <= bound + 1e-4).all()
    assert small(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(small(x)[:, 5], layer.bias[5].expand(7))


def weight_bytes(network: nn.Module) -> int:
    """Return the number of bytes of parameters and buffers."""
    return sum(part.numel() * part.element_size() for part in [*network.parameters(), *network.buffers()])


def observation() -> dict[str, object]:
    view = {
        "image": np.random.default_rng(0).integers(0, 255, (S, S, 3), dtype=np.uint8),
        "intrinsics": np.array([[40.0, 0, 16], [0, 40.0, 16], [0, 0, 1]]),
        "world_to_camera": np.eye(4),
    }
    pose = {"position": np.array([0.2, 0.0, 0.1]), "quaternion": np.array([0.0, 1.0, 0, 0]), "gripper": 1.0}
    return {"cameras": dict.fromkeys(CAMERAS, view), "instruction": INSTRUCTIONS[0], **pose}


@pytest.mark.parametrize(("precision", "share"), [("bfloat16", 0.5), ("int8", 0.45)])
def test_a_policy_plans_nearly_the_same(precision: str, share: float, tmp_path: Path) -> None:
    module = ready_module(tmp_path, pointing_cells=2, pointed_tokens=True)
    plain = module.policy()
    plain.reset(3)
    expected = plain.plan(observation())
    vlm, head = module.network.vlm, weight_bytes(module.network.head)
    before = weight_bytes(vlm.model)
    frequencies = vlm.model.language_model.rotary_emb.inv_freq.clone()
    policy = type(plain)(module, vlm_precision=precision)  # type: ignore[arg-type]
    assert weight_bytes(vlm.model) < (share + 0.01) * before
    assert weight_bytes(module.network.head) == head
    assert torch.equal(vlm.model.language_model.rotary_emb.inv_freq, frequencies), "positions stay exact"
    session = policy.session()
    session.reset(3)
    found = session.plan(observation())
    assert not np.array_equal(found.position, expected.position)
    np.testing.assert_allclose(found.position, expected.position, atol=0.01)
    with pytest.raises(ValueError, match=f"are {precision} already"):
        type(plain)(module, vlm_precision="int8" if precision == "bfloat16" else "bfloat16")


def test_checking_a_policys_settings_rounds_nothing(tmp_path: Path) -> None:
    """`evaluate` checks them before it computes the errors on recorded demonstrations with the same module."""
    module = ready_module(tmp_path)
    before = weight_bytes(module.network.vlm.model)
    trained_policy.check_policy(module, "run", {"vlm_precision": "int8", "seed": 3})
    assert weight_bytes(module.network.vlm.model) == before
    for changes, said in (({"vlm_precision": "int9"}, "vlm_precision='int9': must be"), ({"sede": 1}, "did you mean")):
        with pytest.raises(ValueError, match=said):
            trained_policy.check_policy(module, "run", changes)


def test_a_policy_is_rounded_before_it_goes_to_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ready_module(tmp_path)
    before, moved = weight_bytes(module.network.vlm.model), []
    monkeypatch.setattr(trained_policy, "load_module", lambda path, **options: module)
    monkeypatch.setattr(trained_policy, "refuse_missing_device", lambda device: None)
    monkeypatch.setattr(module, "to", lambda place: moved.append((place, weight_bytes(module.network.vlm.model))))
    policy = trained_policy.load_policy(tmp_path, {"vlm_precision": "int8", "seed": 7}, "cuda")
    ((place, size),) = moved
    assert place == "cuda"
    assert size < 0.46 * before
    assert (policy.seed, policy.vlm_precision) == (7, "int8")
    assert policy.plan(observation()).position.shape[0] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_never_holds_more_than_the_rounded_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ready_module(tmp_path, vlm=small_vlm(mlp_width=1 << 16))  # 19 M values, 75 MB
    monkeypatch.setattr(trained_policy, "load_module", lambda path, **options: module)
    expected = weight_bytes(module)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    policy = trained_policy.load_policy(tmp_path, {"vlm_precision": "int8"}, "cuda")
    assert torch.cuda.max_memory_allocated() - before < 0.35 * expected
    assert policy.plan(observation()).position.shape[0] == 1


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="float32, bfloat16, int8"):
        lower_precision(nn.Linear(2, 2), "int4")  # type: ignore[arg-type]
