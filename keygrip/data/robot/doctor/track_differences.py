"""Findings that the commanded and the reached track of an arm differ."""

from __future__ import annotations

from collections.abc import Collection

from keygrip.data.robot.doctor.examination import Examination


def add_difference(
    exam: Examination,
    check: str,
    arm: str,
    names: Collection[str],
    shown_by_joints: Collection[str],
    message: str,
    *,
    commanded: tuple[str, str],
    either: tuple[str, str],
) -> None:
    """Add a finding that two tracks differ. Its cause and advice are `commanded` for demos whose reached track is
    confirmed by joints (`shown_by_joints`), and `either` for the others."""
    confirmed = [name for name in names if name in shown_by_joints]
    for demos, (cause, advice) in (
        (confirmed, commanded),
        ([name for name in names if name not in shown_by_joints], either),
    ):
        if demos:
            exam.add(check, "error", message, advice, cause=cause, demos=demos, arm=arm)
