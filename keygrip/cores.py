"""Resources of the machine that this process may use: cores and open files."""

from __future__ import annotations

import contextlib
import os
import resource


def usable_cores() -> int:
    """Return the number of cores that this process may use, at least one: on a cluster those that the scheduler has
    allocated to the job, not all cores of the machine."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def allow_many_files() -> None:
    """Set the soft limit of open files to the hard limit: workers and shards need more than the usual 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
