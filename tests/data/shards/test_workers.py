"""Processes that load data outlive a signal to the trainer's process group, and end with the trainer."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os, signal
from torch.utils.data import DataLoader
from keygrip.data.shards.sampling import start_worker

received = []
signal.signal(signal.SIGTERM, lambda *_: received.append(1))
loader = DataLoader(range(40), num_workers=2, worker_init_fn=start_worker, persistent_workers=True)
seen = 0
for batch in loader:
    seen += 1
    if seen == 3:
        os.killpg(os.getpgrp(), signal.SIGTERM)
print(seen, len(received), *(worker.pid for worker in loader._iterator._workers))
"""


def test_workers_outlive_a_signal_to_the_group_and_end_with_the_trainer() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], start_new_session=True, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    seen, received, *workers = (int(word) for word in done.stdout.split())
    assert (seen, received) == (40, 1)
    assert len(workers) == 2
    for worker in workers:
        assert subprocess.run(["ps", "-p", str(worker)], capture_output=True, check=False).returncode != 0
