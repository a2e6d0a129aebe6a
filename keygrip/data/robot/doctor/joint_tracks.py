"""Compares recorded positions with the kinematics of recorded joints: scale, clock, and demos that differ from the
others."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.data.robot.doctor.examination import Examination
from keygrip.data.robot.doctor.kinematics import with_joints
from keygrip.data.robot.doctor.tracks import best_delay, reached_frames_on_path, unit_of
from keygrip.robots.kinematics import forward_kinematics, matrix_from_quaternion

SCALE, DELAY_FRAMES, SPREAD_M, ODD_M = 0.02, 0.4, 0.006, 0.008


def check_joint_tracks(exam: Examination) -> None:
    """Check positions against a YAM's recorded joints, which give the gripper's position whatever the frame of the
    recorded positions."""
    for arm in exam.arms:
        scales, delays, bases = {}, {}, {}
        recorded = with_joints(exam, arm)
        inconsistent = exam.named("kinematics", "pose_direction", "quaternion_order", arm=arm)
        if inconsistent >= {demo.name for demo, *_ in recorded}:
            inconsistent = set()  # all demos disagree with their joints: no single demo is odd
        for demo, joints, model in recorded:
            track = demo.arms[arm]
            joint_position, quaternion = forward_kinematics(joints, *model)
            if np.ptp(joint_position, axis=0).max() < 0.03:
                continue
            rotations = Rotation.from_matrix(
                matrix_from_quaternion(track.quaternion) @ matrix_from_quaternion(quaternion).transpose(0, 2, 1)
            )
            base_rotation = rotations[reached_frames_on_path(demo, arm)].mean()
            rotated = base_rotation.apply(joint_position)
            delay = best_delay(rotated, track.position, 8)
            if (
                np.isfinite(delay)
                and abs(delay) > DELAY_FRAMES
                and _delay_explains_difference(delay, rotated, track.position)
            ):
                delays[demo.name] = delay
                continue
            aligned = _rotation_between(joint_position, track.position)
            centred_aligned, centred_recorded = (
                aligned.apply(joint_position - joint_position.mean(axis=0)),
                track.position - track.position.mean(axis=0),
            )
            scale = float((centred_aligned * centred_recorded).sum() / (centred_aligned**2).sum())
            residual = centred_recorded - scale * centred_aligned
            if abs(scale - 1) > SCALE and float(np.median(np.linalg.norm(residual, axis=1))) < SPREAD_M:
                scales[demo.name] = scale
                continue
            if demo.name not in inconsistent:
                bases[demo.name] = np.median(track.position - rotated, axis=0)
        _report_scales(exam, arm, scales)
        _report_delays(exam, arm, delays)
        if len(bases) >= 3:
            _report_odd_offsets(exam, arm, bases)


def _delay_explains_difference(delay: float, computed: np.ndarray, recorded: np.ndarray) -> bool:
    """Return whether tracks [N, 3] agree up to an offset after one is shifted by `delay` frames. If rotations are in
    another convention or joints have another zero position, no shift achieves that."""
    frames = np.arange(len(computed))
    shifted = np.stack([np.interp(frames - delay, frames, axis) for axis in computed.T], axis=1)
    residual = recorded - shifted
    return float(np.median(np.linalg.norm(residual - np.median(residual, axis=0), axis=1))) < SPREAD_M


def _rotation_between(first: np.ndarray, second: np.ndarray) -> Rotation:
    return Rotation.align_vectors(second - second.mean(axis=0), first - first.mean(axis=0))[0]


def _report_scales(exam: Examination, arm: str, scales: dict[str, float]) -> None:
    if not scales:
        return
    scale = float(np.median(list(scales.values())))
    unit = unit_of(scale)
    exam.add(
        "position_scale",
        "error",
        f"recorded positions move {scale:.3f} times as far as the kinematics of the recorded joints",
        f"Convert the positions to metres: divide them by {scale:.4g}",
        cause=f"positions in {unit}" if unit else f"positions scaled by {scale:.3f}",
        demos=scales,
        arm=arm,
    )


def _report_delays(exam: Examination, arm: str, delays: dict[str, float]) -> None:
    if not delays:
        return
    delay = float(np.median(list(delays.values())))
    frames = max(1, round(abs(delay)))
    exam.add(
        "pose_lag",
        "error",
        f"recorded poses follow the kinematics of the recorded joints by {delay:.1f} frames",
        f"Shift the poses by {frames} frames {'earlier' if delay > 0 else 'later'}",
        cause=f"poses {frames} frames {'late' if delay > 0 else 'early'} against the joints",
        demos=delays,
        arm=arm,
    )


def _report_odd_offsets(exam: Examination, arm: str, bases: dict[str, np.ndarray]) -> None:
    usual_base = np.median(np.stack(list(bases.values())), axis=0)
    odd_offsets = {name: base - usual_base for name, base in bases.items() if np.linalg.norm(base - usual_base) > ODD_M}
    if not odd_offsets or len(odd_offsets) > len(bases) / 2:
        return
    centimetres = max(float(np.linalg.norm(value)) for value in odd_offsets.values()) * 100
    exam.add(
        "base_offset",
        "error",
        f"recorded positions lie up to {centimetres:.1f} cm elsewhere against the joints than in the other demos",
        "Give all demos the same base and tool frame",
        cause=f"positions offset by {centimetres:.1f} cm in these demos",
        demos=odd_offsets,
        arm=arm,
    )
