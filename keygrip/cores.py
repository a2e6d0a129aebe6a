"""Cores that processes of this program are shared out over."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """How many cores this process may use: those that a cluster's scheduler has given its job, not all of the
    machine's. At least one."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
