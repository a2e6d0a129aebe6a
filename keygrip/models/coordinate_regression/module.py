"""Training of the regression baseline, on the same batches and with the same control as the volume-query policy."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keygrip.data.batches import CLOSED, PolicyBatch
from keygrip.data.robot.statistics import DemoStatistics
from keygrip.exporting.graphs import ExportGraph
from keygrip.models.coordinate_regression.network import (
    STATE_SIZE,
    CoordinateRegressionGraph,
    CoordinateRegressionNetwork,
    RegressionOutput,
)
from keygrip.models.geometry.cameras import inside_image, project
from keygrip.models.geometry.rotations import columns_to_quaternion, geodesic_angle, quaternion_to_columns
from keygrip.models.nn.processor_attention import trained_on
from keygrip.models.policy import Needs, Observation, Plan, image_of, refuse_incomplete
from keygrip.models.policy_statistics import PolicyStatistics
from keygrip.models.policy_tensors import plans_of, stacked_poses
from keygrip.training.checkpoints import stored_beside_weights
from keygrip.training.distributed import check_weights, mean_over_processes, weighted_means
from keygrip.training.optimizers import AdamW
from keygrip.training.parts import model_part
from keygrip.training.system import System, check_names

log = logging.getLogger(__name__)

HEADLINE = ("pix_argmax", "gripper_open_acc", "height_m", "position_cm", "rotation_deg")


BAR = ("total", "position_cm")  # metrics in the progress line
STATE = "coordinate_regression"  # checkpoint key of the state that is not in the weights


@model_part(from_checkpoint={"init_from": None})
class CoordinateRegressionModule(System):
    """L1 loss on normalised positions and rotation columns, cross-entropy on the gripper's opening.

    Steps that project outside the image also count in the loss: a regressor can predict them, and leaving them out
    would put it at a disadvantage.

    Args:
        network: the plain network. optimizer: its settings.
        position_weight, rotation_weight, gripper_weight: weights of the three losses.
        mask_padded_steps: leave steps past the end of a demo, which repeat its last pose, out of the loss.
        init_from: run folder or checkpoint of a regression policy from whose weights training starts; positions are
            normalised over the range of the new data. None: start from the network as built.
    """

    batch_type = PolicyBatch
    reads_calibration = False  # only `pix_argmax` reads it, and is left out without it
    evaluation_kind = "policy"
    about = "coordinate_regression, the baseline of volume_query: a robot policy that predicts metres"
    toy_overrides = (
        *("data=yam", "data.record.task.name=reach", "data.record.demos=4", "data.record.image_size=72"),
        *("backbone.image_size=64", "backbone.width=32", "backbone.depth=1", "backbone.heads=2"),
    )

    headline_metrics = tuple(f"{split}/{name}" for split in ("train", "val") for name in HEADLINE)

    def __init__(
        self,
        network: CoordinateRegressionNetwork,
        optimizer: AdamW,
        position_weight: float = 1.0,
        rotation_weight: float = 0.5,
        gripper_weight: float = 0.5,
        init_from: str | None = None,
        mask_padded_steps: bool = False,
    ) -> None:
        super().__init__(optimizer)
        self.network, self.init_from = network, init_from
        self.mask_padded_steps = mask_padded_steps
        self.statistics = PolicyStatistics()
        self.camera: str | None = None  # name of the camera that the policy reads
        self.logs_pixels = True
        self.weights = {"position": position_weight, "rotation": rotation_weight, "gripper": gripper_weight}
        check_weights({f"model.{name}_weight": weight for name, weight in self.weights.items()})

    def resume_data(self, datamodule: Any, checkpoint: Mapping[str, Any]) -> None:
        """Keep the part of the image that the resumed run was trained on, see `PolicyStatistics.keep_view`."""
        self.statistics.keep_view(datamodule, checkpoint)

    def setup(self, stage: str) -> None:
        """Leave `pix_argmax` out if the data's camera is not calibrated: its matrices then have no meaning."""
        data = getattr(self.trainer, "datamodule", None)
        self.logs_pixels = getattr(data, "camera_is_calibrated", True)

    def set_statistics(self, statistics: DemoStatistics) -> dict[str, float]:
        """Store the training split's ranges."""
        self.statistics.take(statistics, self.network.horizon)
        if self.init_from is not None and not self.resumed:
            self.take_weights(self.init_from, "a regression policy")
        self.camera = statistics.cameras[0] if statistics.cameras else None
        if len(statistics.cameras) > 1:
            log.warning(
                "the data hold %d cameras, and this policy uses only %s",
                len(statistics.cameras),
                statistics.cameras[0],
            )
        return {}

    def check_start(self, before: CoordinateRegressionModule) -> None:
        """Refuse a run with the same arms in another order; warn about different arms."""
        check_names(f"model.init_from={self.init_from}", arms=(before.network.arms, self.network.arms))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[STATE] = {"camera": self.camera}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        name = stored_beside_weights(checkpoint, STATE, "camera")["camera"]
        self.camera = None if name is None else str(name)

    def policy(self) -> CoordinateRegressionPolicy:
        """The module as a policy that plans from observations."""
        return CoordinateRegressionPolicy(self)

    def export_graph(self) -> ExportGraph:
        """The graph that `keygrip export` writes: a normalised image and the arms' state in, poses out."""
        network, generator = self.network, torch.Generator().manual_seed(0)
        inputs = {
            "image": torch.randn(2, 3, network.image_size, network.image_size, generator=generator),
            "state": torch.rand(2, len(network.arms), STATE_SIZE, generator=generator),
        }
        return ExportGraph(CoordinateRegressionGraph(network).eval(), inputs, ("position", "rotation", "gripper"))

    def sharded_parts(self) -> list[nn.Module]:
        """Blocks that are only called through their `forward`, which FSDP may shard one by one."""
        return self.network.backbone.sharded_parts()

    def normalise(self, position: Tensor) -> Tensor:
        """Metres ``[..., 3]`` to -1 .. 1 over the training range."""
        low, high = self.statistics.position_range
        return (position - low) / (high - low).clamp_min(1e-6) * 2 - 1

    def denormalise(self, position: Tensor) -> Tensor:
        """Metres ``[..., 3]`` from -1 .. 1 over the training range; the inverse of `normalise`."""
        low, high = self.statistics.position_range
        return low + (position + 1) / 2 * (high - low)

    def state(self, position: Tensor, quaternion: Tensor, gripper: Tensor) -> Tensor:
        """State features ``[..., 10]``: position, opening, two columns of the rotation matrix."""
        columns = quaternion_to_columns(quaternion).flatten(-2)
        return torch.cat([self.normalise(position), gripper[..., None] * 2 - 1, columns], dim=-1)

    def forward(self, batch: PolicyBatch) -> RegressionOutput:
        return self.network(batch.image, self.state(batch.start_position, batch.start_quaternion, batch.start_gripper))

    def _counted(self, batch: PolicyBatch) -> Tensor:
        """Bool ``[B, A, T]``: the steps that count in the loss."""
        return ~batch.action_is_pad if self.mask_padded_steps else torch.ones_like(batch.action_is_pad)

    def losses(self, output: RegressionOutput, batch: PolicyBatch) -> dict[str, Tensor]:
        """The three losses and their weighted ``total``, each a scalar averaged over the counted steps of the global
        batch."""
        columns = quaternion_to_columns(batch.quaternion)
        per_step = {
            "position": (output.position - self.normalise(batch.position)).abs().mean(-1),
            "rotation": (output.rotation - columns).abs().mean((-2, -1)),
            "gripper": F.binary_cross_entropy_with_logits(output.gripper, batch.gripper, reduction="none"),
        }
        return weighted_means(per_step, self._counted(batch), self.weights)

    @torch.no_grad()
    def metrics(self, output: RegressionOutput, batch: PolicyBatch) -> dict[str, Tensor]:
        """Errors in the same units as those of the volume-query policy.

        Each is a mean over the steps that count in the loss: all, or with `mask_padded_steps` those before the demo's
        end; NaN without any. `pix_argmax` is a mean over those of them inside the image, and is left out for an
        uncalibrated camera, see `setup`. (All errors of the volume-query policy are means over steps inside the image,
        because others have no loss there.) `gripper_open_acc` is the share of steps where open or closed is right.
        There is no `gripper_acc`, which in the volume-query policy requires the exact bin: here the opening has no
        bins.
        """
        return self._metrics_and_counts(output, batch)[0]

    @torch.no_grad()
    def _metrics_and_counts(
        self, output: RegressionOutput, batch: PolicyBatch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`metrics`, and by the same names the number of steps over which each is a mean."""
        position = self.denormalise(output.position)
        angle = torch.rad2deg(geodesic_angle(columns_to_quaternion(output.rotation), batch.quaternion))
        counted = self._counted(batch)
        errors = {
            "height_m": (position[..., 2] - batch.position[..., 2]).abs(),
            "position_cm": (position - batch.position).norm(dim=-1) * 100,
            "rotation_deg": angle,
            "gripper_open_acc": ((output.gripper.sigmoid() > CLOSED) == (batch.gripper > CLOSED)).float(),
        }
        metrics = {name: error.masked_fill(~counted, 0.0).sum() / counted.sum() for name, error in errors.items()}
        counts = dict.fromkeys(metrics, counted.sum())
        if not self.logs_pixels:
            return metrics, counts
        intrinsics, extrinsics = batch.intrinsics[:, None, None], batch.world_to_camera[:, None, None]
        true_pixels, _ = project(batch.position, intrinsics, extrinsics)
        pixels, _ = project(position, intrinsics, extrinsics)
        size = self.network.image_size
        visible = counted & inside_image(true_pixels, size, size) & torch.isfinite(pixels).all(-1)
        pixel_error = (pixels - true_pixels).norm(dim=-1).masked_fill(~visible, 0.0)
        return {"pix_argmax": pixel_error.sum() / visible.sum()} | metrics, {"pix_argmax": visible.sum()} | counts

    def loss(self, batch: PolicyBatch) -> Tensor:
        return self.losses(self(batch), batch)["total"]

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        with trained_on(self.device):
            output = self(batch)
        losses = self.losses(output, batch)
        self.log_values("train", mean_over_processes(losses) | self.metrics(output, batch), len(batch), BAR)
        return self.mean_of_step(losses["total"], self._counted(batch).sum())

    def validation_step(self, batch: PolicyBatch, batch_idx: int) -> None:
        output = self(batch)
        losses = self.losses(output, batch)
        metrics, counts = self._metrics_and_counts(output, batch)
        counts |= dict.fromkeys(losses, self._counted(batch).sum())
        self.log_values("val", losses | metrics, len(batch), BAR, counts)


@dataclass
class CoordinateRegressionPolicy:
    """Plan with a trained baseline."""

    module: CoordinateRegressionModule

    def __post_init__(self) -> None:
        self.module.eval()
        self._geometry = self.module.statistics.geometry

    @property
    def needs(self) -> Needs:
        """What the policy reads from an observation."""
        module = self.module
        return Needs(tuple(module.network.arms), calibration=module.reads_calibration, camera=module.camera)

    @property
    def workspace(self) -> np.ndarray:
        """``[2, 3]`` lowest and highest position seen in training, metres."""
        return self.module.statistics.position_range.double().cpu().numpy()

    def plan(self, observation: Observation) -> Plan:
        """Poses of the next T steps.

        Raises:
            ValueError: the observation is incomplete or invalid.
        """
        refuse_incomplete(observation, self.needs)
        return self.plan_batch([observation], [self])[0]

    @torch.inference_mode()
    def plan_batch(self, observations: Sequence[Observation], sessions: Sequence[Self]) -> list[Plan]:
        """Plan for several observations in one pass of the network."""
        module = self.module
        images = [self._geometry.apply(image_of(seen), np.eye(3))[0].to(module.device) for seen in observations]
        state = module.state(*stacked_poses(observations, len(module.network.arms), module.device))
        output = module.network(torch.stack(images), state)
        position, quaternion = module.denormalise(output.position), columns_to_quaternion(output.rotation)
        return plans_of(position, quaternion, output.gripper.sigmoid(), module.statistics.step_seconds)
