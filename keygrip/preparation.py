"""Steps of data preparation that join parts which know nothing of each other; ``conf/step`` names them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keygrip.data.robot_demos import RobotDemos
    from keygrip.geometry.rotation_codecs import RotationCodec
    from keygrip.sim.tasks import TaskOptions


def record(
    task: TaskOptions,
    root: str | Path,
    demos: int,
    seed: int,
    image_size: int,
    hz: float,
    processes: int | None,
    cameras: Sequence[str] | None,
    depth: bool,
    video: bool,
) -> dict[str, Any]:
    """Record demonstrations in the simulator; see :func:`keygrip.sim.recorder.record`. Returns counts and seconds."""
    from keygrip.sim.recorder import record as record_demos

    summary = record_demos(
        task,
        root,
        demos,
        seed=seed,
        image_size=image_size,
        hz=hz,
        processes=processes or os.cpu_count() or 1,
        cameras=None if cameras is None else tuple(cameras),
        depth=depth,
        video=video,
    )
    return {
        "root": str(summary.root),
        "demos": summary.demos,
        "recorded": summary.recorded,
        "failed_episodes": summary.failed,
        "wall_s": round(summary.seconds, 1),
    }


def fit_rotation(data: RobotDemos, rotation: RotationCodec) -> dict[str, Any]:
    """Fit one rotation basis an arm on the training split and keep it beside the dataset; returns the reports."""
    import copy

    import torch

    from keygrip.geometry.rotation_codecs import fit_or_load

    data.prepare_data()
    data.setup("fit")
    statistics = data.statistics
    return {
        arm: fit_or_load(copy.deepcopy(rotation), torch.from_numpy(values), statistics.cache_dir, statistics.fingerprint)
        for arm, values in statistics.quaternions.items()
    } | {"folder": str(statistics.cache_dir)}
