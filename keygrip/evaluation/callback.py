"""Closed-loop evaluation at the end of training: success among the headline metrics, videos in TensorBoard."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from keygrip.evaluation.closed_loop import ClosedLoop, ConditionResult, summarise

log = logging.getLogger(__name__)


class EvaluateClosedLoop(Callback):
    """Drives the simulated arm with the run's latest checkpoint once training has ended.

    Writes ``closed_loop/result.json`` and videos into the run folder, logs ``closed_loop/<condition>/success_rate`` and shows the
    videos in TensorBoard.

    Args:
        closed_loop: what to evaluate. run_dir: the run folder, whose latest checkpoint is used.
    """

    def __init__(self, closed_loop: ClosedLoop, run_dir: str) -> None:
        self.closed_loop, self.run_dir = closed_loop, Path(run_dir)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        output = self.run_dir / "closed_loop"
        results = self.closed_loop.run(self.run_dir, output)
        figures = summarise(results)
        write_result(output / "result.json", figures, results)
        for name, summary in figures.items():
            trainer.callback_metrics[f"closed_loop/{name}/success_rate"] = torch.tensor(summary["success_rate"])
            log.info(
                "closed loop, %s: %d of %d succeeded (95 %% interval %.0f .. %.0f %%)",
                name,
                summary["successes"],
                summary["episodes"],
                100 * summary["success_low"],
                100 * summary["success_high"],
            )
        show_in_tensorboard(trainer, figures, results, output)


def write_result(path: Path, figures: dict[str, Any], results: list[ConditionResult]) -> None:
    """Write the figures and every episode as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    episodes = {result.name: [vars(episode) for episode in result.episodes] for result in results}
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps({"conditions": figures, "episodes": episodes}, indent=1))
    temporary.replace(path)


def show_in_tensorboard(
    trainer: Trainer, figures: dict[str, Any], results: list[ConditionResult], output: Path
) -> None:
    """Success rates as scalars and the filmed episodes as videos."""
    for logger in trainer.loggers:
        writer = getattr(logger, "experiment", None)
        if not hasattr(writer, "add_video") or not hasattr(writer, "add_scalar"):
            continue
        assert writer is not None
        for name, summary in figures.items():
            writer.add_scalar(f"closed_loop/{name}/success_rate", summary["success_rate"], trainer.global_step)
        for result in results:
            for episode in result.episodes:
                if episode.video is not None:
                    frames = read_frames(output / "videos" / episode.video, every=2)
                    # TensorBoard wants [N, T, C, H, W]; half of the frames at half speed keep the event file small.
                    tag = f"closed_loop/{result.name}_{episode.seed}_{'success' if episode.success else episode.failure}"
                    clip = torch.from_numpy(frames.transpose(0, 3, 1, 2))[None]
                    writer.add_video(tag, clip, trainer.global_step, fps=5)


def read_frames(path: Path, every: int = 1) -> np.ndarray:
    """Every n-th frame of a video, ``[N, H, W, 3]`` uint8."""
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for i, frame in enumerate(container.decode(video=0)) if i % every == 0]
    return np.stack(frames)
