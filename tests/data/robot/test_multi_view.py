"""Batches of several cameras with depth: shapes, what stays aligned, and what is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from keygrip.data.batches import MultiViewPolicyBatch, PolicyBatch, PolicyTargets
from keygrip.data.manifests import make_manifests
from keygrip.data.robot import statistics as module_under_test
from keygrip.data.robot.augmentation import Augmentation, Box, Colours, ImageGeometry, cut, cut_depth, recolour
from keygrip.data.robot.datamodule import RobotDemos
from keygrip.data.robot.fingerprint import demo_fingerprint
from keygrip.data.robot.lerobot_export import files
from keygrip.data.robot.lerobot_export.export import export_lerobot
from keygrip.data.robot.recordings import Recording
from keygrip.data.robot.schema import Demo
from keygrip.data.shards.sampling import SampleKey

Make = Callable[..., RobotDemos]
CAMERAS = ("over", "front")
TWO: dict[str, Any] = {"cameras": CAMERAS, "depth": True}


def add_depth(folder: Path, camera: str, height: int = 40, width: int = 48) -> None:
    """Add depth images whose values encode their place: 1000 mm, plus 1 per column and 100 per frame."""
    (folder / "depth" / camera).mkdir(parents=True)
    metadata = json.loads((folder / "metadata.json").read_text())
    for frame in range(metadata["frames"]):
        values = np.full((height, width), 1000 + 100 * frame, np.uint16) + np.arange(width, dtype=np.uint16)
        Image.fromarray(values).save(folder / "depth" / camera / f"{frame:06d}.png")
    metadata["cameras"][camera]["depth"] = f"depth/{camera}/%06d.png"
    (folder / "metadata.json").write_text(json.dumps(metadata))


@pytest.fixture
def root(tmp_path: Path, native_demo: Any) -> Path:
    """Write six demos of two cameras with depth."""
    for number in range(6):
        folder = native_demo(
            tmp_path / "root" / f"demo_{number}", cameras=CAMERAS, seed=number, level=0.1 + 0.01 * number
        )
        for camera in CAMERAS:
            add_depth(folder, camera)
    return tmp_path / "root"


def ready(module: RobotDemos) -> RobotDemos:
    module.setup("fit")
    return module


def test_a_batch_has_the_promised_shapes_and_types(root: Path, robot_demos: Make) -> None:
    module = ready(robot_demos(root, **TWO, augmentation=Augmentation()))
    batch = next(iter(module.train_dataloader()))
    assert isinstance(batch, MultiViewPolicyBatch)
    expected = {
        "images": ((8, 2, 3, 32, 32), torch.uint8),
        "view_intrinsics": ((8, 2, 3, 3), torch.float32),
        "view_world_to_camera": ((8, 2, 4, 4), torch.float32),
        "depth": ((8, 2, 32, 32), torch.float32),
        "image": ((8, 3, 32, 32), torch.float32),
        "intrinsics": ((8, 3, 3), torch.float32),
        "world_to_camera": ((8, 4, 4), torch.float32),
        "start_position": ((8, 1, 3), torch.float32),
        "position": ((8, 1, 3, 3), torch.float32),
        "action_is_pad": ((8, 1, 3), torch.bool),
        "view_mask": ((8, 2), torch.bool),
    }
    for name, (shape, kind) in expected.items():
        assert getattr(batch, name).shape == shape, name
        assert getattr(batch, name).dtype == kind, name
    assert batch.cameras == CAMERAS
    assert len(batch) == len(batch.instruction) == 8
    moved = batch.to("meta", torch.bfloat16)
    assert (moved.images.dtype, moved.depth.dtype) == (torch.uint8, torch.bfloat16)
    assert moved.images.device.type == "meta"
    assert moved.cameras == CAMERAS


def test_the_first_view_is_what_a_policy_of_one_camera_is_given(root: Path, robot_demos: Make) -> None:
    many, one = ready(robot_demos(root, **TWO)), ready(robot_demos(root))
    assert RobotDemos.batch_type({"cameras": list(CAMERAS)}) is MultiViewPolicyBatch
    assert RobotDemos.batch_type({"cameras": None}) is RobotDemos.batch_type({}) is PolicyBatch
    assert issubclass(MultiViewPolicyBatch, PolicyBatch)  # accepted as a PolicyBatch, but not the other way round
    assert not issubclass(PolicyBatch, MultiViewPolicyBatch)
    ours, theirs = next(iter(many.val_dataloader())), next(iter(one.val_dataloader()))
    for name in (
        "image",
        "intrinsics",
        "world_to_camera",
        "position",
        "start_quaternion",
        "action_is_pad",
        "frame_index",
    ):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.normalised((0, 0, 0), (1, 1, 1)) * 255, ours.images.float())


def test_views_keep_their_order(root: Path, robot_demos: Make) -> None:
    forth, back = (
        ready(robot_demos(root, **TWO)),
        ready(robot_demos(root, **TWO | {"cameras": CAMERAS[::-1]}, camera="front")),
    )
    ours, theirs = next(iter(forth.val_dataloader())), next(iter(back.val_dataloader()))
    torch.testing.assert_close(ours.images, theirs.images.flip(1))
    assert not torch.equal(ours.images[:, 0], ours.images[:, 1])


@pytest.mark.parametrize("rotate", [0.0, 20.0])
def test_depth_follows_its_image(root: Path, robot_demos: Make, rotate: float) -> None:
    """A depth value encodes its column and frame: it must lie where the intrinsics place that column."""
    module = ready(robot_demos(root, **TWO, augmentation=Augmentation(rotate_degrees=rotate)))
    turned = 0.0
    for index in range(0, len(module.train_samples), 3):
        sample = module.train_samples[SampleKey(index, 1)]
        assert isinstance(sample, MultiViewPolicyBatch)
        frame = int(sample.frame_index)
        for view in range(2):
            depth, k = sample.depth[view].double().numpy(), sample.view_intrinsics[view].double().numpy()
            turn = sample.view_world_to_camera[view, :3, :3].double().numpy()
            rows, columns = np.nonzero(depth)
            rays = np.linalg.inv(k) @ np.stack([columns + 0.5, rows + 0.5, np.ones(len(rows))])
            rays = np.diag([1.0, -1.0, -1.0]) @ turn.T @ rays  # in the axes of the camera before it was rolled
            source = 40 * rays[0] + 24
            told = 1000 * depth[rows, columns] - 1000 - 100 * frame
            assert np.abs(source - (told + 0.5)).max() <= 0.5 + 1e-3
            turned = max(turned, abs(turn[0, 1]))
    assert (turned > 0.05) == (rotate > 0)


def test_depth_is_never_mixed_over_an_edge() -> None:
    near_far = np.where(np.arange(40) < 20, 500, 2000).astype(np.uint16)[None].repeat(40, 0)
    for box in (Box(0, 0, 40, 40), Box(3.3, 2.2, 33.7, 35.1), Box(5, 5, 35, 35, angle=0.3)):
        assert set(np.unique(cut_depth(near_far, box, 15))) <= {0, 500, 2000}
    np.testing.assert_array_equal(cut_depth(near_far, Box(0, 0, 40, 40), 40), near_far)
    beyond = cut_depth(near_far, Box(-10, 0, 30, 40), 40)
    assert (beyond[:, :10] == 0).all()
    assert (beyond[:, 10:] > 0).all()


def test_views_are_cropped_and_coloured_each_by_itself_and_alike_each_time(root: Path, robot_demos: Make) -> None:
    module = ready(robot_demos(root, **TWO, augmentation=Augmentation()))
    first, again, later = (module.train_samples[SampleKey(3, epoch)] for epoch in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.depth, again.depth)
    assert not torch.equal(first.view_intrinsics, later.view_intrinsics)
    assert not torch.equal(first.view_intrinsics[0], first.view_intrinsics[1])


def test_the_sharper_cut_is_the_first_views(root: Path, robot_demos: Make) -> None:
    one, many = (ready(robot_demos(root, **extra, detail_size=64)) for extra in ({}, TWO))
    ours, theirs = next(iter(many.val_dataloader())), next(iter(one.val_dataloader()))
    assert (ours.detail.shape, ours.detail.dtype) == ((8, 3, 64, 64), torch.uint8)
    assert torch.equal(ours.detail, theirs.detail)
    augmented = {"augmentation": Augmentation(rotate_degrees=5.0), **TWO}
    plain, sharp = (ready(robot_demos(root, **augmented, **extra)) for extra in ({}, {"detail_size": 64}))
    for index in range(0, len(sharp.train_samples), 9):
        without, sample = (module.train_samples[SampleKey(index, 1)] for module in (plain, sharp))
        assert without.detail is None
        assert torch.equal(sample.images, without.images)  # bit-identical: no further random numbers are used
        small = torch.nn.functional.avg_pool2d(sample.detail[None].float(), 2)[0]
        assert float((small - sample.images[0].float()).abs().mean()) < 6
        assert float((small - sample.images[1].float()).abs().mean()) > 12


def test_a_sharper_cut_that_nothing_reads_is_refused(root: Path, robot_demos: Make) -> None:
    class Looking:
        reads_detail = True

    robot_demos(root, detail_size=64).configure_for(Looking())
    with pytest.raises(ValueError, match=r"data\.detail_size=64.*no second look"):
        robot_demos(root, detail_size=64).configure_for(object())
    with pytest.raises(ValueError, match=r"at least data\.image_size=32"):
        robot_demos(root, detail_size=16)


def test_a_model_that_learns_from_depth_is_refused_without_it_before_data_are_read(robot_demos: Make) -> None:
    class LearnsDepth:
        learns_depth = True

    class LearnsNone:
        learns_depth = False

    for module in (LearnsNone(), object()):
        robot_demos(Path("absent"), cameras=CAMERAS).configure_for(module)
    robot_demos(Path("absent"), **TWO).configure_for(LearnsDepth())
    with pytest.raises(ValueError, match=r"^data\.depth=false, but this model learns from depth: .*=dino_multiview_no"):
        robot_demos(Path("absent"), cameras=CAMERAS).configure_for(LearnsDepth())


def test_new_colours_in_bytes_are_those_of_the_normalised_image() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)
    colours = Colours(rng.normal(1, 0.3, (3, 3)) / 2, rng.normal(-60, 20, 3))
    exact = np.clip(picture.astype(float) @ colours.matrix.T + colours.offset, 0, 255)
    changed = recolour(picture, colours)
    assert changed.dtype == np.uint8
    assert np.abs(changed - exact).max() <= 0.501
    assert (changed == 0).any()  # clipped, not wrapped around


def test_depth_of_another_size_than_its_image_is_refused() -> None:
    geometry = ImageGeometry(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="must be aligned"):
        geometry.view(np.zeros((10, 12, 3), np.uint8), np.eye(3), np.eye(4), np.zeros((5, 6), np.uint16))


def test_the_nominal_view_is_the_crop_of_inference() -> None:
    geometry = ImageGeometry(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), field=0.8)
    picture = np.random.default_rng(1).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    k = np.array([[50.0, 0, 30], [0, 50, 20], [0, 0, 1]])
    view = geometry.view(picture, k, np.eye(4))
    image, intrinsics = geometry.apply(picture, k)
    np.testing.assert_array_equal(view.image, cut(picture, geometry.box(60, 40), 16))
    torch.testing.assert_close(torch.tensor(view.image).permute(2, 0, 1) / 255, image / 2 + 0.5)
    np.testing.assert_allclose(view.intrinsics, intrinsics.numpy(), atol=1e-5)
    assert view.depth is None


# ---------------------------------------------------------------------------------------------------------- statistics


def test_chunks_are_the_training_samples_targets(root: Path, robot_demos: Make) -> None:
    module = ready(robot_demos(root, **TWO, targets="commanded"))
    statistics = module.statistics
    chunks = statistics.chunks
    assert statistics.cameras == CAMERAS
    assert type(chunks) is PolicyTargets
    assert len(chunks) == len(module.train_samples) == len(chunks.instruction)
    assert set(chunks.demo_index.tolist()) == set(module.train_indices)  # and none of the validation demos
    for index in range(0, len(chunks), 7):
        sample = module.train_samples[SampleKey(index, 0)]
        for name in ("start_position", "start_quaternion", "start_gripper", "position", "quaternion", "gripper"):
            torch.testing.assert_close(getattr(chunks, name)[index], getattr(sample, name))
        assert torch.equal(chunks.action_is_pad[index], sample.action_is_pad)
        assert (chunks.instruction[index], int(chunks.frame_index[index])) == (
            sample.instruction,
            int(sample.frame_index),
        )


def test_of_many_frames_the_chunks_are_an_even_choice(
    root: Path, robot_demos: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "CHUNKS_AT_MOST", 13)
    module = ready(robot_demos(root, **TWO))  # 5 or fewer demos of 12 frames
    chunks, samples = module.statistics.chunks, len(module.train_samples)
    every = -(-samples // 13)
    assert len(chunks) == -(-samples // every) <= 13
    order = {index: number for number, index in enumerate(module.train_indices)}
    places = [12 * order[int(d)] + int(f) for d, f in zip(chunks.demo_index, chunks.frame_index, strict=True)]
    assert places == list(range(0, samples, every))


def test_of_many_frames_every_robot_has_its_own_choice_and_range(
    tmp_path: Path, native_demo: Any, change_metadata: Any, robot_demos: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a robot whose only demo lay between two evenly chosen frames of all demos got no chunks."""
    for number in range(7):
        folder = native_demo(tmp_path / f"demo_{number}", seed=number, cameras=CAMERAS, level=0.1 + 0.01 * number)
        if number == 2:
            change_metadata(folder, robot="panda")
    monkeypatch.setattr(module_under_test, "CHUNKS_AT_MOST", 2)
    data = robot_demos(tmp_path, cameras=CAMERAS, val_fraction=0.0)
    data.embodiments = ("yam", "panda")
    statistics = ready(data).statistics
    chunks = statistics.chunks
    assert chunks is not None
    assert chunks.embodiment is not None
    assert torch.bincount(chunks.embodiment).tolist() == [2, 2]
    assert list(zip(chunks.demo_index.tolist(), chunks.frame_index.tolist(), strict=True)) == [
        (0, 0), (2, 0), (2, 6), (4, 0)
    ]  # fmt: skip
    for name, robot_range in statistics.robot_ranges.items():
        reached = np.concatenate([demo.arms["right"].position for demo in data.demos if demo.robot == name])
        np.testing.assert_array_equal(robot_range, [reached.min(axis=0), reached.max(axis=0)])


# ------------------------------------------------------------------------------------------------------------- refusals


def test_demos_without_depth_are_named_and_theirs_is_unknown(
    root: Path, robot_demos: Make, native_demo: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = native_demo(root / "flat", cameras=CAMERAS, seed=9)
    add_depth(folder, "over")
    caplog.set_level(logging.WARNING, logger="keygrip")
    module = ready(robot_demos(root, **TWO, val_fraction=0.0))
    assert "1 of 7 demos hold no depth for all of over, front (first: flat)" in caplog.text
    number = next(index for index, demo in enumerate(module.demos) if demo.name == "flat")
    rows = [row for row in range(len(module.train_samples)) if module.train_samples.sample_demo[row] == number]
    sample = module.train_samples[SampleKey(rows[0], 0)]
    assert sample.depth[0].max() > 0
    assert (sample.depth[1] == 0).all()  # 0: depth is unknown
    for folder in root.glob("demo_*"):
        shutil.rmtree(folder)
    said = r"no demo holds depth for all of over, front \(first: flat\); use data\.depth=false, .*dino_multiview_no_d"
    with pytest.raises(ValueError, match=said):
        robot_demos(root, **TWO, val_fraction=0.0).setup("fit")
    batch = next(iter(ready(robot_demos(root, cameras=CAMERAS, val_fraction=0.0)).train_dataloader()))
    assert batch.depth is None


def test_a_demo_that_lacks_a_camera_is_broken(root: Path, robot_demos: Make) -> None:
    with pytest.raises(ValueError, match="it has no camera 'wrist'; it has over"):
        robot_demos(root, cameras=("over", "wrist")).setup("fit")


@pytest.mark.parametrize(("metres", "angle"), [(0.0, 0.0), (0.2, 22.6)])
def test_statistics_say_how_far_cameras_stand_apart(root: Path, robot_demos: Make, metres: float, angle: float) -> None:
    """Angles are measured from the middle of the workspace, half a metre below both cameras."""
    middle = np.array(ready(robot_demos(root, cameras=CAMERAS)).statistics.position_range).mean(axis=0)
    for folder in root.glob("demo_*"):
        with np.load(folder / "cameras.npz") as file:
            cases = dict(file)
        for name, side in (("over", -metres / 2), ("front", metres / 2)):
            pose = np.diag([1.0, -1.0, -1.0, 1.0])  # looks down
            pose[:3, 3] = -pose[:3, :3] @ (middle + [side, 0.0, 0.5])
            cases[f"{name}/world_to_camera"] = pose
        np.savez(folder / "cameras.npz", **cases)
    ((pair, apart),) = ready(robot_demos(root, cameras=CAMERAS)).statistics.apart.items()
    assert pair == CAMERAS
    assert apart.distance_m == pytest.approx(metres, abs=1e-6)
    assert apart.angle_deg == pytest.approx(angle, abs=0.05)


class MasksViews:
    masks_views = True


def asked(module: RobotDemos) -> RobotDemos:
    module.configure_for(MasksViews())
    return ready(module)


def test_of_a_model_that_masks_views_a_demo_may_lack_all_but_the_first(
    root: Path, robot_demos: Make, native_demo: Any, caplog: pytest.LogCaptureFixture
) -> None:
    native_demo(root / "half", cameras=("over",), seed=8)
    lost = native_demo(root / "lost", cameras=CAMERAS, seed=9)
    metadata = json.loads((lost / "metadata.json").read_text())
    metadata["cameras"]["front"]["uncalibrated"] = "its board was not seen"
    (lost / "metadata.json").write_text(json.dumps(metadata))
    native_demo(root / "blind", cameras=("front",), seed=10)
    settings = {**TWO, "val_fraction": 0.0, "augmentation": Augmentation(), "fit": "auto", "max_broken_share": 0.4}
    caplog.set_level(logging.WARNING, logger="keygrip")
    module = asked(robot_demos(root, **settings, cache_gb=0.1))
    assert "camera front is masked in 2 of 8 demos (first: half: it has no such camera)" in caplog.text
    assert [error.name for error in module.broken] == ["blind"]  # the first camera is still required
    assert module.statistics.cameras == CAMERAS
    lacking = {index for index, demo in enumerate(module.demos) if demo.name in ("half", "lost")}
    seen = set()
    for sample in (module.train_samples[SampleKey(row, 0)] for row in range(0, len(module.train_samples), 5)):
        absent = int(sample.demo_index) in lacking
        seen.add(absent)
        assert sample.view_mask.tolist() == [True, not absent]
        assert bool(sample.images[0].any())
        assert bool(sample.images[1].any()) != absent
        if absent:
            assert torch.equal(sample.view_world_to_camera[1], torch.eye(4))
            assert not sample.depth[1].any()
    assert seen == {True, False}
    whole = ready(robot_demos(root, **settings))  # for any other model these demos are broken
    assert sorted(error.name for error in whole.broken) == ["blind", "half", "lost"]
    row = module.train_samples.sample_demo.tolist().index(0)
    one, other = (each.train_samples[SampleKey(row, 0)] for each in (module, whole))
    for name in ("images", "view_intrinsics", "depth", "view_mask"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    with pytest.raises(ValueError, match=r"no demo has a calibrated and sound camera 'wrist', which data\.cameras"):
        asked(robot_demos(root, cameras=("over", "wrist"), max_broken_share=0.4))


@pytest.mark.parametrize("manifests", [False, True])
def test_of_a_model_that_masks_views_a_damaged_further_camera_is_masked_and_the_demo_stays(
    root: Path, robot_demos: Make, caplog: pytest.LogCaptureFixture, manifests: bool
) -> None:
    if manifests:
        make_manifests(root)
    sound = asked(robot_demos(root, **TWO, val_fraction=0.0))
    (root / "demo_2" / "rgb" / "front" / "000005.jpg").write_bytes(b"damaged")
    caplog.set_level(logging.WARNING, logger="keygrip")
    for _ in range(2):  # the findings of an earlier start are checked again
        caplog.clear()
        module = asked(robot_demos(root, **TWO, val_fraction=0.0))
        assert not module.broken
        assert "demo 'demo_2': camera 'front' is masked: " in caplog.text
        assert "camera front is masked in 1 of 6 demos (first: demo_2: " in caplog.text
        masked = module.origin["masked"]  # as in the run's metadata
        assert {name: list(views) for name, views in masked.items()} == {"demo_2": ["front"]}
        assert f"camera 'front' is masked: {masked['demo_2']['front']}" in caplog.text
        assert ("000005.jpg: it is not the file" if manifests else "frame 5 cannot be used") in caplog.text
        assert module.contents.keys() == sound.contents.keys()
        changed = [name for name, content in module.contents.items() if content != sound.contents[name]]
        assert changed == ["demo_2"]
    for row, number in enumerate(module.train_samples.sample_demo):
        whole = module.demos[number].name != "demo_2"
        assert module.train_samples[SampleKey(row, 0)].view_mask.tolist() == [True, whole]
    other = robot_demos(root, **TWO, val_fraction=0.0, max_broken_share=0.2)  # for any other model the demo is broken
    assert [error.name for error in ready(other).broken] == ["demo_2"]
    (root / "demo_2" / "rgb" / "over" / "000005.jpg").write_bytes(b"damaged")  # now the first camera is broken too
    first = asked(robot_demos(root, **TWO, val_fraction=0.0, max_broken_share=0.2))
    assert [error.name for error in first.broken] == ["demo_2"]
    assert (sound.origin["masked"], first.origin["masked"]) == ({}, {})


@pytest.mark.parametrize("frame", [0, 11])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("pixels", [None, (24, 24)])
@pytest.mark.quick_sets(4)
def test_a_further_camera_whose_first_or_last_image_is_damaged_is_masked(
    root: Path, robot_demos: Make, frame: int, verify: bool, pixels: tuple[int, int] | None
) -> None:
    """These two images are also decoded where nothing is verified."""
    settings = {**TWO, "val_fraction": 0.0, "verify": verify}
    sound = asked(robot_demos(root, **settings))

    def damage(camera: str) -> None:
        image = root / "demo_2" / "rgb" / camera / f"{frame:06d}.jpg"
        if pixels is None:
            image.write_bytes(b"damaged")
        else:
            Image.new("RGB", pixels).save(image)

    damage("front")
    module = asked(robot_demos(root, **settings))
    assert not module.broken
    masked = module.origin["masked"]
    assert {name: list(views) for name, views in masked.items()} == {"demo_2": ["front"]}
    assert ("not an image" if pixels is None else f"frame {frame} ") in masked["demo_2"]["front"]
    changed = [name for name, content in module.contents.items() if content != sound.contents[name]]
    assert changed == (["demo_2"] if verify else [])  # without a check there are no hashes of images
    for batch in module.train_dataloader():
        shown = [module.demos[int(number)].name != "demo_2" for number in batch.demo_index]
        assert batch.view_mask.tolist() == [[True, whole] for whole in shown]
    (broken,) = ready(robot_demos(root, **settings, max_broken_share=0.2)).broken  # for any other model
    assert (broken.name, "camera 'front'" in broken.reason) == ("demo_2", True)
    damage("over")
    (broken,) = asked(robot_demos(root, **settings, max_broken_share=0.2)).broken  # the first camera is needed
    assert (broken.name, "camera 'over'" in broken.reason) == ("demo_2", True)


@pytest.mark.parametrize("verify", [True, False])
def test_a_further_camera_whose_video_is_missing_is_masked(
    root: Path, robot_demos: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    monkeypatch.setattr(files, "VIDEO_FILE_S", 0.5)  # one file for each demo
    export_lerobot(root, tmp_path / "set", progress=False)
    videos = sorted((tmp_path / "set" / "videos" / "observation.images.front").rglob("*.mp4"))
    assert len(videos) == 6
    videos[2].unlink()
    settings = {"cameras": CAMERAS, "val_fraction": 0.0, "verify": verify}
    module = asked(robot_demos(tmp_path / "set", **settings))
    assert not module.broken
    masked = module.origin["masked"]
    assert [list(views) for views in masked.values()] == [["front"]]
    assert len(ready(robot_demos(tmp_path / "set", **settings, max_broken_share=0.2)).broken) == 1


def test_a_damaged_further_camera_is_masked_where_a_lag_is_corrected(
    root: Path, robot_demos: Make, tmp_path: Path
) -> None:
    make_manifests(root)
    (root / "demo_2" / "rgb" / "front" / "000005.jpg").write_bytes(b"damaged")
    file = tmp_path / "calibration.yaml"
    head = "schema: keygrip.calibration/1\nconventions: {camera: opencv, pixel: corner, length: m}\n"
    file.write_text(head + "corrections: {over: {lag_frames: 1}}")
    module = asked(robot_demos(root, **TWO, val_fraction=0.0, calibration=str(file)))
    assert not module.broken
    assert {name: list(views) for name, views in module.origin["masked"].items()} == {"demo_2": ["front"]}


def test_a_further_cameras_frame_that_cannot_be_read_in_training_is_masked_and_counted(
    root: Path, robot_demos: Make, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**TWO, "val_fraction": 0.0, "verify": False, "augmentation": Augmentation()}
    module, other = asked(robot_demos(root, **settings)), ready(robot_demos(root, **settings))
    (root / "demo_2" / "rgb" / "front" / "000005.jpg").write_bytes(b"damaged")
    caplog.set_level(logging.WARNING, logger="keygrip")
    masked = []
    for batch in module.train_dataloader():
        for row in (~batch.view_mask).any(dim=1).nonzero().flatten().tolist():
            masked.append((module.demos[int(batch.demo_index[row])].name, int(batch.frame_index[row])))
            assert batch.view_mask[row].tolist() == [True, False]
            assert not batch.images[row, 1].any()
            assert batch.images[row, 0].any()
    assert masked == [("demo_2", 5)]
    assert (module.skipped.count, module.skipped.seen) == (1, len(module.train_samples))
    assert "demo 'demo_2': frame 5 of camera 'front' cannot be read" in caplog.text
    assert "this view is masked" in caplog.text
    frames = [
        (other.demos[int(number)].name, int(frame))
        for batch in other.train_dataloader()
        for number, frame in zip(batch.demo_index, batch.frame_index, strict=True)
    ]
    assert ("demo_2", 5) not in frames  # for any other model the sample is replaced


def test_a_sample_of_several_views_that_cannot_be_read_counts_once(
    tmp_path: Path, native_demo: Any, robot_demos: Make
) -> None:
    three = ("over", "front", "side")
    folder = native_demo(tmp_path / "root" / "demo", cameras=three, seed=0)
    module = asked(robot_demos(tmp_path / "root", cameras=three, val_fraction=0.0, verify=False))
    for camera in three[1:]:
        (folder / "rgb" / camera / "000005.jpg").write_bytes(b"damaged")
    masked = sum(int((~batch.view_mask).sum()) for batch in module.train_dataloader())
    assert (masked, module.skipped.count) == (2, 1)
    reason = next(iter(module.skipped.reasons))
    assert [f"frame 5 of camera '{camera}' cannot be read" in reason for camera in three] == [False, True, True]


class ReadsOver:
    reads_calibration = ("over",)


def test_of_a_model_that_reads_one_cameras_calibration_the_other_needs_none(root: Path, robot_demos: Make) -> None:
    def lose(camera: str, *names: str) -> None:
        for name in names:
            path = root / name / "metadata.json"
            metadata = json.loads(path.read_text())
            metadata["cameras"][camera]["uncalibrated"] = "its board was not seen"
            path.write_text(json.dumps(metadata))

    whole = ready(robot_demos(root, **TWO, val_fraction=0.0))
    lose("front", "demo_1", "demo_3")
    lose("over", "demo_4")
    module = robot_demos(root, **TWO, val_fraction=0.0, max_broken_share=0.2)
    module.configure_for(ReadsOver())
    ready(module)
    assert [str(error) for error in module.broken] == [
        "demo 'demo_4': camera 'over' is not calibrated, which this model needs: its board was not seen"
    ]
    names = [demo.name for demo in module.demos]
    assert names == [f"demo_{number}" for number in (0, 1, 2, 3, 5)]
    for index, name in enumerate(names):
        one, other = (
            each.train_samples[SampleKey(each.train_samples.sample_demo.tolist().index(at), 0)]
            for each, at in ((module, index), (whole, int(name[-1])))
        )
        assert torch.equal(one.images, other.images)  # images of an uncalibrated camera are still used
        assert one.view_mask.all()
        assert torch.equal(one.view_world_to_camera[0], other.view_world_to_camera[0])
        assert torch.equal(one.view_world_to_camera[1], torch.eye(4)) == (name in ("demo_1", "demo_3"))


class ReadsWhatThereIs:
    reads_calibration = ()  # decided by the statistics


def test_statistics_name_the_cameras_that_are_calibrated_in_all_demos_of_all_roots(
    root: Path, robot_demos: Make, caplog: pytest.LogCaptureFixture
) -> None:
    second = root.parent / "second"
    shutil.copytree(root, second)
    path = second / "demo_2" / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["cameras"]["front"]["uncalibrated"] = "its board was not seen"
    path.write_text(json.dumps(metadata))
    found = []
    for roots in (str(root), [str(root), str(second)]):
        module = robot_demos(roots, cameras=CAMERAS)
        module.configure_for(ReadsWhatThereIs())
        with caplog.at_level("INFO"):
            found.append(ready(module).statistics.calibrated)
        assert not module.broken
    assert found == [("over", "front"), ("over",)]
    said = "camera front is not calibrated in 1 of 12 demos (first: second/demo_2: its board was not seen)"
    assert caplog.text.count("is not calibrated in") == 1
    assert said in caplog.text


def test_views_are_dropped_at_random_in_training_alone(root: Path, robot_demos: Make) -> None:
    settings = {"cameras": CAMERAS, "augmentation": Augmentation()}
    module, again = (asked(robot_demos(root, **settings, view_dropout=0.3)) for _ in range(2))
    masks = []
    for epoch in range(6):
        for row in range(len(module.train_samples)):
            sample = module.train_samples[SampleKey(row, epoch)]
            masks.append(sample.view_mask)
            assert bool(sample.images[1].any()) == bool(sample.view_mask[1])
            if row % 17 == 0:  # depends on the sample and the epoch only, so that a resumed run samples the same
                same = again.train_samples[SampleKey(row, epoch)]
                assert torch.equal(sample.images, same.images)
                assert torch.equal(sample.view_mask, same.view_mask)
    shown = torch.stack(masks).float()
    assert bool((shown[:, 0] == 1).all())
    assert abs(float(shown[:, 1].mean()) - 0.7) < 4 * (0.21 / len(shown)) ** 0.5
    assert bool(next(iter(module.val_dataloader())).view_mask.all())
    assert not torch.equal(
        shown[: len(module.train_samples)], shown[len(module.train_samples) :][: len(module.train_samples)]
    )
    plain, none = asked(robot_demos(root, **settings)), ready(robot_demos(root, **settings, view_dropout=0.0))
    assert torch.equal(plain.train_samples[SampleKey(3, 1)].images, none.train_samples[SampleKey(3, 1)].images)
    with pytest.raises(ValueError, match=r"data\.view_dropout=0\.3: this model masks no views"):
        robot_demos(root, **settings, view_dropout=0.3).configure_for(object())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"view_dropout": 0.2}, r"view_dropout=0\.2.*several data\.cameras"),
        ({"cameras": CAMERAS, "view_dropout": 1.0}, r"view_dropout=1\.0 must be at least 0 and below 1"),
        ({"cameras": ("front", "over")}, "data.camera=over first"),
        ({"cameras": ("over", "over")}, "each camera once"),
        ({"cameras": ()}, "each camera once"),
        ({"depth": True}, "data.depth=true needs data.cameras"),
    ],
)
def test_bad_settings_are_named(root: Path, robot_demos: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        robot_demos(root, **changes)


def test_recordings_of_the_tasks_own_camera_keep_their_folder() -> None:
    plain = {"recorder": "keygrip.recording.demonstrations.record", "task": {"name": "pick"}}
    before = Recording(**plain).root  # type: ignore[arg-type]
    assert before == Recording(**plain, cameras=None).root  # type: ignore[arg-type]
    assert Recording(**plain, cameras=CAMERAS).root != before  # type: ignore[arg-type]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full((40, 48), 200, np.uint8), r"000000\.png: depth holds uint8; uint16 millimetres are needed"),
        (np.zeros((40, 48, 3), np.uint8), r"000000\.png: depth must have one channel, it has shape \(40, 48, 3\)"),
    ],
)
def test_depth_images_that_are_not_uint16_are_refused(
    root: Path, robot_demos: Make, values: np.ndarray, said: str, verify: bool
) -> None:
    """Values with 8 bits, such as a picture of depth, would count as distances up to 25 cm."""
    for frame in range(12):
        Image.fromarray(values).save(root / "demo_2" / "depth" / "over" / f"{frame:06d}.png")
    settings = {"val_fraction": 0.0, "max_broken_share": 0.2, "verify": verify}
    module = ready(robot_demos(root, **TWO, **settings))
    (error,) = module.broken
    assert error.name == "demo_2"
    assert re.search(r"camera 'over': .*" + said, error.reason)
    assert len(ready(robot_demos(root, cameras=CAMERAS, **settings)).demos) == 6  # depth is not used
    Image.fromarray(np.full((20, 24), 900, np.uint16)).save(root / "demo_3" / "depth" / "front" / "000000.png")
    module = ready(robot_demos(root, **TWO, **settings | {"max_broken_share": 0.4}))
    assert [error.name for error in module.broken] == ["demo_2", "demo_3"]


def test_depth_that_passed_an_earlier_check_is_checked_again(root: Path, robot_demos: Make, tmp_path: Path) -> None:
    """Regression: `verified.json` of a version that cast any depth to uint16 kept 8-bit depth in use."""
    for frame in range(12):
        Image.fromarray(np.full((40, 48), 200, np.uint8)).save(root / "demo_2" / "depth" / "over" / f"{frame:06d}.png")
    settings: dict[str, Any] = {"cameras": CAMERAS, "val_fraction": 0.0, "max_broken_share": 0.2}
    demos = ready(robot_demos(root, **settings)).demos
    (verified,) = tmp_path.rglob("verified.json")

    def identity(demo: Demo, depth: bool) -> str:
        """Return the identity of a recording in that version."""
        files = [file for file in demo.path.rglob("*") if file.is_file()]
        stats = [(file.relative_to(demo.path).as_posix(), file.stat()) for file in files]
        lines = sorted(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)
        text = f"{demo_fingerprint(demo)}\n{list(CAMERAS)}\n{depth}\n" + "\n".join(lines)
        return hashlib.sha256(text.encode()).hexdigest()

    kept = json.loads(verified.read_text())
    assert set(kept) == {identity(demo, depth=False) for demo in demos}  # these need no second check
    verified.write_text(json.dumps({identity(demo, True): kept[identity(demo, False)] for demo in demos}))
    (error,) = ready(robot_demos(root, **settings, depth=True)).broken
    assert error.name == "demo_2"
    assert "depth holds uint8" in error.reason


def test_optional_views_with_unusable_depth_are_masked_without_verification(root: Path, robot_demos: Make) -> None:
    Image.fromarray(np.full((40, 48), 200, np.uint8)).save(root / "demo_2" / "depth" / "front" / "000011.png")
    module = asked(robot_demos(root, **TWO, val_fraction=0.0, verify=False))
    assert [demo.name for demo in module.demos if "damaged" in demo.source] == ["demo_2"]
    assert "depth holds uint8" in module.origin["masked"]["demo_2"]["front"]
