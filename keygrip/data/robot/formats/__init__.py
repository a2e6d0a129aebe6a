"""Readers of what other recorders write: raiden, yam-abc, LeRobot v3 and LIBERO. Each reads into
`keygrip.data.robot.demos.Demo`."""

from __future__ import annotations

from keygrip.data.robot.formats.importing import ImportSummary, import_demos

__all__ = ["ImportSummary", "import_demos"]
