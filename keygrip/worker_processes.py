"""Setup of every spawned worker process of a recorder, of a shard writer or of the validation of shards."""

from __future__ import annotations

import os
import signal
import threading
import time


def prepare_worker(parent: int) -> None:
    """Ignore Ctrl-C, which the parent handles by letting current work finish; end this process when its parent was
    killed; and render with one thread.

    Args:
        parent: process id of the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's software renderer: one thread per process, not per core


def _end_with_parent(parent: int) -> None:
    """End this process when its parent has been killed; otherwise the pool would let it wait for work forever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
