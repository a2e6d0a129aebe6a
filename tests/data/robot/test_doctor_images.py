"""Images compared with poses: flips, lags, moved and wrongly calibrated cameras are reported, sound sets are not, and
self-calibration recovers the camera. Images are the robot's silhouette over a textured table."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from five_joint_arm import MJCF
from looking import looking_at
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation

from keygrip.data.robot.calibration import read_calibration
from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.doctor import Finding, doctor, images_and_poses
from keygrip.data.robot.doctor.calibrate import calibrate
from keygrip.data.robot.doctor.causes import Cause, other_image_size, other_reading
from keygrip.data.robot.doctor.examination import Examination, yam_model
from keygrip.data.robot.doctor.images_and_poses import ComparedCamera, _check_demos, check_images_and_poses, lag_start
from keygrip.data.robot.doctor.not_compared import EXPLAINED
from keygrip.data.robot.doctor.overlays import FITTED, RECORDED
from keygrip.data.robot.doctor.registration import FOCAL, LAG, NUMBERS, Fit, agreement_of, half_contrast_offsets
from keygrip.data.robot.doctor.run import examine, no_fault_in
from keygrip.data.robot.doctor.search import starts
from keygrip.data.robot.doctor.silhouettes import move_camera, project_points, splat
from keygrip.data.robot.doctor.views import make_view, place, place_all
from keygrip.data.robot.native_writer import ArmPose, CameraPose, DemoWriter
from keygrip.data.robot.schema import ArmTrajectory, Demo
from keygrip.robots.inverse_kinematics import pointing_down, solve
from keygrip.robots.kinematics import forward_kinematics
from keygrip.robots.model_file import yam_surface

SIDE, FRAMES, DEMOS = 128, 24, 3
INTRINSICS = np.array([[248.0, 0, 64.0], [0, 248.0, 64.0], [0, 0, 1]])


POSE = looking_at(np.array([0.95, -0.45, 0.75]), np.array([0.3, 0.0, 0.06]))
SIDE_POSE = looking_at(np.array([0.4, 0.95, 0.6]), np.array([0.3, 0.0, 0.06]))


@dataclass(frozen=True)
class Recorded:
    joints: np.ndarray
    position: np.ndarray
    quaternion: np.ndarray
    gripper: np.ndarray
    images: np.ndarray
    intrinsics: np.ndarray = field(default_factory=lambda: INTRINSICS)
    pose: np.ndarray = field(default_factory=lambda: POSE)


@cache
def sound(number: int, tilt: float = 0.3) -> Recorded:
    """Return a recording in which the gripper moves over the table, rotates, and moves down and up."""
    rng = np.random.default_rng(number)
    corners = np.array(
        [[0.3, -0.14, 0.2], [0.36, 0.1, 0.16], [0.32, 0.12, 0.05], [0.24, -0.05, 0.12], [0.3, -0.1, 0.05]]
    )
    corners = corners + rng.uniform(-0.03, 0.03, corners.shape)
    at = np.linspace(0, FRAMES - 1, len(corners))
    path = np.stack([np.interp(np.arange(FRAMES), at, corners[:, axis]) for axis in range(3)], axis=1)
    yaw = np.interp(np.arange(FRAMES), at, rng.uniform(-0.8, 0.8, len(corners)))
    joints, guess = [], np.array([0.0, 1.2, 1.4, -1.0, 0.0, 0.0])
    for point, angle in zip(path, yaw, strict=True):
        guess = solve(point, pointing_down(float(angle), tilt), guess).joints
        joints.append(guess)
    position, quaternion = forward_kinematics(np.stack(joints))
    signs = np.where((quaternion[1:] * quaternion[:-1]).sum(axis=1) < 0, -1.0, 1.0)
    quaternion[1:] *= np.cumprod(signs)[:, None]
    gripper = np.interp(np.arange(FRAMES), [0, 8, 12, FRAMES], [1.0, 1.0, 0.3, 0.3])
    images = shown(np.stack(joints), gripper, POSE)
    return Recorded(np.stack(joints), position, quaternion, gripper, images)


def shown(joints: np.ndarray, gripper: np.ndarray, pose: np.ndarray, base: Sequence[float] = (0, 0, 0)) -> np.ndarray:
    """Render the arm over a table: [N, SIDE, SIDE, 3]."""
    points = yam_surface().at(joints, gripper) + np.array(base, dtype=np.float32)
    pixels, _ = project_points(points, INTRINSICS, pose)
    mask, _ = splat(pixels, SIDE, SIDE)
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    table = np.stack([170 + 20 * ((x // 16 + y // 16) % 2), 150 + 0 * x, 120 + 0 * x], axis=-1).astype(np.uint8)
    return np.where(mask[..., None], np.array([60, 62, 70], dtype=np.uint8), table)


Fault = Callable[[Recorded, int], Recorded]


def write(root: Path, fault: Fault, joints: bool = True, told: bool = False, robot: str = "yam") -> Path:
    """Write demos. `told`: with commands, which are the poses of the sound arm at the next frame."""
    for number in range(DEMOS):
        demo, following = fault(sound(number), number), sound(number)
        with DemoWriter(root / f"demo_{number}", robot, "pick", "pick up the cube", 10.0) as writer:
            for i in range(FRAMES):
                arm = ArmPose(
                    demo.position[i], demo.quaternion[i], float(demo.gripper[i]), demo.joints[i] if joints else None
                )
                camera = CameraPose(demo.intrinsics, demo.pose)
                n = min(i + 1, FRAMES - 1)
                command = ArmPose(following.position[n], following.quaternion[n], float(following.gripper[n]))
                images, commanded = {"over": demo.images[i]}, {"right": command} if told else None
                writer.add(i * 100_000_000, images, {"over": camera}, {"right": arm}, commanded)
    return root


@dataclass(frozen=True)
class Held:
    """Frames in memory."""

    images: np.ndarray

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def __len__(self) -> int:
        return len(self.images)


def found(tmp_path: Path, fault: Fault, joints: bool = True, told: bool = False) -> list[Finding]:
    return doctor(write(tmp_path / "data", fault, joints, told), tmp_path / "out", progress=False).findings


def same(demo: Recorded, number: int) -> Recorded:
    return demo


def mirrored(demo: Recorded, number: int) -> Recorded:
    return replace(demo, images=demo.images[:, :, ::-1])


def late_once(demo: Recorded, number: int) -> Recorded:
    return replace(demo, images=demo.images[np.maximum(np.arange(FRAMES) - 2, 0)]) if number == 1 else demo


def long_lens(demo: Recorded, number: int) -> Recorded:
    return replace(demo, intrinsics=INTRINSICS * [[1.12, 1, 1], [1, 1.12, 1], [1, 1, 1]])


def cropped(demo: Recorded, number: int) -> Recorded:
    return replace(demo, images=demo.images[:, 12:-12, 12:-12])


def moved_once(demo: Recorded, number: int) -> Recorded:
    return replace(demo, pose=move_camera(POSE, np.array([0.06, -0.05, 0.03, 0, 0, 0]))) if number == 2 else demo


def exchanged_once(demo: Recorded, number: int) -> Recorded:
    return replace(demo, images=demo.images[..., ::-1]) if number == 0 else demo


@pytest.mark.parametrize(
    ("fault", "joints", "check", "cause", "demos"),
    [
        (mirrored, False, "flipped_images", "images mirrored left-right", 3),
        pytest.param(late_once, True, "image_lag", "images 2 frames late", 1, marks=pytest.mark.slow),
        pytest.param(long_lens, True, "registration", "focal length off by", 3, marks=pytest.mark.slow),
        pytest.param(
            cropped,
            True,
            "registration",
            "cropped or resized images with old K (of 128 x 128",
            3,
            marks=pytest.mark.slow,
        ),
        pytest.param(moved_once, False, "moved_camera", "camera moved by", 1, marks=pytest.mark.slow),
        pytest.param(exchanged_once, True, "colour_order", "colour order BGR", 1, marks=pytest.mark.slow),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_fault_is_named_with_its_demos(tmp_path, fault, joints, check, cause, demos):
    findings = found(tmp_path, fault, joints)
    assert [finding.check for finding in findings] == [check], [str(finding) for finding in findings]
    assert findings[0].cause.startswith(cause)
    assert len(findings[0].demos) == demos
    assert findings[0].camera == "over"


@pytest.mark.slow
def test_what_a_camera_of_its_own_would_explain_in_each_demo_is_one_reading_of_all_poses(tmp_path):
    def conjugated(demo: Recorded, number: int) -> Recorded:
        upright = sound(number, 0.08)  # so that the arm can reach the conjugated poses, too
        return replace(upright, quaternion=upright.quaternion * [1, -1, -1, -1])

    demos = [reference.read() for reference in find_demos(write(tmp_path / "data", conjugated, joints=False))]
    pairs = {demo.name: (make_view(demo, "over", 8), place(demo, "right")) for demo in demos}
    exam = Examination(demos, frames_per_demo=8, height_bins=32, pred_size=56)
    _check_demos(exam, ComparedCamera("over", "right", pairs))
    assert [finding.cause for finding in exam.findings] == ["quaternions conjugated (world to gripper)"]
    assert exam.findings[0].demos == ("demo_0", "demo_1", "demo_2")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        pytest.param(lambda p, q: (1.1 * p, q), "positions scaled by 1.", marks=pytest.mark.slow),
        pytest.param(
            lambda p, q: (p, q * [1, -1, -1, -1]), "quaternions conjugated (world to gripper)", marks=pytest.mark.slow
        ),
    ],
    ids=["scaled", "conjugated"],
)
def test_images_show_that_it_is_the_reached_track_which_is_wrong(tmp_path, change, cause):
    def wrong(demo: Recorded, number: int) -> Recorded:
        position, quaternion = change(demo.position, demo.quaternion)
        return replace(demo, position=position, quaternion=quaternion)

    findings = found(tmp_path, wrong, joints=False, told=True)
    assert any(finding.check == "pose_reading" and finding.cause.startswith(cause) for finding in findings), findings
    assert not [finding for finding in findings if finding.check.startswith("command")]


LEFT_BASE = [0.0, 0.4, 0.0]
WIDE_POSE = looking_at(np.array([1.4, -0.3, 1.1]), np.array([0.3, 0.2, 0.06]))


def two_armed(folder: Path, late: int = 0) -> list[Demo]:
    """Return demos of two arms side by side, both visible in the images. The images are `late` frames late."""
    demos = []
    for number, reference in enumerate(find_demos(write(folder, same))):
        right, left, demo = sound(number), sound(number + DEMOS), reference.read()
        images = np.minimum(  # the arms are darker than the table
            shown(right.joints, right.gripper, WIDE_POSE), shown(left.joints, left.gripper, WIDE_POSE, LEFT_BASE)
        )[np.clip(np.arange(FRAMES) - late, 0, FRAMES - 1)]
        poses = np.broadcast_to(WIDE_POSE, (FRAMES, 4, 4))
        track = replace(demo.cameras["over"], world_to_camera=poses, frames=Held(images))
        arms = {
            "left": ArmTrajectory(left.position + LEFT_BASE, left.quaternion, left.gripper, joints=left.joints),
            "right": demo.arms["right"],
        }
        demos.append(replace(demo, cameras={"over": track}, arms=arms))
    return demos


@pytest.mark.parametrize("late", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_all_that_moves_in_the_images_of_two_arms_is_compared_with_both(tmp_path, late):
    exam = Examination(two_armed(tmp_path / "data", late), frames_per_demo=8, height_bins=32, pred_size=56)
    check_images_and_poses(exam)
    causes = [finding.cause for finding in exam.findings]
    assert causes == (["images 2 frames late"] if late else []), exam.findings
    if not late:
        agreement = exam.measures["camera/over/arm/left and right/agreement"]
        assert min(agreement.values()) > 0.8, agreement


def test_two_arms_are_not_compared_where_nothing_says_where_a_base_stands(tmp_path):
    demos = two_armed(tmp_path / "data")
    demos = [replace(d, arms=d.arms | {"left": replace(d.arms["left"], joints=None)}) for d in demos]
    exam = Examination(demos, frames_per_demo=8, height_bins=32, pred_size=56)
    check_images_and_poses(exam)
    assert exam.findings == []
    assert exam.measures["camera/over/arm/left and right/compared_demos"] == 0


@pytest.mark.parametrize("every", [1, 7])
def test_points_of_two_arms_have_the_speed_at_which_they_move(tmp_path, every):
    robot = place_all(two_armed(tmp_path / "data")[0])
    assert robot is not None
    when = np.array([3.0, 8.5, 11.0, 14.0])
    way = robot.at(when + 0.5, every) - robot.at(when - 0.5, every)
    last = way.shape[1] - 1
    which = np.array([0, last // 2 - 1, last // 2 + 1, last])
    speed = robot.speed(when, which, every)
    np.testing.assert_allclose(speed, way[np.arange(4), which], atol=1e-5)
    assert np.linalg.norm(speed, axis=1).max() > 1e-3


@pytest.mark.slow
def test_joints_in_degrees_are_all_that_is_said(tmp_path):
    findings = found(tmp_path, lambda demo, number: replace(demo, joints=np.degrees(demo.joints)))
    assert [finding.check for finding in findings] == ["joint_unit"], [str(finding) for finding in findings]


@pytest.mark.parametrize("exchanged", [(0, 1, 2), pytest.param((1,), marks=pytest.mark.slow)])
def test_cameras_under_each_others_names_are_named(tmp_path, exchanged):
    demos = []
    for number, demo in enumerate(find_demos(write(tmp_path / "data", same))):
        recorded, track = sound(number), demo.read().cameras["over"]
        images = shown(recorded.joints, recorded.gripper, SIDE_POSE)
        poses = np.broadcast_to(SIDE_POSE, (FRAMES, 4, 4))
        cameras = {"over": track, "side": replace(track, world_to_camera=poses, frames=Held(images))}
        if number in exchanged:
            frames = {"over": cameras["side"].frames, "side": cameras["over"].frames}
            cameras = {name: replace(cameras[name], frames=frames[name]) for name in cameras}
        demos.append(replace(demo.read(), cameras=cameras))
    exam = Examination(demos, frames_per_demo=8, height_bins=32, pred_size=56)
    check_images_and_poses(exam)
    names = tuple(f"demo_{number}" for number in exchanged)
    assert [(finding.cause, finding.demos) for finding in exam.findings] == [
        ("images or calibrations of over and side exchanged", names),
        ("images or calibrations of side and over exchanged", names),
    ]


def examined(root: Path, output: Path, caplog: pytest.LogCaptureFixture, **settings: bool) -> tuple[dict, str]:
    """Return the counts of the step, and its message "no fault found ..." or an empty string."""
    caplog.set_level("INFO")
    counts = examine(root, output, "auto", None, None, 12, 32, 56, settings.get("compare_images", True))
    return counts, next((text for text in caplog.messages if text.startswith("no fault found")), "")


@pytest.mark.parametrize("fault", [same, mirrored])
def test_an_arm_that_nothing_is_known_of_is_said_not_to_be_compared(tmp_path, caplog, fault):
    """The gripper's own motion reveals mirrored images, and nothing else."""
    root = write(tmp_path / "data", fault, robot="panda")
    counts, last = examined(root, tmp_path / "out", caplog)
    report = json.loads((tmp_path / "out/report.json").read_text())
    causes = [finding["cause"] for finding in report["findings"] if finding["check"] != "not_compared"]
    assert causes == ([] if fault is same else ["images mirrored left-right"])
    (found,) = [finding for finding in report["findings"] if finding["check"] == "not_compared"]
    assert (found["severity"], found["camera"], found["demos"]) == ("warning", "over", ["demo_0", "demo_1", "demo_2"])
    assert "nothing says what robot 'panda' looks like" in found["what"]
    assert "robot_model.path=FILE" in found["advice"]
    assert (counts["errors"], counts["warnings"]) == (len(causes), len(causes) + 1 - counts["errors"])
    assert last == (
        f"no fault found in what was compared of {root}; images were not compared with poses: camera over, all demos"
        if fault is same
        else ""
    )


def test_an_arm_with_fewer_recorded_joints_than_its_model_is_said_not_to_be_compared(tmp_path, monkeypatch):
    """Fingers that `robot_model.fingers` does not name count as joints of the arm."""
    monkeypatch.setattr(images_and_poses, "check_own_motion", lambda *_: None)
    root, model = write(tmp_path / "data", same, robot="panda"), replace(yam_surface(), joints=8)
    exam = Examination([reference.read() for reference in find_demos(root)], 8, 32, 56)
    check_images_and_poses(exam, model).report(exam)
    (found,) = exam.findings
    assert (found.check, found.severity, len(found.demos)) == ("not_compared", "warning", DEMOS)
    assert "6 joints are recorded, the arm in robot_model.path has 8 (without robot_model.fingers)" in found.what
    assert found.advice.startswith("Name the joints that the opening moves with robot_model.fingers")
    with pytest.raises(ValueError, match=r"over: 6 joints are recorded, .* has 8 .*Name the joints that the opening"):
        calibrate(root, tmp_path / "fixed.yaml", "auto", None, None, 3, 4, model)


def test_two_arms_one_of_which_lacks_some_joints_are_said_not_to_be_compared(tmp_path):
    demos = two_armed(tmp_path / "data")
    demos = [replace(d, arms=d.arms | {"left": replace(d.arms["left"], joints=np.zeros((FRAMES, 5)))}) for d in demos]
    exam = Examination(demos, frames_per_demo=8, height_bins=32, pred_size=56)
    check_images_and_poses(exam).report(exam)
    (found,) = exam.findings
    assert (found.check, found.severity, len(found.demos)) == ("not_compared", "warning", DEMOS)
    assert "5 joints are recorded, a YAM has 6" in found.what


def test_wrong_intrinsics_of_one_camera_leave_the_others_compared(tmp_path, monkeypatch):
    compared = []

    def compare(exam: Examination, camera: ComparedCamera, small_images: object) -> bool:
        compared.append(camera.camera)
        return True

    monkeypatch.setattr(images_and_poses, "_compare_camera", compare)
    demos = [reference.read() for reference in find_demos(write(tmp_path / "data", same))]
    demos = [replace(demo, cameras=demo.cameras | {"side": demo.cameras["over"]}) for demo in demos]
    exam = Examination(demos, frames_per_demo=8, height_bins=32, pred_size=56)
    names = [demo.name for demo in demos]
    exam.add("intrinsics", "error", "measured", "advice", cause="cause", camera="side", demos=names)
    assert check_images_and_poses(exam).demos == {("side", EXPLAINED): names}
    assert compared == ["over"]


def test_faults_of_one_demo_leave_the_other_demos_compared(tmp_path, monkeypatch):
    compared: dict[str, float] = {}

    def compare(exam: Examination, camera: ComparedCamera, small_images: object) -> bool:
        compared.update({name: float(robot.opening[0]) for name, (_, robot) in camera.pairs.items()})
        return True

    monkeypatch.setattr(images_and_poses, "_compare_camera", compare)
    demos = [reference.read() for reference in find_demos(write(tmp_path / "data", same))]
    demos = [*demos, *(replace(demo, name=f"again_{number}") for number, demo in enumerate(demos[:2]))]
    exam = Examination(demos, frames_per_demo=8, height_bins=32, pred_size=56)
    exam.add("pose_direction", "error", "measured", "advice", cause="cause", arm="right", demos=["demo_0"])
    exam.add("intrinsics", "error", "measured", "advice", cause="cause", camera="over", demos=["demo_1"])
    exam.add("gripper_polarity", "error", "measured", "advice", cause="cause", arm="right", demos=["again_1"])
    assert check_images_and_poses(exam).demos == {("over", EXPLAINED): ["demo_1", "demo_0"]}
    assert compared == {"demo_2": 1.0, "again_0": 1.0, "again_1": 0.0}  # the inverted opening is corrected


def test_images_name_the_convention_of_one_demo_without_joints(tmp_path):
    def inverted(demo: Recorded, number: int) -> Recorded:
        if number != 1:
            return demo
        inverse = Rotation.from_quat(demo.quaternion, scalar_first=True).inv()
        quaternion = inverse.as_quat(scalar_first=True)
        return replace(demo, position=-inverse.apply(demo.position), quaternion=quaternion)

    root = write(tmp_path / "data", inverted, joints=False)
    demos = [reference.read() for reference in find_demos(root)][:2]
    pairs = {demo.name: (make_view(demo, "over", 8), place(demo, "right")) for demo in demos}
    compared = ComparedCamera("over", "right", pairs)
    usual = agreement_of([pairs["demo_0"]])
    moved = Fit(np.zeros(NUMBERS), np.zeros(NUMBERS), before=0.1, after=0.3 * usual, residual=1, points=99, cost=1)
    assert other_reading(compared, "demo_1", moved, usual) == "inverted"
    fits_well = replace(moved, after=usual)  # the camera of the demo was moved
    assert [other_reading(compared, name, fits_well, usual) for name in pairs] == [None, None]


def test_calibrating_an_arm_that_nothing_is_known_of_asks_for_its_model(tmp_path):
    root = write(tmp_path / "data", same, robot="panda")
    with pytest.raises(
        ValueError, match=r"over: nothing says what robot 'panda' looks like\. Name .*robot_model\.path"
    ):
        calibrate(root, tmp_path / "fixed.yaml", "auto", None, None, 3, 4)


def test_images_that_are_too_small_are_said_not_to_be_compared(tmp_path, caplog):
    def small(demo: Recorded, number: int) -> Recorded:
        return replace(demo, images=demo.images[:, ::2, ::2], intrinsics=INTRINSICS * [[0.5], [0.5], [1]])

    _, last = examined(write(tmp_path / "data", small), tmp_path / "out", caplog)
    assert "images were not compared with poses: camera over" in last
    (found,) = json.loads((tmp_path / "out/report.json").read_text())["findings"]
    assert (found["check"], found["severity"]) == ("not_compared", "warning")
    assert "images of 64 x 64 pixels are too small for it (the longer side needs 96)" in found["what"]
    with pytest.raises(ValueError, match=r"\(over: images of 64 x 64 .*Use the recording at 96 pixels or more\)"):
        calibrate(tmp_path / "data", tmp_path / "fixed.yaml", "auto", None, None, 3, 4)


def test_a_camera_on_the_hand_is_a_note_and_no_finding(tmp_path, caplog):
    root = write(tmp_path / "data", same)
    for number in range(DEMOS):
        file = root / f"demo_{number}/cameras.npz"
        arrays = dict(np.load(file))
        poses = np.repeat(np.reshape(arrays["over/world_to_camera"], (-1, 4, 4))[:1], FRAMES, axis=0)
        poses[:, 2, 3] += np.linspace(0, 0.05, FRAMES)
        np.savez(file, **arrays | {"over/world_to_camera": poses})
        (root / f"demo_{number}/manifest.json").unlink()
    counts, last = examined(root, tmp_path / "out", caplog)
    assert (counts["errors"], counts["warnings"], counts["notes"]) == (0, 0, 1)
    assert last.endswith("images were not compared with poses: camera over, all demos")
    (note,) = json.loads((tmp_path / "out/report.json").read_text())["notes"]
    assert (note["severity"], note["camera"]) == ("note", "over")
    assert "the camera moves within the demo" in note["what"]
    assert "No fault found in what was compared" in (tmp_path / "out/report.html").read_text()


def test_the_last_line_says_that_images_were_left_out(tmp_path, caplog):
    root = write(tmp_path / "data", same)
    _, last = examined(root, tmp_path / "out", caplog, compare_images=False)
    assert last == (
        f"no fault found in what was compared of {root}; images were not compared with poses (compare_images=false)"
    )


@pytest.mark.parametrize(("examined_count", "left_out"), [(50, True), (250, False)])
def test_the_last_line_says_how_many_demonstrations_were_examined(examined_count, left_out):
    exam = Examination([], 12, 32, 56, measures={"demos": 250, "examined": examined_count})
    part = "the 50 of 250 demonstrations of data/x that were examined (max_demos=null: all)" if left_out else "data/x"
    assert no_fault_in(exam, "data/x", True) == f"no fault found in {part}"
    assert no_fault_in(exam, "data/x", False) == (
        f"no fault found in what was compared of {part}; images were not compared with poses (compare_images=false)"
    )
    exam.add("not_compared", "note", "", "", cause="", demos=["a"], camera="over")
    assert no_fault_in(exam, "data/x", True) == (
        f"no fault found in what was compared of {part}; images were not compared with poses: camera over, a"
    )


@pytest.mark.parametrize(
    ("robot", "models", "known"),
    [
        ("yam", None, ("yam", "linear_4310")),
        ("bi_yam_follower", None, ("yam", "linear_4310")),
        ("i2rt_YAM", None, ("yam", "linear_4310")),
        ("miyamoto", None, None),
        ("panda", None, None),
        ("unknown", ["yam_pro", "crank_4310"], ("yam_pro", "crank_4310")),
    ],
)
def test_a_yam_is_known_by_its_models_or_by_its_name(robot, models, known):
    source = {} if models is None else {"models": {"right": models}}
    demo = SimpleNamespace(name="demo", robot=robot, source=source)
    assert yam_model(demo, "right") == known


@pytest.mark.slow
def test_a_demo_that_goes_with_no_image_is_not_passed_over(tmp_path):
    """Its poses match none of its images: no small change of camera or clock raises its agreement from 0."""

    def gone(demo: Recorded, number: int) -> Recorded:
        if number != 1:
            return demo
        tracks = ("joints", "position", "quaternion", "gripper")
        still = {name: np.repeat(getattr(demo, name)[:1], FRAMES, axis=0) for name in tracks}
        return replace(demo, **still)

    demos = [reference.read() for reference in find_demos(write(tmp_path / "data", gone))]
    exam = Examination(demos, frames_per_demo=8, height_bins=32, pred_size=56)
    check_images_and_poses(exam)
    assert [(found.check, found.demos) for found in exam.findings] == [("wrong_demo", ("demo_1",))]


def test_a_robot_that_is_in_no_image_is_nowhere_to_be_searched(tmp_path):
    demo = find_demos(write(tmp_path / "data", same))[0].read()
    away = np.diag([1.0, -1.0, -1.0, 1.0]) @ POSE
    view = replace(make_view(demo, "over", 8), world_to_camera=away)
    with np.errstate(all="raise"):
        assert starts([(view, place(demo, "right"))], best=3) == []


def test_a_search_over_images_of_several_sizes_uses_those_of_the_most_frequent_size(tmp_path):
    demo = find_demos(write(tmp_path / "data", same))[0].read()
    view, robot = make_view(demo, "over", 8), place(demo, "right")
    low = replace(view.with_images(view.images[:, 16:-16]), intrinsics=INTRINSICS - [[0, 0, 0], [0, 0, 16], [0, 0, 0]])
    expected = starts([(view, robot), (view, robot)], best=1)
    found = starts([(low, robot), (view, robot), (view, robot)], best=1)
    assert found[0][0] == expected[0][0]
    assert found[0][1].tolist() == expected[0][1].tolist()


@pytest.mark.parametrize("lag", [-4, 3])
def test_fit_of_a_demo_begins_at_the_lag_that_its_silhouettes_show(tmp_path, lag):
    def late(demo: Recorded, number: int) -> Recorded:
        return replace(demo, images=demo.images[np.clip(np.arange(FRAMES) - lag, 0, FRAMES - 1)])

    demo = find_demos(write(tmp_path / "data", late))[0].read()
    begun = lag_start((make_view(demo, "over", 8), place(demo, "right")), np.zeros(NUMBERS))
    assert begun.tolist() == [0, 0, 0, 0, 0, 0, 0, -lag]


def test_sound_set_gives_no_finding_and_a_whole_report(tmp_path):
    assert found(tmp_path, same) == []
    page = (tmp_path / "out/report.html").read_text()
    assert "No fault found" in page
    assert page.count("data:image/jpeg;base64,") == 4  # three overlays and a contact sheet
    assert "http" not in page


@pytest.mark.parametrize(("after", "check", "fitted"), [(0.8, "registration", True), (0.05, "disagreement", False)])
def test_overlays_of_a_camera_that_is_badly_wrong_show_it(tmp_path, monkeypatch, after, check, fitted):
    """The camera is rotated by 20 degrees, and a fit is found or not. The recorded outline is drawn in both cases, a
    fitted one only if there is a fit."""
    change = np.zeros(NUMBERS)
    change[2] = np.radians(20)
    fit = Fit(-change, np.zeros(NUMBERS), before=0.04, after=after, residual=1.0, points=100, cost=0.1)
    for name in ("fit", "wide_fit"):  # the real functions take half a minute
        monkeypatch.setattr(images_and_poses, name, lambda pairs: fit)
    monkeypatch.setattr(images_and_poses, "FITTED", 2)
    monkeypatch.setattr(images_and_poses, "camera_cause", lambda *_: Cause("turned", "by 20 degrees", "calibrate"))
    root = write(tmp_path / "data", lambda demo, number: replace(demo, pose=move_camera(POSE, change[:6])))
    exam = Examination([reference.read() for reference in find_demos(root)], 8, 32, 56)
    check_images_and_poses(exam)
    assert [finding.check for finding in exam.findings] == [check], [str(finding) for finding in exam.findings]
    assert exam.findings[0].demos == ("demo_0", "demo_1", "demo_2")
    assert len(exam.overlays) == 3
    for _, image in exam.overlays:
        assert (image == RECORDED).all(axis=-1).sum() > 100
        assert (image == FITTED).all(axis=-1).any() == fitted


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda demo: replace(demo, quaternion=np.roll(demo.quaternion, -1, axis=1)), "quaternions stored x, y, z, w"),
        (lambda demo: replace(demo, position=1.1 * demo.position), "positions scaled by 1.100"),
        (lambda demo: replace(demo, position=1.3 * demo.position), "positions scaled by 1.300"),
    ],
    ids=["misread", "scaled", "scaled more"],
)
def test_images_are_not_blamed_for_poses_that_joints_show_to_be_wrong(tmp_path, change, cause):
    errors = [f.cause for f in found(tmp_path, lambda demo, _: change(demo)) if f.severity == "error"]
    assert errors == [cause]


@pytest.mark.slow
def test_calibration_gives_the_camera_back_and_leaves_the_recording(tmp_path):
    turn = np.array([0.05, -0.04, 0.03, 0.02, -0.01, 0.02])

    def wrong(demo: Recorded, number: int) -> Recorded:
        late = demo.images[np.clip(np.arange(FRAMES) - 2, 0, FRAMES - 1)]
        return replace(
            demo,
            pose=move_camera(POSE, turn),
            images=late,
            intrinsics=INTRINSICS * [[1.06, 1, 1], [1, 1.06, 1], [1, 1, 1]],
        )

    root = write(tmp_path / "data", wrong)
    before = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    report = calibrate(root, tmp_path / "fixed.yaml", "auto", None, None, 3, 10)
    assert {path: path.read_bytes() for path in before} == before
    assert report["cameras"]["over"]["late_frames"] == pytest.approx(2, abs=0.2)
    demo = find_demos(root, calibration=tmp_path / "fixed.yaml")[0].read()
    track = demo.cameras["over"]
    off = track.world_to_camera[0] @ np.linalg.inv(POSE)
    centre = np.linalg.inv(track.world_to_camera[0])[:3, 3] - np.linalg.inv(POSE)[:3, 3]
    assert np.degrees(Rotation.from_matrix(off[:3, :3]).magnitude()) < 0.7
    assert np.linalg.norm(centre) < 0.01
    assert track.intrinsics[0, 0, 0] == pytest.approx(248.0, rel=0.02)
    assert len(demo) == FRAMES - 2
    # after the correction of the lag, image and pose belong together
    assert np.abs(track.frames.read(5).astype(int) - sound(0).images[5]).mean() < 3
    assert len(pickle.loads(pickle.dumps(track.frames))) == FRAMES - 2
    with pytest.raises(FileExistsError, match="name another file"):
        calibrate(root, tmp_path / "fixed.yaml", "auto", None, None, 3, 10)


def test_a_demo_of_an_unknown_model_is_left_out_of_the_calibration(tmp_path, monkeypatch, caplog):
    root = write(tmp_path / "data", same)
    file = root / "demo_1" / "metadata.json"
    metadata = json.loads(file.read_text())
    metadata["source"] = {"models": {"right": ["yam", "new_gripper"]}}
    file.write_text(json.dumps(metadata))
    used: list[str] = []

    def fitted(pairs):
        used[:] = [view.demo.name for view, _ in pairs]
        return Fit(np.full(NUMBERS, 0.1), np.full(NUMBERS, 0.01), 0.9, 0.9, residual=0.5, points=100, cost=0.1)

    monkeypatch.setattr("keygrip.data.robot.doctor.calibrate.best_fit", fitted)
    calibrate(root, tmp_path / "fixed.yaml", "auto", None, None, DEMOS, 4)
    assert used == [f"demo_{number}" for number in range(DEMOS) if number != 1]
    assert (tmp_path / "fixed.yaml").is_file()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("left out: demo 'demo_1': source.models.right: unknown gripper 'new_gripper'")
    calibrate(root, tmp_path / "own.yaml", "auto", None, None, DEMOS, 4, yam_surface())  # the demo's names are not used
    assert len(used) == DEMOS


@pytest.mark.parametrize(
    ("change", "sigma", "is_uncertain"),
    [
        (dict.fromkeys(range(NUMBERS), 0.02), 0.03, True),
        ({1: 0.06}, 0.03, False),  # the turn; sigma of turn and shift is 0.03 times the root of 3
        ({4: 0.06}, 0.03, False),  # the shift
        ({FOCAL: -0.04}, 0.03, False),
        ({LAG: 0.4}, 0.03, True),  # rounds to 0 frames
        ({LAG: 2.0}, 0.03, False),
        ({LAG: 2.0}, 3.0, True),
    ],
)
def test_corrections_within_their_standard_deviation_are_not_advised(
    tmp_path, monkeypatch, caplog, change, sigma, is_uncertain
):
    numbers = np.zeros(NUMBERS)
    numbers[list(change)] = list(change.values())
    found = Fit(numbers, np.full(NUMBERS, sigma), 0.9, 0.9, residual=0.5, points=100, cost=0.1)
    monkeypatch.setattr("keygrip.data.robot.doctor.calibrate.best_fit", lambda pairs: found)
    root = write(tmp_path / "data", same)
    with caplog.at_level("INFO"):
        calibrate(root, tmp_path / "my fix.yaml", "auto", None, None, 1, 4)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.split(",")[0] for text in warnings] == (
        ["camera over: no correction is larger than its standard deviation"] if is_uncertain else []
    )
    last = caplog.records[-1].getMessage()
    # the override is quoted, as the folder's name holds a space
    advice = "" if is_uncertain else f"; use them with \"data.calibration='{tmp_path}/my fix.yaml'\""
    assert last == f"corrections: {tmp_path}/my fix.yaml{advice}"


@pytest.mark.parametrize(("folder", "root"), [("data", "."), ("data/demo_0", ".."), ("", "data")])
def test_a_calibration_is_written_beside_the_data(tmp_path, monkeypatch, folder, root):
    write(tmp_path / "data", same)
    before = sorted((tmp_path / "data").rglob("*"))
    none = Fit(np.zeros(NUMBERS), np.ones(NUMBERS), 0.9, 0.9, residual=0.5, points=100, cost=0.1)
    monkeypatch.setattr("keygrip.data.robot.doctor.calibrate.best_fit", lambda pairs: none)
    monkeypatch.chdir(tmp_path / folder)
    report = calibrate(root, None, "auto", None, None, 1, 4)
    assert Path(report["output"]).resolve() == tmp_path.resolve() / "data_calibration.yaml"
    assert (tmp_path / "data_calibration.yaml").is_file()
    assert sorted((tmp_path / "data").rglob("*")) == before


def test_two_arms_one_of_which_has_no_joints_are_not_calibrated_and_the_reason_is_said(tmp_path, monkeypatch):
    demos = two_armed(tmp_path / "data")
    arms = {**demos[0].arms, "left": replace(demos[0].arms["left"], joints=None)}
    without = SimpleNamespace(format="native", read=lambda: replace(demos[0], arms=arms))
    monkeypatch.setattr("keygrip.data.robot.doctor.calibrate.find_demos", lambda *_: [without])
    with pytest.raises(
        ValueError, match=r"\(over: .*of several arms one has no recorded joints, .*\): run step=doctor"
    ):
        calibrate(tmp_path / "data", tmp_path / "fixed.yaml", "auto", None, None, 3, 4)


@pytest.mark.parametrize(
    ("output", "named"),
    [
        ("set/fixed.yaml", "robot/five.xml"),
        ("fixed.yaml", "set/robot/five.xml"),
        ("other/fixed.yaml", "fixed_robot_five.xml"),  # no path without `..` leads to the model: it is copied
    ],
)
def test_the_models_of_a_calibration_file_are_found_from_where_its_corrections_are_written(
    tmp_path, monkeypatch, output, named
):
    file, model = tmp_path / "set/calibration.yaml", tmp_path / "set/robot/five.xml"
    model.parent.mkdir(parents=True)
    model.write_text(MJCF)
    arm = {"model": "robot/five.xml", "tool": "tip", "joints": ["pan", "lift", "elbow", "flex", "roll"]}
    head = {"schema": "keygrip.calibration/1", "conventions": {"camera": "opencv", "pixel": "corner", "length": "m"}}
    file.write_text(yaml.safe_dump(head | {"arms": {"right": arm, "left": {"arm": "yam", "gripper": "linear_4310"}}}))
    root = write(tmp_path / "data", same)
    demo = find_demos(root)[0].read()
    foreign = SimpleNamespace(format="lerobot_v3", read=lambda: demo)
    monkeypatch.setattr("keygrip.data.robot.doctor.calibrate.find_demos", lambda *_: [foreign])
    found = Fit(np.zeros(NUMBERS), np.ones(NUMBERS), 0.9, 0.9, residual=0.5, points=100, cost=0.1)
    monkeypatch.setattr("keygrip.data.robot.doctor.calibrate.best_fit", lambda pairs: found)
    monkeypatch.chdir(tmp_path)
    calibrate(root, output, "auto", "set/calibration.yaml", None, 1, 4)
    written = tmp_path / output
    content = yaml.safe_load(written.read_text())
    assert content["arms"]["right"] == arm | {"model": named}
    assert content["arms"]["left"] == {"arm": "yam", "gripper": "linear_4310"}
    assert read_calibration(written).arms["right"].model.read_text() == MJCF
    assert yaml.safe_load(file.read_text())["arms"]["right"] == arm, "what was read is left as it is"

    written.unlink()
    if output.startswith("other"):
        (written.parent / named).write_text("mine")
        with pytest.raises(FileExistsError, match=r"fixed_robot_five\.xml is another file: name another place"):
            calibrate(root, output, "auto", "set/calibration.yaml", None, 1, 4)
        assert (written.parent / named).read_text() == "mine"
    model.unlink()
    with pytest.raises(FileNotFoundError, match=r"five\.xml, the model of an arm in .*, is missing"):
        calibrate(root, output, "auto", "set/calibration.yaml", None, 1, 4)
    assert not written.exists()


def test_corrections_are_not_made_on_top_of_others(tmp_path):
    """The new file would replace the first one and so undo its corrections."""
    root, file = write(tmp_path / "data", same), tmp_path / "first.yaml"
    head = "schema: keygrip.calibration/1\nconventions: {camera: opencv, pixel: corner, length: m}\n"
    file.write_text(head + "corrections: {over: {focal_factor: 1.1}}")
    with pytest.raises(ValueError, match=r"first\.yaml holds corrections already"):
        calibrate(root, tmp_path / "second.yaml", "auto", file, None, 3, 10)
    assert not (tmp_path / "second.yaml").exists()


def test_corrections_that_cannot_be_are_refused(tmp_path):
    root = write(tmp_path / "data", same)
    file = tmp_path / "c.yaml"
    head = "schema: keygrip.calibration/1\nconventions: {camera: opencv, pixel: corner, length: m}\n"
    for text, said in (
        ("corrections: {over: {focal_factor: 9}}", "0.2 to 5"),
        ("corrections: {over: {lag: 2}}", "mapping with"),
        ("corrections: {over: {camera_change: [[1]]}}", "4 x 4"),
    ):
        file.write_text(head + text)
        with pytest.raises(ValueError, match=said):
            find_demos(root, calibration=file)
    file.write_text(head + "corrections: {side: {lag_frames: 1}}")
    with pytest.raises(ValueError, match="corrects camera 'side'"):
        find_demos(root, calibration=file)[0].read()
    file.write_text(head)
    with pytest.raises(ValueError, match="has no effect"):
        find_demos(root, calibration=file)
    file.write_text(head + "corrections: {over: {focal_factor: 1.1}, side: {lag_frames: 1}}")
    demo = find_demos(root, calibration=file)[0].read()  # a demo may lack a camera
    before = find_demos(root)[0].read()
    focal = demo.cameras["over"].intrinsics[0, 0, 0] / before.cameras["over"].intrinsics[0, 0, 0]
    assert (focal, len(demo)) == (pytest.approx(1.1), len(before))
    assert demo.source["notes"] == [f"{file} corrects camera 'side', which not every demo has"]


@pytest.mark.parametrize(
    ("centre", "size"),
    [
        ((64.0, 64.0), None),
        ((70.0, 64.0), None),
        ((66.0, 66.0), None),
        ((80.0, 80.0), (160, 160)),
        ((48.0, 48.2), (96, 96)),
    ],
)
def test_a_principal_point_says_whose_images_a_camera_matrix_is_of(centre, size):
    matrix = np.array([[[200.0, 0, centre[0]], [0, 200.0, centre[1]], [0, 0, 1]]])
    track = SimpleNamespace(intrinsics=matrix, width=128, height=128)
    view = SimpleNamespace(camera="over", demo=SimpleNamespace(cameras={"over": track}))
    assert other_image_size(view) == size


@pytest.mark.parametrize("contrast", [30, 60, 200])
@pytest.mark.parametrize("blur", [0.0, 0.8])
@pytest.mark.parametrize("place", [20.0, 20.3, 20.8])
def test_an_edge_is_found_at_half_its_contrast(contrast, blur, place):
    covered = np.clip(place - np.arange(40), 0, 1)  # share of each pixel's width: the robot is on the left
    row = gaussian_filter1d(covered * contrast, blur) if blur else covered * contrast
    added = np.broadcast_to(row[None, None, :, None] * [1.0, -0.5, 0.2], (1, 9, 40, 3)).astype(np.float32)
    at = np.array([[place - 0.6, 4.5], [place + 0.4, 4.5], [5.0, 4.5]])
    found, good = half_contrast_offsets(added, np.zeros(3, int), at, np.array([[1.0, 0.0]] * 3))
    assert good.tolist() == [True, True, False]  # there is no edge near the last point
    assert at[:2, 0] + found[:2] == pytest.approx([place] * 2, abs=0.2)


def test_an_edge_of_little_contrast_is_not_measured():
    added = np.zeros((1, 9, 40, 3), np.float32)
    added[:, :, :20] = 5
    assert not half_contrast_offsets(added, np.zeros(1, int), np.array([[20.0, 4.5]]), np.array([[1.0, 0.0]]))[1].any()
