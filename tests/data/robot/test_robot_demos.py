"""The data module: which demos, which targets, which statistics, and a sample order that survives an interruption."""

from __future__ import annotations

import json
import logging
import multiprocessing
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer

from keygrip.config import config_folder
from keygrip.data.batches import PolicyBatch
from keygrip.data.robot import set_checks
from keygrip.data.robot.augmentation import Augmentation
from keygrip.data.robot.datamodule import RobotDemos
from keygrip.data.robot.recordings import Recording
from keygrip.data.robot.samples import keyframe_of, moving_frames, targets_of
from keygrip.data.robot.schema import ArmTrajectory
from keygrip.data.robot.set_checks import GRIP_BELOW, off_screen_shares, refuse_short
from keygrip.data.robot.split import split_demos
from keygrip.data.shards.sampling import SampleKey
from keygrip.models.policy_statistics import PolicyStatistics

Make = Callable[..., RobotDemos]


@pytest.fixture(autouse=True)
def log_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="keygrip")


def ready(module: RobotDemos) -> RobotDemos:
    module.setup("fit")
    return module


# ------------------------------------------------------------------------------------------------------------ batches


def test_a_batch_has_the_promised_shapes_and_types(native_root: Path, robot_demos: Make) -> None:
    batch = next(iter(ready(robot_demos(native_root)).train_dataloader()))
    shapes = {
        "image": (8, 3, 32, 32),
        "intrinsics": (8, 3, 3),
        "world_to_camera": (8, 4, 4),
        "start_position": (8, 1, 3),
        "start_quaternion": (8, 1, 4),
        "start_gripper": (8, 1),
        "position": (8, 1, 3, 3),
        "quaternion": (8, 1, 3, 4),
        "gripper": (8, 1, 3),
        "action_is_pad": (8, 1, 3),
        "demo_index": (8,),
        "frame_index": (8,),
    }
    types_ = {"action_is_pad": torch.bool, "demo_index": torch.int64, "frame_index": torch.int64}
    for name, shape in shapes.items():
        assert getattr(batch, name).shape == shape, name
        assert getattr(batch, name).dtype == types_.get(name, torch.float32), name
    assert len(batch) == len(batch.instruction) == 8
    for index, sentence in zip(batch.demo_index.tolist(), batch.instruction, strict=True):
        assert sentence == f"pick up the cube number {index}"


def test_moving_a_batch_keeps_whole_numbers_and_sentences(native_root: Path, robot_demos: Make) -> None:
    batch = next(iter(ready(robot_demos(native_root)).train_dataloader()))
    moved = batch.to("meta")
    assert moved.image.device.type == "meta"
    assert moved.instruction == batch.instruction
    half = batch.to(dtype=torch.bfloat16)
    assert (half.image.dtype, half.demo_index.dtype, half.action_is_pad.dtype) == (
        torch.bfloat16,
        torch.int64,
        torch.bool,
    )


def test_reached_targets_and_repeats_past_the_end(native_root: Path, robot_demos: Make) -> None:
    module = ready(robot_demos(native_root, targets="reached"))
    samples = module.train_samples
    for index in range(len(samples)):
        sample = samples[SampleKey(index, 0)]
        demo = module.demos[int(sample.demo_index)]
        frame = int(sample.frame_index)
        for step, ahead in enumerate((2, 4, 6)):
            future = min(frame + ahead, 11)
            np.testing.assert_allclose(sample.position[0, step], demo.arms["right"].position[future], atol=1e-6)
            np.testing.assert_allclose(sample.quaternion[0, step], demo.arms["right"].quaternion[future], atol=1e-6)
            assert bool(sample.action_is_pad[0, step]) == (frame + ahead > 11)
        np.testing.assert_allclose(sample.start_position[0], demo.arms["right"].position[frame], atol=1e-6)


def test_commanded_targets_are_the_command_given_one_frame_before(native_root: Path, robot_demos: Make) -> None:
    module = ready(robot_demos(native_root, targets="commanded"))
    for index in range(0, len(module.train_samples), 5):
        sample = module.train_samples[SampleKey(index, 0)]
        frame, level = int(sample.frame_index), module.demos[int(sample.demo_index)].arms["right"].position[0, 2]
        for step, ahead in enumerate((2, 4, 6)):
            # the command of frame i is at 5 mm x (i + 1), 1 mm above the path
            expected = 0.005 * min(frame + ahead, 12)
            assert float(sample.position[0, step, 0]) == pytest.approx(expected, abs=1e-6)
            assert float(sample.position[0, step, 2]) == pytest.approx(level + 0.001, abs=1e-6)
            assert bool(sample.action_is_pad[0, step]) == (frame + ahead > 11)


def test_targets_of_many_frames_equal_those_of_each(native_root: Path, robot_demos: Make) -> None:
    arm = ready(robot_demos(native_root)).demos[0].arms["right"]
    steps = np.array([1, 3, 8])
    for targets in ("commanded", "reached"):
        together = targets_of(arm, np.arange(12), steps, targets)
        for frame in range(12):
            for ours, theirs in zip(targets_of(arm, frame, steps, targets), together, strict=True):
                np.testing.assert_array_equal(ours, theirs[frame])


def test_keyframes_are_where_the_gripper_is_to_close_or_open_and_the_end() -> None:
    def trajectory(gripper: list[float], height: float = 0.0) -> ArmTrajectory:
        position = np.stack([np.arange(10.0), np.zeros(10), np.full(10, height)], axis=-1)
        return ArmTrajectory(position, np.tile([1.0, 0, 0, 0], (10, 1)), np.array(gripper))

    reached = trajectory([1, 1, 1, 0.9, 0.4, 0.2, 0.2, 0.6, 1, 1])  # is closed in frame 4, open again in frame 7
    expected = [4, 4, 4, 4, 7, 7, 7, 9, 9, 9]
    assert [int(keyframe_of(reached, frame, "reached")) for frame in range(10)] == expected
    assert keyframe_of(reached, np.arange(10), "reached").tolist() == expected
    # Commanded to close in frame 2, which is reached in frame 3, and to open in frame 5.
    commanded = trajectory([1, 1, 0, 0, 0, 1, 1, 1, 1, 1], height=0.5)
    arm = replace(reached, commanded=commanded)
    assert keyframe_of(arm, np.arange(10), "commanded").tolist() == [3, 3, 3, 6, 6, 6, 9, 9, 9, 9]


def test_samples_know_the_position_at_their_keyframe(tmp_path: Path, native_demo: Any, robot_demos: Make) -> None:
    native_demo(tmp_path / "root" / "0")
    module = ready(robot_demos(tmp_path / "root", targets="commanded", val_fraction=0.0))
    arm = module.demos[0].arms["right"]
    assert arm.commanded is not None
    together = module.statistics.chunks
    assert together is not None
    for frame in range(len(arm)):
        sample = module.train_samples[frame]
        goal = int(keyframe_of(arm, frame, "commanded"))
        np.testing.assert_allclose(sample.keyframe[0], arm.commanded.position[goal - 1], atol=1e-6)
        torch.testing.assert_close(together.keyframe[frame], sample.keyframe)


def test_commands_that_were_not_recorded_are_an_error_that_names_the_way_out(
    native_root: Path, robot_demos: Make, native_demo: Any
) -> None:
    shutil.rmtree(native_root / "demo_03")
    native_demo(native_root / "demo_03", commanded=False)
    with pytest.raises(ValueError, match=r"1 of 10 demos hold no commanded poses \(first: demo_03\).*targets=reached"):
        robot_demos(native_root, targets="commanded").setup("fit")
    ready(robot_demos(native_root, targets="reached"))


def test_openings_may_be_commanded_where_poses_are_reached(
    native_root: Path, robot_demos: Make, native_demo: Any, change_archive: Any
) -> None:
    for folder in native_root.iterdir():
        change_archive(folder / "trajectory.npz", right__commanded_gripper_opening=np.repeat([1.0, 0.0, 1.0], 4))
    module = ready(robot_demos(native_root, targets="reached", gripper_targets="commanded"))
    samples, chunks = module.train_samples, module.statistics.chunks
    assert chunks is not None
    for index in range(len(samples)):
        sample = samples[SampleKey(index, 0)]
        arm, frame = module.demos[int(sample.demo_index)].arms["right"], int(sample.frame_index)
        for step, ahead in enumerate((2, 4, 6)):
            np.testing.assert_allclose(sample.position[0, step], arm.position[min(frame + ahead, 11)], atol=1e-6)
            assert float(sample.gripper[0, step]) == float(not 4 <= min(frame + ahead - 1, 11) < 8)
        # Commanded to close in frame 4 and open in frame 8: keyframes are one later, when the arm has got there.
        keyframe = next(each for each in (5, 9, 11) if each > frame or each == 11)
        np.testing.assert_allclose(sample.keyframe[0], arm.position[keyframe], atol=1e-6)
        torch.testing.assert_close(chunks.gripper[index], sample.gripper)
    shutil.rmtree(native_root / "demo_03")
    native_demo(native_root / "demo_03", commanded=False)
    with pytest.raises(ValueError, match=r"data\.gripper_targets=commanded, but 1 of 10 .*gripper_targets=reached"):
        robot_demos(native_root, targets="reached", gripper_targets="commanded").setup("fit")


def test_openings_that_a_model_does_not_read_are_refused(tmp_path: Path, robot_demos: Make) -> None:
    chosen = robot_demos(tmp_path, gripper_targets="commanded")
    chosen.configure_for(types.SimpleNamespace(extra_targets=("joints",)))
    with pytest.raises(ValueError, match=r"data\.gripper_targets=commanded: .*model\.actions\.kind=osc"):
        chosen.configure_for(types.SimpleNamespace(extra_targets=("controller",)))


@pytest.mark.parametrize(
    ("opening", "commanded", "warned"),
    [
        pytest.param([1.0, 0.57, 1.0], [1.0, 0.0, 1.0], "reached", id="something is held"),
        pytest.param([1.0, 0.3, 1.0], [1.0, 0.0, 1.0], "", id="something thin"),
        pytest.param([1.0, 0.9, 1.0], [1.0, 0.9, 1.0], "", id="nothing is gripped"),
        pytest.param([1.0, 0.57, 1.0], [1.0, 0.5, 1.0], "commanded", id="commands that stop there too"),
    ],
)
def test_openings_that_never_shut_a_gripper_are_said(
    opening: list[float],
    commanded: list[float],
    warned: str,
    native_root: Path,
    robot_demos: Make,
    change_archive: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A plan of such openings does not move the gripper: a robot's gripper command changes below 0.4 and above 0.6."""
    execution = yaml.safe_load((config_folder() / "execution" / "options.yaml").read_text(encoding="utf-8"))
    assert execution["asynchronous"]["grip_below"] == GRIP_BELOW
    both = {"right__gripper_opening": opening, "right__commanded_gripper_opening": commanded}
    change_archive(
        native_root / "demo_03" / "trajectory.npz", **{name: np.repeat(each, 4) for name, each in both.items()}
    )
    ready(robot_demos(native_root, targets="reached"))
    reached = "1 of 10 demos close a gripper, and their reached openings stay above 0.4 (execution.grip_below)"
    assert (reached in caplog.text) == bool(warned)
    assert ("set data.gripper_targets=commanded" in caplog.text) == ("demo_03 (0.57)" in caplog.text) == bool(warned)
    caplog.clear()
    ready(robot_demos(native_root, targets="reached", gripper_targets="commanded"))
    assert ("their commanded openings stay above 0.4" in caplog.text) == (warned == "commanded")
    caplog.clear()
    for folder in native_root.glob("demo_*"):
        change_archive(folder / "trajectory.npz", right__controller_action=np.zeros((12, 7)))
    inputs = robot_demos(native_root, targets="reached", frame_stride=1)  # of a controller, the gripper's included
    inputs.configure_for(types.SimpleNamespace(extra_targets=("controller",)))
    ready(inputs)
    assert "close a gripper" not in caplog.text


def test_two_arms_keep_their_order(tmp_path: Path, native_demo: Any, robot_demos: Make) -> None:
    for number in range(4):
        native_demo(tmp_path / "root" / str(number), arms=("left", "right"), seed=number)
    for arms, sides in ((["left", "right"], [0.0, 0.02]), (["right", "left"], [0.02, 0.0])):
        module = ready(robot_demos(tmp_path / "root", arms=arms))
        batch = next(iter(module.train_dataloader()))
        assert batch.position.shape == (8, 2, 3, 3)
        np.testing.assert_allclose(batch.position[0, :, 0, 1], sides, atol=1e-7)
        assert list(module.statistics.quaternions) == arms


def test_validation_images_are_those_of_the_checkpoints_geometry(native_root: Path, robot_demos: Make) -> None:
    module = ready(robot_demos(native_root, augmentation=Augmentation()))
    geometry = module.statistics.geometry
    batch = next(iter(module.val_dataloader()))
    for row in range(len(batch)):
        demo, frame = module.demos[int(batch.demo_index[row])], int(batch.frame_index[row])
        track = demo.cameras["over"]
        image, intrinsics = geometry.apply(track.frames.read(frame), track.intrinsics[frame])
        assert torch.equal(image, batch.image[row])
        assert torch.equal(intrinsics, batch.intrinsics[row])


def test_a_camera_that_moves_has_its_pose_of_the_frame(
    tmp_path: Path, native_demo: Any, change_archive: Any, robot_demos: Make
) -> None:
    for number in range(2):
        folder = native_demo(tmp_path / "root" / str(number), seed=number)
        poses = np.repeat(np.diag([1.0, -1.0, -1.0, 1.0])[None], 12, axis=0)
        poses[:, 2, 3] = 1 + 0.1 * np.arange(12)
        change_archive(folder / "cameras.npz", over__world_to_camera=poses)
    batch = next(iter(ready(robot_demos(tmp_path / "root", augmentation=Augmentation())).train_dataloader()))
    np.testing.assert_allclose(batch.world_to_camera[:, 2, 3], 1 + 0.1 * batch.frame_index.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("workers", "cache_gb"),
    [
        (0, 0.0),
        (0, 1.0),
        (2, 1e-4),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in ((0, 1e-4), (2, 0.0), (2, 1.0))),
    ],
)
def test_cache_and_workers_change_no_batch(native_root: Path, robot_demos: Make, cache_gb: float, workers: int) -> None:
    def batches(**changes: Any) -> list[PolicyBatch]:
        loader = ready(
            robot_demos(native_root, augmentation=Augmentation(rotate_degrees=5), **changes)
        ).train_dataloader()
        return [batch for epoch in range(2) for batch in epoch_of(loader, epoch)]

    reference = batches()
    ours = batches(cache_gb=cache_gb, num_workers=workers)
    assert len(ours) == len(reference) > 10
    for one, other in zip(ours, reference, strict=True):
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.world_to_camera, other.world_to_camera)
        assert torch.equal(one.frame_index, other.frame_index)


def epoch_of(loader: Any, epoch: int) -> list[PolicyBatch]:
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


def test_augmentation_differs_between_epochs_and_seeds(native_root: Path, robot_demos: Make) -> None:
    def picture(seed: int, epoch: int) -> torch.Tensor:
        samples = ready(robot_demos(native_root, augmentation=Augmentation(), seed=seed)).train_samples
        return samples[SampleKey(3, epoch)].image

    assert torch.equal(picture(0, 0), picture(0, 0))
    assert not torch.equal(picture(0, 0), picture(0, 1))
    assert not torch.equal(picture(0, 0), picture(1, 0))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cameras", [None, ["over"]])
def test_a_frame_that_breaks_is_replaced_by_its_neighbour_and_named(
    native_root: Path, robot_demos: Make, workers: int, cameras: list[str] | None
) -> None:
    module = ready(robot_demos(native_root, num_workers=workers, cameras=cameras))
    whole = module.train_samples
    broken = module.train_demos[2]
    at = next(n for n in range(len(whole)) if whole.sample_demo[n] == 2 and whole.sample_frame[n] == 5)
    neighbour = whole[SampleKey(at - 1, 0)]
    for frame in (5, 6):
        (native_root / broken.name / "rgb" / "over" / f"{frame:06d}.jpg").write_bytes(b"no image")
    batches = epoch_of(module.train_dataloader(), 0)
    assert sum(map(len, batches)) == len(whole) // 8 * 8
    order = module.train_dataloader().batch_sampler.order(0).tolist()
    stands_in = {
        field: torch.cat([getattr(batch, field) for batch in batches])[order.index(at)]
        for field in ("frame_index", "demo_index", "position", "image" if cameras is None else "images")
    }
    for field, value in stands_in.items():
        assert torch.equal(value, getattr(neighbour, field)), field
    assert stands_in["frame_index"] == 4
    assert sorted(reason.partition(":")[0] for reason in module.skipped.reasons) == [f"demo {broken.name!r}"] * 2
    assert all("of camera 'over' cannot be read" in reason for reason in module.skipped.reasons)
    assert module.skipped.count <= 3  # the replacement of frame 6 tries frame 5 first
    settings = {"num_workers": workers, "cameras": cameras, "max_broken_share": 0.001, "verify": False}
    module = ready(robot_demos(native_root, **settings))
    module.skipped.checked_after = 8
    with pytest.raises(ValueError, match=r"more than data.max_broken_share=0.001 allows; the first: demo"):
        for _ in range(2):
            epoch_of(module.train_dataloader(), 0)


def test_a_demo_whose_frames_all_broke_ends_the_run_in_one_line(native_root: Path, robot_demos: Make) -> None:
    module = ready(robot_demos(native_root))
    for folder in native_root.glob("demo_*"):
        for path in (folder / "rgb" / "over").iterdir():
            path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^\d+ samples in a row cannot be read; the first: demo '[^\n]*$"):
        epoch_of(module.train_dataloader(), 0)


# ------------------------------------------------------------------------------------------------- which demos are used


def test_the_split_is_by_name_and_stable_under_added_demos() -> None:
    names = [f"demo_{number}" for number in range(200)]
    train, val = split_demos(names, 0.2, 0)
    assert sorted(train + val) == list(range(200))
    assert 20 <= len(val) <= 60
    more = [*names, *(f"later_{number}" for number in range(50))]
    _, val_of_more = split_demos(more, 0.2, 0)
    assert {names[i] for i in val} == {more[i] for i in val_of_more if i < 200}
    assert split_demos(names, 0.2, 1)[1] != val
    assert split_demos(names, 0.0, 0)[1] == []
    few = [names[index] for index in train[:3]]  # one is held out, although the larger set trains on it
    assert len(split_demos(few, 0.2, 0)[1]) == 1
    assert split_demos([*few, names[val[0]]], 0.2, 0) == ([0, 1, 2], [3])
    for count in (2, 3):  # both sides get at least one demo, however small the set
        assert all(split_demos(names[:count], fraction, 0)[side] for fraction in (0.01, 0.99) for side in (0, 1))


def test_a_single_demo_is_trained_on_whatever_its_name(
    native_demo: Callable[..., Path], tmp_path: Path, robot_demos: Make
) -> None:
    for name in ("demo_002", "demo_000003", "episode_001", "000002", "seed_1", "demo_000000"):
        assert split_demos([name], 0.1, 0) == ([0], [])
        assert split_demos([name], 0.99, 0) == ([], [0])  # how a policy is evaluated on a single one
    root = native_demo(tmp_path / "demos" / "demo_002").parent
    data = ready(robot_demos(root, val_fraction=0.1))
    assert data.statistics.frames == len(data.train_samples) == 12
    assert data.val_dataloader() == []
    assert (len(data.val_samples), data.val_samples.dropped) == (0, 0)
    with pytest.raises(
        ValueError, match=r"val_fraction=0\.99 holds out the only demonstration, demo_002: set data\.val_fraction=0 to"
    ):
        robot_demos(root, val_fraction=0.99).setup("fit")
    evaluated = robot_demos(root, val_fraction=0.99)
    evaluated.setup("validate")
    assert len(evaluated.val_samples) == 12


def test_no_demo_is_on_both_sides(native_root: Path, robot_demos: Make) -> None:
    module = ready(robot_demos(native_root))
    trained = {int(i) for batch in module.train_dataloader() for i in batch.demo_index}
    validated = {int(i) for batch in module.val_dataloader() for i in batch.demo_index}
    assert trained == set(module.train_indices)
    assert validated == set(module.val_indices)
    assert not trained & validated
    assert trained | validated == set(range(10))
    without = ready(robot_demos(native_root, val_fraction=0.0))
    assert without.val_dataloader() == []


def test_statistics_are_those_of_the_training_split(native_root: Path, robot_demos: Make) -> None:
    for targets, above in (("reached", 0.0), ("commanded", 0.001)):
        module = ready(robot_demos(native_root, targets=targets))
        levels = [demo.arms["right"].position[0, 2] for demo in module.train_demos]
        low, high = module.statistics.height_range
        # the range covers reached poses and targets, so its lowest value is a reached one
        assert (low, high) == (pytest.approx(min(levels)), pytest.approx(max(levels) + above))
        assert module.statistics.frames == 12 * len(module.train_indices)
        assert module.statistics.quaternions["right"].shape == (12 * len(module.train_indices), 4)
        assert module.statistics.step_seconds == pytest.approx(0.2)
        (x_low, _, z_low), (x_high, _, z_high) = module.statistics.position_range
        assert (z_low, z_high) == (low, high)
        assert (x_low, x_high) == (0.0, pytest.approx(0.055 + (0.005 if targets == "commanded" else 0)))


def test_statistics_ignore_validation_demos(native_root: Path, robot_demos: Make, change_archive: Any) -> None:
    before = ready(robot_demos(native_root)).statistics
    data = ready(robot_demos(native_root))
    held_out = data.demos[data.val_indices[0]]
    moved = held_out.arms["right"].position + [0, 0, 0.5]
    change_archive(held_out.path / "trajectory.npz", right__position_m=moved)
    after = ready(robot_demos(native_root)).statistics
    assert (after.height_range, after.fingerprint) == (before.height_range, before.fingerprint)
    trained = ready(robot_demos(native_root)).train_demos[0]
    change_archive(trained.path / "trajectory.npz", right__position_m=trained.arms["right"].position + [0, 0, 0.5])
    changed = ready(robot_demos(native_root)).statistics
    assert changed.height_range[1] > before.height_range[1] + 0.3
    assert changed.fingerprint != before.fingerprint


def test_broken_demos_are_named_counted_and_left_out(
    native_root: Path, robot_demos: Make, caplog: pytest.LogCaptureFixture
) -> None:
    (native_root / "demo_04" / "metadata.json").unlink()
    module = ready(robot_demos(native_root))
    assert [demo.name for demo in module.demos] == [f"demo_{n:02d}" for n in range(10) if n != 4]
    assert [error.name for error in module.broken] == ["demo_04"]
    assert "left out: demo 'demo_04': no completion mark" in caplog.text
    assert f"1 of 10 demos in {native_root} are broken and left out" in caplog.text


def test_too_many_broken_demos_stop_the_run_with_the_list(native_root: Path, robot_demos: Make) -> None:
    (native_root / "demo_04" / "metadata.json").unlink()
    (native_root / "demo_07" / "rgb" / "over" / "000003.jpg").unlink()
    with pytest.raises(
        ValueError, match=r"2 of 10 demos .* demo_04: no completion mark.*; demo_07: .*1 of 12"
    ) as caught:
        robot_demos(native_root).setup("fit")
    assert "\n" not in str(caught.value)
    assert len(ready(robot_demos(native_root, max_broken_share=0.25)).demos) == 8


def test_a_demo_without_the_camera_or_the_arm_is_broken(native_root: Path, robot_demos: Make) -> None:
    with pytest.raises(ValueError, match="it has no camera 'wrist'; it has over"):
        robot_demos(native_root, camera="wrist").setup("fit")
    with pytest.raises(ValueError, match="it has no arm 'left'; it has right"):
        robot_demos(native_root, arms=["left"]).setup("fit")


def test_max_demos_takes_the_first_ones(native_root: Path, robot_demos: Make) -> None:
    assert [demo.name for demo in ready(robot_demos(native_root, max_demos=3)).demos] == [
        "demo_00",
        "demo_01",
        "demo_02",
    ]
    with pytest.raises(ValueError, match=r"max_demos=11, but .* holds 10"):
        robot_demos(native_root, max_demos=11).setup("fit")


def test_of_max_demos_those_that_are_found_damaged_are_not_replaced(native_root: Path, robot_demos: Make) -> None:
    (native_root / "demo_00" / "metadata.json").write_text("{")
    (native_root / "demo_01" / "rgb/over/000005.jpg").write_bytes(b"no image")
    data = ready(robot_demos(native_root, max_demos=3, max_broken_share=0.5))
    assert [demo.name for demo in data.demos] == ["demo_02", "demo_03"]
    assert [error.name for error in data.broken] == ["demo_00", "demo_01"]


def test_a_camera_is_calibrated_if_it_is_in_all_demos(
    native_root: Path, robot_demos: Make, change_metadata: Any
) -> None:
    reads_none = types.SimpleNamespace(reads_calibration=False)
    for uncalibrated in (False, True):
        if uncalibrated:
            entry = json.loads((native_root / "demo_06/metadata.json").read_text())["cameras"]["over"]
            change_metadata(native_root / "demo_06", cameras={"over": entry | {"uncalibrated": "no entry"}})
        data = robot_demos(native_root)
        data.configure_for(reads_none)
        assert ready(data).camera_is_calibrated == (not uncalibrated)
        assert data.cameras_are_calibrated == (not uncalibrated)
        assert len(data.demos) == 10


def stamped(demo: Path, rate: float, change_archive: Any) -> None:
    """Give a demo of twelve frames the time stamps of `rate` frames per second."""
    change_archive(demo / "trajectory.npz", timestamps_ns=(np.arange(12) * 1e9 / rate).round().astype(np.int64))


def test_mixed_frame_rates_are_refused(
    native_root: Path, robot_demos: Make, change_metadata: Any, change_archive: Any
) -> None:
    change_metadata(native_root / "demo_02", fps=30.0)
    stamped(native_root / "demo_02", 30.0, change_archive)
    with pytest.raises(ValueError, match=r"different rates .*10 frames/s, demo_02: 30"):
        robot_demos(native_root).setup("fit")


def test_time_stamps_of_another_rate_than_fps_are_refused(
    native_root: Path, robot_demos: Make, change_metadata: Any, change_archive: Any
) -> None:
    """Their plans would run three times as fast as the recorded motion, and nothing else would reveal it."""
    for demo in native_root.glob("demo_*"):
        change_metadata(demo, fps=30.0)
    with pytest.raises(
        ValueError, match=r"10 of 10 demos .* by more than 5 % \(demo_00: 10 for 30; .* 3 times as fast"
    ):
        robot_demos(native_root).setup("fit")
    for demo in native_root.glob("demo_*"):
        change_metadata(demo, fps=10.0)
    stamped(native_root / "demo_03", 10.6, change_archive)
    data = ready(robot_demos(native_root))  # a single such demo is left out
    assert [str(broken) for broken in data.broken] == [
        "demo 'demo_03': its time stamps say 10.6 frames per second, its fps is 10: plans would run 0.943 times as "
        "fast as what was shown"
    ]
    assert len(data.demos) == 9
    with pytest.raises(ValueError, match=r"1 of 10 demos .* broken, more than data\.max_broken_share=0\.05"):
        robot_demos(native_root, max_broken_share=0.05).setup("fit")
    stamped(native_root / "demo_03", 10.4, change_archive)
    jitter = np.arange(12) * 100_000_000 + 40_000_000 * (np.arange(12) % 2)
    change_archive(native_root / "demo_04" / "trajectory.npz", timestamps_ns=jitter)
    dropped = np.delete(np.arange(15), [4, 7, 10]) * 100_000_000
    change_archive(native_root / "demo_05" / "trajectory.npz", timestamps_ns=dropped)
    bursts = np.cumsum([0, *([1, 1, 364] * 4)[:-1]]) * 1_000_000  # three images at once, same mean rate as the others
    change_archive(native_root / "demo_06" / "trajectory.npz", timestamps_ns=bursts)
    assert len(ready(robot_demos(native_root)).demos) == 10


def test_gaps_in_the_time_stamps_are_said_once(
    native_root: Path, robot_demos: Make, change_archive: Any, caplog: pytest.LogCaptureFixture
) -> None:
    times = np.arange(12) * 100_000_000
    times[6:] += 500_000_000
    for name in ("demo_01", "demo_04"):
        change_archive(native_root / name / "trajectory.npz", timestamps_ns=times)
    assert len(ready(robot_demos(native_root)).demos) == 10
    (said,) = [record.getMessage() for record in caplog.records if "time stamps jump" in record.getMessage()]
    assert "in 2 of 10 demos, by up to 0.60 s" in said
    assert "demo_01 (0.60 s), demo_04 (0.60 s)" in said


def test_heights_that_differ_by_rounding_alone_are_refused(native_root: Path, robot_demos: Make) -> None:
    """Height bins between values that float32 cannot distinguish would give NaN."""
    statistics = ready(robot_demos(native_root)).statistics
    taken = PolicyStatistics()
    with pytest.raises(
        ValueError, match=r"no range of heights \(lowest 0\.1000 m, highest 0\.1000 m; at least 0\.001 m"
    ):
        taken.take(replace(statistics, height_range=(0.1, 0.1 + 1e-10)), statistics.horizon)
    taken.take(replace(statistics, height_range=(0.1, 0.102)), statistics.horizon)
    assert taken.height_range.tolist() == pytest.approx([0.1, 0.102])


def test_demos_that_are_shorter_than_a_step_have_no_share_outside(native_root: Path, robot_demos: Make) -> None:
    module = ready(robot_demos(native_root))
    steps = np.arange(1, 3) * 50
    shares = off_screen_shares(module.demos, "over", module.arms, module.geometry, lambda number: steps, "reached")
    assert shares == {}


@pytest.mark.parametrize("targets", ["reached", "commanded"])
def test_a_fixed_camera_projects_each_target_once(
    native_root: Path, robot_demos: Make, monkeypatch: pytest.MonkeyPatch, targets: str
) -> None:
    """The shares are those of a camera whose matrices are stored for each frame."""
    module = ready(robot_demos(native_root))
    rng = np.random.default_rng(0)
    fixed, moving = [], []
    for demo in module.demos:
        arm = demo.arms["right"]
        assert arm.commanded is not None
        paths = [track.position + rng.uniform(-0.5, 0.5, (12, 3)) * [1, 1, 0] for track in (arm, arm.commanded)]
        arm = replace(arm, position=paths[0], commanded=replace(arm.commanded, position=paths[1]))
        camera = demo.cameras["over"]
        matrices = {name: getattr(camera, name).copy() for name in ("intrinsics", "world_to_camera")}
        fixed.append(replace(demo, arms={"right": arm}))
        moving.append(replace(fixed[-1], cameras={"over": replace(camera, **matrices)}))
    points: list[int] = []
    project = set_checks.project

    def count(positions: torch.Tensor, *matrices: torch.Tensor) -> Any:
        points.append(positions[..., 0].numel())
        return project(positions, *matrices)

    monkeypatch.setattr(set_checks, "project", count)
    steps = np.arange(1, 6) * 3  # the last step is longer than a demo
    shares = [
        off_screen_shares(demos, "over", module.arms, module.geometry, lambda number: steps, targets)
        for demos in (fixed, moving)
    ]
    assert shares[0] == shares[1]
    assert len({*shares[0].values()}) > 3
    assert points == [12] * 10 + [12 * 5] * 10


def test_steps_outside_the_image_are_counted_and_named(
    native_root: Path, robot_demos: Make, change_archive: Any, caplog: pytest.LogCaptureFixture
) -> None:
    module = ready(robot_demos(native_root))
    assert set(module.off_screen_shares().values()) == {0.0}
    assert "outside camera" not in caplog.text
    # nominal field: 32 of 48 x 40 pixels; 40 px focal length at 0.85 m: half the field is 0.34 m
    path = np.zeros((12, 3))
    path[:, 2] = 0.15
    path[6:, 0] = 0.35
    change_archive(native_root / "demo_05" / "trajectory.npz", right__position_m=path)
    module = ready(robot_demos(native_root, horizon=1, frame_stride=1))
    shares = module.off_screen_shares()
    assert shares["demo_05"] == pytest.approx(6 / 11)
    assert sum(share > 0 for share in shares.values()) == 1
    assert "1 of 10 demos have more than 25 % of their steps outside camera over's image" in caplog.text
    assert "demo_05 (55 %)" in caplog.text


def test_demos_that_the_camera_never_sees_end_the_run(
    native_root: Path, robot_demos: Make, change_archive: Any
) -> None:
    for folder in native_root.iterdir():
        change_archive(folder / "trajectory.npz", right__position_m=np.tile([5.0, 0.0, 0.2], (12, 1)))
    with pytest.raises(ValueError, match=r"outside of camera over's image in all 10 demos of .*calibration"):
        ready(robot_demos(native_root))


def test_single_wrong_readings_are_named(
    native_root: Path, robot_demos: Make, change_archive: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with np.load(native_root / "demo_03" / "trajectory.npz") as stored:
        path = stored["right/position_m"].copy()
    ready(robot_demos(native_root, targets="reached"))
    assert "leave the path" not in caplog.text
    path[7, 2] += 0.3
    path[3, 0] -= 0.2
    change_archive(native_root / "demo_03" / "trajectory.npz", right__position_m=path)
    ready(robot_demos(native_root, targets="reached"))
    assert "2 reached positions leave the path of their neighbours" in caplog.text
    assert "demo_03 frame 3, demo_03 frame 7" in caplog.text
    caplog.clear()
    ready(robot_demos(native_root, targets="commanded"))  # the height bins span the reached positions as well
    assert "2 reached positions leave the path of their neighbours" in caplog.text
    assert "commanded positions leave the path" not in caplog.text
    caplog.clear()
    path[0] = 0.0
    path[11] += [0.0, 0.4, 0.0]
    change_archive(native_root / "demo_04" / "trajectory.npz", right__position_m=path)
    with np.load(native_root / "demo_05" / "trajectory.npz") as stored:
        path = stored["right/position_m"].copy()
    path[0] = [-0.4, 0.0, 0.15]
    path[5:7] = [0.0, 0.4, 0.15]
    change_archive(native_root / "demo_05" / "trajectory.npz", right__position_m=path)
    ready(robot_demos(native_root, targets="reached"))
    assert "demo_05 frame 0, demo_05 frame 5, demo_05 frame 6" in caplog.text


def test_pauses_can_be_dropped(native_root: Path, robot_demos: Make, change_archive: Any) -> None:
    for folder in native_root.iterdir():
        with np.load(folder / "trajectory.npz") as stored:
            position, turn = stored["right/position_m"].copy(), stored["right/quaternion_wxyz"].copy()
        gripper = np.ones(12)
        position[3:9], turn[3:9] = position[3], turn[3]  # stands still from frame 3 to frame 8, half a second
        change_archive(
            folder / "trajectory.npz",
            right__position_m=position,
            right__quaternion_wxyz=turn,
            right__gripper_opening=gripper,
        )
    demo = ready(robot_demos(native_root)).demos[0]
    assert np.flatnonzero(~moving_frames(demo, ["right"], 0.25)).tolist() == [6, 7, 8]
    assert np.flatnonzero(~moving_frames(demo, ["right"], 0.0)).tolist() == [4, 5, 6, 7, 8]
    module = ready(robot_demos(native_root, drop_idle_s=0.25))
    count = len(module.train_indices)
    assert len(module.train_samples) == 9 * count
    assert {int(f) for f in module.train_samples.sample_frame} == set(range(12)) - {6, 7, 8}
    assert len(module.val_samples) == 12 * len(module.val_indices)  # validation samples stay the same
    whole, dropped = (each.train_samples for each in (ready(robot_demos(native_root)), module))
    for frame in (2, 9):  # one that reaches into the pause, and the first one after it
        one, other = (
            samples[SampleKey(int(np.flatnonzero(samples.sample_frame == frame)[0]), 0)] for samples in (whole, dropped)
        )
        assert torch.equal(one.position, other.position), "the timing of plans stays"


def test_a_closing_gripper_is_no_pause(native_root: Path, robot_demos: Make, change_archive: Any) -> None:
    folder = native_root / "demo_00"
    still = {"right__position_m": np.zeros((12, 3)), "right__quaternion_wxyz": np.tile([1.0, 0, 0, 0], (12, 1))}
    change_archive(folder / "trajectory.npz", **still)
    demo = ready(robot_demos(native_root)).demos[0]
    assert moving_frames(demo, ["right"], 0.0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "wanted"}, "one of commanded, reached"),
        ({"gripper_targets": "wanted"}, r"data\.gripper_targets must be one of commanded, reached"),
        ({"horizon": 0}, "at least 1"),
        ({"arms": ["right", "right"]}, "each arm once"),
        ({"max_demos": 0}, "max_demos"),
        ({"root": None}, "name a folder with data.root"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, robot_demos: Make, changes: dict[str, Any], message: str) -> None:
    root = changes.pop("root", tmp_path)
    with pytest.raises(ValueError, match=message):
        robot_demos(root, **changes)


def test_a_folder_that_the_user_names_must_be_there(tmp_path: Path, robot_demos: Make) -> None:
    module = robot_demos(tmp_path / "mine", record=Recording("nowhere.record", {"name": "pick"}, tmp_path))
    module.prepare_data()
    with pytest.raises(FileNotFoundError, match="mine does not exist; name a folder"):
        module.setup("fit")


# ----------------------------------------------------------------------------------------------- recording on first use


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, native_demo: Any) -> list[dict[str, Any]]:
    """Install a stand-in recorder that writes missing demos. Return the list of its calls."""
    calls: list[dict[str, Any]] = []

    def record(**arguments: Any) -> None:
        calls.append(arguments)
        for number in range(arguments["demos"]):
            folder = arguments["root"] / f"pick_{number:07d}"
            if not folder.exists():
                native_demo(folder, seed=number)

    module = types.ModuleType("stand_in_recorder")
    module.record = record  # type: ignore[attr-defined]
    module.Options = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in_recorder", module)
    return calls


def recording(folder: Path, **changes: Any) -> Recording:
    task = {"_target_": "stand_in_recorder.Options", "name": "pick", "region": "all"} | changes.pop("task", {})
    return Recording("stand_in_recorder.record", task, folder, **({"demos": 3} | changes))


def test_missing_demonstrations_are_recorded_once_and_said(
    tmp_path: Path, robot_demos: Make, recorder: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    module = robot_demos(None, record=recording(tmp_path / "data"))
    module.prepare_data()
    assert "holds 0 of 3 demonstrations: recording the others in the simulator" in caplog.text
    ready(module)
    assert len(module.demos) == 3
    assert recorder[0]["task"] == {"name": "pick", "region": "all"}
    assert recorder[0]["root"] == module.root
    robot_demos(None, record=recording(tmp_path / "data")).prepare_data()
    assert len(recorder) == 1  # the demos exist now
    module = robot_demos(None, record=recording(tmp_path / "data", demos=5))
    module.prepare_data()
    assert len(recorder) == 2
    assert len(ready(module).demos) == 5
    module = robot_demos(None, record=recording(tmp_path / "data", demos=2))
    module.prepare_data()
    assert len(ready(module).demos) == 2  # the first two of five


def test_a_recording_that_is_there_needs_nothing_written(
    tmp_path: Path, robot_demos: Make, recorder: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    robot_demos(None, record=recording(tmp_path / "data")).prepare_data()
    monkeypatch.setattr("keygrip.artifacts.locked", lambda path: pytest.fail("a read-only folder"))
    robot_demos(None, record=recording(tmp_path / "data")).prepare_data()
    assert len(recorder) == 1


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"cache_gb": -1.0}, "data.cache_gb=-1.0: must be finite and at least 0"),
        ({"drop_idle_s": float("nan")}, "data.drop_idle_s=nan: must be finite"),
        ({"max_broken_share": 2.0}, "data.max_broken_share=2.0: it is a share, 0 to 1"),
    ],
)
def test_numbers_that_cannot_be_are_named(
    setting: dict[str, Any], said: str, native_root: Path, robot_demos: Make
) -> None:
    with pytest.raises(ValueError, match=said):
        robot_demos(native_root, **setting)


@pytest.mark.parametrize("setting", [{"num_workers": -1}, {"prefetch_batches": 0}])
def test_workers_that_cannot_be_are_named(setting: dict[str, int], native_root: Path, robot_demos: Make) -> None:
    with pytest.raises(ValueError, match=rf"data\.{next(iter(setting))}={next(iter(setting.values()))} "):
        ready(robot_demos(native_root, **setting)).train_dataloader()


def test_a_recorders_worker_does_not_wait_for_its_own_parent(
    tmp_path: Path, robot_demos: Make, recorder: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(RuntimeError, match="put its work under if __name__"):
        robot_demos(None, record=recording(tmp_path)).prepare_data()
    assert recorder == []


def test_other_options_lie_in_another_folder(tmp_path: Path) -> None:
    plain = recording(tmp_path).root
    assert plain.parent == tmp_path
    assert plain.name.startswith("pick-")
    others = [
        recording(tmp_path, task={"region": "left"}).root,
        recording(tmp_path, task={"name": "stack"}).root,
        recording(tmp_path, image_size=448).root,
        recording(tmp_path, hz=20.0).root,
        recording(tmp_path, seed=7).root,
    ]
    assert len({plain, *others}) == 6
    assert recording(tmp_path, demos=7, processes=3).root == plain  # more demos of the same kind
    assert recording(tmp_path, hz=10).root == plain


@pytest.mark.slow
def test_the_simulator_is_not_imported_for_folders(native_root: Path) -> None:
    program = (
        "import sys; from hydra.utils import instantiate; from keygrip.config import compose\n"
        f"data = instantiate(compose('train', ['data.root={native_root}', 'data.num_workers=0', 'data.batch_size=4',"
        "'data.horizon=2']).data, _convert_='all')\n"
        "data.prepare_data(); data.setup('fit'); next(iter(data.train_dataloader()))\n"
        "assert data.num_workers == 0 and len(data.demos) == 10\n"
        "print([name for name in ('mujoco', 'keygrip.envs.yam', 'timm', 'h5py', 'pyarrow') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == "[]"


def test_the_shipped_config_records_in_the_simulator(tmp_path: Path) -> None:
    from hydra.utils import instantiate

    from keygrip.config import compose

    overrides = [
        f"data.record.folder={tmp_path}",
        "data.record.task.name=reach",
        "data.record.demos=2",
        "data.record.processes=1",
        "data.batch_size=8",
        "data.num_workers=0",
    ]
    module = instantiate(compose("train", overrides).data, _convert_="all")
    module.prepare_data()
    ready(module)
    assert module.root.parent == tmp_path
    assert {demo.task for demo in module.demos} == {"reach"}
    batch = next(iter(module.train_dataloader()))
    assert batch.image.shape == (8, 3, 192, 192)
    from keygrip.envs.yam.tasks import TaskOptions

    demo = module.demos[0]
    assert TaskOptions(**demo.source["task"]) == TaskOptions(name="reach")
    assert max(module.off_screen_shares().values()) < 0.05  # the embedded camera covers the whole motion


# --------------------------------------------------------------------------------------------------------------- resume


class Watcher(LightningModule):
    """Records which samples it is given, and the sum of their augmented images."""

    def __init__(self, checkpoint_at: tuple[str, int] | None = None, path: Path | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[Any, ...]] = []
        self.checkpoint_at, self.path = checkpoint_at, path

    def training_step(self, batch: PolicyBatch, index: int) -> torch.Tensor:
        self.seen.append((*batch.demo_index.tolist(), *batch.frame_index.tolist(), float(batch.image.sum())))
        return self.layer(batch.image.mean((1, 2, 3))[:, None]).sum()

    def validation_step(self, batch: PolicyBatch, index: int) -> None:
        assert len(batch) > 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)

    def _save(self, when: str) -> None:
        if self.checkpoint_at == (when, self.global_step) and self.path is not None and not self.path.exists():
            self.trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, batch: PolicyBatch, index: int) -> None:
        self._save("batch start")

    def on_train_batch_end(self, outputs: Any, batch: PolicyBatch, index: int) -> None:
        self._save("batch end")

    def on_validation_end(self) -> None:
        self._save("validation end")

    def on_train_epoch_end(self) -> None:
        self._save("epoch end")


SCHEDULES: dict[str, dict[str, Any]] = {
    "steps": {"max_steps": 29, "val_check_interval": 5, "check_val_every_n_epoch": None},
    "epochs": {"max_epochs": 3, "val_check_interval": 5},
    "accumulation": {
        "max_steps": 14,
        "accumulate_grad_batches": 2,
        "val_check_interval": 6,
        "check_val_every_n_epoch": None,
    },
}


def fit(module: Watcher, data: RobotDemos, checkpoint: Path | None = None, **schedule: Any) -> Watcher:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **schedule,
    )
    trainer.fit(module, data, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
    return module


@pytest.mark.parametrize(
    ("schedule", "every"), [("steps", 2), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in SCHEDULES)]
)
def test_resumed_training_sees_what_uninterrupted_training_sees(
    schedule: str, every: int, tmp_path: Path, native_root: Path, robot_demos: Make
) -> None:
    """The checkpoint is saved at each place of the list, or at every second one."""
    data = partial(robot_demos, native_root, augmentation=Augmentation(), cache_gb=0.1)
    whole = fit(Watcher(), data(), **SCHEDULES[schedule])
    per_epoch = len(ready(data()).train_dataloader())
    assert len(whole.seen) > 2 * per_epoch  # epochs end in between
    stride = SCHEDULES[schedule].get("accumulate_grad_batches", 1)
    ends = per_epoch // stride
    for number, (when, step) in enumerate(
        [
            ("batch end", 3),
            ("batch start", 4),
            ("batch end", ends),
            ("epoch end", ends),
            ("validation end", 10 // stride if stride == 1 else 6),
            ("batch end", ends + 2),
        ][::every]
    ):
        path = tmp_path / f"{number}.ckpt"
        fit(Watcher((when, step), path), data(), **SCHEDULES[schedule])
        assert path.exists(), (when, step)
        done = torch.load(path, weights_only=True)["RobotDemos"]["batches_done"]
        resumed = fit(Watcher(), data(num_workers=1 if number == 0 else 0), path, **SCHEDULES[schedule])
        assert 0 < done < len(whole.seen)
        assert resumed.seen == whole.seen[done:], (when, step)


def test_an_order_that_cannot_be_continued_is_refused(native_root: Path, robot_demos: Make) -> None:
    state = robot_demos(native_root).state_dict()
    with pytest.raises(
        ValueError, match=r"data.batch_size=8, this run has 4; the order of samples cannot be continued"
    ):
        robot_demos(native_root, batch_size=4).load_state_dict(state)
    with pytest.raises(ValueError, match=r"data.seed=0, this run has 1"):
        robot_demos(native_root, seed=1).load_state_dict(state)


def test_steps_that_no_demonstration_reaches_are_said_and_refused_where_there_is_none(
    native_root: Path, robot_demos: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Demos of twelve frames contain targets up to eleven frames ahead."""
    ready(robot_demos(native_root, horizon=5, frame_stride=2))
    assert "no demo shows them" not in caplog.text
    ready(robot_demos(native_root, horizon=6, frame_stride=2))
    assert "horizon=6 steps of data.frame_stride=2 frames: the last 1 lie behind" in caplog.text
    assert "no demo shows them; data.horizon=5 would do, or a lower data.frame_stride" in caplog.text
    with pytest.raises(
        ValueError, match=r"frame_stride=12: the first target lies behind .* with 12 frames the longest"
    ):
        robot_demos(native_root, horizon=1, frame_stride=12).setup("fit")
    robot_demos(native_root, horizon=1, frame_stride=12).setup("validate")


def test_demonstrations_shorter_than_a_step_are_named(
    native_root: Path, robot_demos: Make, caplog: pytest.LogCaptureFixture
) -> None:
    data = robot_demos(native_root, horizon=1, frame_stride=4)
    data.setup("fit")
    short = data.train_demos[0]
    assert "hold no target" not in caplog.text
    cut = replace(short, timestamps=short.timestamps[:4])
    refuse_short([cut, *data.train_demos[1:]], 1, [4] * len(data.train_demos))
    assert f"1 of {len(data.train_demos)} training demos are shorter than one step" in caplog.text
    assert caplog.text.rstrip().endswith(short.name)


def test_a_weight_of_corrections_needs_corrected_frames(
    native_root: Path, robot_demos: Make, change_archive: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"^data\.intervention_weight=4, but a person corrected no frame"):
        ready(robot_demos(native_root, intervention_weight=4.0))
    assert "corrected" not in caplog.text
    data = ready(robot_demos(native_root))
    held_out = data.demos[data.val_indices[0]].name
    change_archive(native_root / held_out / "trajectory.npz", intervention=np.arange(12) > 8)
    with pytest.raises(ValueError, match=rf"all frames that a person corrected are held out .*: {held_out}; add"):
        ready(robot_demos(native_root, intervention_weight=4.0))
    data = robot_demos(native_root, val_fraction=0.0, intervention_weight=4.0)
    data.setup("fit")
    assert "a person corrected 3 of 120 training frames, in 1 demos; data.intervention_weight=4" in caplog.text


@pytest.mark.parametrize(("weight", "corrected"), [(1.9, 15), (0.5, 4), (0.1, 0), (1.3, 10), (1.0, 8)])
def test_fractions_of_a_weight_are_kept_over_short_corrections(
    native_root: Path, robot_demos: Make, change_archive: Any, weight: float, corrected: int
) -> None:
    """One frame per demo is corrected: counted in each demo alone, 1.9 had the effect of 1 and 0.5 that of 0."""
    flags = np.arange(12) == 4
    for number in (0, 1, 2, 4, 5, 6, 8, 9):
        change_archive(native_root / f"demo_{number:02d}" / "trajectory.npz", intervention=flags)
    samples = ready(robot_demos(native_root, val_fraction=0.0, intervention_weight=weight)).train_samples
    assert len(samples) == 10 * 12 - 8 + corrected
    assert (samples.sample_frame == 4).sum() == 2 + corrected
    counts = np.bincount(samples.sample_demo[samples.sample_frame == 4], minlength=10)[[0, 1, 2, 4, 5, 6, 8, 9]]
    assert set(counts) <= {int(weight), int(weight) + 1}  # spread evenly


def test_a_demonstration_whose_name_is_not_utf_8_is_named(native_root: Path, robot_demos: Make) -> None:
    (native_root / "demo_03").rename(native_root / "demo_\udcfc")
    with pytest.raises(ValueError, match=r"^the name demo_\\udcfc in .* holds bytes that are not UTF-8: rename it$"):
        ready(robot_demos(native_root))
