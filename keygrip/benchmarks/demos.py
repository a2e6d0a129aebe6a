"""Demonstrations for benchmarks: a few from the simulator, copied under other names until an epoch is long enough."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from keygrip.data.robot.discovery import find_demos


def repeated_demos(config: DictConfig, folder: Path, demos: int, samples: int) -> Path:
    """Return a folder of native demos with at least `samples` frames, recorded as a training config describes, but
    fewer.

    The copies share their files on the disk (hard links). The epoch must not end in the middle of a measurement: the
    loaders would start again, which they do only once in a few hundred steps of a real run.

    Args:
        config: composed from ``conf/train.yaml``; its ``data.record`` describes the recording.
        folder: receives ``recorded/`` and ``demos/``. demos: number of demos to record (at least 2).
        samples: smallest number of frames.
    """
    # Recorded in separate processes: a graphics library leaves threads running, which would disturb the measurement.
    recording = replace(instantiate(config.data.record), folder=folder / "recorded", demos=max(demos, 2), processes=2)
    recording.complete()
    references = find_demos(recording.root, "native")
    frames = sum(len(reference.read()) for reference in references)
    root = folder / "demos"
    for copy in range(math.ceil(samples / frames)):
        for reference in references:
            shutil.copytree(reference.path, root / f"{reference.path.name}-{copy:03d}", copy_function=os.link)
    return root
