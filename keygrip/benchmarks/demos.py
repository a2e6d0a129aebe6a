"""Demonstrations to measure with: a few from the simulator, repeated under other names to make an epoch long enough."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from keygrip.data.robot.discovery import find_demos


def repeated_demos(config: DictConfig, folder: Path, demos: int, samples: int) -> Path:
    """A folder of native demos with at least so many frames: what a training config would record, but fewer.

    The copies share their files on the disk. An epoch that ends in the middle of a measurement would make loaders start
    again, which they do once in a few hundred steps of a real run.

    Args:
        config: composed from ``conf/train.yaml``; its ``data.record`` says what to record.
        folder: receives ``recorded/`` and ``demos/``. demos: how many to record (at least 2).
        samples: frames wanted, at least.
    """
    from hydra.utils import instantiate

    # Recorded in processes of their own: a graphics library leaves threads behind that disturb measurements.
    recording = replace(instantiate(config.data.record), folder=folder / "recorded", demos=max(demos, 2), processes=2)
    recording.complete()
    references = find_demos(recording.root, "native")
    frames = sum(len(reference.read()) for reference in references)
    root = folder / "demos"
    for copy in range(math.ceil(samples / frames)):
        for reference in references:
            shutil.copytree(reference.path, root / f"{reference.path.name}-{copy:03d}", copy_function=os.link)
    return root
