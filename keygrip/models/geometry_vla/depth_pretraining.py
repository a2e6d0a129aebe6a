"""Depth pretraining of the geometry encoder, on images of many scenes and cameras.

MapAnything was trained on very many scenes. A small encoder that is trained from random weights together with the
actions sees only the demonstrations, with one camera pose per demonstration. It can therefore first be trained on still
images of the simulator, where scenes and cameras cost next to nothing and depth is known. `geometry.init_from` names
such a run, and `geometry.frozen` then keeps its weights fixed, as those of MapAnything are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from keygrip.data.batches import MultiViewPolicyBatch
from keygrip.models.geometry_vla.figures import scene_figure
from keygrip.models.geometry_vla.geometry import DinoMultiView, GeometryFeatures
from keygrip.models.nn.processor_attention import trained_on
from keygrip.training.distributed import mean_over_processes
from keygrip.training.optimizers import AdamW
from keygrip.training.parts import model_part
from keygrip.training.system import System

if TYPE_CHECKING:
    from keygrip.data.robot.statistics import DemoStatistics

HEADLINE = ("loss", "point_cm", "depth_cm")
BAR = ("loss", "point_cm")  # metrics in the progress line


@model_part
class DepthReaderModule(System):
    """Train a `DinoMultiView` on depth alone.

    Args:
        network: the encoder, which also sets the weights of the two losses.
        optimizer: its settings.
        log_images_every_n_steps: minimum steps between validations that show depth maps; 0: none.

    Raises:
        ValueError: an encoder that learns no depth, or negative steps.
    """

    batch_type = MultiViewPolicyBatch
    learns_depth = True  # read by the data module
    toy_overrides = (
        *("data=yam_stills", "data.record.demos=4", "data.record.image_size=72", "backbone.image_size=64"),
        *("backbone.width=32", "backbone.depth=1", "backbone.heads=2", "geometry.layers=1", "data.batch_size=4"),
    )
    headline_metrics = tuple(f"{split}/{name}" for split in ("train", "val") for name in HEADLINE)

    def __init__(self, network: DinoMultiView, optimizer: AdamW, log_images_every_n_steps: int = 1) -> None:
        super().__init__(optimizer)
        if not network.learns_depth:
            raise ValueError(
                "model=depth_reader trains on depth alone: set geometry.point_weight or geometry.depth_weight above 0, "
                "and geometry.frozen=false."
            )
        if log_images_every_n_steps < 0:
            raise ValueError(f"model.log_images_every_n_steps is 0 (off) or positive, got {log_images_every_n_steps}.")
        self.network, self.log_images_every_n_steps = network, log_images_every_n_steps

    def set_statistics(self, statistics: DemoStatistics) -> None:
        """Load the weights of the run to start from, if there is one; no statistics are stored."""
        if not self.resumed:  # the checkpoint has its weights
            self.network.take_start(self.own_packages, self.own_files)

    def forward(self, batch: MultiViewPolicyBatch) -> GeometryFeatures:
        """The encoder's features of a batch's images."""
        return self.network(batch.images, batch.view_intrinsics, batch.view_world_to_camera)

    def losses(self, features: GeometryFeatures, batch: MultiViewPolicyBatch) -> dict[str, Tensor]:
        """The encoder's losses, and `loss`, the sum of `points` and `depth`."""
        if batch.depth is None:
            raise ValueError("model=depth_reader learns from depth and the batches hold none: set data.depth=true.")
        losses = self.network.losses(features, batch.depth, batch.view_intrinsics, batch.view_world_to_camera)
        return losses | {"loss": losses["points"] + losses["depth"]}

    def loss(self, batch: MultiViewPolicyBatch) -> Tensor:
        """The loss of a training step on a batch."""
        return self.losses(self(batch), batch)["loss"]

    def training_step(self, batch: MultiViewPolicyBatch, batch_idx: int) -> Tensor:
        with trained_on(self.device):
            losses = self.losses(self(batch), batch)
        self.log_values("train", mean_over_processes(losses), len(batch), BAR)
        return losses["loss"]

    def validation_step(self, batch: MultiViewPolicyBatch, batch_idx: int) -> None:
        features = self(batch)
        losses = self.losses(features, batch)
        assert batch.depth is not None
        counts = self.network.counts(features, batch.depth, batch.view_intrinsics, batch.view_world_to_camera)
        self.log_values("val", losses, len(batch), BAR, counts | {"loss": counts["points"]})
        if batch_idx == 0 and self.images_are_due(self.log_images_every_n_steps):
            self._show(features, batch)

    @torch.no_grad()
    def figure(self, features: GeometryFeatures, batch: MultiViewPolicyBatch, sample: int = 0) -> np.ndarray:
        """One sample's views with recorded and predicted depth, ``[H, W, 3]`` uint8."""
        return scene_figure(batch, None, features, sample)

    def _show(self, features: GeometryFeatures, batch: MultiViewPolicyBatch) -> None:
        if self.shows_images:
            self.show_image("val/depth", self.figure(features, batch))
