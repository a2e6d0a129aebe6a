"""What this process may use of the machine: cores, and open files."""

from __future__ import annotations

import contextlib
import os
import resource


def usable_cores() -> int:
    """How many cores this process may use: those that a cluster's scheduler has given its job, not all of the
    machine's. At least one."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def allow_many_files() -> None:
    """Raises the soft limit of open files to the hard one: workers and shards need more than the usual 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
