"""The geometry doctor: looks at a folder of demonstrations before anyone trains on it.

Wrong geometry trains without an error and fails on the robot. The doctor projects the gripper into the pictures, looks
at heights, rotations, the gripper, cameras and time stamps, says what is wrong and what to do about it, and draws a
contact sheet that shows at a glance whether the projected gripper sits on the real one.

Legend: N frames of a demo.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from keygrip.data.robot.demos import ArmTrajectory, CameraTrack, Demo, DemoError, find_demos, write_whole
from keygrip.models.geometry.cameras import camera_centre, inside_image, pixel_rays, project, recover_3d

logger = logging.getLogger(__name__)

ON_SCREEN_SHARE = 0.9  # of frames; below it the training loses targets, and below half the geometry is wrong
LARGEST_BIN_MM = 20.0  # a height bin worth more cannot tell a grasp from a miss
LARGEST_CELL_MM = 25.0  # likewise a cell of the prediction grid on the table
SMALLEST_RANGE_M = 0.02  # of heights: a task without up and down gives the height bins nothing to say
LARGEST_RANGE_M = 1.5  # of heights: an arm on a table does not reach that
OUTLIER_RATIO = 1.5  # full height range over that of all but 2 % of the frames
SITE_OFFSET_M = 0.01  # between the recorded position and the grasp site
KINEMATICS_SPREAD_M = 0.01  # of what is left between recorded poses and forward kinematics
DARK, BRIGHT = 8.0, 247.0  # mean grey level of a picture
CHANGED_PIXEL, CHANGED_SHARE = 8, 1e-4  # a picture differs where this share of pixels changes by this many levels
MOVED_M = 0.02  # a gripper that moves this far must change the picture
GAP = 2.5  # a step between frames longer than this many median steps
RATE_TOLERANCE = 0.1  # between the stated rate and that of the time stamps
GRAZING_SLOPE = 0.1  # sine of the angle between a viewing ray and the horizontal: 6 degrees
JUMP_SPEED_M_S = 5.0  # faster than the arm can be
ORDER_MARGIN = 0.5  # difference in the mean cosine of the approach against straight down that another order must make


@dataclass(frozen=True)
class Finding:
    """Something wrong with a data set.

    Attributes:
        check: which check found it, a short name. severity: `error` spoils training, `warning` costs quality.
        where: camera, arm or demos. what: what was measured. advice: what to do.
    """

    check: str
    severity: Literal["error", "warning"]
    where: str
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.severity} [{self.check}] {self.where}: {self.what}. {self.advice}"


@dataclass
class _Examination:
    """What the checks look at and what they leave behind."""

    demos: list[Demo]
    frames_per_demo: int
    height_bins: int
    pred_size: int
    findings: list[Finding] = field(default_factory=list)
    measures: dict[str, Any] = field(default_factory=dict)

    def add(self, check: str, severity: Literal["error", "warning"], where: str, what: str, advice: str) -> None:
        self.findings.append(Finding(check, severity, where, what, advice))

    @property
    def arms(self) -> list[str]:
        return sorted({arm for demo in self.demos for arm in demo.arms})

    @property
    def cameras(self) -> list[str]:
        return sorted({camera for demo in self.demos for camera in demo.cameras})

    def with_arm(self, arm: str) -> list[Demo]:
        return [demo for demo in self.demos if arm in demo.arms]

    def with_camera(self, camera: str) -> list[Demo]:
        return [demo for demo in self.demos if camera in demo.cameras]


def doctor(
    root: Path | str,
    output: Path | str,
    format: str = "auto",
    calibration: Path | str | None = None,
    max_demos: int | None = 50,
    frames_per_demo: int = 12,
    height_bins: int = 32,
    pred_size: int = 56,
    progress: bool = True,
) -> list[Finding]:
    """Examines the demonstrations under `root`; an empty list means that nothing is wrong.

    Args:
        root, format, calibration: as for `find_demos`.
        output: folder for `contact_sheet_<camera>.png` and `report.json` (findings and all measures).
        max_demos: look at so many, evenly spread over the folder; None: all.
        frames_per_demo: pictures that are decoded of each demo and camera, evenly spread.
        height_bins, pred_size: of the policy, for what a bin and a cell are worth.
        progress: show a progress bar on standard error.

    Raises:
        FileNotFoundError, ValueError: no data, or a format that is not known (see `find_demos`).
    """
    output = Path(output)
    references = find_demos(root, format, calibration)
    chosen = _spread(len(references), max_demos or len(references))
    demos: list[Demo] = []
    broken: list[DemoError] = []
    for index in tqdm(chosen, desc="reading demos", unit="demo", disable=not progress):
        try:
            demos.append(references[index].read())
        except DemoError as error:
            broken.append(error)
    examination = _Examination(demos, frames_per_demo, height_bins, pred_size)
    examination.measures |= {"root": str(root), "format": references[0].format, "demos": len(references)}
    examination.measures |= {"examined": len(chosen), "readable": len(demos)}
    if broken:
        examination.add(
            "broken_demo",
            "error",
            _listed(error.name for error in broken),
            f"{len(broken)} of {len(chosen)} demos cannot be read; the first: {broken[0].reason}",
            "Record them again or remove them; training leaves them out and stops at more than 10 %",
        )
    output.mkdir(parents=True, exist_ok=True)
    if demos:
        checks: list[Callable[[_Examination], None]] = [
            _check_heights,
            _check_jumps,
            _check_kinematics,
            _check_quaternions,
            _check_gripper,
            _check_times,
            _check_projection,
        ]
        for check in checks:
            check(examination)
        for camera in tqdm(examination.cameras, desc="looking at pictures", unit="camera", disable=not progress):
            _check_pictures(examination, camera)
            sheet = _contact_sheet(examination, camera)
            _save(sheet, output / f"contact_sheet_{camera.replace('/', '_')}.png")
    report = {**examination.measures, "findings": [asdict(finding) for finding in examination.findings]}
    write_whole(output / "report.json", json.dumps(report, indent=1).encode())
    return examination.findings


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of 0 .. count - 1, evenly spread, ends included."""
    return [int(index) for index in np.unique(np.linspace(0, count - 1, min(wanted, count)).round())]


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float64))


def _matrices(quaternion: np.ndarray) -> np.ndarray:
    return Rotation.from_quat(quaternion, scalar_first=True).as_matrix()


# ---------------------------------------------------------------------- trajectories


def _check_heights(exam: _Examination) -> None:
    for arm in exam.arms:
        demos = exam.with_arm(arm)
        heights = np.concatenate([demo.arms[arm].position[:, 2] for demo in demos])
        low, high = float(heights.min()), float(heights.max())
        bulk_low, bulk_high = (float(value) for value in np.quantile(heights, [0.01, 0.99]))
        bin_mm = (high - low) / exam.height_bins * 1e3
        exam.measures[f"arm/{arm}/height_range_m"] = [low, high]
        exam.measures[f"arm/{arm}/height_bin_mm"] = bin_mm
        where = f"arm {arm}"
        if high - low > LARGEST_RANGE_M:
            exam.add(
                "height_range",
                "error",
                where,
                f"the gripper's height runs from {low:.3g} to {high:.3g}, which no arm on a table reaches in metres",
                "Convert positions to metres (millimetres are likely), or fix the world frame: z must point up",
            )
        elif high - low < SMALLEST_RANGE_M:
            exam.add(
                "height_range",
                "warning",
                where,
                f"the gripper's height changes by only {(high - low) * 1e3:.1f} mm",
                "Check that z is the vertical axis of the world and that the positions move at all",
            )
        elif high - low > OUTLIER_RATIO * (bulk_high - bulk_low):
            extreme = [
                demo.name
                for demo in demos
                if demo.arms[arm].position[:, 2].min() < bulk_low - 0.25 * (bulk_high - bulk_low)
                or demo.arms[arm].position[:, 2].max() > bulk_high + 0.25 * (bulk_high - bulk_low)
            ]
            exam.add(
                "height_outlier",
                "warning",
                f"arm {arm}, {_listed(extreme)}",
                f"98 % of the heights lie between {bulk_low:.3f} and {bulk_high:.3f} m, but the bins must reach from "
                f"{low:.3f} to {high:.3f} m",
                "Leave these demos out or cut the stray frames: they make every height bin coarser",
            )
        elif bin_mm > LARGEST_BIN_MM:
            exam.add(
                "height_bin",
                "warning",
                where,
                f"one of {exam.height_bins} height bins is worth {bin_mm:.0f} mm",
                "Use more height bins, or leave out demos that go needlessly high",
            )


def _check_jumps(exam: _Examination) -> None:
    for arm in exam.arms:
        jumping = []
        fastest = 0.0
        for demo in exam.with_arm(arm):
            seconds = np.maximum(np.diff(demo.timestamps) * 1e-9, 1e-6)
            # a long gap may hide a long way: only neighbouring frames count
            near = seconds <= GAP * np.median(seconds)
            way = np.linalg.norm(np.diff(demo.arms[arm].position, axis=0), axis=1)
            speed = float((way / seconds)[near].max(initial=0.0))
            fastest = max(fastest, speed)
            if speed > JUMP_SPEED_M_S and way[near].max() > MOVED_M:
                jumping.append(demo.name)
        exam.measures[f"arm/{arm}/fastest_m_s"] = fastest
        if jumping and exam.measures[f"arm/{arm}/height_range_m"][1] < LARGEST_RANGE_M:
            exam.add(
                "jump",
                "warning",
                f"arm {arm}, {_listed(jumping)}",
                f"the gripper jumps between neighbouring frames, at up to {fastest:.1f} m/s",
                "Check for dropped frames and for positions in another frame or unit part of the time",
            )


def _check_quaternions(exam: _Examination) -> None:
    for arm in exam.arms:
        demos = exam.with_arm(arm)
        flips = {
            demo.name: int(((demo.arms[arm].quaternion[1:] * demo.arms[arm].quaternion[:-1]).sum(axis=1) < 0).sum())
            for demo in demos
        }
        flipping = [name for name, count in flips.items() if count]
        exam.measures[f"arm/{arm}/quaternion_sign_flips"] = sum(flips.values())
        if flipping:
            exam.add(
                "quaternion_flip",
                "warning",
                f"arm {arm}, {_listed(flipping)}",
                f"the quaternion changes its sign from one frame to the next {sum(flips.values())} times",
                "Give each quaternion the sign that is nearer to the one before: q and -q are one rotation, but "
                "anything "
                "that interpolates or averages them goes astray",
            )
        stated = _attitude([demo.arms[arm] for demo in demos], lambda quaternion: quaternion)
        rolled = _attitude([demo.arms[arm] for demo in demos], lambda quaternion: np.roll(quaternion, 1, axis=1))
        exam.measures[f"arm/{arm}/approach_down"] = stated[0]
        exam.measures[f"arm/{arm}/turning_about_vertical"] = stated[1]
        upside = rolled[0] - stated[0] > ORDER_MARGIN and stated[0] < 0.5 < rolled[0]
        tilting = rolled[0] > 0.7 and rolled[1] - stated[1] > ORDER_MARGIN and stated[1] < 0.3
        known = any(finding.check == "quaternion_order" and finding.where == f"arm {arm}" for finding in exam.findings)
        if (upside or tilting) and not known:
            exam.add(
                "quaternion_order",
                "error" if upside else "warning",
                f"arm {arm}",
                f"as the file is read, the gripper points down by {stated[0]:.2f} when it is low (1 is straight "
                "down) and "
                f"{stated[1]:.0%} of its turning is about the vertical; were its quaternions x, y, z, w, by "
                f"{rolled[0]:.2f} and {rolled[1]:.0%}, as on a table",
                "Store quaternions as w, x, y, z; the axes on the contact sheet show which reading is right",
            )


def _attitude(trajectories: list[ArmTrajectory], reading: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """How a reading of the quaternions looks: mean cosine of the approach (tool z) against straight down in the lowest
    quarter of each demo, and the share of all turning that is about the world's vertical (0.5 where nothing turns)."""
    down: list[np.ndarray] = []
    turning = np.zeros(3)
    for trajectory in trajectories:
        height = trajectory.position[:, 2]
        matrices = _matrices(reading(trajectory.quaternion))
        down.append(-matrices[height <= np.quantile(height, 0.25), 2, 2])
        turns = Rotation.from_matrix(matrices[1:] @ matrices[:-1].transpose(0, 2, 1)).as_rotvec()
        turning += np.abs(turns).sum(axis=0)
    total = float((turning**2).sum())
    return float(np.concatenate(down).mean()), float(turning[2] ** 2 / total) if total > 1e-4 else 0.5


def _check_kinematics(exam: _Examination) -> None:
    """Recorded poses against forward kinematics, where a YAM's joints were recorded."""
    from keygrip.robots.kinematics import forward_kinematics

    for arm in exam.arms:
        turns, swapped, world, rotations = [], [], [], []
        for demo in exam.with_arm(arm):
            joints = demo.arms[arm].joints
            if joints is None or joints.shape[1] != 6 or not demo.robot.startswith("yam"):
                continue
            pick = _spread(len(demo), 40)
            position, quaternion = forward_kinematics(joints[pick])
            expected, found = _matrices(quaternion), _matrices(demo.arms[arm].quaternion[pick])
            other = _matrices(np.roll(demo.arms[arm].quaternion[pick], 1, axis=1))
            turns.append(found @ expected.transpose(0, 2, 1))
            swapped.append(other @ expected.transpose(0, 2, 1))
            world.append((demo.arms[arm].position[pick], position))
            rotations.append(found)
        if not turns:
            exam.measures[f"arm/{arm}/site_offset_m"] = None
            continue
        base, spread = _mean_turn(np.concatenate(turns))
        _, swapped_spread = _mean_turn(np.concatenate(swapped))
        if spread > 5 and swapped_spread < 0.5 * spread:
            exam.add(
                "quaternion_order",
                "error",
                f"arm {arm}",
                f"the recorded rotations differ from the forward kinematics by {spread:.0f} degrees as the file "
                "is read and by "
                f"{swapped_spread:.0f} if its quaternions are x, y, z, w",
                "Store quaternions as w, x, y, z",
            )
            continue
        left = np.concatenate([recorded - computed @ base.T for recorded, computed in world])
        tool = (np.concatenate(rotations).transpose(0, 2, 1) @ left[..., None])[..., 0]
        in_world, in_tool = float(left.std(axis=0).max()), float(tool.std(axis=0).max())
        exam.measures[f"arm/{arm}/site_offset_m"] = [round(float(value), 4) for value in tool.mean(axis=0)]
        offset = tool.mean(axis=0)
        if min(in_world, in_tool) > KINEMATICS_SPREAD_M or spread > 5:
            exam.add(
                "kinematics",
                "warning",
                f"arm {arm}",
                "recorded poses and the forward kinematics of the recorded joints do not go together "
                f"({in_tool * 1e3:.0f} mm, "
                f"{spread:.0f} degrees of spread)",
                "Check the joints' zero positions and order, the arm's model, and whether poses and joints have the "
                "same clock",
            )
        # along the approach a shifted base and a shifted site look alike as long as the gripper points down
        elif np.linalg.norm(offset) > SITE_OFFSET_M and (
            in_tool < in_world or abs(offset[2]) > 0.95 * np.linalg.norm(offset)
        ):
            millimetres = ", ".join(f"{value * 1e3:.0f}" for value in offset)
            exam.add(
                "site_offset",
                "error",
                f"arm {arm}",
                "the recorded position is not the grasp site between the finger tips but "
                f"{np.linalg.norm(offset) * 1e3:.0f} mm "
                f"off ({millimetres} mm along the tool's x, y, z)",
                "Record the grasp site's position (a flange or wrist frame is likely), or add the offset on import; "
                "look at "
                "the contact sheet for the point that is marked",
            )


def _mean_turn(turns: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean of rotations [N, 3, 3] and the largest angle to it in degrees."""
    rotations = Rotation.from_matrix(turns)
    mean = rotations.mean()
    return mean.as_matrix(), float(np.degrees((mean.inv() * rotations).magnitude().max()))


def _check_gripper(exam: _Examination) -> None:
    for arm in exam.arms:
        demos = exam.with_arm(arm)
        ranges = [float(np.ptp(demo.arms[arm].gripper)) for demo in demos]
        exam.measures[f"arm/{arm}/gripper_range"] = max(ranges)
        if max(ranges) < 0.05:
            exam.add(
                "gripper_still",
                "warning",
                f"arm {arm}",
                f"the gripper's opening never changes by more than {max(ranges):.2f}",
                "Fine for a task without grasping; else check which signal is recorded as the opening",
            )
            continue
        first = [_first_change(demo.arms[arm].gripper) for demo in demos]
        opening = sum(change > 0 for change in first)
        closing = sum(change < 0 for change in first)
        exam.measures[f"arm/{arm}/starts_by_closing"] = closing
        exam.measures[f"arm/{arm}/starts_by_opening"] = opening
        if opening > closing:
            exam.add(
                "gripper_polarity",
                "error",
                f"arm {arm}",
                f"in {opening} of {opening + closing} demos the gripper first opens, as the file is read; a grasp "
                "begins with closing",
                "Store 0 for closed and 1 for open (the other way round is likely); ignore this for tasks that begin "
                "with an "
                "object in the gripper",
            )


def _first_change(opening: np.ndarray) -> int:
    """Direction of the first change by more than 0.3 of the stroke: -1 closing, 1 opening, 0 none."""
    change = opening - opening[0]
    large = np.flatnonzero(np.abs(change) > 0.3)
    return 0 if len(large) == 0 else int(np.sign(change[large[0]]))


def _check_times(exam: _Examination) -> None:
    gaps: dict[str, float] = {}
    rates: dict[str, float] = {}
    for demo in exam.demos:
        steps = np.diff(demo.timestamps) * 1e-9
        median = float(np.median(steps))
        if steps.max() > GAP * median:
            gaps[demo.name] = float(steps.max())
        if abs(median * demo.fps - 1) > RATE_TOLERANCE:
            rates[demo.name] = 1 / median
    exam.measures["demos_with_gaps"] = len(gaps)
    if gaps:
        exam.add(
            "time_gap",
            "warning",
            _listed(gaps),
            f"time stamps jump: the longest gap is {max(gaps.values()):.2f} s",
            "Frames were dropped there: the policy would learn to move too fast. Leave the demos out or record them "
            "again",
        )
    if rates:
        name, rate = next(iter(rates.items()))
        exam.add(
            "frame_rate",
            "warning",
            _listed(rates),
            f"the time stamps say {rate:.1f} frames a second, the file of {name} says something else",
            "Correct fps in the metadata: control runs at the rate that it states",
        )


# ---------------------------------------------------------------------- cameras


def _check_projection(exam: _Examination) -> None:
    for camera in exam.cameras:
        demos = exam.with_camera(camera)
        carrier = _mounted_on(demos, camera)
        exam.measures[f"camera/{camera}/mounted_on"] = carrier
        track = demos[0].cameras[camera]
        centre = track.intrinsics[0, :2, 2] / [track.width, track.height]
        if np.abs(centre - 0.5).max() > 0.25:
            exam.add(
                "intrinsics",
                "error",
                f"camera {camera}",
                f"the optical centre lies at {centre[0]:.2f}, {centre[1]:.2f} of a picture of {track.width} x "
                f"{track.height}",
                "The intrinsics are for another resolution or crop: scale them with the picture",
            )
            continue  # whatever the projection shows now comes from this
        if carrier is not None:
            continue  # a camera on the hand sees its gripper at one place or not at all: nothing to learn from that
        for arm in sorted({arm for demo in demos for arm in demo.arms}):
            _check_view(exam, camera, arm, [demo for demo in demos if arm in demo.arms])


def _mounted_on(demos: Sequence[Demo], camera: str) -> str | None:
    """The arm that carries a camera: the one on whose gripper it is rigid while it moves."""
    for demo in demos:
        pose = np.linalg.inv(np.asarray(demo.cameras[camera].world_to_camera))
        if np.ptp(pose[:, :3, 3], axis=0).max() < MOVED_M:
            return None
        for arm, trajectory in demo.arms.items():
            turned = _matrices(trajectory.quaternion).transpose(0, 2, 1)
            own = (turned @ (pose[:, :3, 3] - trajectory.position)[..., None])[..., 0]
            if np.ptp(own, axis=0).max() < 0.25 * np.ptp(pose[:, :3, 3], axis=0).max():
                return arm
    return None


def _inside(track: CameraTrack, position: np.ndarray, world_to_camera: np.ndarray) -> np.ndarray:
    """[N] bool: which positions [N, 3] are in the picture."""
    pixels, _ = project(_tensor(position), _tensor(track.intrinsics), _tensor(world_to_camera))
    return inside_image(pixels, track.width, track.height).numpy()


_FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
_ALTERNATIVES: list[tuple[str, Callable[[np.ndarray], np.ndarray]]] = [
    ("it is camera_to_world: store its inverse", np.linalg.inv),
    ("its camera axes are OpenGL's (y up, looking along -z): flip y and z", lambda pose: _FLIP @ pose),
    (
        "it is camera_to_world of an OpenGL camera: flip y and z and store the inverse",
        lambda pose: _FLIP @ np.linalg.inv(pose),
    ),
]


def _check_view(exam: _Examination, camera: str, arm: str, demos: list[Demo]) -> None:
    where = f"camera {camera}, arm {arm}"
    tracks = [demo.cameras[camera] for demo in demos]
    positions = [demo.arms[arm].position for demo in demos]
    inside = [
        _inside(track, position, track.world_to_camera) for track, position in zip(tracks, positions, strict=True)
    ]
    share = float(np.concatenate(inside).mean())
    exam.measures[f"camera/{camera}/arm/{arm}/on_screen"] = share
    if share < ON_SCREEN_SHARE:
        advice = "Look at the contact sheet, aim the camera at the workspace or leave these demos out"
        for words, change in _ALTERNATIVES:
            other = [
                _inside(track, position, change(np.asarray(track.world_to_camera)))
                for track, position in zip(tracks, positions, strict=True)
            ]
            if np.concatenate(other).mean() > max(ON_SCREEN_SHARE, share + 0.3):
                advice = f"World_to_camera puts the gripper into the picture if {words}"
                break
        worst = sorted(range(len(demos)), key=lambda number: inside[number].mean())
        exam.add(
            "off_screen",
            "error" if share < 0.5 else "warning",
            where,
            f"the gripper is in the picture in only {share:.0%} of the frames, least in "
            f"{_listed(demos[n].name for n in worst[:3])}",
            advice,
        )
    if share == 0:
        return
    slopes, cells = [], []
    lowest = float(np.min([position[:, 2].min() for position in positions]))
    for track, position, seen in zip(tracks, positions, inside, strict=True):
        if not seen.any():
            continue
        intrinsics, pose = _tensor(track.intrinsics)[seen], _tensor(track.world_to_camera)[seen]
        pixels, _ = project(_tensor(position)[seen], intrinsics, pose)
        slopes.append(pixel_rays(pixels, intrinsics, pose)[:, 2].abs().numpy())
        cell = min(track.width, track.height) / exam.pred_size
        height = torch.full((len(pixels),), lowest, dtype=pixels.dtype)
        corners = [
            recover_3d(
                pixels + torch.tensor(step, dtype=pixels.dtype) * cell / 2, height, intrinsics, pose, strict=False
            )
            for step in ([-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0])
        ]
        above = camera_centre(pose)[:, 2] > lowest
        size = torch.maximum((corners[1] - corners[0]).norm(dim=-1), (corners[3] - corners[2]).norm(dim=-1))
        cells.append(size[above & size.isfinite()].numpy())
    grazing = float((np.concatenate(slopes) < GRAZING_SLOPE).mean())
    found = np.concatenate(cells)
    exam.measures[f"camera/{camera}/arm/{arm}/grazing_share"] = grazing
    exam.measures[f"camera/{camera}/arm/{arm}/cell_mm"] = float(np.median(found) * 1e3) if len(found) else None
    if grazing > 0.05:
        exam.add(
            "grazing_rays",
            "error" if grazing > 0.5 else "warning",
            where,
            f"{grazing:.0%} of the viewing rays to the gripper are within 6 degrees of the horizontal",
            "A pixel and a height do not tell where such a point is: put the camera higher and look down more steeply",
        )
    elif len(found) and np.median(found) * 1e3 > LARGEST_CELL_MM:
        exam.add(
            "cell_size",
            "warning",
            where,
            f"one of {exam.pred_size} x {exam.pred_size} cells covers {np.median(found) * 1e3:.0f} mm on the table",
            "Move the camera nearer, crop, or raise pred_size",
        )


def _check_pictures(exam: _Examination, camera: str) -> None:
    dark, bright, frozen = [], [], []
    levels = []
    for demo in exam.with_camera(camera):
        track = demo.cameras[camera]
        pick = _spread(len(demo), exam.frames_per_demo)
        pictures = [track.frames.read(index) for index in pick]
        mean = float(np.mean([picture.mean() for picture in pictures]))
        levels.append(mean)
        if mean < DARK:
            dark.append(demo.name)
        elif mean > BRIGHT:
            bright.append(demo.name)
        still = moved = 0.0
        for before, after, i, j in zip(pictures, pictures[1:], pick, pick[1:], strict=False):
            way = max(float(np.linalg.norm(arm.position[j] - arm.position[i])) for arm in demo.arms.values())
            moved += way
            change = np.abs(after.astype(np.int16) - before).max(axis=-1)
            if (change > CHANGED_PIXEL).mean() < CHANGED_SHARE:
                still += way
        if still > MOVED_M and still > 0.25 * moved:
            frozen.append(demo.name)
    exam.measures[f"camera/{camera}/mean_level"] = float(np.mean(levels))
    rows: list[tuple[str, list[str], str, str]] = [
        ("dark_camera", dark, "the pictures are almost black", "Check the cable, the lens cap and the exposure"),
        ("bright_camera", bright, "the pictures are almost white", "Lower the exposure or the gain"),
        (
            "frozen_camera",
            frozen,
            "the picture stands still while the gripper moves",
            "The stream hung: leave these demos out and check the camera's cable and bandwidth",
        ),
    ]
    for check, names, what, advice in rows:
        if names:
            exam.add(check, "error", f"camera {camera}, {_listed(names)}", what, advice)


# ---------------------------------------------------------------------- contact sheet

_TILE_WIDTH, _HEADER, _ROWS, _COLUMNS = 280, 16, 6, 6
_ARM_COLOURS = {"right": (255, 210, 0), "left": (0, 220, 255)}
_AXIS_M = 0.05


def _contact_sheet(exam: _Examination, camera: str) -> Image.Image:
    """Rows of frames of a few demos with the projected gripper, its path, and its axes (x red, y green, z blue, 5
    cm)."""
    demos = exam.with_camera(camera)
    demos = [demos[index] for index in _spread(len(demos), _ROWS)]
    rows = [_sheet_row(demo, camera) for demo in demos]
    width = max(row.width for row in rows)
    sheet = Image.new("RGB", (width, sum(row.height for row in rows) + _HEADER), (24, 24, 24))
    share = {arm: exam.measures.get(f"camera/{camera}/arm/{arm}/on_screen") for demo in demos for arm in demo.arms}
    shown = ", ".join(f"{arm} in the picture {value:.0%}" for arm, value in share.items() if value is not None)
    title = (
        f"{camera}{': ' + shown if shown else ''}.  Axes of the gripper: x red, y green, z (approach) blue, 5 cm each"
    )
    ImageDraw.Draw(sheet).text((4, 2), title, fill=(255, 255, 255))
    top = _HEADER
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _sheet_row(demo: Demo, camera: str) -> Image.Image:
    track = demo.cameras[camera]
    scale = _TILE_WIDTH / track.width
    size = (_TILE_WIDTH, max(1, round(track.height * scale)))
    pick = _spread(len(demo), _COLUMNS)
    row = Image.new("RGB", ((_TILE_WIDTH + 2) * len(pick), size[1] + _HEADER + 2), (24, 24, 24))
    for column, index in enumerate(pick):
        tile = Image.fromarray(track.frames.read(index)).resize(size)
        draw = ImageDraw.Draw(tile)
        words = []
        for arm, trajectory in demo.arms.items():
            colour = _ARM_COLOURS.get(arm, (255, 255, 255))
            words.append(_draw_arm(draw, track, trajectory, index, scale, colour))
        left = column * (_TILE_WIDTH + 2)
        row.paste(tile, (left, _HEADER))
        name = f"{demo.name[-18:]} " if column == 0 else ""
        ImageDraw.Draw(row).text((left + 2, 2), f"{name}#{index} {'; '.join(words)}", fill=(220, 220, 220))
    return row


def _draw_arm(
    draw: ImageDraw.ImageDraw,
    track: CameraTrack,
    trajectory: ArmTrajectory,
    index: int,
    scale: float,
    colour: tuple[int, int, int],
) -> str:
    """Draws path, axes and marker of one arm; returns its caption."""
    axes = _matrices(trajectory.quaternion[index : index + 1])[0].T * _AXIS_M
    points = np.concatenate([trajectory.position, trajectory.position[index] + axes])
    pixels, _ = project(_tensor(points), _tensor(track.intrinsics[index]), _tensor(track.world_to_camera[index]))
    shown = [tuple(float(value) for value in pixel * scale) for pixel in pixels.numpy()]
    path, tips = shown[:-3], shown[-3:]
    for before, after in pairwise(path[: index + 1]):
        if np.isfinite([*before, *after]).all():
            draw.line([before, after], fill=colour, width=1)
    height = f"z {trajectory.position[index, 2]:.3f} m, open {trajectory.gripper[index]:.2f}"
    here = path[index]
    inside = np.isfinite(here).all() and 0 <= here[0] < track.width * scale and 0 <= here[1] < track.height * scale
    if not inside:
        draw.rectangle([1, 1, _TILE_WIDTH - 2, round(track.height * scale) - 2], outline=(255, 40, 40), width=3)
        return f"off screen, {height}"
    for tip, tint in zip(tips, ((255, 60, 60), (60, 220, 60), (90, 140, 255)), strict=True):
        if np.isfinite(tip).all():
            draw.line([here, tip], fill=tint, width=2)
    x, y = here
    draw.ellipse([x - 4, y - 4, x + 4, y + 4], outline=colour, width=2)
    return height


def _save(sheet: Image.Image, path: Path) -> None:
    import io

    content = io.BytesIO()
    sheet.save(content, "PNG")
    write_whole(path, content.getvalue())
