"""The geometry doctor: it reports nothing for a sound folder, and exactly the injected fault for a faulty one."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partialmethod
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from looking import looking_at
from PIL import Image
from scipy.spatial.transform import Rotation

from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.doctor import Finding, doctor
from keygrip.data.robot.doctor.calibrate import calibrate
from keygrip.data.robot.doctor.commands import check_commands
from keygrip.data.robot.doctor.examination import Examination
from keygrip.data.robot.doctor.misread_rotations import ComparedPoses, find_misread
from keygrip.data.robot.doctor.projection import check_projection
from keygrip.data.robot.doctor.run import CHECKS
from keygrip.data.robot.doctor.views import place
from keygrip.data.robot.native_writer import ArmPose, CameraPose, DemoWriter
from keygrip.data.robot.schema import ArmTrajectory, Demo
from keygrip.robots.inverse_kinematics import pointing_down, solve
from keygrip.robots.kinematics import forward_kinematics

WIDTH, HEIGHT, FRAMES, DEMOS = 128, 96, 30, 3
INTRINSICS = np.array([[110.0, 0, 64.0], [0, 110.0, 48.0], [0, 0, 1]])


@pytest.fixture(autouse=True)
def sheets_are_compressed_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compress contact sheets at level 1: their pixels are the same, and each test writes a sheet."""
    monkeypatch.setattr(Image.Image, "save", partialmethod(Image.Image.save, compress_level=1))


@dataclass(frozen=True)
class Parts:
    """The arrays from which one demo is written; faults replace some of them."""

    times: np.ndarray
    position: np.ndarray
    quaternion: np.ndarray
    gripper: np.ndarray
    joints: np.ndarray
    images: np.ndarray
    intrinsics: np.ndarray
    world_to_camera: np.ndarray  # [N, 4, 4]
    fps: float = 10.0


def images_of(position: np.ndarray, world_to_camera: np.ndarray) -> np.ndarray:
    camera = position @ world_to_camera[:3, :3].T + world_to_camera[:3, 3]
    pixels = (camera @ INTRINSICS.T)[:, :2] / camera[:, 2:]
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    table = 90 + 20 * ((x // 16 + y // 16) % 2)
    discs = np.hypot(x - pixels[:, 0, None, None], y - pixels[:, 1, None, None]) < 5
    grey = np.where(discs, 220, table)
    return np.stack([grey, table * np.ones_like(grey), table * np.ones_like(grey)], axis=-1).astype(np.uint8)


@cache
def sound(number: int) -> Parts:
    """Return a grasp: open above the table, down, close, up, to the side. Poses are the forward kinematics of the
    joints."""
    corners = np.array([[0.36, -0.12, 0.2], [0.38, 0.0, 0.2], [0.38, 0.0, 0.02], [0.38, 0.0, 0.02], [0.38, 0.1, 0.22]])
    corners = corners + [0.0, 0.02 * number, 0.0]
    at = np.array([0, 8, 14, 18, FRAMES - 1])
    path = np.stack([np.interp(np.arange(FRAMES), at, corners[:, axis]) for axis in range(3)], axis=1)
    yaw = np.interp(np.arange(FRAMES), at, [-0.3, 0.1, 0.3, 0.3, 0.6])
    joints, guess = [], np.array([0.0, 1.2, 1.4, -1.0, 0.0, 0.0])
    for point, angle in zip(path, yaw, strict=True):
        solution = solve(point, pointing_down(angle, 0.1 + 1.5 * point[2]), guess)
        assert solution.position_error < 0.02
        guess = solution.joints
        joints.append(guess)
    position, quaternion = forward_kinematics(np.stack(joints))
    signs = np.where((quaternion[1:] * quaternion[:-1]).sum(axis=1) < 0, -1.0, 1.0)
    quaternion[1:] *= np.cumprod(signs)[:, None]
    pose = looking_at(np.array([0.85, -0.15, 0.65]), np.array([0.33, 0.0, 0.1]))
    return Parts(
        times=(np.arange(FRAMES) * 100_000_000).astype(np.int64) + number,
        position=position,
        quaternion=quaternion,
        gripper=np.interp(np.arange(FRAMES), [0, 14, 18, FRAMES], [1.0, 1.0, 0.3, 0.3]),
        joints=np.stack(joints),
        images=images_of(position, pose),
        intrinsics=INTRINSICS,
        world_to_camera=np.broadcast_to(pose, (FRAMES, 4, 4)),
    )


Fault = Callable[[Parts, int], Parts]


def unchanged(parts: Parts, number: int) -> Parts:
    return parts


def arm_pose(parts: Parts, frame: int) -> ArmPose:
    return ArmPose(parts.position[frame], parts.quaternion[frame], float(parts.gripper[frame]), parts.joints[frame])


def write(root: Path, fault: Fault = unchanged, told: Fault | None = None, demos: int = DEMOS) -> Path:
    """Write demos. `told` changes the commands, which are the poses of the sound arm at the next frame; None: no
    commands."""
    for number in range(demos):
        parts = fault(sound(number), number)
        command = None if told is None else told(sound(number), number)
        with DemoWriter(root / f"demo_{number}", "yam", "pick", "pick up the cube", parts.fps) as writer:
            for i in range(len(parts.times)):
                writer.add(
                    int(parts.times[i]),
                    {"over": parts.images[i]},
                    {"over": CameraPose(parts.intrinsics, parts.world_to_camera[i])},
                    {"right": arm_pose(parts, i)},
                    None if command is None else {"right": arm_pose(command, min(i + 1, FRAMES - 1))},
                )
    return root


def examine(tmp_path: Path, fault: Fault, told: Fault | None = None) -> list[Finding]:
    return doctor(
        write(tmp_path / "data", fault, told), tmp_path / "out", compare_images=False, progress=False
    ).findings


def test_a_sound_folder_gives_no_finding_and_a_sheet_with_the_gripper_marked(tmp_path):
    assert examine(tmp_path, unchanged, unchanged) == []
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["demos"] == report["readable"] == DEMOS
    assert report["camera/over/arm/right/on_screen"] == 1.0
    assert report["camera/over/mounted_on"] is None
    low, high = report["arm/right/height_range_m"]
    assert (low, high) == pytest.approx((0.02, 0.22), abs=2e-3)
    assert report["arm/right/height_bin_mm"] == pytest.approx((high - low) / 32 * 1e3)
    # A cell is 96 / 56 pixels; along the ray's ground direction it is stretched by the slope: some millimetres at 0.8
    # m.
    assert 8 < report["camera/over/arm/right/cell_mm"] < 25
    assert np.abs(report["arm/right/site_offset_m"]).max() < 1e-3
    sheet = np.asarray(Image.open(tmp_path / "out/contact_sheet_over.png").convert("RGB")).astype(int)
    marked = (np.abs(sheet - [255, 210, 0]).max(axis=-1) < 40).sum()
    assert marked > 300  # pixels of rings and paths
    assert sheet.shape[1] > 6 * 200


def rolled(parts: Parts, number: int) -> Parts:
    return replace(parts, quaternion=np.roll(parts.quaternion, -1, axis=1))


def rolled_without_joints(parts: Parts, number: int) -> Parts:
    return replace(rolled(parts, number), joints=parts.joints[:, :5])


def flipping(parts: Parts, number: int) -> Parts:
    return replace(parts, quaternion=parts.quaternion * np.where(np.arange(FRAMES) % 7 < 3, -1, 1)[:, None])


def moved_camera(parts: Parts, change: Callable[[np.ndarray], np.ndarray]) -> Parts:
    return replace(parts, world_to_camera=change(np.asarray(parts.world_to_camera)))


def inverse_camera(parts: Parts, number: int) -> Parts:
    return moved_camera(parts, np.linalg.inv)


def opengl_camera(parts: Parts, number: int) -> Parts:
    return moved_camera(parts, lambda pose: np.diag([1.0, -1, -1, 1]) @ pose)


def opengl_inverse_camera(parts: Parts, number: int) -> Parts:
    return moved_camera(parts, lambda pose: np.linalg.inv(np.diag([1.0, -1, -1, 1]) @ pose))


def aimed_elsewhere(parts: Parts, number: int) -> Parts:
    pose = looking_at(np.array([0.85, -0.15, 0.65]), np.array([0.33, 0.6, 0.1]))
    return moved_camera(parts, lambda old: np.broadcast_to(pose, old.shape))


def grazing_camera(parts: Parts, number: int) -> Parts:
    pose = looking_at(np.array([0.95, -0.2, 0.13]), np.array([0.33, 0.0, 0.12]))
    return replace(
        parts,
        world_to_camera=np.broadcast_to(pose, (FRAMES, 4, 4)),
        images=images_of(parts.position, pose),
    )


def distant_camera(parts: Parts, number: int) -> Parts:
    pose = looking_at(np.array([1.6, -0.4, 1.5]), np.array([0.33, 0.0, 0.1]))
    return replace(
        parts,
        world_to_camera=np.broadcast_to(pose, (FRAMES, 4, 4)),
        images=images_of(parts.position, pose),
    )


def of_another_resolution(parts: Parts, number: int) -> Parts:
    matrix = INTRINSICS.copy()
    matrix[:2] *= 0.4
    return replace(parts, intrinsics=matrix)


def flange(parts: Parts, number: int) -> Parts:
    turn = Rotation.from_quat(parts.quaternion, scalar_first=True)
    return replace(parts, position=parts.position + turn.apply([0.0, 0.0, -0.135]))


def i2rts_site(parts: Parts, number: int) -> Parts:
    turn = Rotation.from_quat(parts.quaternion, scalar_first=True)
    return replace(parts, position=parts.position + turn.apply([-0.0001, 0.00004, -0.00995]))


def other_zero(parts: Parts, number: int) -> Parts:
    return replace(parts, joints=parts.joints + np.linspace(0, 0.4, FRAMES)[:, None] * [0, 1, 0, 0.5, 0, 0])


def scaled(factor: float) -> Fault:
    return lambda parts, number: replace(parts, position=parts.position * factor)


def conjugated(parts: Parts, number: int) -> Parts:
    return replace(parts, quaternion=parts.quaternion * [1, -1, -1, -1])


def offset(parts: Parts, number: int) -> Parts:
    return replace(parts, position=parts.position + [0.016, -0.012, 0])


def in_percent(parts: Parts, number: int) -> Parts:
    return replace(parts, gripper=(90 if number == 1 else 100) * parts.gripper)


def flat(parts: Parts, number: int) -> Parts:
    position = parts.position.copy()
    position[:, 2] = 0.1 + 0.02 * (position[:, 2] - 0.1)
    return replace(parts, position=position, joints=parts.joints[:, :5])


def stray_frame(parts: Parts, number: int) -> Parts:
    if number:
        return parts
    position = parts.position.copy()
    position[20, 2] += 0.4
    return replace(parts, position=position, joints=parts.joints[:, :5])


def jumping(parts: Parts, number: int) -> Parts:
    position = parts.position.copy()
    position[10:12, 1] -= 0.08
    return replace(parts, position=position, joints=parts.joints[:, :5], times=parts.times // 10, fps=100.0)


def inverted_gripper(parts: Parts, number: int) -> Parts:
    return replace(parts, gripper=1 - parts.gripper)


def still_gripper(parts: Parts, number: int) -> Parts:
    return replace(parts, gripper=np.full(FRAMES, 0.8))


def gap(parts: Parts, number: int) -> Parts:
    times = parts.times.copy()
    times[15:] += 700_000_000 if number == 1 else 0
    return replace(parts, times=times)


def wrong_rate(parts: Parts, number: int) -> Parts:
    return replace(parts, fps=30.0)


def frozen(parts: Parts, number: int) -> Parts:
    images = parts.images.copy()
    if number == 2:
        images[6:] = images[6]
    return replace(parts, images=images)


def dark(parts: Parts, number: int) -> Parts:
    return replace(parts, images=parts.images // 60)


def bright(parts: Parts, number: int) -> Parts:
    return replace(parts, images=255 - parts.images // 60)


@pytest.mark.parametrize(
    ("fault", "check", "severity", "said"),
    [
        (rolled, "quaternion_order", "error", "differ from the forward kinematics"),
        (rolled_without_joints, "quaternion_order", None, "Store quaternions as w, x, y, z"),
        (flipping, "quaternion_flip", "warning", "nearer to the one before"),
        (inverse_camera, "off_screen", "error", "camera_to_world stored as world_to_camera. Read so"),
        (opengl_camera, "off_screen", "error", "Likely cause: world_to_camera of OpenGL's camera axes"),
        (opengl_inverse_camera, "off_screen", "error", "Likely cause: camera_to_world of OpenGL's"),
        (aimed_elsewhere, "off_screen", None, "aim the camera at the workspace"),
        (grazing_camera, "grazing_rays", None, "put the camera higher"),
        (distant_camera, "cell_size", "warning", "Move the camera nearer"),
        (of_another_resolution, "intrinsics", "error", "another resolution or crop"),
        (flange, "site_offset", "error", "135 mm off"),
        (i2rts_site, "site_offset", "warning", "10 mm off"),
        (other_zero, "kinematics", "warning", "zero positions"),
        (flat, "height_range", "warning", "z is the vertical axis"),
        (jumping, "jump", "warning", "dropped frames"),
        (inverted_gripper, "gripper_polarity", "error", "0 for closed and 1 for open"),
        (still_gripper, "gripper_still", "warning", "which signal is recorded"),
        (gap, "time_gap", "warning", "demo_1: time stamps jump: the longest gap is 0.80 s"),
        (wrong_rate, "frame_rate", "error", "the time stamps say 10.0 frames per second"),
        (frozen, "frozen_camera", "error", "camera over, demo_2: the image stands still"),
        (dark, "dark_camera", "error", "almost black"),
        (bright, "bright_camera", "error", "almost white"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
@pytest.mark.quick_sets(11)
def test_one_fault_gives_one_finding_that_says_what_to_do(tmp_path, fault, check, severity, said):
    findings = examine(tmp_path, fault)
    others = {"frozen_camera"} if fault in (dark, bright) else set()  # images without content do not change either
    found = [finding for finding in findings if finding.check not in others]
    assert [finding.check for finding in found] == [check], [str(finding) for finding in findings]
    assert severity is None or found[0].severity == severity
    assert said in str(found[0])
    assert "\n" not in str(found[0])
    assert all(finding.cause and finding.demos for finding in findings)
    stored = json.loads((tmp_path / "out/report.json").read_text())["findings"]
    assert [entry["check"] for entry in stored] == [finding.check for finding in findings]


@pytest.mark.parametrize(
    ("fault", "cause", "advice"),
    [
        (scaled(1000), "positions in millimetres", "Convert positions to metres (divide millimetres by 1000: "),
        (scaled(100), "positions in centimetres", "Convert positions to metres (divide centimetres by 100: "),
        (in_percent, "gripper opening in percent", "Percent are likely: divide by 100"),
    ],
    ids=["millimetres", "centimetres", "percent"],
)
def test_another_unit_is_named_with_what_to_divide_by(tmp_path, fault, cause, advice):
    for track, faults in (("reached", (fault, unchanged)), ("commanded", (unchanged, fault))):
        (finding,) = examine(tmp_path / track, *faults)
        assert (finding.check, finding.cause) == ("broken_demo", f"{track} {cause}")
        assert finding.demos == ("demo_0", "demo_1", "demo_2")
        assert finding.advice.startswith(advice)
        assert advice not in finding.what


@pytest.mark.parametrize(
    ("fault", "told", "cause"),
    [
        (scaled(1.1), unchanged, "positions scaled by 1.100"),
        (conjugated, unchanged, "quaternions conjugated (world to gripper)"),
        (rolled, unchanged, "quaternions stored x, y, z, w"),
        (inverted_gripper, unchanged, "gripper opening inverted (1 for closed)"),
        (offset, unchanged, "reached track offset by 2.0 cm"),
        (unchanged, scaled(1.1), "commanded positions scaled by 1.1"),
        (unchanged, conjugated, "commanded quaternions conjugated (world to gripper)"),
        (unchanged, inverted_gripper, "commanded gripper inverted"),
        (unchanged, offset, "commanded track offset by 2.0 cm"),
    ],
)
@pytest.mark.quick_sets(4)
def test_joints_tell_which_of_both_tracks_is_wrong(tmp_path, fault, told, cause):
    causes = [finding.cause for finding in examine(tmp_path, fault, told)]
    assert cause in causes
    blamed = [other for other in causes if other.startswith("commanded") and " or reached " not in other]
    assert told is not unchanged or not blamed, causes


def inverted_poses(parts: Parts, number: int) -> Parts:
    inverse = Rotation.from_quat(parts.quaternion, scalar_first=True).inv()
    quaternion = inverse.as_quat(scalar_first=True)
    return replace(parts, position=-inverse.apply(parts.position), quaternion=quaternion)


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> list[Demo]:
    """Return five sound demos, without commands."""
    return [reference.read() for reference in find_demos(write(tmp_path_factory.mktemp("five"), demos=5))]


def with_poses(demo: Demo, fault: Fault, told: Fault | None) -> Demo:
    """Return a demo with the poses of its sound parts after a fault, and with commands."""

    def track(fault: Fault) -> ArmTrajectory:
        parts = fault(sound(int(demo.name[-1])), 0)
        return ArmTrajectory(parts.position, parts.quaternion, parts.gripper)

    def at_next_frame(track: ArmTrajectory) -> ArmTrajectory:
        rows = np.minimum(np.arange(FRAMES) + 1, FRAMES - 1)
        return ArmTrajectory(track.position[rows], track.quaternion[rows], track.gripper[rows])

    commanded = None if told is None else at_next_frame(track(told))
    return replace(demo, arms={"right": replace(track(fault), joints=demo.arms["right"].joints, commanded=commanded)})


def findings_of(demos: list[Demo]) -> list[Finding]:
    """Return the findings of all checks that need no images."""
    exam = Examination(demos, frames_per_demo=4, height_bins=32, pred_size=56)
    for check in (*CHECKS, check_commands):
        check(exam)
    return exam.findings


XYZW_CAUSE = "quaternions stored x, y, z, w"
CONJUGATED_CAUSE = "quaternions conjugated (world to gripper)"
INVERTED_CAUSE = "poses inverted (world to gripper in place of gripper to world)"
POLARITY_CAUSE = "gripper opening inverted (1 for closed)"


@pytest.mark.parametrize(
    ("fault", "told", "causes"),
    [
        (rolled, None, [XYZW_CAUSE]),
        (rolled, unchanged, [XYZW_CAUSE]),
        (conjugated, None, [CONJUGATED_CAUSE]),
        (conjugated, unchanged, [CONJUGATED_CAUSE]),
        (inverted_poses, None, [INVERTED_CAUSE]),
        (inverted_poses, unchanged, [INVERTED_CAUSE]),
        (inverted_gripper, None, [POLARITY_CAUSE]),
        (inverted_gripper, unchanged, [POLARITY_CAUSE, "commanded or reached gripper inverted"]),
        (inverted_gripper, inverted_gripper, [POLARITY_CAUSE]),
    ],
)
@pytest.mark.parametrize("wrong", [(2,), (0, 3)], ids=["one", "two"])
def test_a_convention_of_some_demos_is_named_for_these_demos_alone(five, fault, told, causes, wrong):
    sound_commands = None if told is None else unchanged
    demos = [
        with_poses(demo, fault, told) if number in wrong else with_poses(demo, unchanged, sound_commands)
        for number, demo in enumerate(five)
    ]
    findings = findings_of(demos)
    # heights of inverted positions are stray heights, too
    named = [finding for finding in findings if finding.check != "height_outlier"]
    assert [finding.cause for finding in named] == causes, [str(finding) for finding in findings]
    assert {finding.severity for finding in named} == {"error"}
    assert {finding.demos for finding in findings} == {tuple(five[number].name for number in wrong)}


@pytest.mark.parametrize("wrong", [0, 4])
def test_intrinsics_of_another_resolution_in_one_demo_leave_the_others_examined(five, wrong):
    track = five[wrong].cameras["over"]
    demos = list(five)
    intrinsics = np.asarray(track.intrinsics) * [[2], [2], [1]]
    demos[wrong] = replace(demos[wrong], cameras={"over": replace(track, intrinsics=intrinsics)})
    exam = Examination(demos, frames_per_demo=4, height_bins=32, pred_size=56)
    check_projection(exam)
    assert [(found.check, found.demos) for found in exam.findings] == [("intrinsics", (f"demo_{wrong}",))]
    assert exam.measures["camera/over/arm/right/on_screen"] == 1.0


def still_poses(name: str, read: Callable[[np.ndarray], np.ndarray], frames: int = 20) -> ComparedPoses:
    """Return poses of a gripper that does not turn; `read` changes its quaternion."""
    stored = np.tile(read(Rotation.from_euler("xyz", [2.6, 0.3, 0.5]).as_quat(scalar_first=True)), (frames, 1))
    true = np.tile(Rotation.from_euler("xyz", [2.6, 0.3, 0.5]).as_matrix(), (frames, 1, 1))
    recorded, misread = (
        Rotation.from_quat(rows, scalar_first=True).as_matrix() for rows in (stored, np.roll(stored, 1, axis=1))
    )
    position = np.tile([0.3, 0.0, 0.1], (frames, 1))
    return ComparedPoses(name, position, recorded, position, true, misread)


def test_a_gripper_that_does_not_turn_shows_its_convention_by_the_base_of_the_other_demos():
    def to_xyzw(quaternion: np.ndarray) -> np.ndarray:
        return np.roll(quaternion, -1)

    right = [still_poses(f"right_{number}", lambda quaternion: quaternion) for number in range(3)]
    (found,) = find_misread([*right, still_poses("wrong", to_xyzw)])
    assert (found.reading, [demo.name for demo in found.demos]) == ("xyzw", ["wrong"])
    assert found.as_recorded > 30
    assert found.as_read == pytest.approx(0, abs=1e-3)
    assert find_misread([*right, still_poses("short", to_xyzw, frames=7)]) == []
    assert find_misread([right[0], still_poses("wrong", to_xyzw)]) == []  # one other demo is no usual base
    assert find_misread([still_poses(f"wrong_{number}", to_xyzw) for number in range(4)]) == []


def test_joints_that_do_not_go_with_the_poses_are_those_of_the_demos_named(tmp_path):
    (found,) = examine(tmp_path, lambda parts, number: other_zero(parts, number) if number == 1 else parts)
    assert (found.check, found.demos) == ("kinematics", ("demo_1",))


def turned_twice(parts: Parts, number: int) -> Parts:
    turned = Rotation.from_quat(parts.quaternion, scalar_first=True)
    quaternion = parts.quaternion.copy()
    for frame in (8, 20):
        wrong = turned[frame] * Rotation.from_euler("y", 120, degrees=True)
        quaternion[frame] = wrong.as_quat(scalar_first=True)
    return replace(parts, quaternion=quaternion)


def test_wrong_rotations_of_some_frames_say_nothing_about_joints_and_the_base(five):
    demos = [with_poses(demo, turned_twice if number == 2 else unchanged, None) for number, demo in enumerate(five)]
    found = findings_of(demos)
    assert [(each.check, each.demos, each.frames) for each in found] == [("outlier_pose", ("demo_2",), (8, 20))]
    np.testing.assert_allclose(place(demos[2], "right").base, np.eye(4), atol=1e-6)


def test_joints_show_the_order_of_quaternions_whatever_way_the_gripper_points(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "keygrip.data.robot.doctor.trajectories._attitude",
        lambda arms, reading: (0.0, 0.1) if reading(np.arange(4)[None])[0, 0] == 0 else (1.0, 0.9),
    )
    assert examine(tmp_path / "joints", unchanged) == []
    without = examine(tmp_path / "none", lambda parts, number: replace(parts, joints=parts.joints[:, :5]))
    assert [finding.check for finding in without] == ["quaternion_order"]


def test_demos_without_joints_are_not_blamed_for_how_the_others_look(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "keygrip.data.robot.doctor.trajectories._attitude",
        lambda arms, reading: (0.0, 0.1) if len(arms) > 1 and reading(np.arange(4)[None])[0, 0] == 0 else (1.0, 0.9),
    )

    def fault(parts: Parts, number: int) -> Parts:
        return replace(parts, joints=parts.joints[:, :5]) if number == 0 else parts

    assert "quaternion_order" not in {finding.check for finding in examine(tmp_path, fault)}


def test_a_stray_frame_costs_height_bins(tmp_path):
    findings = examine(tmp_path, stray_frame)
    outlier = next(finding for finding in findings if finding.check == "height_outlier")
    assert "demo_0" in outlier.where
    assert {finding.check for finding in findings} == {"height_outlier", "outlier_pose"}
    pose = next(finding for finding in findings if finding.check == "outlier_pose")
    assert (pose.demos, pose.frames, pose.cause) == (("demo_0",), (20,), "outlier reached pose")


def test_broken_demos_are_named_and_the_others_examined(tmp_path):
    root = write(tmp_path / "data")
    (root / "demo_1/metadata.json").unlink()
    findings = doctor(root, tmp_path / "out", compare_images=False, progress=False).findings
    assert [finding.check for finding in findings] == ["broken_demo"]
    assert findings[0].where == "demo_1"
    assert (findings[0].demos, findings[0].cause) == (("demo_1",), "files that are damaged or do not fit together")
    assert "the recording was cut off" in findings[0].what
    for number in (0, 2):
        shutil.rmtree(root / f"demo_{number}")
    findings = doctor(root, tmp_path / "again", compare_images=False, progress=False).findings
    assert [finding.check for finding in findings] == ["broken_demo"]
    assert json.loads((tmp_path / "again/report.json").read_text())["readable"] == 0
    doctor(root, tmp_path / "out", compare_images=False, progress=False)  # this folder holds the report of another run
    page = (tmp_path / "out/report.html").read_text()
    assert "1 of 1 demos cannot be read" in page
    assert page.count("data:image/jpeg") == 0
    with pytest.raises(FileNotFoundError, match="does not exist"):
        doctor(tmp_path / "nothing", tmp_path / "out", compare_images=False, progress=False)


@pytest.mark.parametrize(
    ("setting", "number"), [("max_demos", 0), ("max_demos", -1), ("frames_per_demo", 0), ("frames_per_demo", -2)]
)
def test_numbers_of_demos_and_images_below_one_are_refused_before_data_are_read(tmp_path, setting, number):
    said = f"^{setting}={number}: it must be at least 1$"
    with pytest.raises(ValueError, match=said):
        doctor(tmp_path / "absent", tmp_path / "out", **{setting: number}, progress=False)
    with pytest.raises(ValueError, match=said):
        calibrate(
            tmp_path / "absent", None, "auto", None, None, **{"max_demos": 1, "frames_per_demo": 1, setting: number}
        )


def test_a_calibration_of_no_cameras_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^cameras=\[\]: name at least one camera"):
        calibrate(tmp_path / "absent", None, "auto", None, [], 1, 1)


def test_a_report_at_the_place_of_a_file_is_refused_before_data_are_read(tmp_path):
    file = tmp_path / "afile"
    file.write_text("x")
    with pytest.raises(ValueError, match=r"^output=.*afile is a file: give a folder$"):
        doctor(tmp_path / "absent", file, progress=False)
    assert file.read_text() == "x"


@pytest.mark.parametrize("frames", [[5], [0, 5]])
def test_demos_with_a_damaged_image_are_named_and_the_others_examined(tmp_path, frames, monkeypatch):
    """Frames between the first and the last are only read by the checks of images. No arm is seen in them: the camera's
    long fit, which would fail, is left out."""
    monkeypatch.setattr("keygrip.data.robot.doctor.images_and_poses._fit_camera", lambda exam, compared: None)
    root = write(tmp_path / "data")
    for frame in frames:
        (root / f"demo_1/rgb/over/{frame:06d}.jpg").write_bytes(b"cut off")
    findings = doctor(root, tmp_path / "out", progress=False).findings
    found = next(finding for finding in findings if finding.check.startswith("broken"))
    assert (found.check, found.demos) == ("broken_image" if frames == [5] else "broken_demo", ("demo_1",))
    assert f"frame {frames[0]}" in found.what or frames[0] == 0
    assert "demo_1" in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize("size", [(2 * WIDTH, 2 * HEIGHT), (HEIGHT, WIDTH)])
def test_demos_with_an_image_of_another_size_are_named_and_the_others_examined(tmp_path, size):
    """Training leaves them out, too, even if the image has the same aspect ratio."""
    root = write(tmp_path / "data")
    Image.new("RGB", size).save(root / "demo_1/rgb/over/000005.jpg")
    findings = doctor(root, tmp_path / "out", compare_images=False, progress=False).findings
    assert [(finding.check, finding.demos) for finding in findings] == [("broken_image", ("demo_1",))]
    stored, stated = (size[1], size[0], 3), (HEIGHT, WIDTH, 3)
    assert f"frame 5 cannot be used: it has shape {stored}, the recording says {stated}" in findings[0].what


def test_a_recording_of_two_frames_leaves_the_other_demos_examined(tmp_path):
    """It is not longer than the delay of the other demos, whose commands are those for the second frame after."""

    def ahead(parts: Parts, number: int) -> Parts:
        rows = np.minimum(np.arange(FRAMES) + 1, FRAMES - 1)
        return replace(
            parts, position=parts.position[rows], quaternion=parts.quaternion[rows], gripper=parts.gripper[rows]
        )

    root = write(tmp_path / "data", told=ahead)
    parts = sound(0)
    with DemoWriter(root / "demo_aborted", "yam", "pick", "pick up the cube", 10.0) as writer:
        for i in range(2):
            writer.add(
                int(parts.times[i]),
                {"over": parts.images[i]},
                {"over": CameraPose(parts.intrinsics, parts.world_to_camera[i])},
                {"right": arm_pose(parts, i)},
                {"right": arm_pose(parts, i + 1)},
            )
    exam = doctor(root, tmp_path / "out", compare_images=False, progress=False)
    assert exam.findings == []
    assert exam.measures["readable"] == DEMOS + 1
    assert exam.measures["arm/right/command_delay_frames"] == pytest.approx(2, abs=0.05)


def test_a_folder_whose_demos_all_have_damaged_images_is_reported(tmp_path):
    root = write(tmp_path / "data")
    for number in range(DEMOS):
        (root / f"demo_{number}/rgb/over/000005.jpg").write_bytes(b"cut off")
    findings = doctor(root, tmp_path / "out", progress=False).findings
    (found,) = [finding for finding in findings if finding.check == "broken_image"]
    assert (found.severity, len(found.demos)) == ("error", DEMOS)
    assert (tmp_path / "out/report.json").is_file()


def test_a_broken_camera_that_is_not_calibrated_leaves_its_demo(tmp_path, native_demo, change_metadata):
    """The demo stays readable, since training can use its other cameras."""
    for number in range(2):
        folder = native_demo(tmp_path / f"data/demo_{number}")
        shutil.copytree(folder / "rgb/over", folder / "rgb/hand")
        entry = json.loads((folder / "metadata.json").read_text())["cameras"]["over"]
        hand = entry | {"frames": "rgb/hand/%06d.jpg", "uncalibrated": "no entry"}
        change_metadata(folder, cameras={"over": entry, "hand": hand})
    (tmp_path / "data/demo_1/rgb/hand/000000.jpg").write_bytes(b"cut off")
    findings = doctor(tmp_path / "data", tmp_path / "out", compare_images=False, progress=False).findings
    (found,) = [finding for finding in findings if finding.check.startswith("broken")]
    assert (found.check, found.severity, found.where) == ("broken_camera", "warning", "demo_1")
    assert "'hand'" in found.what
    assert json.loads((tmp_path / "out/report.json").read_text())["readable"] == 2
    (tmp_path / "data/demo_1/rgb/over/000000.jpg").write_bytes(b"cut off")
    findings = doctor(tmp_path / "data", tmp_path / "again", compare_images=False, progress=False).findings
    assert [finding.check for finding in findings if finding.check.startswith("broken")] == ["broken_demo"]


def test_a_camera_that_is_not_calibrated_leaves_the_other_checks(tmp_path):
    """Some models need no calibration. Checks that would use the placeholder calibration are left out."""

    def hung(parts: Parts, number: int) -> Parts:  # can only be found with the camera's pose
        return frozen(parts, number)

    root = write(tmp_path / "data", hung)
    for number in range(DEMOS):
        file = root / f"demo_{number}/metadata.json"
        content = json.loads(file.read_text())
        content["cameras"]["over"]["uncalibrated"] = "no entry in calibration.yaml"
        file.write_text(json.dumps(content))
    findings = doctor(root, tmp_path / "out", progress=False).findings
    assert [(finding.check, finding.severity, finding.where) for finding in findings] == [
        ("uncalibrated_camera", "warning", "camera over, all demos")
    ]
    assert "no entry in calibration.yaml" in findings[0].what
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["readable"] == DEMOS
    assert not [name for name in report if name.endswith(("on_screen", "agreement"))]
    sheet = np.asarray(Image.open(tmp_path / "out/contact_sheet_over.png").convert("RGB")).astype(int)
    assert (np.abs(sheet - [255, 210, 0]).max(axis=-1) < 40).sum() == 0  # no gripper is drawn
    with DemoWriter(root / "demo_dark", "yam", "pick", "pick up the cube", 10.0, uncalibrated={"over": "x"}) as writer:
        parts = sound(0)
        for i in range(FRAMES):
            pose = ArmPose(parts.position[i], parts.quaternion[i], float(parts.gripper[i]), parts.joints[i])
            writer.add(
                int(parts.times[i]),
                {"over": np.zeros_like(parts.images[i])},
                {"over": CameraPose(parts.intrinsics, parts.world_to_camera[i])},
                {"right": pose},
            )
    findings = doctor(root, tmp_path / "dark", compare_images=False, progress=False).findings
    assert [finding.check for finding in findings] == ["uncalibrated_camera", "dark_camera"]


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (["../yam", "x"], "the names of an arm and of its"),
        (["yam", True], "the names of an arm and of its"),
        (["yam", "claw"], "unknown gripper 'claw'"),
    ],
)
def test_a_demo_of_an_arm_that_there_is_not_is_broken_and_the_others_are_examined(tmp_path, models, said):
    root = write(tmp_path / "data")
    file = root / "demo_1/metadata.json"
    content = json.loads(file.read_text())
    content["robot"] = "yam"
    content["source"] = {"models": dict.fromkeys(content["arms"], models)}
    file.write_text(json.dumps(content))
    findings = doctor(root, tmp_path / "out", compare_images=False, progress=False).findings
    assert [(finding.check, finding.where) for finding in findings] == [("broken_demo", "demo_1")]
    assert said in findings[0].what


def test_a_camera_on_the_hand_is_recognised_and_not_blamed(tmp_path):
    def on_hand(parts: Parts, number: int) -> Parts:
        pose = np.zeros((FRAMES, 4, 4))
        pose[:, :3, :3] = Rotation.from_quat(parts.quaternion, scalar_first=True).as_matrix()
        pose[:, :3, 3] = parts.position + (pose[:, :3, :3] @ [0.0, 0.07, -0.1])
        pose[:, 3, 3] = 1
        return replace(parts, world_to_camera=np.linalg.inv(pose))

    assert examine(tmp_path, on_hand) == []
    assert json.loads((tmp_path / "out/report.json").read_text())["camera/over/mounted_on"] == "right"


def test_max_demos_looks_at_an_even_spread(tmp_path):
    root = write(tmp_path / "data", lambda parts, number: gap(parts, number))
    assert (
        doctor(root, tmp_path / "out", max_demos=2, compare_images=False, progress=False).findings == []
    )  # the first and the last demo; the gap is in the one between
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["demos"], report["examined"]) == (3, 2)


def test_a_gap_and_a_jump_are_named_with_their_frames(tmp_path):
    (found,) = examine(tmp_path / "gap", gap)
    assert (found.demos, found.frames, found.cause) == (("demo_1",), (14,), "dropped frames")
    (found,) = examine(tmp_path / "jump", jumping)
    assert found.demos == ("demo_0", "demo_1", "demo_2")
    assert found.frames in {(9,), (11,)}
    (found,) = examine(tmp_path / "rate", wrong_rate)
    assert found.cause == "stated frame rate 30 in place of 10.0, or wrong time stamps"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    """Import benchmarks/doctor.py."""
    folder = Path(__file__).parents[3] / "benchmarks"
    spec = importlib.util.spec_from_file_location("doctor_benchmark", folder / "doctor.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize(
    ("planted", "causes", "right"),
    [
        ("reached positions scaled, x 100, all demos", ["reached positions in millimetres"], False),
        ("reached positions scaled, x 100, all demos", ["reached positions in centimetres"], True),
        ("commanded positions scaled, x 100, all demos", ["reached positions in centimetres"], False),
        ("reached gripper in percent, all demos", ["reached gripper opening in another unit"], False),
        ("reached gripper in percent, all demos", ["reached gripper opening in percent"], True),
        ("reached positions scaled, x 1.1, all demos", ["commanded positions scaled by 0.906"], False),
        ("reached positions scaled, x 1.1, all demos", ["positions scaled by 1.100"], True),
        ("reached positions offset, 2 cm, all demos", ["commanded track offset by 2.1 cm"], False),
        ("reached positions offset, 2 cm, all demos", ["commanded or reached track offset by 2.1 cm"], False),
        ("reached positions offset, 2 cm, all demos", ["reached track offset by 2.1 cm"], True),
        (
            "reached quaternions conjugated, all demos, no joints",
            ["commanded quaternions conjugated (world to gripper)"],
            False,
        ),
        (
            "reached quaternions conjugated, all demos, no joints",
            ["quaternions conjugated (world to gripper)"],
            True,
        ),
        (
            "camera turned, 3 degrees, all demos, no joints",
            [
                "extrinsics or the robot's base off by 4.5 cm",
                "camera moved by 1.0 degrees and 2.2 cm in this demo",
            ],
            False,
        ),
        ("camera turned, 3 degrees, all demos, no joints", ["extrinsics off by 3.0 degrees"], True),
        (
            "camera shifted, 5 cm, all demos, no joints",
            [
                "cropped images with old K (focal length +9.0 percent, centre moved)",
                "camera moved by 1.0 degrees and 2.2 cm in this demo",
            ],
            False,
        ),
        ("camera shifted, 5 cm, all demos, no joints", ["extrinsics or the robot's base off by 5.0 cm"], True),
        ("flip, 90 degrees, all demos", ["images turned by 90 degrees clockwise"], False),
        ("flip, 90 degrees, all demos", ["images turned by 90 degrees anticlockwise"], True),
        ("time stamps, in microseconds, all demos", ["dropped frames", "1", "2", "time stamps in microseconds"], False),
    ],
)
def test_the_benchmark_counts_a_cause_that_names_the_fault_its_track_and_its_unit(benchmark, planted, causes, right):
    (fault,) = [fault for fault in benchmark.faults() if fault.name == planted]
    findings = [Finding("check", "error", "", "cm degrees", "divide by 100", cause, ("a", "b")) for cause in causes]
    assert benchmark.graded(findings, fault.says, ["a", "b"]) == (True, right)
    assert benchmark.graded(findings, fault.says, ["a"]) == (True, False)  # b has no fault
    assert benchmark.graded(findings, fault.says, ["c"]) == (False, False)
    assert benchmark.graded([], fault.says, ["a", "b"]) == (False, False)


def test_the_benchmark_keeps_the_commands_of_rows_that_are_not_made_again(benchmark):
    kept = benchmark.commands({"pick": "old pick", "reach": "old reach"}, "pick")
    assert kept == {name: benchmark.RECORD + command for name, command in benchmark.RECORDINGS.items()} | {
        "reach": "old reach"
    }
