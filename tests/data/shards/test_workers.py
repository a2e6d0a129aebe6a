"""Data loader processes survive signals that are meant for the trainer, and end with the trainer."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, subprocess, sys
from torch.utils.data import DataLoader
from keygrip.data.shards.sampling import start_worker

ended = iter(DataLoader(range(40), num_workers=1, worker_init_fn=start_worker))
next(ended)
ended._workers[0].terminate()  # as the trainer does
ended._workers[0].join(60)

received = []
signal.signal(signal.SIGTERM, lambda *_: received.append(1))
loader = DataLoader(range(40), num_workers=2, worker_init_fn=start_worker, persistent_workers=True)
seen = 0
for batch in loader:
    seen += 1
    if seen == 3:
        if sys.argv[1] == "group":
            os.killpg(os.getpgrp(), signal.SIGTERM)
        else:  # as Slurm does: from a process that is not the trainer
            workers = [str(worker.pid) for worker in loader._iterator._workers]
            for name in ("-TERM", "-INT", "-USR1"):
                subprocess.run(["kill", name, *workers], check=True)
            os.kill(os.getpid(), signal.SIGTERM)
print(ended._workers[0].exitcode, seen, len(received), *(worker.pid for worker in loader._iterator._workers))
"""


@pytest.mark.parametrize("signalled", ["group", pytest.param("every process", marks=pytest.mark.slow)])
def test_workers_outlive_a_signal_and_end_with_the_trainer_or_when_it_tells_them_to(signalled: str) -> None:
    command = [sys.executable, "-c", SCRIPT, signalled]
    done = subprocess.run(command, start_new_session=True, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    exitcode, seen, received, *workers = (int(word) for word in done.stdout.split())
    assert (exitcode, seen, received) == (0, 40, 1)
    assert len(workers) == 2
    for worker in workers:
        assert subprocess.run(["ps", "-p", str(worker)], capture_output=True, check=False).returncode != 0
