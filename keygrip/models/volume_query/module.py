"""Training of the volume-query policy: loss weights, metrics, images."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keygrip.data.batches import CLOSED, MultiViewPolicyBatch, PolicyBatch
from keygrip.data.robot.statistics import DemoStatistics
from keygrip.exporting.graphs import ExportGraph
from keygrip.models.geometry.cameras import recover_3d
from keygrip.models.geometry.rotation_codecs import RotationCodec, fit_or_load
from keygrip.models.geometry.rotations import geodesic_angle
from keygrip.models.nn.processor_attention import trained_on
from keygrip.models.policy_statistics import PolicyStatistics
from keygrip.models.volume_query.decoding import Decoder
from keygrip.models.volume_query.export import volume_query_graph
from keygrip.models.volume_query.figures import prediction_figure
from keygrip.models.volume_query.network import VolumeQueryNetwork, VolumeQueryOutput
from keygrip.models.volume_query.policy import VolumeQueryPolicy
from keygrip.models.volume_query.second_look import SharpImage, copy_backbone_weights
from keygrip.models.volume_query.symmetry import (
    GripSymmetry,
    equivalent_classes,
    nearest_angle,
    shared_cross_entropy,
)
from keygrip.models.volume_query.targets import StepTargets, arm_state, height_centres, step_targets, views_of_images
from keygrip.models.volume_query.volume import argmax_voxel, volume_cross_entropy
from keygrip.models.volume_query.world import FurtherViews
from keygrip.training.checkpoints import stored_beside_weights
from keygrip.training.distributed import check_weights, mean_over_processes, weighted_means
from keygrip.training.figures import figure_to_image
from keygrip.training.lightning_loops import completes_step
from keygrip.training.optimizers import AdamW
from keygrip.training.parts import model_part
from keygrip.training.system import System, check_names
from keygrip.training.task_metrics import MeansByTask

log = logging.getLogger(__name__)

STATE = "volume_query"  # checkpoint key of the state that is not in the weights
# Metrics used to compare runs; the validation loss of a multimodal policy is noise.
HEADLINE = (
    "pix_argmax",
    "pix_floor",
    "gripper_acc",
    "gripper_open_acc",
    "rotation_acc",
    "height_m",
    "height_m_floor",
    "position_cm",
    "position_cm_floor",
    "rotation_deg",
    "rotation_deg_floor",
)

BY_TASK = ("pix_argmax", "position_cm", "gripper_acc", "rotation_deg")  # also reported per instruction in validation
BAR = ("total", "pix_argmax")  # metrics in the progress line


@model_part(from_checkpoint={"init_from": None})
class VolumeQueryModule(System):
    """Cross-entropy of the volume, of the gripper and of the rotation, each averaged over the valid steps.

    Args:
        network: the plain network. rotation: the codec, copied for each arm and fitted on the training split.
        optimizer: its settings. decoder: converts predictions to poses, in validation and in control.
        volume_weight, gripper_weight, rotation_weight: weights of the three losses.
        target: "hard" puts the target's mass on one voxel; "bilinear" on the 4 cells and 2 heights around the point, in
            proportion, from which the network learns where in the cell the point lies.
        mask_padded_steps: leave steps past the end of a demo, which repeat its last pose, out of the loss. Without the
            mask the policy learns to rest there.
        rotation_symmetry: number of equal turns of the open gripper about the vertical that are the same grip (4 for a
            cube, 2 for a bar): one number for all plans, or one per word of the instruction (see
            `keygrip.models.volume_query.symmetry`). 1: no symmetry.
        log_images_every_n_steps: training steps between images in TensorBoard; 0 switches them off.
        init_from: run folder or checkpoint of a volume-query policy from whose weights training starts; heights,
            gripper and rotation classes come from the new data. None: start from the network as built.
    """

    batch_type = PolicyBatch
    evaluation_kind = "policy"
    about = "volume_query, a robot policy: one image to pixel x height voxels, gripper and rotation bins"
    toy_overrides = (
        *("data=yam", "data.record.task.name=reach", "data.record.demos=4", "data.record.image_size=72"),
        *("backbone.image_size=64", "backbone.width=32", "backbone.depth=1", "backbone.heads=2"),
    )

    headline_metrics = tuple(f"{split}/{name}" for split in ("train", "val") for name in HEADLINE)

    def __init__(
        self,
        network: VolumeQueryNetwork,
        rotation: RotationCodec,
        optimizer: AdamW,
        decoder: Decoder,
        volume_weight: float = 1.0,
        gripper_weight: float = 0.5,
        rotation_weight: float = 0.5,
        target: Literal["hard", "bilinear"] = "hard",
        log_images_every_n_steps: int = 500,
        mask_padded_steps: bool = False,
        rotation_symmetry: int | Mapping[str, int] = 1,
        init_from: str | None = None,
    ) -> None:
        super().__init__(optimizer)
        if target not in ("hard", "bilinear"):
            raise ValueError(f"model.target is hard or bilinear, not {target!r}.")
        if rotation.classes != network.rotation_classes:
            raise ValueError(
                f"The rotation codec has {rotation.classes} classes and the network's head {network.rotation_classes}: "
                "set rotation.classes, which both read."
            )
        if log_images_every_n_steps < 0:
            raise ValueError(f"model.log_images_every_n_steps is 0 (off) or positive, got {log_images_every_n_steps}.")
        self.network = network
        self.codecs = nn.ModuleDict({arm: copy.deepcopy(rotation) for arm in network.arms})
        self.statistics = PolicyStatistics()
        self.decoder = decoder
        self.weights = {"volume": volume_weight, "gripper": gripper_weight, "rotation": rotation_weight}
        check_weights({f"model.{name}_weight": weight for name, weight in self.weights.items()})
        self.target: Literal["hard", "bilinear"] = target
        self.mask_padded_steps, self.symmetry = mask_padded_steps, GripSymmetry(rotation_symmetry)
        self.log_images_every_n_steps, self.init_from = log_images_every_n_steps, init_from
        self.by_task = MeansByTask(())
        self.views: tuple[str, ...] = ()  # camera names; without world_views the network reads only the first

    # -- set-up -------------------------------------------------------------------------------------------------------

    def resume_data(self, datamodule: Any, checkpoint: Mapping[str, Any]) -> None:
        """Keep the part of the image that the resumed run was trained on, see `PolicyStatistics.keep_view`."""
        self.statistics.keep_view(datamodule, checkpoint)

    def set_statistics(self, statistics: DemoStatistics) -> dict[str, float]:
        """Store the training split's ranges, fit the rotation codecs on it, and return the codecs' reports."""
        missing = [arm for arm in self.network.arms if arm not in statistics.quaternions]
        if missing:
            raise ValueError(
                f"The demonstrations have no arm {missing}; they have {sorted(statistics.quaternions)}: set data.arms."
            )
        self.symmetry.refuse_unfit(statistics.instructions)
        for sentence in statistics.all_instructions:  # a held-out one would end the run in its first validation
            self.symmetry.order_of(sentence)
        self.statistics.take(statistics, self.network.horizon)
        report: dict[str, float] = {}
        for arm in self.network.arms:
            fitted = fit_or_load(
                self.codec(arm),
                torch.from_numpy(statistics.quaternions[arm]),
                statistics.cache_dir,
                statistics.fingerprint,
            )
            report |= {f"rotation/{arm}/{name}": value for name, value in fitted.items()}
        self.views = statistics.cameras
        if self.init_from is not None and not self.resumed:
            self.take_weights(self.init_from, "a volume-query policy")
        encoder = self.network.instruction_encoder
        if encoder is not None:  # after the weights, which bring the earlier run's words: these are added
            encoder.prepare(statistics.instructions)
            encoder.tokens(statistics.all_instructions)  # refuses held-out sentences that it cannot read
            report["instructions"] = len(statistics.instructions)
        self.by_task = MeansByTask(statistics.instructions)
        if len(self.views) < 2 and self.network.world_views:
            log.warning("model.network.world_views=true has no effect with one camera: name several in data.cameras")
        if len(self.views) > 1 and not self.network.world_views:
            log.warning(
                "the data hold %d cameras, and this policy uses only %s (all of them: model.network.world_views=true)",
                len(self.views),
                self.views[0],
            )
        return report

    def check_start(self, before: VolumeQueryModule) -> None:
        """Refuse a run with the same arms, or the same cameras read, in another order; warn if they differ."""
        source = f"model.init_from={self.init_from}"
        check_names(source, arms=(before.network.arms, self.network.arms))
        if self.network.world_views and before.network.world_views:
            check_names(source, cameras=(before.views, self.views))

    def started_from(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        look = self.network.second_look
        return weights if look is None or look.backbone is None else copy_backbone_weights(weights)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[STATE] = {"views": list(self.views)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.views = tuple(str(name) for name in stored_beside_weights(checkpoint, STATE, "views")["views"])

    @property
    def masks_views(self) -> bool:
        """Whether cameras other than the first may be missing."""
        return self.network.world_views

    @property
    def reads_detail(self) -> bool:
        """Whether the network reads the high-resolution image of a batch."""
        return self.network.second_look is not None

    def codec(self, arm: str) -> RotationCodec:
        """The rotation codec of one arm."""
        codec = self.codecs[arm]
        assert isinstance(codec, RotationCodec)
        return codec

    def policy(self) -> VolumeQueryPolicy:
        """The module as a policy that plans from observations."""
        return VolumeQueryPolicy(self)

    def export_graph(self) -> ExportGraph:
        """The graph that `keygrip export` writes: it outputs logits of pixels, heights, gripper and rotation."""
        return volume_query_graph(self.network)

    # -- forward and loss ---------------------------------------------------------------------------------------------

    def targets(self, batch: PolicyBatch) -> StepTargets:
        """Pixels, height bins and gripper bins of a batch's steps, and which steps carry loss."""
        return step_targets(
            batch,
            image_size=self.network.image_size,
            pred_size=self.network.pred_size,
            height_bins=self.network.height_bins,
            gripper_bins=self.network.gripper_bins,
            height_range=self.statistics.height_range,
            mask_padded=self.mask_padded_steps,
        )

    def forward(self, batch: PolicyBatch, targets: StepTargets, *, teacher: bool) -> VolumeQueryOutput:
        """Run the network. It reads gripper and rotation at the targets' pixels with ``teacher``, as in training;
        without ``teacher`` it reads them where the decoder places the steps, as in control."""
        state = arm_state(
            self.network.state_parts,
            batch.start_position,
            batch.start_quaternion,
            batch.start_gripper,
            self.statistics.height_range,
        )
        return self.network(
            batch.image,
            targets.start_pixels,
            state,
            targets.pixels if teacher else partial(self.decoder.places, **self._decoding(batch)),
            self.instruction_tokens(batch.instruction),
            self.further_views(batch),
            self.sharp_image(batch),
        )

    def _decoding(self, batch: PolicyBatch) -> dict[str, Any]:
        """Inputs of a decoder other than the network's output."""
        return {
            "intrinsics": batch.intrinsics,
            "world_to_camera": batch.world_to_camera,
            "height_range": self.statistics.height_range,
            "image_size": self.network.image_size,
        }

    def further_views(self, batch: PolicyBatch) -> FurtherViews | None:
        """Views of the cameras other than the first; None if there are none or the network does not read them.

        A camera whose image shows nothing (one colour or sensor noise) is masked.
        """
        if not self.network.world_views or not isinstance(batch, MultiViewPolicyBatch) or batch.images.shape[1] < 2:
            return None
        return views_of_images(
            batch.images,
            batch.view_intrinsics,
            batch.view_world_to_camera,
            network=self.network,
            statistics=self.statistics,
            there=batch.view_mask,
        )

    def sharp_image(self, batch: PolicyBatch) -> SharpImage | None:
        """Input of the second look; None if the network has no second look."""
        if self.network.second_look is None:
            return None
        if batch.detail is None:
            size = self.network.second_look.sharp_size
            raise ValueError(f"model.network.second_look needs the sharper image: set data.detail_size={size}.")
        geometry = self.statistics.geometry
        return SharpImage(batch.detail, geometry.mean, geometry.std)

    def instruction_tokens(self, sentences: Sequence[str]) -> Tensor | None:
        """Tokens of B sentences for the network; None if it reads no instruction."""
        encoder = self.network.instruction_encoder
        return None if encoder is None else encoder.tokens(sentences).to(self.device)

    def losses(self, output: VolumeQueryOutput, batch: PolicyBatch, targets: StepTargets) -> dict[str, Tensor]:
        """The three losses and their weighted ``total``, each a scalar averaged over the valid steps of all arms in the
        global batch: an arm with fewer valid steps has a smaller weight."""
        network = self.network
        if not self.symmetry.is_symmetric:
            codes = [self.codec(arm).encode(batch.quaternion[:, i]) for i, arm in enumerate(network.arms)]
            rotation = _step_cross_entropy(output.rotation, torch.stack(codes, dim=1))
        else:
            rotation = shared_cross_entropy(output.rotation, self._equivalent_classes(batch))
        per_step = {
            "volume": volume_cross_entropy(
                output.volume.float(), targets.volume(self.target, network.pred_size, network.height_bins)
            ),
            "gripper": _step_cross_entropy(output.gripper, targets.gripper),
            "rotation": rotation,
        }
        return weighted_means(per_step, targets.valid, self.weights)

    def _symmetry_masks(self, batch: PolicyBatch) -> list[tuple[int, Tensor]]:
        """Pairs of a number of equivalent grips and a bool ``[B, A, T]`` that marks the steps with that number of
        grips, only in plans that begin with an open gripper."""
        free = (batch.start_gripper >= CLOSED)[..., None].expand(batch.gripper.shape)
        return self.symmetry.choices(batch.instruction, free)

    def _equivalent_classes(self, batch: PolicyBatch) -> Tensor:
        """Bool ``[B, A, T, R]``: the classes of the target rotations and of their equivalents."""
        classes = [
            torch.stack(
                [
                    equivalent_classes(self.codec(arm), batch.quaternion[:, i], free[:, i], order)
                    for i, arm in enumerate(self.network.arms)
                ],
                dim=1,
            )
            for order, free in self._symmetry_masks(batch)
        ]
        return torch.stack(classes).any(dim=0)

    def _rotation_error(self, rotation: Tensor, batch: PolicyBatch) -> Tensor:
        """Angles ``[B, A, T]`` in radians between rotations and their targets, or the nearest equivalents of these."""
        if not self.symmetry.is_symmetric:
            return geodesic_angle(rotation, batch.quaternion)
        angles = [nearest_angle(rotation, batch.quaternion, free, order) for order, free in self._symmetry_masks(batch)]
        return torch.stack(angles).amin(dim=0)

    def loss(self, batch: PolicyBatch) -> Tensor:
        targets = self.targets(batch)
        return self.losses(self(batch, targets, teacher=True), batch, targets)["total"]

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        targets = self.targets(batch)
        with trained_on(self.device):
            output = self(batch, targets, teacher=True)
        losses = self.losses(output, batch, targets)
        self.log_values("train", mean_over_processes(losses) | self.metrics(output, batch, targets), len(batch), BAR)
        self.log("train/off_screen_share", 1 - targets.inside.float().mean(), batch_size=len(batch))
        due = self.log_images_every_n_steps and self.global_step % self.log_images_every_n_steps == 0
        if due and completes_step(self.trainer):
            self._show("train", output, batch, targets)
        return self.mean_of_step(losses["total"], targets.valid.sum())

    def validation_step(self, batch: PolicyBatch, batch_idx: int) -> None:
        targets = self.targets(batch)
        # Evaluated as in control: the network receives nothing from the targets.
        output = self(batch, targets, teacher=False)
        errors = self.step_errors(output, batch, targets)
        self.by_task.add(batch.instruction, {name: errors[name] for name in BY_TASK}, targets.valid)
        losses = self.losses(output, batch, targets)
        errors |= self.decoded_errors(output, batch, targets)
        metrics = {name: _mean_where(value, targets.valid) for name, value in errors.items()}
        counts = {name: _finite_and_valid(value, targets.valid).sum() for name, value in errors.items()}
        counts |= dict.fromkeys(losses, targets.valid.sum())
        self.log_values("val", losses | metrics, len(batch), BAR, counts)
        if batch_idx == 0 and self.log_images_every_n_steps:
            self._show("val", output, batch, targets)

    def on_validation_epoch_start(self) -> None:
        self.by_task.clear()

    def on_validation_epoch_end(self) -> None:
        for name, value in self.by_task.means().items():
            self.log(f"val_by_task/{name}", value)

    # -- metrics ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def metrics(self, output: VolumeQueryOutput, batch: PolicyBatch, targets: StepTargets) -> dict[str, Tensor]:
        """Headline errors of the plain argmax, each with its quantisation floor (``*_floor``).

        Each is a mean over the steps that count in the loss: steps inside the image and, with `mask_padded_steps`,
        before the demo's end. `gripper_acc` is the share of steps with exactly the right bin of `gripper_bins`;
        `gripper_open_acc`, as in the regression baseline, is the share where open or closed is right.
        """
        return {
            name: _mean_where(value, targets.valid) for name, value in self.step_errors(output, batch, targets).items()
        }

    @torch.no_grad()
    def step_errors(self, output: VolumeQueryOutput, batch: PolicyBatch, targets: StepTargets) -> dict[str, Tensor]:
        """The errors behind `metrics`, of every step: ``[B, A, T]``."""
        network = self.network
        centres = height_centres(self.statistics.height_range, network.height_bins)
        cell = network.image_size / network.pred_size
        cells, bins = argmax_voxel(output.volume.float())
        pixels, floor_pixels = (cells.flip(-1) + 0.5) * cell, (targets.cells.flip(-1) + 0.5) * cell
        heights, floor_heights = centres[bins], centres[targets.heights]
        cameras = batch.intrinsics[:, None, None], batch.world_to_camera[:, None, None]
        points = recover_3d(pixels, heights, *cameras, strict=False)
        floor_points = recover_3d(floor_pixels, floor_heights, *cameras, strict=False)
        true_height = batch.position[..., 2]
        opening = (output.gripper.argmax(-1) + 0.5) / network.gripper_bins
        decoded, rotation_floor, rotation_hits = [], [], []
        for i, arm in enumerate(network.arms):
            codec, true = self.codec(arm), batch.quaternion[:, i]
            best, code = output.rotation[:, i].argmax(-1), codec.encode(true)
            decoded.append(codec.decode(best))
            rotation_floor.append(torch.rad2deg(geodesic_angle(codec.decode(code), true)))
            rotation_hits.append((best == code).float())
        hits = torch.stack(rotation_hits, dim=1)
        if self.symmetry.is_symmetric:
            best = output.rotation.argmax(-1, keepdim=True)
            hits = self._equivalent_classes(batch).gather(-1, best)[..., 0].float()
        return {
            "pix_argmax": (pixels - targets.pixels).norm(dim=-1),
            "pix_floor": (floor_pixels - targets.pixels).norm(dim=-1),
            "height_m": (heights - true_height).abs(),
            "height_m_floor": (floor_heights - true_height).abs(),
            "position_cm": (points - batch.position).norm(dim=-1) * 100,
            # Steps that position_cm leaves out, for example because the pixel lies above the horizon.
            "no_point_share": (~torch.isfinite(points).all(-1)).float(),
            "position_cm_floor": (floor_points - batch.position).norm(dim=-1) * 100,
            "gripper_acc": (output.gripper.argmax(-1) == targets.gripper).float(),
            "gripper_open_acc": ((opening > CLOSED) == (batch.gripper > CLOSED)).float(),
            "rotation_acc": hits,
            "rotation_deg": torch.rad2deg(self._rotation_error(torch.stack(decoded, dim=1), batch)),
            "rotation_deg_floor": torch.stack(rotation_floor, dim=1),
        }

    @torch.no_grad()
    def decoded_errors(self, output: VolumeQueryOutput, batch: PolicyBatch, targets: StepTargets) -> dict[str, Tensor]:
        """Errors ``[B, A, T]`` of the configured decoder (as the robot would move) and the heatmap's relative
        entropy."""
        decoded = self.decoder.decode(
            output,
            [self.codec(arm) for arm in self.network.arms],
            **self._decoding(batch),
            strict=False,  # a step without a usable height plane has no position and is left out of the mean
        )
        return {
            "pix_decoded": (decoded.pixels - targets.pixels).norm(dim=-1),
            "position_cm_decoded": (decoded.position - batch.position).norm(dim=-1) * 100,
            "rotation_deg_decoded": torch.rad2deg(self._rotation_error(decoded.quaternion, batch)),
            "heatmap_entropy": decoded.entropy,
        }

    # -- images -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def figure(
        self, output: VolumeQueryOutput, batch: PolicyBatch, targets: StepTargets, *, sample: int, arm: int
    ) -> np.ndarray:
        """Draw one sample's prediction together with its target, ``[H, W, 3]`` uint8."""
        geometry = self.statistics.geometry
        mean, std = torch.tensor(geometry.mean)[:, None, None], torch.tensor(geometry.std)[:, None, None]
        output = output.detach()
        figure = prediction_figure(
            (batch.image[sample].float().cpu() * std + mean).clamp(0, 1),
            output.volume.float(),
            output.gripper.float(),
            output.rotation.float(),
            targets,
            self.codec(self.network.arms[arm]).encode(batch.quaternion[:, arm]),
            height_centres(self.statistics.height_range, self.network.height_bins),
            sample=sample,
            arm=arm,
        )
        return figure_to_image(figure)

    def _show(self, split: str, output: VolumeQueryOutput, batch: PolicyBatch, targets: StepTargets) -> None:
        if not self.shows_images:
            return
        for arm, name in enumerate(self.network.arms):
            image = self.figure(output, batch, targets, sample=0, arm=arm)
            self.show_image(f"{split}/prediction_{name}", image)


def _step_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy per step ``[B, A, T]`` of logits ``[B, A, T, C]``, in float32."""
    return F.cross_entropy(logits.float().flatten(0, -2), target.flatten(), reduction="none").view(target.shape)


def _mean_where(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of ``values`` over ``valid`` entries that are finite; NaN where there is none."""
    usable = _finite_and_valid(values, valid)
    return values.masked_fill(~usable, 0.0).sum() / usable.sum()


def _finite_and_valid(values: Tensor, valid: Tensor) -> Tensor:
    return valid & torch.isfinite(values)
