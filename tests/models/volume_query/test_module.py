"""The training module: its loss against an explicit loss, its lower bounds, its images, and the policy built from
it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import lightning
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_ranks import logged_by, on_two_ranks
from policy_batches import observation_of, trained_in_pieces, validated_in_pieces
from torch.utils.data import DataLoader

from keygrip.data.batches import MultiViewPolicyBatch, PolicyBatch
from keygrip.data.robot.augmentation import ImageGeometry
from keygrip.data.robot.statistics import DemoStatistics
from keygrip.models.backbone import DinoBackbone
from keygrip.models.dark_images import image_shows_nothing
from keygrip.models.geometry.cameras import project
from keygrip.models.geometry.rotation_codecs import PCARotation
from keygrip.models.geometry.rotations import rotation_exp
from keygrip.models.language.instructions import WordTransformer
from keygrip.models.policy import Observation
from keygrip.models.volume_query.decoding import Decoder, DecoderName
from keygrip.models.volume_query.figures import prediction_figure
from keygrip.models.volume_query.module import VolumeQueryModule
from keygrip.models.volume_query.network import VolumeQueryNetwork
from keygrip.models.volume_query.policy import SENTENCES_KEPT, VolumeQueryPolicy
from keygrip.models.volume_query.targets import height_centres
from keygrip.models.volume_query.volume import VolumeLogits, argmax_voxel, volume_cross_entropy
from keygrip.models.volume_query.world import WorldScores
from keygrip.setting_types import hints_of, type_problem
from keygrip.training.figures import figure_to_image
from keygrip.training.optimizers import AdamW
from keygrip.training.task_metrics import MeansByTask

S, P, Z, T = 64, 16, 8, 3


def build(arms: tuple[str, ...] = ("right",), tmp: Path | None = None, **options: Any) -> VolumeQueryModule:
    torch.manual_seed(0)
    backbone = DinoBackbone(variant="tiny", image_size=S, weights="random", width=32, depth=1, heads=2)
    network_options = options.pop("network", {})
    network = VolumeQueryNetwork(
        backbone, S, 6, arms=arms, horizon=T, pred_size=P, height_bins=Z, gripper_bins=4, **network_options
    )
    module = VolumeQueryModule(
        network, PCARotation(classes=6), AdamW(lr=1e-3, schedule="constant"), Decoder(), **options
    )
    if tmp is not None:
        module.set_statistics(statistics(arms, tmp))
    return module


def statistics(arms: tuple[str, ...], folder: Path, **changes: Any) -> DemoStatistics:
    turns = rotation_exp(torch.linspace(-0.6, 0.6, 40)[:, None] * torch.tensor([0.0, 0.0, 1.0])).numpy()
    values: dict[str, Any] = {
        "height_range": (0.0, 0.2),
        "position_range": ((-0.3, -0.3, 0.0), (0.3, 0.3, 0.2)),
        "quaternions": dict.fromkeys(arms, turns),
        "arms": arms,
        "targets": "reached",
        "horizon": T,
        "step_seconds": 0.3,
        "geometry": ImageGeometry(S, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        "demos": 1,
        "frames": 40,
        "fingerprint": "test",
        "cache_dir": folder,
    }
    return DemoStatistics(**{**values, **changes})


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> float:
    return float(F.cross_entropy(logits.detach(), target))


def batch(size: int = 2, arms: int = 1, seed: int = 0) -> PolicyBatch:
    """Random poses over a table viewed from straight above, 1 m away: all are inside the image."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    position = (rand(size, arms, T, 3) - 0.5) * torch.tensor([0.4, 0.4, 0.2]) + torch.tensor([0.0, 0.0, 0.1])
    start = (rand(size, arms, 3) - 0.5) * torch.tensor([0.4, 0.4, 0.2]) + torch.tensor([0.0, 0.0, 0.1])
    turn = (rand(size, arms, T, 1) - 0.5) * torch.tensor([0.0, 0.0, 1.0])
    camera = torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 1], [0, 0, 0, 1]])
    k = torch.tensor([[80.0, 0, 32], [0, 80.0, 32], [0, 0, 1]])
    return PolicyBatch(
        image=torch.randn(size, 3, S, S, generator=generator),
        intrinsics=k.expand(size, 3, 3),
        world_to_camera=camera.expand(size, 4, 4),
        start_position=start,
        start_quaternion=rotation_exp(torch.zeros(size, arms, 3)),
        start_gripper=torch.ones(size, arms),
        position=position,
        quaternion=rotation_exp(turn),
        gripper=rand(size, arms, T),
        action_is_pad=torch.zeros(size, arms, T, dtype=torch.bool),
        keyframe=position[:, :, -1],
        demo_index=torch.zeros(size, dtype=torch.long),
        frame_index=torch.arange(size),
        instruction=["go"] * size,
    )


@pytest.mark.parametrize("arms", [("right",), ("left", "right")])
def test_loss_is_the_mean_over_valid_steps_of_the_dense_loss(tmp_path: Path, arms: tuple[str, ...]) -> None:
    module = build(arms, tmp_path)
    data = batch(arms=len(arms))
    data.position[0, 0, 1] = torch.tensor([5.0, 0.0, 0.1])  # far outside the image: must not count
    data.position[1, 0, 2, 2] = 1.5  # behind the camera
    targets = module.targets(data)
    assert targets.valid.sum() == targets.valid.numel() - 2
    output = module(data, targets, teacher=True)
    losses = module.losses(output, data, targets)
    volume, gripper, rotation, count = 0.0, 0.0, 0.0, 0
    dense = output.volume.dense().detach()
    for b, a, t in targets.valid.nonzero().tolist():
        x, y, depth = 80 * data.position[b, a, t, 0], -80 * data.position[b, a, t, 1], 1 - data.position[b, a, t, 2]
        column, row = int((x / depth + 32) * P / S), int((y / depth + 32) * P / S)
        z = int(data.position[b, a, t, 2] / 0.2 * Z)
        volume += cross_entropy(dense[b, a, t].flatten()[None], torch.tensor([(z * P + row) * P + column]))
        gripper += cross_entropy(output.gripper[b, a, t][None], (data.gripper[b, a, t] * 4).long()[None])
        code = module.codec(arms[a]).encode(data.quaternion[b, a, t])
        rotation += cross_entropy(output.rotation[b, a, t][None], code[None])
        count += 1
    assert float(losses["volume"]) == pytest.approx(volume / count, rel=1e-5)
    assert float(losses["gripper"]) == pytest.approx(gripper / count, rel=1e-5)
    assert float(losses["rotation"]) == pytest.approx(rotation / count, rel=1e-5)
    expected = (volume + 0.5 * gripper + 0.5 * rotation) / count
    assert float(losses["total"]) == pytest.approx(expected, rel=1e-5)


def test_floors_are_what_perfect_predictions_would_score(tmp_path: Path) -> None:
    module = build(("right",), tmp_path)
    data = batch(size=4)
    targets = module.targets(data)
    perfect = module(data, targets, teacher=True)
    perfect.volume.pixel.data.zero_()
    perfect.volume.height.data.zero_()
    for b, a, t in targets.valid.nonzero().tolist():
        row, column = targets.cells[b, a, t]
        perfect.volume.pixel.data[b, a, t, row, column] = 50
        perfect.volume.height.data[b, a, t, targets.heights[b, a, t]] = 50
    perfect.rotation.data.copy_(F.one_hot(module.codec("right").encode(data.quaternion), 6) * 50.0)
    metrics = module.metrics(perfect, data, targets)
    for name in ("pix", "height_m", "position_cm", "rotation_deg"):
        error = metrics["pix_argmax" if name == "pix" else name]
        assert float(error) == pytest.approx(float(metrics[f"{name}_floor"]), abs=1e-6), name
    assert 0 < float(metrics["pix_floor"]) <= S / P / 2 * 2**0.5
    assert float(metrics["rotation_acc"]) == 1.0


def test_a_small_module_learns_a_batch_by_heart(tmp_path: Path) -> None:
    module = build(
        ("right",),
        tmp_path,
        target="bilinear",
        network={"state": ["height", "gripper", "rotation"], "step_features": True},
    )
    data = batch(size=4)
    optimizer = torch.optim.Adam(module.network.parameters(), lr=3e-3)
    first = last = 0.0
    for step in range(60):
        targets = module.targets(data)
        loss = module.losses(module(data, targets, teacher=True), data, targets)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (float(loss.detach()), last) if step == 0 else (first, float(loss.detach()))
    assert last < 0.6 * first


def test_accumulated_batches_have_the_gradient_of_one_large_batch(tmp_path: Path) -> None:
    """Steps outside the image and past a demo's end have no loss; the batches have 1, 3, 3 and 2 steps with loss."""
    module, data = build(("right",), tmp_path, log_images_every_n_steps=0, mask_padded_steps=True), batch(4)
    data.action_is_pad[0, 0, 1:] = True
    data.position[3, 0, 1] = torch.tensor([5.0, 0.0, 0.1])
    whole, (all_together,) = trained_in_pieces(module, data, [slice(4)])
    parts, logged = trained_in_pieces(module, data, [slice(at, at + 1) for at in range(4)])
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-5)
    mean = sum(each["total"] * count for each, count in zip(logged, (1, 3, 3, 2), strict=True)) / 9
    assert mean == pytest.approx(all_together["total"], rel=1e-5)


def test_two_processes_log_the_losses_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process has a single step that counts, the other six."""
    whole = batch(size=4)
    whole.action_is_pad[:2] = True
    whole.action_is_pad[0, 0, 0] = False
    modules = [build(("right",), tmp_path, log_images_every_n_steps=0) for _ in range(3)]
    for module in modules:
        module.trainer = SimpleNamespace(accumulate_grad_batches=1)  # type: ignore[assignment]

    def step(module: VolumeQueryModule, part: slice) -> dict[str, float]:
        logged = logged_by(module)
        tensors = {name: value[part] for name, value in vars(whole).items() if isinstance(value, torch.Tensor)}
        module.training_step(replace(whole, instruction=whole.instruction[part], **tensors), 0)
        return {f"train/{name}": logged[f"train/{name}"] for name in ("loss", "volume", "gripper", "rotation")}

    alone = step(modules[2], slice(4))
    halves = on_two_ranks(monkeypatch, lambda rank: step(modules[rank], slice(2 * rank, 2 * rank + 2)))
    assert halves == [pytest.approx(alone, rel=1e-4)] * 2


def test_figures_show_the_prediction_and_can_be_switched_off(tmp_path: Path) -> None:
    module = build(("right",), tmp_path, log_images_every_n_steps=0)
    data = batch()
    targets = module.targets(data)
    output = module(data, targets, teacher=True).detach()
    module.log = lambda *a, **k: None  # type: ignore[method-assign]
    module.trainer = SimpleNamespace(accumulate_grad_batches=1)  # type: ignore[assignment]
    assert torch.isfinite(module.training_step(data, 0))  # 0 must neither draw nor divide
    arguments = (
        output.volume, output.gripper, output.rotation, targets, module.codec("right").encode(data.quaternion[:, 0]),
        height_centres(torch.tensor([0.0, 0.2]), Z),
    )  # fmt: skip
    picture = figure_to_image(prediction_figure(torch.rand(3, S, S), *arguments, sample=0, arm=0))
    other = figure_to_image(prediction_figure(torch.rand(3, S, S), *arguments, sample=1, arm=0))
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    assert picture.dtype == np.uint8
    assert (picture != other).any()
    with pytest.raises(ValueError, match="log_images_every_n_steps"):
        build(log_images_every_n_steps=-1)


@pytest.mark.filterwarnings("ignore")
def test_a_image_is_drawn_once_per_due_step(tmp_path: Path) -> None:
    """Not once per batch whose gradients are accumulated for it."""
    module, drawn = build(("right",), tmp_path, log_images_every_n_steps=2), []
    module._show = lambda split, *_: drawn.append((split, module.global_step))  # type: ignore[method-assign]
    trainer = lightning.Trainer(
        max_epochs=1, accumulate_grad_batches=3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([batch()] * 9, batch_size=None))  # type: ignore[arg-type]
    assert trainer.global_step == 3
    assert drawn == [("train", 0), ("train", 2)]


def test_policy_sees_what_validation_sees_and_plans_in_metres(tmp_path: Path) -> None:
    module = build(("right",), tmp_path, network={"state": ["height", "gripper", "rotation"]}).eval()
    data = batch(size=1)
    picture = np.random.default_rng(0).integers(0, 256, (S, S, 3), dtype=np.uint8)
    image, k = module.statistics.geometry.apply(picture, data.intrinsics[0].numpy())
    data.image = image[None]
    torch.testing.assert_close(k, data.intrinsics[0])
    policy = module.policy()
    seen = observation_of(data, picture)
    plan = policy.plan(seen)
    for wrong, said in (
        ({"intrinsics": np.eye(3) * np.nan}, "'intrinsics' of the observation holds numbers that are not finite"),
        ({"world_to_camera": np.eye(3)}, "'world_to_camera' of the observation must be 4 x 4, not 3 x 3"),
        ({"world_to_camera": np.ones((4, 4))}, "'world_to_camera' of the observation is no rigid transform"),
        ({"position": [[320.0, -40.0, 150.0]]}, "'position' of the observation lies farther than 100 m"),
    ):
        with pytest.raises(ValueError, match=said):
            policy.plan(seen | wrong)
    named = {key: value for key, value in seen.items() if key != "image"} | {"cameras": {"over": seen, "front": seen}}
    with pytest.raises(ValueError, match=r"lacks 'image', .*; it has the cameras over, front, and this policy reads"):
        policy.plan(named)
    with torch.no_grad():
        output = module(data, module.targets(data), teacher=False)
        decoded = module.decoder.decode(
            output, [module.codec("right")], intrinsics=data.intrinsics, world_to_camera=data.world_to_camera,
            height_range=module.statistics.height_range, image_size=S,
        )  # fmt: skip
    low, high = np.array([-0.3, -0.3, 0.0]) - 0.01, np.array([0.3, 0.3, 0.2]) + 0.01
    position = decoded.position[0].numpy()
    boxed = VolumeQueryPolicy(module, margin_m=0.01).plan(seen)
    np.testing.assert_allclose(boxed.position, np.clip(position, low, high), atol=1e-5)
    np.testing.assert_allclose(plan.position[..., :2], position[..., :2], atol=1e-5)
    np.testing.assert_allclose(plan.position[..., 2], np.clip(position[..., 2], -0.01, 0.21), atol=1e-5)
    np.testing.assert_allclose(plan.quaternion, decoded.quaternion[0].numpy(), atol=1e-5)
    assert plan.step_seconds == 0.3
    assert plan.gripper.shape == (1, T)


def test_a_plan_says_how_far_it_was_held_back_and_the_log_once_an_episode(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, data = build(("right",), tmp_path).eval(), batch(size=1)
    seen = observation_of(data, np.random.default_rng(0).integers(0, 256, (S, S, 3), dtype=np.uint8))
    free = VolumeQueryPolicy(module, margin_m=None).plan(seen)
    np.testing.assert_array_equal(free.held_back, np.zeros((1, 3)))
    assert type_problem(None, hints_of(VolumeQueryPolicy)["margin_m"]) is None, "policy.margin_m=null is taken"
    assert not caplog.messages
    low, high = free.position[0].min(axis=0), free.position[0].max(axis=0)
    box = np.stack([low - 1, high + 1])
    box[:, 1] = high[1] - 0.15, high[1] - 0.12  # the farthest step is 12 cm outside, 11 cm beyond the margin
    module.statistics.position_range.copy_(torch.as_tensor(box))
    policy = VolumeQueryPolicy(module, margin_m=0.01)
    for _ in range(2):
        plan = policy.plan(seen)
        moved = np.abs(plan.position - free.position)[0].max(axis=0)
        np.testing.assert_allclose(plan.held_back, moved[None], atol=1e-5)
        assert plan.held_back[0, 1] == pytest.approx(max(0.11, high[1] - low[1] - 0.16), abs=1e-5)
    (message,) = caplog.messages
    assert "cm along y (arm right): it leads farther than policy.margin_m=0.01 out of the box" in message
    assert f"{100 * moved[1]:.1f} cm" in message
    policy.reset(1)
    policy.plan_batch([seen, seen], [policy, policy.session()])
    assert len(caplog.messages) == 3, "each session is an episode of its own"
    VolumeQueryPolicy(module, margin_m=(None, 0.01, 0.02)).plan(seen)
    assert "policy.margin_m=[null,0.01,0.02] out" in caplog.messages[-1]
    usual = module.policy().plan(seen)
    np.testing.assert_array_equal(usual.held_back, np.zeros((1, 3)), "along x and y nothing is held back")
    module.statistics.position_range.copy_(torch.as_tensor(np.stack([low + (0, 0, 0.05), high + (0, 0, 0.05)])))
    sunk = module.policy().plan(seen)
    np.testing.assert_allclose(sunk.held_back, [[0, 0, 0.04]], atol=1e-5)
    assert sunk.position[..., 2].min() == pytest.approx(low[2] + 0.04, abs=1e-5)
    for wrong in (-0.01, np.nan, np.inf, (0.1, 0.1), (0.1, 0.1, -0.1)):
        with pytest.raises(ValueError, match=r"policy\.margin_m="):
            VolumeQueryPolicy(module, margin_m=wrong)


@pytest.mark.parametrize("sky", [False, True], ids=["table", "horizon"])
@pytest.mark.parametrize("decoder", get_args(DecoderName))
def test_turn_and_opening_are_read_where_the_plan_goes(
    decoder: DecoderName, sky: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = build(("right",), tmp_path, network={"step_features": True}).eval(), batch(size=1)
    pixel, height = torch.zeros(1, T, P, P), torch.zeros(1, T, Z)
    pixel[..., 10, 4], pixel[:, 1, 12, 12] = 10.0, 10.1  # one path; the best voxel of its middle step is elsewhere
    height[..., 3] = 9.0
    if sky:
        pixel[..., 1, 8] = 12.0  # no point: the camera points 5 degrees below the horizon
        turn = torch.deg2rad(torch.tensor(5.0))
        pose = torch.eye(4)
        pose[1, 1:3] = torch.stack([-turn.sin(), -turn.cos()])
        pose[2, 1:3] = torch.stack([turn.cos(), -turn.sin()])
        pose[:3, 3] = -pose[:3, :3] @ torch.tensor([0.0, -1.0, 0.5])
        data.world_to_camera = pose[None]
    with torch.no_grad():
        module.network.refiner.refine[-1].weight.mul_(30)  # initially, features of different places are much the same
    volume = VolumeLogits(pixel, height, torch.zeros(1, T))
    monkeypatch.setattr(module.network.streams["right"], "volume", lambda *_: volume)
    calls: list[Any] = []
    module.network.register_forward_hook(lambda _, given, found: calls.append((given, found)))
    picture = np.random.default_rng(0).integers(0, 256, (S, S, 3), dtype=np.uint8)
    plan = VolumeQueryPolicy(module, decoder, margin_m=100.0).plan(observation_of(data, picture))
    (image, start, *_), planned = calls[0]
    cameras = data.intrinsics[:, None, None], data.world_to_camera[:, None, None]
    went, _ = project(torch.as_tensor(plan.position, dtype=torch.float32)[None], *cameras)
    with torch.no_grad():
        told, best = (module.network(image, start, step_pixels=pixels) for pixels in (went, None))
        for name in ("rotation", "gripper"):
            torch.testing.assert_close(getattr(planned, name), getattr(told, name), atol=1e-3, rtol=1e-3)
        if decoder == "viterbi" or sky:
            assert float((best.rotation - told.rotation).abs().max()) > 1e-2
        elif decoder == "soft_argmax":
            assert torch.equal(best.rotation, planned.rotation), "no camera without a horizon changes anything"
        module.decoder = Decoder(decoder)  # and the same in validation
        targets, settings = module.targets(data), module._decoding(data)
        output = module(data, targets, teacher=False)
        pixels = module.decoder.decode(output, [module.codec("right")], **settings).pixels
        told = module.network(data.image, targets.start_pixels, step_pixels=pixels)
        torch.testing.assert_close(output.rotation, told.rotation, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    module = build()
    with pytest.raises(ValueError, match="no statistics"):
        module.targets(batch())
    with pytest.raises(ValueError, match=r"data\.horizon"):
        module.set_statistics(statistics(("right",), tmp_path, horizon=5))
    with pytest.raises(ValueError, match=r"data\.arms"):
        module.set_statistics(statistics(("left",), tmp_path))
    with pytest.raises(ValueError, match="range of heights"):
        module.set_statistics(statistics(("right",), tmp_path, height_range=(0.1, 0.1)))
    with pytest.raises(ValueError, match=r"rotation\.classes"):
        VolumeQueryModule(module.network, PCARotation(classes=7), AdamW(lr=1e-3), Decoder())


@pytest.mark.parametrize("weights", [{"volume_weight": -1.0}, {"rotation_weight": np.inf}, {"volume_weight": 0.0}])
def test_weights_with_which_nothing_is_learned_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"model\.{next(iter(weights))}.*(0 \(it is left out\) or more|all 0)"):
        build(**{"gripper_weight": 0.0, "rotation_weight": 0.0} | weights)
    build(gripper_weight=0.0)


def test_open_and_closed_are_told_apart_by_the_bin(tmp_path: Path) -> None:
    """The exact bin also has the right half; a neighbouring bin on the same side is wrong in the bin alone."""
    module, data = build(("right",), tmp_path), batch(size=1)
    targets = module.targets(data)
    output = module(data, targets, teacher=True)
    bins = module.network.gripper_bins
    beside = (targets.gripper + torch.where(targets.gripper % (bins // 2) == 0, 1, -1)).clamp(0, bins - 1)
    for chosen, exact, right in ((targets.gripper, 1, 1), (beside, 0, 1), (bins - 1 - targets.gripper, 0, 0)):
        output.gripper.data.copy_(F.one_hot(chosen, bins).float())
        errors = module.step_errors(output, data, targets)
        assert float(errors["gripper_acc"].mean()) == exact
        assert float(errors["gripper_open_acc"].mean()) == right


def test_padded_steps_carry_no_loss_where_they_are_masked(tmp_path: Path) -> None:
    data = batch()
    data.action_is_pad[:, :, 1:] = True
    trained, masked = build(("right",), tmp_path), build(("right",), tmp_path, mask_padded_steps=True)
    for name, value in trained.network.state_dict().items():
        assert torch.equal(value, masked.network.state_dict()[name])
    found = {}
    for which, module in (("trained", trained), ("masked", masked)):
        targets = module.targets(data)
        assert bool(targets.inside.all())
        output = module(data, targets, teacher=True)
        found[which] = module.losses(output, data, targets)["volume"]
        steps = volume_cross_entropy(output.volume, targets.volume("hard", P, Z))
        expected = steps[:, :, :1].mean() if which == "masked" else steps.mean()
        torch.testing.assert_close(found[which], expected)
    assert float(found["trained"]) != float(found["masked"])


def language() -> dict[str, Any]:
    torch.manual_seed(1)
    return {"instruction": WordTransformer(width=16, layers=1, heads=2, rows=64, length=8)}


@pytest.mark.parametrize(("sentence", "said"), [(" ", "an instruction is empty"), ("very " * 8, "8")])
def test_sentences_that_cannot_be_read_are_refused_before_training(sentence: str, said: str) -> None:
    encoder = WordTransformer(width=16, layers=1, heads=2, rows=64, length=8)
    with pytest.raises(ValueError, match=said):
        encoder.prepare(["open the drawer", sentence])


@pytest.mark.parametrize("sentence", ["", "grip the cube beside the bar"])
def test_held_out_sentences_that_cannot_be_read_are_refused_before_training(sentence: str, tmp_path: Path) -> None:
    module = build(("right",), network=language(), rotation_symmetry={"cube": 4, "bar": 2})
    known = ("grip the bar", "grip the cube")
    data = replace(statistics(("right",), tmp_path), instructions=known, all_instructions=known)
    module.set_statistics(data)
    with pytest.raises(ValueError, match=r"is empty|names both"):
        module.set_statistics(replace(data, all_instructions=(*known, sentence)))


def test_a_resumed_run_keeps_the_part_of_the_image_that_it_was_trained_on(tmp_path: Path) -> None:
    """With `data.fit=auto`, demonstrations that were added could lead to another choice."""
    module = build(("right",), tmp_path)
    stored = module.statistics.state_dict()
    stored["_image_stretch"], stored["_image_field"] = torch.tensor(True), torch.tensor(1.0, dtype=torch.float64)
    checkpoint = {"state_dict": {f"statistics.{name}": value for name, value in stored.items()}}
    chosen = replace(module.statistics.geometry, fit="crop", field=0.8)
    for fits, expected in ((True, ("stretch", 1.0)), (False, ("crop", 0.8))):
        data = SimpleNamespace(fit_to_workspace=fits, geometry=chosen)
        module.resume_data(data, checkpoint)
        assert (data.geometry.fit, data.geometry.field, data.fit_to_workspace) == (*expected, False)


def test_a_validation_is_the_mean_over_all_elements(tmp_path: Path) -> None:
    """The mean does not depend on the batches, one of which has no valid step."""
    module, data = build(("right",), tmp_path, mask_padded_steps=True, log_images_every_n_steps=0), batch(size=4)
    data.action_is_pad[0, :, 1:] = True
    data.action_is_pad[3] = True
    whole, parts = (
        validated_in_pieces(module, data, pieces) for pieces in ([slice(4)], [slice(1), slice(1, 3), slice(3, 4)])
    )
    assert parts == pytest.approx(whole, rel=1e-4)
    assert whole["val/position_cm_decoded"] > 0


def test_an_instruction_is_added_to_a_network_that_is_the_same_without_it(tmp_path: Path) -> None:
    plain, told = build(("left", "right"), tmp_path), build(("left", "right"), tmp_path, network=language())
    weights = told.network.state_dict()
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, weights[name]), name
    data = batch(arms=2)
    targets = told.targets(data)
    data.instruction = ["open the drawer", "close it"]
    one = told(data, targets, teacher=True).volume.height
    data.instruction = ["close it", "close it"]
    other = told(data, targets, teacher=True).volume.height
    assert not torch.equal(one[0], other[0])
    torch.testing.assert_close(one[1], other[1])
    with pytest.raises(ValueError, match="give its tokens"):
        told.network(data.image, targets.start_pixels)
    with pytest.raises(ValueError, match="reads no instruction"):
        plain.network(data.image, targets.start_pixels, instruction=torch.ones(2, 8, 2, dtype=torch.long))


@pytest.mark.parametrize("told", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_only_language_separates_tasks_that_look_the_same(told: bool, tmp_path: Path) -> None:
    module = build(("right",), tmp_path, network=(language() if told else {}) | {"logit_scale": "learned"})
    data = batch(size=4)
    data.image[1::2], data.start_position[1::2] = data.image[::2], data.start_position[::2]  # same scene, other goal
    data.instruction = ["put the red cube away", "put the blue cube away"] * 2
    optimizer = torch.optim.Adam(module.network.parameters(), lr=3e-3)
    for _ in range(40):
        targets = module.targets(data)
        loss = module.losses(module(data, targets, teacher=True), data, targets)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = module.metrics(module(data, targets, teacher=False), data, targets)["pix_argmax"]
    assert float(error) < 3 if told else float(error) > 5  # pixels of 64; half a cell is 2


def test_a_policy_that_reads_language_asks_for_it_and_names_unknown_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = build(("right",), network=language()).eval()
    report = module.set_statistics(statistics(("right",), tmp_path, instructions=("open the drawer", "close it")))
    assert report["instructions"] == 2
    again = build(("right",), network=language()).eval()
    again.load_state_dict(module.state_dict())  # the content of a checkpoint
    policy = again.policy()
    assert policy.needs.instruction
    observation = {
        "image": np.zeros((S, S, 3), np.uint8),
        "intrinsics": np.array([[80.0, 0, 32], [0, 80, 32], [0, 0, 1]]),
        "world_to_camera": np.array([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 1], [0, 0, 0, 1]]),
        "position": np.array([0.0, 0.0, 0.1]),
        "quaternion": np.array([1.0, 0, 0, 0]),
        "gripper": np.array(1.0),
    }
    for missing in ({}, {"instruction": " "}):
        with pytest.raises(ValueError, match="lacks an instruction"):
            policy.plan(observation | missing)
    policy.plan(observation | {"instruction": "Open the drawer"})
    assert not caplog.records
    policy.plan(observation | {"instruction": "open the fridge"})
    assert "fridge" in caplog.text
    for number in range(2 * SENTENCES_KEPT):
        policy._tokens([{"instruction": f"open {number}"}])
    assert len(policy._read) <= SENTENCES_KEPT  # however many clients send


def test_validation_keeps_means_of_every_instruction() -> None:
    means = MeansByTask(("a b", "a-b", "never seen"))
    values = torch.tensor([[1.0, 3.0], [5.0, torch.nan], [7.0, 7.0]])
    valid = torch.tensor([[True, True], [True, True], [True, False]])
    means.add(["a b", "a-b", "unheard of"], {"cm": values}, valid)
    means.add(["a b", "a b", "a-b"], {"cm": values}, valid)
    assert means.means() == {"a_b/cm": pytest.approx((4 + 4 + 5) / 5), "a_b_1/cm": pytest.approx((5 + 7) / 2)}
    means.clear()
    assert means.means() == {}
    one = MeansByTask(("only one",))
    one.add(["only one"], {"cm": values[:1]}, valid[:1])
    assert one.means() == {}


def several(data: PolicyBatch, views: int) -> MultiViewPolicyBatch:
    common = {name: getattr(data, name) for name in (
        "start_position", "start_quaternion", "start_gripper", "position", "quaternion", "gripper", "action_is_pad",
        "keyframe", "demo_index", "frame_index", "instruction",
    )}  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    poses = data.world_to_camera[:, None].repeat(1, views, 1, 1)
    poses[:, 1:, 0, 3] += 0.1
    return MultiViewPolicyBatch(
        images=torch.randint(0, 256, (len(data), views, 3, 64, 64), generator=generator, dtype=torch.uint8),
        view_intrinsics=data.intrinsics[:, None].repeat(1, views, 1, 1),
        view_world_to_camera=poses,
        depth=None,
        cameras=("over", "front")[:views],
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        **common,
    )


def test_a_module_of_several_views(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, world = build(("right",)), build(("right",), network={"world_views": True, "step_features": False})
    known = statistics(("right",), tmp_path, cameras=("over", "front"))
    plain.set_statistics(known)
    assert "uses only over" in caplog.text
    world.set_statistics(known)
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, world.network.state_dict()[name])
    one = several(batch(), 1)
    targets = plain.targets(one)
    expected, same = (module(one, targets, teacher=True) for module in (plain, world))
    assert torch.equal(expected.volume.pixel, same.volume.pixel)  # one view: bit-identical
    assert same.volume.voxel is None

    two = several(batch(), 2)
    output = world(two, targets, teacher=True)
    assert isinstance(output.volume.voxel, WorldScores)
    losses = world.losses(output, two, targets)
    losses["total"].backward()
    assert all(torch.isfinite(p.grad).all() for p in world.network.parameters() if p.grad is not None)
    assert torch.isfinite(world.decoded_errors(output, two, targets)["position_cm_decoded"][targets.valid]).all()
    for decoder in ("argmax", "viterbi", "sample"):
        decoded = Decoder(name=decoder).decode(  # type: ignore[arg-type]
            output, [world.codec("right")], intrinsics=two.intrinsics, world_to_camera=two.world_to_camera,
            height_range=world.statistics.height_range, image_size=64,
        )  # fmt: skip
        assert torch.isfinite(decoded.position).all()
    with torch.no_grad():  # a black second camera changes nothing; with a black first one, the second still counts
        two.images[:, 1] = 0
        black = world(two, targets, teacher=True).volume
        assert torch.equal(argmax_voxel(black)[0], argmax_voxel(plain(two, targets, teacher=True).volume)[0])
        first_black = several(batch(), 2)
        first_black.images[:, 0] = 7
        alone = world(first_black, targets, teacher=True).volume
        assert float(alone.pixel.abs().max()) == 0
        assert isinstance(alone.voxel, WorldScores)
        assert float(alone.voxel.slice(0).abs().max()) > 0
        two.images[:, 1] = torch.tensor([0, 135, 0], dtype=torch.uint8)[
            :, None, None
        ]  # a decoder's green, or tinted grey
        green = world(two, targets, teacher=True).volume
        assert isinstance(green.voxel, WorldScores)
        assert float(green.voxel.slice(0).abs().max()) == 0

        noise = torch.randint(0, 3, two.images[:, 1].shape, dtype=torch.uint8)
        two.images[:, 1] = noise  # a covered lens: the server accepts it, since the view is left out
        covered = world(two, targets, teacher=True).volume
        assert isinstance(covered.voxel, WorldScores)
        assert float(covered.voxel.slice(0).abs().max()) == 0
        two.images[:, 1] = noise * 5
        faint = world(two, targets, teacher=True).volume
        assert isinstance(faint.voxel, WorldScores)
        assert float(faint.voxel.slice(0).abs().max()) > 0

    checkpoint: dict[str, object] = {}
    assert world.masks_views
    assert not plain.masks_views
    world.on_save_checkpoint(checkpoint)
    again: VolumeQueryModule = build(("right",), network={"world_views": True})
    again.load_state_dict(world.state_dict())
    again.on_load_checkpoint(checkpoint)
    policy = again.policy()
    assert policy.needs.cameras == ("over", "front")
    full = several(batch(), 2)
    view = [
        {
            "image": full.images[0, v].permute(1, 2, 0).numpy(),
            "intrinsics": full.view_intrinsics[0, v].numpy(),
            "world_to_camera": full.view_world_to_camera[0, v].numpy(),
        }
        for v in range(2)
    ]
    arm = {"position": full.start_position[0, 0], "quaternion": full.start_quaternion[0, 0], "gripper": torch.ones(())}
    observation: Observation = {name: value.numpy() for name, value in arm.items()} | {
        "cameras": {"over": view[0], "front": view[1]}
    }
    with torch.no_grad():
        again.eval()
        output = again(full, again.targets(full), teacher=False)
        decoded = again.decoder.decode(
            output, [again.codec("right")], intrinsics=full.intrinsics, world_to_camera=full.world_to_camera,
            height_range=again.statistics.height_range, image_size=64,
        )  # fmt: skip
    low, high = np.array([-0.3, -0.3, 0.0]) - 0.01, np.array([0.3, 0.3, 0.2]) + 0.01
    planned = policy.plan(observation).position
    np.testing.assert_allclose(planned[0], np.clip(decoded.position[0, 0].numpy(), low, high), atol=1e-4)
    upright = [each | {"image": each["image"][::-1].copy()} for each in view]  # the other images are flipped views
    flipped = [each | {"image": each["image"][::-1]} for each in upright]
    again_planned = policy.plan(observation | {"cameras": {"over": flipped[0], "front": flipped[1]}}).position
    np.testing.assert_array_equal(again_planned, planned)
    black = {**view[1], "image": np.zeros_like(view[1]["image"])}
    blind = policy.plan(observation | {"cameras": {"over": view[0], "front": None}}).position
    np.testing.assert_array_equal(
        blind, policy.plan(observation | {"cameras": {"over": view[0], "front": black}}).position
    )
    assert np.abs(blind - planned).max() > 1e-6
    covered_lens = {**view[1], "image": np.random.default_rng(0).integers(0, 3, (64, 64, 3), dtype=np.uint8)}
    np.testing.assert_array_equal(
        blind, policy.plan(observation | {"cameras": {"over": view[0], "front": covered_lens}}).position
    )
    # a hundredth of the whole image is bright and a larger share of the crop: the server's image decides
    again.statistics._image_field.fill_(0.5)
    corner = np.zeros((64, 64, 3), dtype=np.uint8)
    corner[30:36, 30:36] = 200
    assert image_shows_nothing(corner)
    assert not image_shows_nothing(corner[16:48, 16:48])
    with_corner, without = (
        again.policy().plan(observation | {"cameras": {"over": view[0], "front": other}}).position
        for other in ({**view[1], "image": corner}, None)
    )
    np.testing.assert_array_equal(with_corner, without)
    with pytest.raises(ValueError, match="camera 'over' is None: the volume is that of the first"):
        policy.plan(observation | {"cameras": {"over": None, "front": view[1]}})
    with pytest.raises(ValueError, match="lacks camera 'front'"):
        policy.plan(observation | {"cameras": {"over": view[0]}})


def test_a_masked_view_trains_as_a_batch_without_it(tmp_path: Path) -> None:
    """Whatever the image of a masked view, loss and gradient are those of the batch without that view."""
    world = build(("right",), network={"world_views": True, "step_features": True, "state": ["height"]})
    world.set_statistics(statistics(("right",), tmp_path, cameras=("over", "front", "side")))

    def trained(data: MultiViewPolicyBatch, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss summed over the steps of the first ``count`` samples, and its gradient."""
        targets = world.targets(data)
        assert bool(targets.valid.all())
        loss = world.losses(world(data, targets, teacher=True), data, targets)["total"] * count
        world.zero_grad()
        loss.backward()
        named = world.network.named_parameters()
        return loss.detach(), {name: weight.grad.clone() for name, weight in named if weight.grad is not None}

    def only(data: MultiViewPolicyBatch, rows: slice, views: list[int]) -> MultiViewPolicyBatch:
        parts = ("images", "view_intrinsics", "view_world_to_camera")
        kept = replace(data.map(lambda part: part[rows]), instruction=data.instruction[rows], view_mask=None)
        return replace(kept, **{name: getattr(kept, name)[:, views] for name in parts})

    def assert_same(one: Any, other: Any) -> None:
        torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-5)
        assert one[1].keys() == other[1].keys()
        for name, gradient in one[1].items():
            torch.testing.assert_close(gradient, other[1][name], rtol=1e-3, atol=2e-5, msg=name)

    data = several(batch(size=4), 3)
    data.view_world_to_camera[:, 2, 0, 3] += 0.1
    everything = trained(data, 4)
    data.view_mask = torch.tensor([[True, False, True]] * 4)
    masked = trained(data, 4)
    assert float((masked[0] - everything[0]).abs()) > 1e-3
    assert_same(masked, trained(only(data, slice(4), [0, 2]), 4))
    # a different mask per sample: the sum over the samples, each without its masked views
    data.view_mask = torch.tensor([[True, False, True], [True, True, False], [True, False, False], [True, True, True]])
    parts = [
        trained(only(data, slice(row, row + 1), [view for view in range(3) if data.view_mask[row, view]]), 1)
        for row in range(4)
    ]
    summed = {name: sum((part[1][name] for part in parts), torch.zeros(())) for name in parts[0][1]}
    assert_same(trained(data, 4), (sum((part[0] for part in parts), torch.zeros(())), summed))


def test_steps_that_the_network_sees_above_the_horizon_are_counted(tmp_path: Path) -> None:
    module, data = build(("right",), tmp_path), batch()
    level = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0.3], [0, 1, 0, 1.0], [0, 0, 0, 1]])  # points along +y, 30 cm up
    data = replace(data, world_to_camera=level.expand(2, 4, 4))
    targets = module.targets(data)
    assert targets.valid.any()
    output = module(data, targets, teacher=False)
    output.volume.pixel[0, ..., 2, 8] += 100  # above the horizon, in the middle column
    output.volume.pixel[1, ..., 14, 8] += 100  # below it
    assert float(module.metrics(output, data, targets)["no_point_share"]) == pytest.approx(
        float(targets.valid[0].sum() / targets.valid.sum())
    )
    decoded = module.decoded_errors(output, data, targets)  # the best of the voxels that are points
    assert all(torch.isfinite(value[targets.valid]).all() for value in decoded.values())


def test_a_start_with_arms_or_cameras_in_another_order_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = ("left", "right")

    def world(cameras: tuple[str, ...], of: tuple[str, ...] = arms, start: str | None = None) -> VolumeQueryModule:
        module = build(of, network={"world_views": True}, init_from=start)
        module.set_statistics(statistics(of, tmp_path, cameras=cameras))
        return module

    before = world(("over", "front"))
    monkeypatch.setattr("keygrip.training.system.load_module", lambda path, **options: before)
    world(("over", "front"), start="run")
    with pytest.raises(ValueError, match=r"run has the arms left, right, this run right, left.*data\.arms=\[left,ri"):
        world(("over", "front"), ("right", "left"), "run")
    with pytest.raises(ValueError, match=r"cameras over, front, this run front, over.*Set data\.cameras=\[over,front"):
        world(("front", "over"), start="run")
