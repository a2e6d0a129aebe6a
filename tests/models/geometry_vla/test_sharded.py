"""A step of the policy with parameters sharded over two processes equals the step of one, whichever parts are
trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from vla_parts import ready_module, small_batch, small_vlm

from keygrip.models.geometry_vla.module import GeometryVLAModule
from keygrip.models.nn.lora import LoRA
from keygrip.training.sharding import shard

PROCESSES = 2
KINDS = {
    "all": {},
    "lora": {"trainable": "language", "lora": LoRA(2, 4.0, ["q_proj", "v_proj", "down_proj"])},
    "frozen": {"trainable": "frozen"},
}


def built(kind: str, folder: Path) -> GeometryVLAModule:
    vlm = small_vlm(gradient_checkpointing=True, **KINDS[kind])
    module = ready_module(folder, vlm=vlm, pointing_cells=2, pointed_tokens=True)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:  # zeros at first: the other half would have no gradient
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    module.log_images_every_n_steps = 0
    return module


def step_and_validation(module: GeometryVLAModule) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the parameters after a step, and the logged values of the step and of a validation."""
    logged: dict[str, float] = {}
    module.log_values = lambda split, values, *_: logged.update(  # type: ignore[method-assign]
        {f"{split}/{name}": float(value.detach()) for name, value in values.items()}
    )
    module.trainer = SimpleNamespace(accumulate_grad_batches=1)  # type: ignore[assignment]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    torch.manual_seed(0)
    module.train().training_step(small_batch(), 0).backward()
    torch.optim.SGD(trained, lr=0.1).step()
    module.eval().on_validation_epoch_start()
    with torch.no_grad():
        module.validation_step(small_batch(), 0)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}
    return whole, logged


def one_of_two(rank: int, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    own = Path(folder) / str(rank)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    try:
        before = dict(built(kind, own).named_parameters())
        expected, logged = step_and_validation(built(kind, own))
        module = built(kind, own)
        shard(module, init_device_mesh("cpu", (PROCESSES,)))
        assert any(isinstance(parameter, DTensor) for parameter in module.parameters())
        found, sharded = step_and_validation(module)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
            )
        moved = {name for name in before if not torch.equal(expected[name], before[name])}
        assert any(name.startswith("network.vlm") for name in moved) == (kind != "frozen")
        assert all("lora_" in name for name in moved if name.startswith("network.vlm")) == (kind != "all")
        assert sharded.keys() == logged.keys()
        assert "val/geometry_worth_cm" in logged
        for name, figure in logged.items():
            assert sharded[name] == pytest.approx(figure, rel=1e-3, abs=1e-4), name
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_two_processes_take_the_step_of_one(kind: str, tmp_path: Path) -> None:
    if kind == "lora":
        pytest.importorskip("peft")
    start_processes(one_of_two, (kind, str(tmp_path)), PROCESSES, start_method="spawn")
