"""What every spawned worker process of a recorder or of a writer of shards does first."""

from __future__ import annotations

import os
import signal
import threading
import time


def prepare_worker(parent: int) -> None:
    """Ctrl-C is left to the parent, which lets work under way finish; the process ends when its parent was killed; and
    it draws with one thread.

    Args:
        parent: its process id.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's software renderer: one thread per process, not per core


def _end_with_parent(parent: int) -> None:
    """Ends this process when its parent has been killed; the pool would leave it waiting for work forever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
