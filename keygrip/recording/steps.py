"""Steps of data preparation that join parts which know nothing of each other; ``conf/step`` names them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from keygrip.data.robot.datamodule import RobotDemos
    from keygrip.envs.yam.tasks import TaskOptions
    from keygrip.models.geometry.rotation_codecs import RotationCodec


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
    """Record demonstrations in the simulator; returns counts and seconds."""
    from keygrip.recording.demonstrations import record as record_demos

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


def examine(
    root: str | Path,
    output: str | Path | None,
    format: str,
    calibration: str | Path | None,
    max_demos: int | None,
    frames_per_demo: int,
    height_bins: int,
    pred_size: int,
) -> dict[str, Any]:
    """Let the geometry doctor look at a folder; says every finding and what to do, returns counts and where the
    pictures are."""
    from keygrip.data.robot.doctor import doctor

    folder = Path(output) if output is not None else Path("runs/doctor") / Path(root).resolve().name
    findings = doctor(
        root,
        folder,
        format=format,
        calibration=calibration,
        max_demos=max_demos,
        frames_per_demo=frames_per_demo,
        height_bins=height_bins,
        pred_size=pred_size,
    )
    for finding in findings:
        log.warning("%s", finding)
    if not findings:
        log.info("nothing is wrong with %s", root)
    errors = sum(finding.severity == "error" for finding in findings)
    log.info("contact sheets and report: %s", folder)
    return {"root": str(root), "output": str(folder), "errors": errors, "warnings": len(findings) - errors}


def fit_rotation(data: RobotDemos, rotation: RotationCodec) -> dict[str, Any]:
    """Fit one rotation basis an arm on the training split and keep it beside the dataset; returns the reports."""
    import copy

    import torch

    from keygrip.models.geometry.rotation_codecs import fit_or_load

    data.prepare_data()
    data.setup("fit")
    statistics = data.statistics
    return {
        arm: fit_or_load(
            copy.deepcopy(rotation), torch.from_numpy(values), statistics.cache_dir, statistics.fingerprint
        )
        for arm, values in statistics.quaternions.items()
    } | {"folder": str(statistics.cache_dir)}
