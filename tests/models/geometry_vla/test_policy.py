"""The whole policy: which inputs change its actions, what trains, what is masked, plans, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vla_parts import (
    CAMERAS,
    INSTRUCTIONS,
    S,
    T,
    V,
    observation,
    ready_module,
    small_batch,
    small_geometry,
    small_module,
    small_statistics,
    small_vlm,
)

from keygrip.data.batches import MultiViewPolicyBatch
from keygrip.models.geometry_vla.figures import scene_figure
from keygrip.models.geometry_vla.mapanything import MapAnythingGeometry
from keygrip.models.geometry_vla.module import GeometryVLAModule
from keygrip.models.geometry_vla.network import ActionSampling
from keygrip.models.nn.flow_matching import interpolate, velocity
from keygrip.models.nn.inpainting import soft_mask


def actions_of(module: GeometryVLAModule, batch: MultiViewPolicyBatch) -> Tensor:
    module.eval()
    with torch.no_grad():
        return module.sample(module(batch), batch)


def furthest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def test_demonstrations_without_an_instruction_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Some demonstrations have no instruction"):
        small_module().set_statistics(small_statistics(tmp_path, ["open the drawer", " "]))
    statistics = small_statistics(tmp_path, ["open the drawer"])
    # a short demonstration in a large set: none of the evenly chosen frames is of it
    with pytest.raises(ValueError, match="Some demonstrations have no instruction"):
        small_module().set_statistics(replace(statistics, instructions=("", "open the drawer")))


@pytest.mark.parametrize("inject", [True, False])
def test_state_cameras_and_instruction_each_change_the_actions(tmp_path: Path, inject: bool) -> None:
    module = ready_module(tmp_path, geom_inject_to_dit=inject)
    batch = small_batch()
    plain = actions_of(module, batch)
    assert plain.shape == (2, T, 10)
    assert furthest(actions_of(module, small_batch()), plain) == 0.0, "the same twice"
    changed = small_batch()
    changed.start_position = changed.start_position + 0.05
    assert furthest(actions_of(module, changed), plain) > 1e-4, "the state"
    for view in range(V):
        changed = small_batch()
        changed.images[:, view] = 255 - changed.images[:, view]
        assert furthest(actions_of(module, changed), plain) > 1e-4, f"camera {view}"
    changed = small_batch()
    changed.instruction = [INSTRUCTIONS[1], INSTRUCTIONS[0]]
    assert furthest(actions_of(module, changed), plain) > 1e-4, "the instruction"


@pytest.mark.parametrize("type", ["pool", "per_layer", "qformer"])
def test_geometry_tokens_change_the_actions(tmp_path: Path, type: str) -> None:
    module = ready_module(tmp_path, geom_compression_type=type, geom_qformer_heads=2)
    batch = small_batch()
    plain = actions_of(module, batch)
    geometry = module.network.geometry
    assert geometry is not None
    hook = geometry.register_forward_hook(lambda *call: type_of(call[2], -call[2].tokens))
    assert furthest(actions_of(module, batch), plain) > 1e-4
    hook.remove()
    assert furthest(actions_of(module, batch), plain) == 0.0


def type_of(features: Any, tokens: Tensor) -> Any:
    return type(features)(tokens, features.points, features.log_depth)


@pytest.mark.parametrize("type", ["pool", "per_layer", "qformer"])
def test_every_part_that_should_train_gets_a_gradient(tmp_path: Path, type: str) -> None:
    """Uses the action loss alone: depth must not be the only loss that trains the geometry encoder."""
    geometry = small_geometry(point_weight=0.0, depth_weight=0.0)
    module = ready_module(tmp_path, geometry=geometry, geom_compression_type=type, geom_qformer_heads=2)
    batch = small_batch(depth=False)
    module.losses(module(batch), batch)["total"].backward()
    without = [
        name for name, p in module.network.named_parameters() if p.grad is None or not float(p.grad.abs().sum()) > 0
    ]
    assert without == []


def test_frozen_parts_get_none(mapanything: Path, tmp_path: Path) -> None:
    module = ready_module(
        tmp_path, vlm=small_vlm(trainable="frozen"), geometry=MapAnythingGeometry(str(mapanything), S)
    )
    batch = small_batch(depth=False)
    module.losses(module(batch), batch)["total"].backward()
    trained = {name.partition(".")[0] for name, p in module.network.named_parameters() if p.grad is not None}
    assert trained == {"head", "compressor"}


def test_the_vlm_runs_once_for_all_draws_and_steps(module: GeometryVLAModule) -> None:
    calls: list[str] = []
    module.network.vlm.register_forward_hook(lambda *_: calls.append("vlm"))
    assert module.network.geometry is not None
    module.network.geometry.register_forward_hook(lambda *_: calls.append("geometry"))
    module.network.head.register_forward_hook(lambda *_: calls.append("head"))
    batch = small_batch()
    module.losses(module(batch), batch)
    assert sorted(calls) == ["geometry", "head", "vlm"]
    calls.clear()
    actions_of(module, batch)
    assert sorted(calls) == ["geometry", *["head"] * module.sampling.steps, "vlm"]
    assert module.sampling.steps == 4


def test_loss_is_written_out_and_padded_steps_do_not_count(module: GeometryVLAModule) -> None:
    batch = small_batch()
    batch.action_is_pad[0, 0, 2:] = True
    scene = module(batch)
    torch.manual_seed(0)
    found = module.losses(scene, batch)["action"]
    torch.manual_seed(0)
    clean = module.actions.encode(batch).repeat_interleave(2, dim=0)
    noise = torch.randn_like(clean)
    level = module.timesteps(len(clean), "cpu")
    predicted = module.network.velocity(scene, interpolate(clean, noise, level), level, module.state(batch))
    error = (predicted - velocity(clean, noise)).square()
    expected = torch.cat([error[:2, :2].flatten(), error[2:].flatten()]).mean()
    torch.testing.assert_close(found, expected)
    # the padded steps train nothing: their own error has no weight
    weight = torch.autograd.grad(
        module.losses(scene, batch)["action"], [module.network.head.decode[3].bias], retain_graph=True
    )[0]
    assert torch.isfinite(weight).all()
    batch.action_is_pad[:] = True
    assert float(module.losses(scene, batch)["action"].detach()) == 0.0


def test_padding_of_the_prompt_does_not_reach_the_actions(tmp_path: Path) -> None:
    """A short instruction next to a long one gives the same actions as alone, also through the head's
    cross-attention."""
    module = ready_module(tmp_path)
    batch = small_batch()
    together = actions_of(module, batch)
    scene = module(batch)
    assert scene.contexts[0].mask is not None
    assert (~scene.contexts[0].mask).any(), "one of the two is padded"
    assert scene.contexts[0].mask[:, -scene.groups[1] :].all()
    for row in range(2):
        alone = small_batch()
        rows = {
            name: value[row : row + 1] if isinstance(value, Tensor) else value for name, value in vars(alone).items()
        }
        rows["instruction"] = [batch.instruction[row]]
        torch.testing.assert_close(
            actions_of(module, MultiViewPolicyBatch(**rows))[0], together[row], atol=1e-4, rtol=1e-3
        )


def test_depth_trains_the_geometry_encoder_and_missing_depth_is_said(module: GeometryVLAModule) -> None:
    batch = small_batch()
    losses = module.losses(module(batch), batch)
    torch.testing.assert_close(losses["total"], losses["action"] + losses["points"] + losses["depth"])
    flat = small_batch(depth=False)
    with pytest.raises(ValueError, match=r"set data\.depth=true"):
        module.losses(module(flat), flat)


def test_head_and_compressor_compute_in_float32_under_bf16_backbones(module: GeometryVLAModule) -> None:
    batch = small_batch()
    compressor = module.network.compressor
    assert compressor is not None
    seen: list[torch.dtype] = []
    compressor.register_forward_hook(lambda _, __, out: seen.append(out[0].dtype))
    module.network.head.decode.register_forward_hook(lambda _, given, out: seen.extend([given[0].dtype, out.dtype]))
    layer = module.network.vlm.model.language_model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda _, __, out: backbone.append(out.dtype))
    backbone: list[torch.dtype] = []
    with torch.autocast("cpu", torch.bfloat16):
        scene = module(batch)
        assert module.losses(scene, batch)["total"].dtype == torch.float32
    assert backbone == [torch.bfloat16]
    assert seen == [torch.float32] * 3
    assert all(context.tokens.dtype == torch.float32 for context in scene.contexts)


def test_context_norm_makes_layers_alike(tmp_path: Path) -> None:
    batch = small_batch()
    for norm in (True, False):
        module = ready_module(tmp_path, context_norm=norm)
        spread = [float(context.tokens.detach().std(-1).mean()) for context in module(batch).contexts]
        assert all(value == pytest.approx(1.0, abs=0.1) for value in spread) == norm


def test_the_head_can_be_told_where_a_token_lies(tmp_path: Path) -> None:
    module = ready_module(tmp_path, context_places=True)
    batch = small_batch()
    places = module.network.places
    assert places is not None
    plain = module(batch).contexts[0].tokens.detach()
    torch.nn.init.normal_(places.lift.weight)
    told = module(batch).contexts[0].tokens.detach() - plain
    pictures = module.network.vlm.tokens(batch.instruction, V)[3][..., 0] > 0
    assert told[:, : pictures.shape[1]][~pictures].abs().max() == 0
    shown = told[:, : pictures.shape[1]][0][pictures[0]]
    assert (shown[:, None] - shown[None]).norm(dim=-1)[~torch.eye(len(shown), dtype=torch.bool)].min() > 0.1
    assert module.network.geometry is not None
    assert told[:, pictures.shape[1] :].abs().max() == 0, "geometry tokens have places of their own"


def test_parts_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"blocks=4, but the vision-language model has 3 layers"):
        small_module(blocks=4)
    with pytest.raises(ValueError, match="needs a geometry encoder"):
        type(small_module().network)(small_vlm(), None, ("right",), T, blocks=2, head_size=16)
    with pytest.raises(ValueError, match=r"model\.draws is at least 1"):
        small_module(draws=0)
    wrong = (("steps", 0), ("solver", "rk4"), ("temperature", -0.1), ("temperature", float("nan")))
    for option, bad in wrong:
        with pytest.raises(ValueError, match=rf"model\.sampling\.{option} .*{bad}"):
            ActionSampling(**{option: bad})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="10000"):
        ActionSampling(steps=20_000)


def test_the_baseline_has_no_geometry() -> None:
    network = small_module(geom_inject_to_dit=False).network
    assert network.geometry is None
    assert network.compressor is None


def test_figures_show_depth_where_there_is_any(module: GeometryVLAModule, tmp_path: Path) -> None:
    batch = small_batch()
    whole = module.figure(module(batch), batch)
    batch.depth = None
    baseline = ready_module(tmp_path, geom_inject_to_dit=False)
    alone = baseline.figure(baseline(batch), batch, sample=1)
    assert whole.dtype == np.uint8
    assert whole.shape[1] == alone.shape[1]
    assert whole.shape[0] == pytest.approx(3 * alone.shape[0], abs=3)
    assert whole.std() > 10


def test_paths_are_drawn_where_the_camera_is_calibrated() -> None:
    batch = small_batch(depth=False)
    lost = replace(batch, view_world_to_camera=batch.view_world_to_camera.clone())
    lost.view_world_to_camera[:, 1] = torch.eye(4)
    paths = batch.position.clone()

    def drawn(seen: Any, planned: Tensor) -> np.ndarray:
        return scene_figure(seen, planned, None)

    known, unknown = drawn(batch, paths), drawn(lost, paths)
    left, right = (slice(None), slice(0, known.shape[1] // 2)), (slice(None), slice(known.shape[1] // 2, None))
    above = slice(known.shape[0] // 5, known.shape[0] * 4 // 5)  # between the titles and the legend
    np.testing.assert_array_equal(known[left][above], unknown[left][above])
    moved = drawn(lost, paths + 0.03)
    assert (moved[left] != unknown[left]).any()
    np.testing.assert_array_equal(moved[right], unknown[right])


# ---------------------------------------------------------------------- plans and checkpoints


def test_plans_are_what_the_network_says(module: GeometryVLAModule) -> None:
    policy, seen = module.policy(), observation()
    policy.reset(5)
    plan = policy.plan(seen)
    pictures = np.stack([seen["cameras"][name]["image"].transpose(2, 0, 1) for name in CAMERAS])
    batch = small_batch(INSTRUCTIONS[:1])
    batch.images = torch.from_numpy(pictures)[None]
    batch.start_position = torch.tensor([[[0.3, 0.0, 0.1]]])
    batch.start_quaternion = torch.tensor([[[0.0, 1.0, 0.0, 0.0]]])
    batch.start_gripper = torch.tensor([[0.7]])
    with torch.no_grad():
        noise = torch.randn((1, T, 10), generator=torch.Generator().manual_seed(5))
        sampled = module.network.sample(module(batch), noise, module.state(batch))
        position, _, gripper = module.actions.decode(sampled, batch.start_position, batch.start_quaternion)
    low, high = module.statistics.position_range
    np.testing.assert_allclose(plan.position, position[0].clamp(low - 0.01, high + 0.01).numpy(), atol=1e-4)
    np.testing.assert_allclose(plan.gripper, gripper[0].clamp(0, 1).numpy(), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(plan.quaternion, axis=-1), 1.0, atol=1e-6)
    assert plan.step_seconds == 0.3
    again = policy.plan(seen)
    assert np.abs(again.position - plan.position).max() > 0, "another draw"
    policy.reset(5)
    np.testing.assert_array_equal(policy.plan(seen).position, plan.position)


def test_a_temperature_of_zero_draws_nothing_by_chance(module: GeometryVLAModule) -> None:
    seen = observation()
    cold = replace(module.policy(), temperature=0.0)
    first = cold.plan(seen)
    np.testing.assert_array_equal(cold.plan(seen).position, first.position)
    batch = small_batch()
    with torch.no_grad():
        scene, state, noise = module(batch), module.state(batch), torch.randn(2, T, 10)
        warm = module.network.sample(scene, noise, state, ActionSampling(temperature=0.5))
        torch.testing.assert_close(warm, module.network.sample(scene, 0.5 * noise, state))
    coarse = replace(module.policy(), temperature=0.0, steps=1)
    assert np.abs(coarse.plan(seen).position - first.position).max() > 0
    with pytest.raises(ValueError, match="temperature must not be negative"):
        replace(module.policy(), temperature=-1.0)


def test_a_solver_of_a_single_step_is_refused(module: GeometryVLAModule) -> None:
    for solver in ("heun", "adams_bashforth"):
        with pytest.raises(ValueError, match=rf"policy\.solver={solver} has no effect with a single step"):
            replace(module.policy(), steps=1, solver=solver)
        replace(module.policy(), steps=2, solver=solver)
    replace(module.policy(), steps=1, solver="euler")


def test_what_an_observation_lacks_is_named(module: GeometryVLAModule) -> None:
    policy, seen = module.policy(), observation()
    with pytest.raises(ValueError, match="lacks an instruction"):
        policy.plan({name: value for name, value in seen.items() if name != "instruction"})
    with pytest.raises(ValueError, match="lacks an instruction"):
        policy.plan(seen | {"instruction": " \n"})
    policy.plan(seen | {"instruction": "é" * 500})
    with pytest.raises(ValueError, match=r"'instruction' of the observation has 1002 bytes, more than 1000"):
        policy.plan(seen | {"instruction": "é" * 501})
    front, whose = seen["cameras"]["front"], "camera 'front' of the observation"
    for wrong, said in (
        ({**front, "image": None}, f"^{whose} lacks 'image'"),
        ({**front, "image": front["image"][..., 0]}, f"^'image' of {whose} must be .*, not {S} x {S} uint8"),
    ):
        with pytest.raises(ValueError, match=said):
            module.policy().plan({**seen, "cameras": {**seen["cameras"], "front": wrong}})
    seen["cameras"] = {"over": seen["cameras"]["over"]}
    with pytest.raises(ValueError, match="lacks camera 'front'"):
        policy.plan(seen)
    with pytest.raises(ValueError, match="has no cameras yet"):
        small_module().policy()


def test_a_checkpoint_holds_all_that_a_plan_needs(module: GeometryVLAModule, tmp_path: Path) -> None:
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    torch.save({"state_dict": module.state_dict(), **checkpoint}, tmp_path / "saved.pt")
    content = torch.load(tmp_path / "saved.pt", weights_only=True)
    other = small_module()
    other.on_load_checkpoint(content)
    other.load_state_dict(content["state_dict"], strict=True)
    np.testing.assert_array_equal(
        other.policy().plan(observation()).position, module.policy().plan(observation()).position
    )
    with pytest.raises(ValueError, match=r"no tokenizer, views, calibrated \(geometry_vla\)"):
        small_module().on_load_checkpoint({})
    with pytest.raises(ValueError, match="no tokenizer yet"):
        small_module().on_save_checkpoint({})
    with pytest.raises(ValueError, match="no action chunks or cameras"):
        small_module().set_statistics(SimpleNamespace(chunks=None, cameras=()))  # type: ignore[arg-type]


def test_a_plan_continues_the_one_under_way(module: GeometryVLAModule) -> None:
    policy, seen = module.policy(), {**observation(), "time_s": 10.0}
    policy.reset(1)
    free = policy.plan(seen)
    shifted = replace(free, position=free.position + 0.02, time_s=10.0)
    policy.reset(1)
    led = policy.plan_continuing(seen, shifted, delay_s=2 * free.step_seconds)

    off = np.abs(led.position[:, :2] - shifted.position[:, :2]).mean()
    assert off < 0.5 * 0.02  # without guidance it would be the whole shift
    policy.reset(1)
    past = policy.plan_continuing(seen, replace(shifted, time_s=-1000.0), delay_s=0.1)
    np.testing.assert_array_equal(past.position, free.position)  # no part of the old plan is left: an ordinary plan
    with pytest.raises(ValueError, match="time_s"):
        policy.plan_continuing(observation(), shifted, delay_s=0.1)
    longer = policy.plan_continuing(seen, shifted, delay_s=1e308)  # longer than any plan
    assert np.isfinite(longer.position).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_continued_has_finite_numbers(module: GeometryVLAModule, value: float) -> None:
    policy, seen = module.policy(), {**observation(), "time_s": 10.0}
    under_way = replace(policy.plan(seen), time_s=10.0)
    with pytest.raises(ValueError, match=rf"delay_s is {value}: it must be a finite number"):
        policy.plan_continuing(seen, under_way, delay_s=value)
    with pytest.raises(ValueError, match=rf"time_s of the observation is {value}: it must be a finite"):
        policy.plan_continuing({**seen, "time_s": value}, under_way, delay_s=0.1)
    for name in ("time_s", "position"):
        wrong = value if name == "time_s" else np.full_like(under_way.position, value)
        with pytest.raises(ValueError, match=f"the plan under way is not finite in its {name}"):
            policy.plan_continuing(seen, replace(under_way, **{name: wrong}), delay_s=0.1)


def test_a_plan_that_is_not_finite_is_not_given(module: GeometryVLAModule) -> None:
    policy = module.policy()
    with torch.no_grad():
        next(module.network.head.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="the policy's plan is not finite in its position"):
        policy.plan(observation())


def test_a_step_that_is_begun_before_the_plan_arrives_is_fixed(
    module: GeometryVLAModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, seen = module.policy(), {**observation(), "time_s": 10.0}
    under_way = replace(policy.plan(seen), time_s=10.0)
    fixed: list[int] = []

    def noted(steps: int, count: int, *rest: Any) -> Tensor:
        fixed.append(count)
        return soft_mask(steps, count, *rest)

    monkeypatch.setattr("keygrip.models.geometry_vla.policy.soft_mask", noted)
    for share in (0.0, 0.5, 1.0, 1.5):
        policy.plan_continuing(seen, under_way, share * under_way.step_seconds)
    assert fixed == [0, 1, 1, 2]
