"""Closed-loop evaluation at the end of training: success among the headline metrics, videos in TensorBoard."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from keygrip.artifacts import write_json
from keygrip.data.video import read_video
from keygrip.evaluation.closed_loop import ClosedLoop, ConditionResult, summarise
from keygrip.models.policy import robot_number

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class EvaluateClosedLoop(Callback):
    """Drives the simulated arm with the run's latest checkpoint once training has ended.

    Writes ``closed_loop/result.json`` and videos into the run folder, logs ``closed_loop/<condition>/success_rate``
    and shows the videos in TensorBoard.

    Args:
        closed_loop: what to evaluate. run_dir: the run folder, whose latest checkpoint is used.
    """

    def __init__(self, closed_loop: ClosedLoop, run_dir: str) -> None:
        self.closed_loop, self.run_dir = closed_loop, Path(run_dir)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses before training what no episode could be driven with.

        Raises:
            ValueError: the model tells several robots apart, and the settings name none.
        """
        robot_number(getattr(pl_module, "embodiments", ()), self.closed_loop.policy.get("embodiment"))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        output = self.run_dir / "closed_loop"
        results = self.closed_loop.run(self.run_dir, output)
        figures = summarise(results)
        write_result(output / "result.json", figures, results)
        for name, summary in figures.items():
            for figure in ("success_rate", "plan_ms_median"):
                trainer.callback_metrics[f"closed_loop/{name}/{figure}"] = torch.tensor(summary[figure])
            log.info(
                "closed loop, %s: %d of %d succeeded (95 %% interval %.0f .. %.0f %%)",
                name,
                summary["successes"],
                summary["episodes"],
                100 * summary["success_low"],
                100 * summary["success_high"],
            )
            for kinds in (summary.get("by_colour", {}), summary.get("by_height", {})):
                for kind, rates in kinds.items():
                    log.info("  %s: %d of %d", kind, rates["successes"], rates["episodes"])
        show_in_loggers(trainer, figures, results, output)


def write_result(path: Path, figures: dict[str, Any], results: list[ConditionResult]) -> None:
    """Write the figures and every episode as JSON, whole or not at all."""
    episodes = {result.name: [vars(episode) for episode in result.episodes] for result in results}
    write_json(path, {"conditions": figures, "episodes": episodes})


def show_in_loggers(trainer: Trainer, figures: dict[str, Any], results: list[ConditionResult], output: Path) -> None:
    """Success rates as scalars and the recorded episodes as videos."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    step, scalars = trainer.global_step, {}
    for name, summary in figures.items():
        scalars[f"closed_loop/{name}/success_rate"] = summary["success_rate"]
        for kind, rates in (summary.get("by_colour", {}) | summary.get("by_height", {})).items():
            scalars[f"closed_loop/{name}/success_rate_by_kind/{kind.replace(' ', '_')}"] = rates["success_rate"]
    recorded = [
        (result.name, episode) for result in results for episode in result.episodes if episode.video is not None
    ]
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=step)
        writer = getattr(logger, "experiment", None)
        for name, episode in recorded:
            tag = f"closed_loop/{name}_{episode.seed}_{'success' if episode.success else episode.failure}"
            video = output / "videos" / str(episode.video)
            if isinstance(writer, SummaryWriter):
                add_animation(writer, tag, read_video(video, every=2), step, fps=5)
            elif hasattr(logger, "log_video"):
                logger.log_video(tag, [str(video)], step=step)


def add_animation(writer: SummaryWriter, tag: str, frames: np.ndarray, step: int, fps: float) -> None:
    """Show frames ``[N, H, W, 3]`` uint8 as an animation among TensorBoard's images.

    torch's own ``add_video`` needs moviepy, and prints a line and does nothing where it is missing; a GIF needs
    nothing.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    buffer = io.BytesIO()
    first, *rest = [Image.fromarray(frame).quantize(128) for frame in frames]
    first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    height, width = frames.shape[1:3]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
    file_writer: Any = writer.file_writer
    file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
