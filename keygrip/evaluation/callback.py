"""Closed-loop evaluation at the end of training: success rates in the headline metrics, videos in TensorBoard."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from keygrip.data.video import read_video
from keygrip.evaluation.closed_loop import ClosedLoop, ConditionResult
from keygrip.evaluation.environments import environment_settings
from keygrip.evaluation.kinds import refuse_unknown
from keygrip.evaluation.rollout_report import RESULT, remove_report, write_report
from keygrip.models.policy import Needs, robot_number
from keygrip.training.checkpoints import run_config
from keygrip.training.loggers import log_final_figures
from keygrip.training.parts import external_settings, named_packages
from keygrip.training.task_metrics import unique_short_names

log = logging.getLogger(__name__)

# of a condition's figures, by kind of episode
BREAKDOWNS = ("by_colour", "by_height", "by_instruction", "by_difficulty")


class EvaluateClosedLoop(Callback):
    """Evaluate the run's latest checkpoint in closed loop in an environment when training has ended.

    The environment is that of ``keygrip evaluate env=NAME`` on the run. It is opened once before training, so that a
    missing interpreter, camera or arm is reported early. Writes ``closed_loop/result.json`` and videos into the run
    folder, logs ``closed_loop/<condition>/success_rate`` (for several tasks also their mean,
    ``closed_loop/all/success_rate``) and shows the videos in TensorBoard.

    Args:
        closed_loop: settings of a partial call of `ClosedLoop`: what to evaluate, without the environment.
        env: settings of the environment, an option of the group env.
        run_dir: the run folder, whose latest checkpoint is used.
    """

    def __init__(self, closed_loop: Mapping[str, Any], env: Mapping[str, Any], run_dir: str) -> None:
        if env["control"]:
            raise ValueError(
                "nothing reads callbacks.closed_loop.env.control: give callbacks.closed_loop.closed_loop.control"
            )
        self.settings: dict[str, Any] = instantiate(dict(closed_loop), _convert_="all").keywords
        self.env, self.run_dir = env, Path(run_dir)
        self.closed_loop: ClosedLoop | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build the evaluation and refuse what the environment or the policy cannot do.

        Raises:
            ValueError: The model is not a robot policy, or the environment does not provide the policy's inputs.
        """
        if stage != "fit" or not trainer.is_global_zero:
            return
        config = run_config(trainer)
        # Packages and files in the user's own configuration are trusted: the checkpoint is opened with them.
        trust, external = named_packages([config["model"], config["data"]]), external_settings(config["model"])
        env = environment_settings(config["data"], self.env, trust)
        device = self.settings.get("device") or str(trainer.strategy.root_device)  # where training computes
        make = partial(ClosedLoop, **{"trust": trust, "external": external, **self.settings, "device": device})
        self.closed_loop = env.closed_loop(make)
        self.closed_loop.check(_policy_needs(pl_module, self.closed_loop.policy))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert self.closed_loop is not None
        output = self.run_dir / "closed_loop"
        remove_report(output)
        results = self.closed_loop.run(self.run_dir, output)
        report = write_report(results, output / RESULT, self.closed_loop.of_tasks)
        figures = report["conditions"] | ({"all": report["all"]} if "all" in report else {})
        for name, summary in figures.items():
            for figure in ("success_rate", "plan_ms_median"):
                if figure in summary:
                    trainer.callback_metrics[f"closed_loop/{name}/{figure}"] = torch.tensor(summary[figure])
            log.info(
                "closed loop, %s: %d of %d succeeded (95 %% interval %.0f .. %.0f %%)",
                name,
                summary["successes"],
                summary["episodes"],
                100 * summary["success_low"],
                100 * summary["success_high"],
            )
            if summary.get("clamped_plans"):
                log.info(
                    "  %d of %d plans were held back at the box of the training positions (policy.margin_m), in %d "
                    "episodes, by at most %.1f cm",
                    summary["clamped_plans"],
                    summary["plans"],
                    summary["clamped_episodes"],
                    100 * summary["clamped_most_m"],
                )
            for kinds in (summary.get(kind, {}) for kind in BREAKDOWNS):
                for kind, rates in kinds.items():
                    log.info("  %s: %d of %d", kind, rates["successes"], rates["episodes"])
        show_in_loggers(trainer, figures, results, output)


def _policy_needs(module: Any, changes: Mapping[str, Any]) -> Needs | None:
    """Return the inputs that the module's policy needs. The module and its training modes are unchanged. Changes to the
    policy's settings are checked by name only, because some of them convert weights in place.

    Raises:
        ValueError: The model is not a robot policy, a setting does not exist, or the model needs the name of one of
            several robots and none is given.
    """
    if not hasattr(module, "policy"):
        raise ValueError(f"closed_loop=...: a {type(module).__name__} is no robot policy: leave it out")
    modes = {part: part.training for part in module.modules()}
    try:
        policy = module.policy()
        if changes:
            refuse_unknown(changes, type(policy))
        robot_number(getattr(module, "embodiments", ()), changes.get("embodiment"))
        return getattr(policy, "needs", None)
    finally:
        for part, training in modes.items():
            part.training = training


def show_in_loggers(trainer: Trainer, figures: dict[str, Any], results: list[ConditionResult], output: Path) -> None:
    """Log success rates as scalars and the recorded episodes as videos."""
    step, scalars = trainer.global_step, {}
    for name, summary in figures.items():
        scalars[f"closed_loop/{name}/success_rate"] = summary["success_rate"]
        for breakdown in BREAKDOWNS:
            kinds = list(summary.get(breakdown, ()))
            is_text = breakdown == "by_instruction"
            short_names = unique_short_names(kinds) if is_text else [kind.replace(" ", "_") for kind in kinds]
            for kind, short in zip(kinds, short_names, strict=True):
                rate = summary[breakdown][kind]["success_rate"]
                scalars[f"closed_loop/{name}/success_rate_by_kind/{short}"] = rate
    recorded = [
        (result.name, episode) for result in results for episode in result.episodes if episode.video is not None
    ]
    log_final_figures(trainer.loggers, scalars, step)
    for logger in trainer.loggers:
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

    torch's own ``add_video`` needs moviepy; without it, it prints a line and does nothing. A GIF needs no further
    package.
    """
    buffer = io.BytesIO()
    first, *rest = [Image.fromarray(frame).quantize(128) for frame in frames]
    first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    height, width = frames.shape[1:3]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
    file_writer: Any = writer.file_writer
    file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
