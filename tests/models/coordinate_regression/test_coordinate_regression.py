"""The regression baseline: decoding inverts normalisation, its loss, and its outputs depend on the image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract_parts import observation, wrong_observations
from lightning.pytorch import LightningDataModule, Trainer
from policy_batches import observation_of, trained_in_pieces, validated_in_pieces
from torch.utils.data import DataLoader

from keygrip.data.batches import PolicyBatch
from keygrip.data.robot.augmentation import ImageGeometry
from keygrip.data.robot.statistics import DemoStatistics
from keygrip.models.backbone import DinoBackbone
from keygrip.models.coordinate_regression.module import CoordinateRegressionModule
from keygrip.models.coordinate_regression.network import CoordinateRegressionNetwork
from keygrip.models.geometry.rotations import columns_to_quaternion, geodesic_angle, quaternion_to_columns, rotation_exp
from keygrip.training.optimizers import AdamW

S, T = 32, 2


@pytest.fixture
def statistics(tmp_path: Path) -> DemoStatistics:
    return DemoStatistics(
        height_range=(0.0, 0.2),
        position_range=((0.1, -0.3, 0.0), (0.5, 0.3, 0.2)),
        quaternions={"right": np.array([[1.0, 0, 0, 0]])},
        arms=("right",),
        targets="reached",
        horizon=T,
        step_seconds=0.3,
        geometry=ImageGeometry(S, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        demos=1,
        frames=1,
        fingerprint="test",
        cache_dir=tmp_path,
    )


@pytest.fixture
def module(statistics: DemoStatistics) -> CoordinateRegressionModule:
    torch.manual_seed(0)
    backbone = DinoBackbone(variant="tiny", image_size=S, weights="random", width=32, depth=1, heads=2)
    network = CoordinateRegressionNetwork(backbone, S, horizon=T, width=64)
    built = CoordinateRegressionModule(network, AdamW(lr=1e-3, schedule="constant"))
    built.set_statistics(statistics)
    return built


def batch() -> PolicyBatch:
    torch.manual_seed(1)
    low, high = torch.tensor([0.1, -0.3, 0.0]), torch.tensor([0.5, 0.3, 0.2])
    return PolicyBatch(
        image=torch.randn(2, 3, S, S),
        intrinsics=torch.tensor([[40.0, 0, 16], [0, 40.0, 16], [0, 0, 1]]).expand(2, 3, 3),
        world_to_camera=torch.tensor([[1.0, 0, 0, -0.3], [0, -1, 0, 0], [0, 0, -1, 1], [0, 0, 0, 1]]).expand(2, 4, 4),
        start_position=torch.rand(2, 1, 3) * (high - low) + low,
        start_quaternion=rotation_exp(torch.randn(2, 1, 3)),
        start_gripper=torch.rand(2, 1),
        position=torch.rand(2, 1, T, 3) * (high - low) + low,
        quaternion=rotation_exp(torch.randn(2, 1, T, 3)),
        gripper=torch.rand(2, 1, T),
        action_is_pad=torch.zeros(2, 1, T, dtype=torch.bool),
        keyframe=torch.rand(2, 1, 3),
        demo_index=torch.zeros(2, dtype=torch.long),
        frame_index=torch.zeros(2, dtype=torch.long),
        instruction=["go", "go"],
    )


def test_positions_and_rotations_come_back(module: CoordinateRegressionModule) -> None:
    position = torch.tensor([[0.1, 0.3, 0.1], [0.5, -0.3, 0.2]])
    torch.testing.assert_close(module.normalise(position), torch.tensor([[-1.0, 1, 0], [1, -1, 1]]))
    torch.testing.assert_close(module.denormalise(module.normalise(position)), position)
    quaternion = rotation_exp(torch.randn(50, 3))
    columns = quaternion_to_columns(quaternion)
    assert geodesic_angle(columns_to_quaternion(columns * 3.0), quaternion).max() < 1e-3


def test_loss_is_written_out(module: CoordinateRegressionModule) -> None:
    data = batch()
    output = module(data)
    losses = module.losses(output, data)
    position = (output.position - module.normalise(data.position)).abs().mean()
    rotation = (output.rotation - quaternion_to_columns(data.quaternion)).abs().mean()
    gripper = F.binary_cross_entropy_with_logits(output.gripper, data.gripper)
    torch.testing.assert_close(losses["total"], position + 0.5 * rotation + 0.5 * gripper)


def test_steps_past_a_demos_end_carry_no_loss_where_they_are_masked(module: CoordinateRegressionModule) -> None:
    data = batch()
    data.action_is_pad[0, 0, 1:] = True
    whole, module.mask_padded_steps = module.losses(module(data), data), True
    masked = module.losses(module(data), data)
    counted = ~data.action_is_pad
    expected = F.binary_cross_entropy_with_logits(module(data).gripper[counted], data.gripper[counted])
    torch.testing.assert_close(masked["gripper"], expected)
    assert not torch.isclose(masked["total"], whole["total"])
    data.position[0, 0, 1:] += 1.0
    torch.testing.assert_close(module.losses(module(data), data), masked)


def test_a_second_camera_is_not_ignored_without_a_word(
    module: CoordinateRegressionModule, statistics: DemoStatistics, caplog: pytest.LogCaptureFixture
) -> None:
    module.set_statistics(statistics)
    assert "cameras" not in caplog.text
    module.set_statistics(replace(statistics, cameras=("over", "front")))
    assert "the data hold 2 cameras, and this policy uses only over" in caplog.text


@pytest.mark.parametrize("weights", [(-1.0, 0.5, 0.5), (1.0, 0.5, float("nan")), (0.0, 0.0, 0.0)])
def test_weights_with_which_nothing_is_learned_are_refused(
    module: CoordinateRegressionModule, weights: tuple[float, float, float]
) -> None:
    with pytest.raises(ValueError, match=r"model\.(position|gripper)_weight.*(0 \(it is left out\) or more|all 0)"):
        CoordinateRegressionModule(module.network, AdamW(lr=1e-3), *weights)
    CoordinateRegressionModule(module.network, AdamW(lr=1e-3), 0.0, 0.0, 1.0)


def test_metrics_are_zero_for_the_truth(module: CoordinateRegressionModule) -> None:
    data = batch()
    output = module(data)
    output.position.data.copy_(module.normalise(data.position))
    output.rotation.data.copy_(quaternion_to_columns(data.quaternion))
    output.gripper.data.copy_((data.gripper > 0.5) * 20.0 - 10.0)
    metrics = module.metrics(output, data)
    assert float(metrics["position_cm"]) < 1e-4
    assert float(metrics["rotation_deg"]) < 0.1
    assert float(metrics["pix_argmax"]) < 1e-3
    assert float(metrics["gripper_open_acc"]) == 1.0
    output.gripper.data[0, 0, 0] *= -1
    wrong = 1 / output.gripper.numel()
    assert float(module.metrics(output, data)["gripper_open_acc"]) == pytest.approx(1 - wrong)


def test_a_validation_is_the_mean_over_all_elements(module: CoordinateRegressionModule) -> None:
    """The mean does not depend on the batches; in one no target is visible, and one is past the end of its demo."""
    two, module.mask_padded_steps = batch(), True
    twice = {name: torch.cat([value, value]) for name, value in vars(two).items() if isinstance(value, torch.Tensor)}
    data = replace(two, instruction=2 * two.instruction, **twice)
    data.position[1, :, 1] += 10.0  # outside the image
    data.position[3] += 10.0
    data.action_is_pad[2] = True
    whole, parts = (
        validated_in_pieces(module, data, pieces) for pieces in ([slice(4)], [slice(2), slice(2, 3), slice(3, 4)])
    )
    assert parts == pytest.approx(whole, rel=1e-4)
    assert whole["val/pix_argmax"] > 0


def test_errors_are_those_of_the_steps_with_loss(module: CoordinateRegressionModule) -> None:
    """As the volume query's, whose figures have the same names."""
    data = batch()
    data.action_is_pad[0, 0, 1:] = True
    whole = {"pix_argmax", "height_m", "position_cm", "rotation_deg", "gripper_open_acc"}
    counted, output = ~data.action_is_pad, module(data)
    alone = replace(data, action_is_pad=torch.zeros_like(data.action_is_pad))
    errors = {"position_cm": (module.denormalise(output.position) - data.position).norm(dim=-1) * 100}
    errors["gripper_open_acc"] = ((output.gripper > 0) == (data.gripper > 0.5)).float()
    metrics = module.metrics(output, data)
    assert metrics.keys() == whole
    torch.testing.assert_close(metrics, module.metrics(output, alone))
    torch.testing.assert_close(metrics["position_cm"], errors["position_cm"].mean())
    module.mask_padded_steps = True
    metrics = module.metrics(output, data)
    for name, error in errors.items():
        torch.testing.assert_close(metrics[name], error[counted].mean())
    data.position[0, 0, 1:] += 0.05
    data.quaternion[0, 0, 1:] = data.quaternion[1, 0, :1]
    data.gripper[0, 0, 1:] = 1 - data.gripper[0, 0, 1:]
    torch.testing.assert_close(module.metrics(output, data), metrics)


def test_accumulated_batches_have_the_gradient_of_one_large_batch(module: CoordinateRegressionModule) -> None:
    """Also if no step of the first of them counts; the logged values stay the means of the batches."""
    two, module.mask_padded_steps = batch(), True
    twice = {name: torch.cat([value, value]) for name, value in vars(two).items() if isinstance(value, torch.Tensor)}
    data = replace(two, instruction=2 * two.instruction, **twice)
    data.image = torch.randn(data.image.shape)
    data.action_is_pad[0] = True
    data.action_is_pad[2, :, 1:] = True
    pieces = [slice(at, at + 1) for at in range(4)]
    whole, _ = trained_in_pieces(module, data, [slice(4)])
    parts, logged = trained_in_pieces(module, data, pieces)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-5)
    counts = (~data.action_is_pad).sum(dim=(1, 2)).tolist()
    assert counts == [0, 2, 1, 2]
    mean = sum(each["total"] * count for each, count in zip(logged, counts, strict=True)) / 5
    assert mean == pytest.approx(float(module.losses(module(data), data)["total"].detach()), rel=1e-5)


class OneBatch(LightningDataModule):
    """The batch as data of a camera that is calibrated or not."""

    def __init__(self, calibrated: bool) -> None:
        super().__init__()
        self.camera_is_calibrated = calibrated

    def train_dataloader(self) -> DataLoader:
        return DataLoader([batch()], batch_size=None)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


def test_without_calibration_there_is_no_error_in_pixels(module: CoordinateRegressionModule) -> None:
    """Regression: it was computed with placeholders, which are in place of the matrices of such a camera."""
    for calibrated in (False, True):
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(accelerator="cpu", enable_model_summary=False, max_steps=1, **options)
        trainer.fit(module, datamodule=OneBatch(calibrated))
        metrics = {name for name in trainer.callback_metrics if not name.startswith("lr-")}
        assert ("train/pix_argmax" in metrics, "val/pix_argmax" in metrics) == (calibrated, calibrated)
        assert {"train/position_cm", "val/position_cm", "val/loss"} <= metrics
        (evaluated,) = trainer.validate(module, datamodule=OneBatch(not calibrated), verbose=False)
        assert ("val/pix_argmax" in evaluated) != calibrated, "the data that are read decide"


def test_image_and_state_both_reach_the_output(module: CoordinateRegressionModule) -> None:
    data = batch()
    plain = module(data).position.detach()
    data.image = data.image + 1.0
    assert (module(data).position - plain).abs().max() > 1e-5
    data.image = data.image - 1.0
    data.start_position = data.start_position + 0.05
    assert (module(data).position - plain).abs().max() > 1e-5


def test_policy_plans_what_the_network_says(module: CoordinateRegressionModule) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (S, S, 3), dtype=np.uint8)
    data = batch()
    observation = observation_of(data, picture)
    plan = module.policy().plan(observation)
    image, _ = module.statistics.geometry.apply(picture, data.intrinsics[0].numpy())
    data.image = image[None].expand(2, -1, -1, -1)
    with torch.no_grad():
        expected = module.denormalise(module(data).position)[0].numpy()
    np.testing.assert_allclose(plan.position, expected, atol=1e-5)
    assert plan.gripper.min() >= 0
    assert plan.gripper.max() <= 1
    assert plan.step_seconds == 0.3


def test_a_pose_that_cannot_be_right_is_refused(module: CoordinateRegressionModule) -> None:
    policy = module.policy()
    seen = observation(policy)
    assert np.isfinite(policy.plan(seen).position).all()
    policy.plan(seen | {name: np.asarray(seen[name])[0].tolist() for name in ("position", "quaternion", "gripper")})
    for wrong, said in wrong_observations(seen):
        with pytest.raises(ValueError, match=said):
            policy.plan(wrong)


def test_wrong_sizes_are_named(module: CoordinateRegressionModule) -> None:
    with pytest.raises(ValueError, match="built for 32 x 32 images, got 48 x 48"):
        module.network(torch.randn(1, 3, 48, 48), torch.zeros(1, 1, 10))
