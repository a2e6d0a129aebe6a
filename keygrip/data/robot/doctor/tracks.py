"""The commanded track against the reached one, gripper units, outlier poses, and instructions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.data.robot.checks import pose_outliers
from keygrip.data.robot.doctor.examination import Examination, listed
from keygrip.data.robot.schema import ArmTrajectory

# Row i of the commanded track is where the arm is told to be at frame i + 1; a controller needs a little longer.
EARLIEST_FRAMES, SLOWEST_S = 0.4, 0.2
ODD_FRAMES = 0.9  # frames; a demo whose delay differs by more from the others' is reported
OFFSET_M, ODD_SCALE, TURN_DEG = 0.012, 0.06, 8.0
SCALE_SHARE, SCALE_GAIN = 0.03, 0.8  # smallest scale error, and the share of an offset's residual that it may leave
READ_TURN_DEG, READ_GAIN = 2.5, 0.4  # least rotation difference, and the share of it that another reading may leave
# Least distance from the reached poses, and the share of it that inverse poses may leave.
INVERTED_M, INVERTED_GAIN = 0.015, 0.35
FAST_M = 0.003  # motion per frame from which a frame is used to measure the delay
UNITS = {1000.0: "millimetres", 100.0: "centimetres", 39.37: "inches", 3.2808: "feet"}
NO_INSTRUCTION = {"", "none", "null", "todo", "tbd", "n/a", "na", "nan", "unknown", "task", "instruction", "test"}


def unit_of(scale: float) -> str | None:
    """The unit in which lengths are `scale` times what they are in metres, None: no usual one."""
    return next((name for size, name in UNITS.items() if abs(scale / size - 1) < 0.03), None)


def best_delay(first: np.ndarray, second: np.ndarray, most: int) -> float:
    """Frames (fractional) by which `second` [N, D] follows `first`, between -most and most; nan where nothing moves."""
    moves = np.linalg.norm(np.diff(first, axis=0), axis=1)
    if (moves > FAST_M).sum() < 3:
        return float("nan")
    most = int(min(most, len(first) // 2))
    delays = np.arange(-most, most + 1)
    costs = []
    for delay in delays.tolist():
        own = np.arange(max(0, -delay), min(len(first), len(first) - delay))
        apart = first[own] - second[own + delay]
        costs.append(float(np.abs(apart - np.median(apart, axis=0)).mean()))  # without an offset, which may be a fault
    best = int(np.argmin(costs))
    if best in (0, len(delays) - 1):
        return float(delays[best])
    left, middle, right = costs[best - 1 : best + 2]
    bend = left - 2 * middle + right
    return float(delays[best] + (0.5 * (left - right) / bend if bend > 0 else 0.0))


def check_commands(exam: Examination) -> None:
    """Where both tracks were recorded: their clock, place, scale, rotation and gripper."""
    exchanged = exam.named("exchanged_commands")
    for arm in exam.arms:
        told = {
            d.name: d.arms[arm]
            for d in exam.with_arm(arm)
            if d.arms[arm].commanded is not None and d.name not in exchanged
        }
        told = _without_inverted(exam, arm, told)
        if not told:
            continue
        rates = {demo.name: demo.fps for demo in exam.with_arm(arm)}
        delays = {name: _delay(arms) for name, arms in told.items()}
        known = {name: delay for name, delay in delays.items() if np.isfinite(delay)}
        usual = float(np.median(list(known.values()))) if known else 1.5
        exam.measures[f"arm/{arm}/command_delay_frames"] = round(usual, 2) if known else None
        bounds = {name: SLOWEST_S * rates[name] + 1 for name in told}
        wrong = {
            name: delay
            for name, delay in known.items()
            if not EARLIEST_FRAMES <= delay <= bounds[name] or abs(delay - usual) > ODD_FRAMES + 0.03 * rates[name]
        }
        if wrong:
            name, delay = max(wrong.items(), key=lambda entry: abs(entry[1] - 1.6))
            common = usual if EARLIEST_FRAMES <= usual <= bounds[name] else 1.6
            frames = round(delay - common) or (1 if delay > common else -1)
            exam.add(
                "command_lag",
                "error",
                f"arm {arm}, {listed(wrong)}",
                f"the commanded track is about {abs(frames)} frames {'early' if frames > 0 else 'late'}: the reached "
                f"track follows it by {delay:.1f} frames, where 1 to 2 are usual",
                f"Shift the commanded track by {abs(frames)} frames {'later' if frames > 0 else 'earlier'}; row i is "
                "the command given at frame i",
                cause=f"commanded track {'early' if frames > 0 else 'late'} by {abs(frames)} frames",
                demos=wrong,
            )
        shift = {name: round(delays[name]) if name in known else round(usual) for name in told}
        _check_places(exam, arm, told, shift)
        _check_turns(exam, arm, told, shift)
        _check_openings(exam, arm, told, shift)


def _without_inverted(exam: Examination, arm: str, told: dict[str, ArmTrajectory]) -> dict[str, ArmTrajectory]:
    """The demos whose commanded poses are gripper-to-world; the others are reported."""
    inverted = []
    for name, reached in told.items():
        assert reached.commanded is not None
        turn = Rotation.from_quat(reached.commanded.quaternion, scalar_first=True).inv()
        stated = track_distance(reached.position, reached.commanded.position)
        other = track_distance(reached.position, -turn.apply(reached.commanded.position))
        if stated > INVERTED_M and other < INVERTED_GAIN * stated:
            inverted.append(name)
    if inverted and not exam.found("pose_direction"):  # else it is the reached track that is inverted
        exam.add(
            "command_direction",
            "error",
            f"arm {arm}, {listed(inverted)}",
            "commanded poses go with the reached ones only if one of both is inverted",
            "Store gripper-to-world poses in both tracks",
            cause="commanded poses inverted (world to gripper in place of gripper to world)",
            demos=inverted,
        )
    return {name: reached for name, reached in told.items() if name not in inverted}


def _delay(reached: ArmTrajectory) -> float:
    assert reached.commanded is not None
    return best_delay(reached.commanded.position, reached.position, 12)


def _paired(reached: np.ndarray, told: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    own = np.arange(max(0, -shift), min(len(told), len(told) - shift))
    return told[own], reached[own + shift]


def _check_places(exam: Examination, arm: str, told: dict[str, ArmTrajectory], shift: dict[str, int]) -> None:
    offsets, scales, pairs = {}, {}, {}
    for name, reached in told.items():
        assert reached.commanded is not None
        command, place = _paired(reached.position, reached.commanded.position, shift[name])
        pairs[name] = command, place
        centred, moved = place - place.mean(axis=0), command - command.mean(axis=0)
        if np.ptp(place, axis=0).max() > 0.05:
            scales[name] = float((centred * moved).sum() / (centred**2).sum())
        offsets[name] = np.median(command - place, axis=0)
    usual = float(np.median(list(scales.values()))) if scales else 1.0
    most = ODD_SCALE if abs(usual - 1) > ODD_SCALE else 3 * ODD_SCALE  # a short move of one demo says little
    odd = {name: scale for name, scale in scales.items() if abs(scale - 1) > most}
    off = {name: offset for name, offset in offsets.items() if np.linalg.norm(offset) > OFFSET_M}
    scale = float(np.median(list(odd.values()))) if odd else 1.0
    if (about_origin := _scale_about_origin([pairs[name] for name in off])) is not None:
        odd, scale = dict.fromkeys(off, about_origin), about_origin
    if odd:
        unit = unit_of(scale)
        exam.add(
            "command_scale",
            "error",
            f"arm {arm}, {listed(odd)}",
            f"commanded positions move {scale:.3g} times as far as reached ones" + (f": {unit}" if unit else ""),
            f"Convert the commanded positions to metres: divide them by {scale:.4g}",
            cause=f"commanded positions in {unit}" if unit else f"commanded positions scaled by {scale:.3g}",
            demos=odd,
        )
        return
    if off:
        offset = np.median(list(off.values()), axis=0)
        centimetres = ", ".join(f"{value * 100:.1f}" for value in offset)
        exam.add(
            "command_offset",
            "error",
            f"arm {arm}, {listed(off)}",
            f"commanded positions lie {np.linalg.norm(offset) * 100:.1f} cm from the reached ones ({centimetres} cm "
            "along the world's x, y, z)",
            "Give both tracks the same frame: another base or tool offset is likely",
            cause=f"commanded track offset by {np.linalg.norm(offset) * 100:.1f} cm",
            demos=off,
        )


def track_distance(reached: np.ndarray, told: np.ndarray) -> float:
    """Median distance (m) of two tracks [N, 3] at the delay that suits them."""
    delay = best_delay(told, reached, 12)
    command, place = _paired(reached, told, round(delay) if np.isfinite(delay) else 0)
    return float(np.median(np.linalg.norm(command - place, axis=1)))


def _scale_about_origin(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float | None:
    """The factor between commanded and reached positions [N, 3], where it explains them better than an offset does."""
    if not pairs:
        return None
    command, place = (np.concatenate(side) for side in zip(*pairs, strict=True))
    scale = float((command * place).sum() / (place**2).sum())
    offset = np.median(command - place, axis=0)
    by_scale = float(np.median(np.linalg.norm(command - scale * place, axis=1)))
    by_offset = float(np.median(np.linalg.norm(command - place - offset, axis=1)))
    return scale if abs(scale - 1) > SCALE_SHARE and by_scale < SCALE_GAIN * by_offset else None


def _check_turns(exam: Examination, arm: str, told: dict[str, ArmTrajectory], shift: dict[str, int]) -> None:
    readings = {
        "stored x, y, z, w": lambda q: np.roll(q, 1, axis=1),
        "conjugated (world to gripper)": lambda q: q * [1, -1, -1, -1],
        "stored x, y, z, w and conjugated": lambda q: np.roll(q, 1, axis=1) * [1, -1, -1, -1],
    }
    angles: dict[str, float] = {}
    causes: dict[str, list[str]] = {}
    for name, reached in told.items():
        assert reached.commanded is not None
        command, turn = _paired(reached.quaternion, reached.commanded.quaternion, shift[name])
        to = Rotation.from_quat(turn, scalar_first=True)

        def angles_of(quaternion: np.ndarray, to: Rotation = to) -> np.ndarray:
            return np.degrees((Rotation.from_quat(quaternion, scalar_first=True) * to.inv()).magnitude())

        own = angles_of(command)
        read = {words: angles_of(change(command)) for words, change in readings.items()}
        best = min(read, key=lambda words: float(read[words].mean()))
        # a gripper that points straight down is turned by half a turn, which is its own inverse: where that is so most
        # of the time the median says nothing about a conjugate, and the mean does
        clearly = own.mean() > READ_TURN_DEG and read[best].mean() < READ_GAIN * own.mean()
        stated = float(own.mean() if clearly else np.median(own))
        if not clearly and stated <= TURN_DEG:
            continue
        angles[name] = stated
        named = clearly or np.median(read[best]) < 0.5 * stated
        causes.setdefault(best if named else "", []).append(name)
    for words, names in causes.items():
        worst = max(angles[name] for name in names)
        exam.add(
            "command_rotation",
            "error",
            f"arm {arm}, {listed(names)}",
            f"commanded rotations are {worst:.0f} degrees from the reached ones"
            + (f"; they agree if they are read as {words}" if words else ""),
            "Store quaternions as w, x, y, z of the gripper in the world, of the same tool in both tracks",
            cause=f"commanded quaternions {words}" if words else f"commanded rotations off by {worst:.0f} degrees",
            demos=names,
        )


def _check_openings(exam: Examination, arm: str, told: dict[str, ArmTrajectory], shift: dict[str, int]) -> None:
    inverted, ratios = [], {}
    for name, reached in told.items():
        assert reached.commanded is not None
        command, opening = _paired(reached.gripper, reached.commanded.gripper, shift[name])
        if np.ptp(command) > 1e-3 and np.ptp(opening) > 1e-3:
            if np.corrcoef(command, opening)[0, 1] < -0.2:
                inverted.append(name)
            elif np.ptp(opening) > 0.2:
                ratios[name] = float(np.ptp(command) / np.ptp(opening))
        elif np.abs(command - (1 - opening)).max() < 0.1 < np.abs(command - opening).min():
            inverted.append(name)
    if inverted:
        exam.add(
            "command_gripper",
            "error",
            f"arm {arm}, {listed(inverted)}",
            "the commanded gripper closes where the reached one opens",
            "Store 0 for closed and 1 for open in both tracks",
            cause="commanded gripper inverted",
            demos=inverted,
        )
    small = [name for name, ratio in ratios.items() if ratio < 0.25]
    if small:
        exam.add(
            "command_gripper",
            "error",
            f"arm {arm}, {listed(small)}",
            "the commanded gripper uses a small part of its range: metres of opening are likely",
            "Store the opening as 0 closed to 1 open",
            cause="commanded gripper in metres",
            demos=small,
        )


def check_opening_unit(exam: Examination) -> None:
    """Openings that stay below a gripper's width in metres were not brought to 0..1."""
    for arm in exam.arms:
        demos = exam.with_arm(arm)
        highest = {demo.name: float(demo.arms[arm].gripper.max()) for demo in demos}
        small = [d.name for d in demos if highest[d.name] < 0.15 and np.ptp(d.arms[arm].gripper) > 0.005]
        if small:
            exam.add(
                "gripper_unit",
                "error",
                f"arm {arm}, {listed(small)}",
                f"the gripper's opening stays between 0 and {max(highest[name] for name in small):.3f}: metres of "
                "opening are likely",
                "Divide by the widest opening: 0 is closed, 1 is open",
                cause="gripper opening in metres",
                demos=small,
            )


def in_degrees(arm: ArmTrajectory) -> bool:
    """Whether joints turn farther than any joint does in radians."""
    return arm.joints is not None and arm.joints.size > 0 and bool(np.abs(arm.joints).max() > 7.0)


def check_joint_unit(exam: Examination) -> None:
    """Joints that turn farther than any joint does are in degrees."""
    for arm in exam.arms:
        found = [demo.name for demo in exam.with_arm(arm) if in_degrees(demo.arms[arm])]
        if found:
            exam.add(
                "joint_unit",
                "error",
                f"arm {arm}, {listed(found)}",
                "joint angles reach more than 7 rad: degrees are likely",
                "Convert the joints to radians (multiply by pi / 180)",
                cause="joints in degrees",
                demos=found,
            )


def check_outlier_poses(exam: Examination) -> None:
    """Single frames whose pose leaves the path of their neighbours, in either track."""
    for arm in exam.arms:
        for track in ("reached", "commanded"):
            found: dict[str, list[int]] = {}
            for demo in exam.with_arm(arm):
                poses = demo.arms[arm] if track == "reached" else demo.arms[arm].commanded
                if poses is not None and len(frames := _outliers(poses)):
                    found[demo.name] = [int(frame) for frame in frames]
            if found:
                name, first = next(iter(found.items()))
                exam.add(
                    "outlier_pose",
                    "error",
                    f"arm {arm}, {listed(found)}",
                    f"single {track} poses leave the path of their neighbours: {name} at frame "
                    f"{', '.join(map(str, first[:5]))}",
                    "Replace them by the mean of their neighbours or cut the demo there",
                    cause=f"outlier {track} pose",
                    demos=found,
                    frames=first,
                )


def _outliers(poses: ArmTrajectory) -> np.ndarray:
    """Frames whose position or rotation is far from both neighbours, which agree with each other."""
    found = set(pose_outliers(poses).tolist())
    path = poses.position
    if len(path) < 5:
        return np.array(sorted(found), dtype=int)
    off = np.linalg.norm(path[1:-1] - (path[:-2] + path[2:]) / 2, axis=1)
    apart = np.linalg.norm(path[2:] - path[:-2], axis=1)
    usual = max(float(np.quantile(off, 0.9)), 1e-3)
    found |= set((np.flatnonzero((off > 0.02) & (off > 4 * usual) & (off > 1.5 * apart)) + 1).tolist())
    turns = Rotation.from_quat(poses.quaternion, scalar_first=True)
    before, beyond = (turns[1:-1] * turns[:-2].inv()).magnitude(), (turns[2:] * turns[:-2].inv()).magnitude()
    after = (turns[2:] * turns[1:-1].inv()).magnitude()
    least = np.minimum(before, after)
    usual = max(float(np.quantile(least, 0.9)), 0.02)
    found |= set((np.flatnonzero((least > 0.35) & (least > 4 * usual) & (least > 1.5 * beyond)) + 1).tolist())
    return np.array(sorted(found), dtype=int)


def check_instructions(exam: Examination) -> None:
    """Demos without words for what they show."""
    empty = [demo.name for demo in exam.demos if demo.instruction.strip().lower() in NO_INSTRUCTION]
    if empty:
        exam.add(
            "empty_instruction",
            "warning" if len(empty) == len(exam.demos) else "error",
            listed(empty),
            f"{len(empty)} of {len(exam.demos)} demos have no instruction",
            "Write what the demo shows into its metadata; a policy that reads language learns nothing from these",
            cause="empty instruction",
            demos=empty,
        )
