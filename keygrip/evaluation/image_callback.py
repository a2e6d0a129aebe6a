"""The image suite at the end of training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from keygrip.artifacts import write_json
from keygrip.data.image_text.datamodule import ImageShards
from keygrip.evaluation.image_cases import ImageSuite
from keygrip.evaluation.image_report import REPORT
from keygrip.evaluation.image_text import check_suite, headline, run_suite
from keygrip.models.patch_dit.module import PatchDiTModule
from keygrip.training.checkpoints import load_module, run_config
from keygrip.training.loggers import log_final_figures, log_image
from keygrip.training.parts import external_settings, named_packages

log = logging.getLogger(__name__)


class EvaluateImages(Callback):
    """Run the image suite on the run's latest checkpoint when training has ended.

    Writes `images/` (report, images, result.json) into the run folder, logs `images/<case>/<figure>` among the
    headline metrics and shows the images in TensorBoard.

    Args:
        suite: what to evaluate. data: the run's data module. run_dir: the run folder.
    """

    def __init__(self, suite: ImageSuite, data: ImageShards, run_dir: str) -> None:
        self.suite, self.data, self.run_dir = suite, data, Path(run_dir)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ValueError or FileNotFoundError if there are no images to evaluate, or if the suite cannot be run on
        the model. Reported before training, not after it."""
        self.data.prepare_data()
        self.data.setup()
        if not len(self.data.samples(self.suite.split)):
            val = "callbacks.images.suite.split=val, or " if len(self.data.samples("val")) else ""
            raise ValueError(
                f"{self.data.place} has no {self.suite.split} images for the evaluation after training: give "
                f"{val}callbacks.images=null"
            )
        assert isinstance(pl_module, PatchDiTModule)
        try:
            check_suite(pl_module, self._undivided_data(), self.suite)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"callbacks.images.suite: {error}") from error
        except ValueError as error:
            raise ValueError(f"callbacks.images.suite: {error}") from error

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        model_config = run_config(trainer)["model"]
        # Packages and files in the user's own configuration are trusted: the checkpoint is opened with them.
        trust, external = named_packages(model_config), external_settings(model_config)
        module = load_module(self.run_dir, expected=PatchDiTModule, trust=trust, external=external)  # with EMA weights
        # the device of training; the trainer has moved its own module to the CPU
        module.to(trainer.strategy.root_device)
        assert isinstance(module, PatchDiTModule)
        output = self.run_dir / "images"
        figures, images = run_suite(module, self._undivided_data(), self.suite, output)
        write_json(output / "result.json", figures)
        for name, value in headline(figures).items():
            trainer.callback_metrics[f"images/{name}"] = torch.tensor(value)
        self._show(trainer, headline(figures), images)
        log.info("images and report: %s", output / REPORT)

    def _undivided_data(self) -> ImageShards:
        """Return the data without the trainer, which would divide batches among its processes."""
        data = copy.copy(self.data)
        data.trainer = None
        return data

    @staticmethod
    def _show(trainer: Trainer, figures: Mapping[str, float], images: Sequence[Path]) -> None:
        step = trainer.global_step
        log_final_figures(trainer.loggers, {f"images/{name}": value for name, value in figures.items()}, step)
        for path in images:
            log_image(trainer.loggers, f"images/{path.stem}", np.asarray(Image.open(path).convert("RGB")), step)
