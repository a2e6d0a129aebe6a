"""Training of the policy with geometry tokens: flow matching on action chunks, and depth for the geometry encoder."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from keygrip.data.batches import CLOSED, MultiViewPolicyBatch
from keygrip.models.geometry.rotations import geodesic_angle
from keygrip.models.geometry_vla.actions import PoseActions
from keygrip.models.geometry_vla.diagnostics import context_figures, exchanged_geometry
from keygrip.models.geometry_vla.figures import scene_figure
from keygrip.models.geometry_vla.network import ActionSampling, GeometryVLA, Scene
from keygrip.models.geometry_vla.network_checks import check_views_apart
from keygrip.models.geometry_vla.pointing import pointing_counts, pointing_losses
from keygrip.models.geometry_vla.policy import GeometryVLAPolicy
from keygrip.models.language.tokenizers import ChatTokenizer
from keygrip.models.nn.attention import AttentionRecord
from keygrip.models.nn.flow_matching import TimestepSampler, interpolate, seeded_noise, velocity
from keygrip.models.nn.lora import Adapter
from keygrip.models.nn.processor_attention import trained_on
from keygrip.models.policy_statistics import PolicyStatistics
from keygrip.training.checkpoints import stored_beside_weights
from keygrip.training.distributed import global_mean, global_sum, mean_over_processes
from keygrip.training.optimizers import AdamW
from keygrip.training.parts import ReadWhere, model_part
from keygrip.training.system import System, check_names, parameters_m

if TYPE_CHECKING:
    from keygrip.data.robot.statistics import DemoStatistics

log = logging.getLogger(__name__)

STATE = "geometry_vla"
HEADLINE = (
    "loss",
    "action",
    "position_cm",
    "height_m",
    "grip_side_cm",
    "grip_height_cm",
    "rotation_deg",
    "gripper_acc",
    "pointing_px",
    "keyframe_px",
    "point_cm",
    "depth_cm",
    "geometry_share",
    "pointed_share",
    "geometry_read",
    "geometry_slot",
    "geometry_moves_cm",
    "geometry_worth_cm",
)
DIAGNOSED = 4  # number of validation batches on which the use of geometry is measured
SEED_STRIDE = 1_000_003  # more frames than any demonstration has


BAR = ("total", "position_cm")  # metrics in the progress line
MASKED = ("action", "position_cm", "height_m", "rotation_deg", "gripper_acc")  # over steps that are not padding


@model_part(from_checkpoint={"init_from": None})
class GeometryVLAModule(System):
    """Squared error of the velocity over the steps that are not padding, plus the geometry encoder's own losses.

    Args:
        network: the plain network. actions: the kind of the actions, and their statistics.
        optimizer: its settings. timesteps: samples the timesteps of training, 0 (data) to 1 (noise).
        draws: number of noise samples for each sample, all from one pass of the encoders.
        sampling: how actions are sampled, in validation and in control.
        log_images_every_n_steps: minimum steps between validations that show a plan and depth maps; 0: none.
        pointing_weight: weight of the loss on the gripper's future pixels in the images
            (`model.network.pointing_cells`).
        init_from: run folder or checkpoint of such a policy from whose weights training starts, geometry encoder
            included; actions are normalised by the new data. None: start from the network as built.
    """

    read_where: ClassVar = {
        "pointing_weight": ReadWhere("network.pointing_cells"),
        "network.geometry.init_from": ReadWhere("init_from", None),
    }
    batch_type = MultiViewPolicyBatch
    evaluation_kind = "policy"
    about = "geometry_vla, a vision-language-action policy: instruction, images and 3D tokens to action chunks"
    toy_overrides = (
        *("data=yam_language", "data.record.demos=4", "data.record.image_size=72", "backbone.image_size=64"),
        *("data.batch_size=4", "model.draws=2", "model.network.blocks=2"),
    )

    headline_metrics = (
        *(f"{split}/{name}" for split in ("train", "val") for name in HEADLINE),
        *(f"parameters/{part}_m" for part in ("all", "head", "compressor")),
    )

    def __init__(
        self,
        network: GeometryVLA,
        actions: PoseActions,
        optimizer: AdamW,
        timesteps: TimestepSampler,
        draws: int = 4,
        sampling: ActionSampling | None = None,
        log_images_every_n_steps: int = 1,
        pointing_weight: float = 0.1,
        init_from: str | None = None,
    ) -> None:
        super().__init__(optimizer)
        if draws < 1:
            raise ValueError(f"model.draws is at least 1, got {draws}.")
        if log_images_every_n_steps < 0:
            raise ValueError(f"model.log_images_every_n_steps is 0 (off) or positive, got {log_images_every_n_steps}.")
        if not 0 <= pointing_weight < math.inf:
            raise ValueError(f"model.pointing_weight must be finite and not negative, got {pointing_weight}.")
        if network.head.action_size != actions.size:
            raise ValueError(
                f"The head writes {network.head.action_size} numbers per step and {len(actions.arms)} arms have "
                f"{actions.size}: set data.arms, which both read, and model.network.action_kind as model.actions.kind."
            )
        self.network = network
        self.actions = actions
        self.statistics = PolicyStatistics()
        self.timesteps = timesteps
        self.draws, self.sampling = draws, sampling or ActionSampling()
        self.log_images_every_n_steps = log_images_every_n_steps
        self.pointing_weight, self.init_from = pointing_weight, init_from
        self.views: tuple[str, ...] = ()
        self.calibrated: tuple[str, ...] = ()  # those of the views that are calibrated in all demonstrations
        self.logs_points = True
        self._grips: dict[str, list[Tensor]] = {}

    @property
    def reads_calibration(self) -> bool | tuple[str, ...]:
        """Whether intrinsics and camera poses change its weights or plans; names: only those of these cameras do."""
        geometry = self.network.geometry
        if self.network.pointing is not None or (geometry is not None and geometry.learns_depth):
            return True  # targets in every view
        return geometry is not None and geometry.reads_cameras

    @property
    def learns_depth(self) -> bool:
        """Whether its losses need recorded depth."""
        return self.network.geometry is not None and self.network.geometry.learns_depth

    @property
    def extra_targets(self) -> tuple[str, ...]:
        """Recordings that its actions are computed from, other than poses: "joints" or "controller"."""
        return self.actions.reads

    @property
    def embodiments(self) -> tuple[str, ...]:
        """Robots that each have their own statistics of actions."""
        return self.actions.embodiments

    @property
    def may_keep_apart(self) -> bool:
        """Whether `embodiments` may name robots."""
        return self.actions.kind != "joint"

    # -- set-up -------------------------------------------------------------------------------------------------------

    def check_run(self, max_steps: int, begins: bool) -> None:
        """Raise ValueError if parts of the vision-language model would keep random weights."""
        vlm = self.network.vlm
        if begins and vlm.trainable != "all" and vlm.loaded_weights == "random" and self.init_from is None:
            raise ValueError(
                f"vlm.trainable={vlm.trainable} would keep random weights: set vlm.trainable=all, vlm.weights to a "
                "folder or a name on the hub, or model.init_from to a trained run."
            )

    def setup(self, stage: str) -> None:
        """Leave the `point_cm` of a frozen encoder out if a camera of the data is not calibrated: the recorded points
        are computed from its matrices, which then have no meaning."""
        data = getattr(self.trainer, "datamodule", None)
        self.logs_points = getattr(data, "cameras_are_calibrated", True)

    def resume_data(self, datamodule: Any, checkpoint: Mapping[str, Any]) -> None:
        """Keep the part of the image that the resumed run was trained on, see `PolicyStatistics.keep_view`."""
        self.statistics.keep_view(datamodule, checkpoint)

    def set_statistics(self, statistics: DemoStatistics) -> dict[str, float]:
        """Store ranges, cameras and action statistics of the training split, and prepare the tokenizer on its
        instructions."""
        if statistics.chunks is None or not statistics.cameras:
            raise ValueError(
                "The data module's statistics hold no action chunks or cameras, which this model normalises by: use "
                "keygrip.data.robot.datamodule.RobotDemos with data.cameras."
            )
        if not all(sentence.strip() for sentence in statistics.instructions):
            raise ValueError(
                "Some demonstrations have no instruction, which this policy needs when it plans: write one into their "
                "metadata.json, or remove them."
            )
        if self.network.triangulates:
            name = "pointed_triangulated" if self.network.pointed_actions is None else "pointed_actions"
            check_views_apart(name, statistics.cameras, statistics.apart)
        self.network.check_grids(statistics.geometry.image_size)
        self.statistics.take(statistics, self.network.head.horizon)
        self.actions.take(statistics.chunks, statistics.robot_ranges)
        self.views = tuple(statistics.cameras)
        self._take_calibrated(statistics.calibrated)
        if self.init_from is None:
            self.network.vlm.prepare(statistics.cache_dir, statistics.chunks.instruction)
            if self.network.geometry is not None and not self.resumed:  # the checkpoint has its weights
                self.network.geometry.take_start(self.own_packages, self.own_files)
        elif not self.resumed:
            start_module = self.take_weights(self.init_from, "a vision-language-action policy")
            assert start_module.network.vlm.tokenizer is not None
            self.network.vlm.set_tokenizer(start_module.network.vlm.tokenizer)  # the weights belong to this tokenizer
        return {"instructions": len(set(statistics.chunks.instruction)), "views": len(self.views)}

    def check_start(self, before: GeometryVLAModule) -> None:
        """Refuse a run with actions of another kind, or with the same cameras or arms in another order; warn about
        other cameras, arms and step lengths, whose weights may still be a useful start."""
        source = f"model.init_from={self.init_from}"
        if before.actions.kind != self.actions.kind:
            raise ValueError(
                f"{source} plans actions of kind {before.actions.kind}, this run {self.actions.kind}: the same numbers "
                f"mean something else. Set model.actions.kind={before.actions.kind}, or model.init_from=null."
            )
        check_names(source, cameras=(before.views, self.views), arms=(before.actions.arms, self.actions.arms))
        seconds = before.statistics.step_seconds, self.statistics.step_seconds
        if not math.isclose(*seconds, rel_tol=1e-3):
            log.warning(
                "%s plans steps of %g s, this run of %g s: it has to learn other ways per step", source, *seconds
            )

    def _take_calibrated(self, cameras: Sequence[str]) -> None:
        self.calibrated = tuple(cameras)
        if self.network.geometry is not None:
            self.network.geometry.take_calibrated(self.calibrated)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        tokenizer = self.network.vlm.tokenizer
        if tokenizer is None:
            raise ValueError("The model has no tokenizer yet: it is saved once it is being trained.")
        cameras = {"views": list(self.views), "calibrated": list(self.calibrated)}
        checkpoint[STATE] = {"tokenizer": tokenizer.state(), **cameras}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stored, vlm = stored_beside_weights(checkpoint, STATE, "tokenizer", "views", "calibrated"), self.network.vlm
        vlm.set_tokenizer(ChatTokenizer.from_state(stored["tokenizer"], vlm.vocabulary))
        self.views = tuple(stored["views"])
        self._take_calibrated(stored["calibrated"])

    @property
    def adapter(self) -> Adapter | None:
        """The language model's LoRA, under the names of `Qwen2_5_VLForConditionalGeneration`; None without one."""
        vlm = self.network.vlm
        return None if vlm.lora is None else Adapter(vlm.model.language_model, vlm.lora, "model.language_model.")

    def policy(self) -> GeometryVLAPolicy:
        """The module as a policy that plans from observations."""
        return GeometryVLAPolicy(self)

    def on_train_start(self) -> None:
        """Log the sizes of the parts, for the tables of sweeps."""
        parts = {"all": self.network, "head": self.network.head, "compressor": self.network.compressor}
        for name, part in parts.items():
            count = 0 if part is None else sum(parameter.numel() for parameter in part.parameters())
            self.log(f"parameters/{name}_m", count / 1e6)

    # -- forward and loss ---------------------------------------------------------------------------------------------

    def forward(self, batch: MultiViewPolicyBatch) -> Scene:
        """One pass of the encoders over a batch."""
        seen = (batch.images, batch.instruction, batch.view_intrinsics, batch.view_world_to_camera)
        return self.with_places(self.network.encode(*seen), batch.embodiment)

    def with_places(self, scene: Scene, embodiment: Tensor | None = None) -> Scene:
        """Add the rays' meeting points, normalised for the head, to a scene; ``embodiment`` ``[B]``: the robots."""
        if scene.met is None:
            return scene
        return replace(scene, places=self.actions.places(scene.met, embodiment))

    def state(self, batch: MultiViewPolicyBatch) -> Tensor:
        poses = (batch.start_position, batch.start_quaternion, batch.start_gripper)
        return self.actions.state(*poses, batch.embodiment)

    def decode(self, actions: Tensor, batch: MultiViewPolicyBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, quaternions and openings of actions, from the batch's present poses."""
        return self.actions.decode(actions, batch.start_position, batch.start_quaternion, batch.embodiment)

    def losses(self, scene: Scene, batch: MultiViewPolicyBatch) -> dict[str, Tensor]:
        """`action` (flow matching), the geometry encoder's losses, and their `total`; also metrics without gradient."""
        clean = self.actions.encode(batch).repeat_interleave(self.draws, dim=0)  # [B R, T, Da]
        noise = torch.randn_like(clean)
        level = self.timesteps(len(clean), clean.device)
        predicted = self.network.velocity(scene, interpolate(clean, noise, level), level, self.state(batch))
        mask = self.actions.mask(batch).repeat_interleave(self.draws, dim=0)
        squared = (predicted - velocity(clean, noise)).square().masked_fill(~mask, 0.0)
        losses = {"action": global_mean(squared.sum(), mask.sum())}
        total = losses["action"]
        geometry = self.network.geometry
        if geometry is not None and geometry.learns_depth:
            if batch.depth is None:
                raise ValueError(
                    "the geometry encoder learns from depth and the batches hold none: set data.depth=true, or "
                    "geometry=dino_multiview_no_depth to train it on the actions alone."
                )
            assert scene.geometry is not None
            extra = geometry.losses(scene.geometry, batch.depth, batch.view_intrinsics, batch.view_world_to_camera)
            total = total + extra["points"] + extra["depth"]
            losses |= extra
        elif scene.geometry is not None and scene.geometry.points is not None and batch.depth is not None:
            assert geometry is not None
            with torch.no_grad():  # a frozen encoder's errors are still logged
                extra = geometry.losses(scene.geometry, batch.depth, batch.view_intrinsics, batch.view_world_to_camera)
            logged = ("depth_cm", "point_cm") if self.logs_points else ("depth_cm",)
            losses |= {name: value for name, value in extra.items() if name in logged}
        if scene.pointing is not None:
            pointing = pointing_losses(scene.pointing, batch)
            for name in ("pointing", "keyframe"):
                if name in pointing:
                    total = total + self.pointing_weight * pointing[name]
            losses |= pointing
        return losses | {"total": total}

    def counts(self, scene: Scene, batch: MultiViewPolicyBatch) -> dict[str, Tensor]:
        """Number of steps, maps or cells over which a validation value is a mean; other values: mean over samples."""
        counts = dict.fromkeys(MASKED, (~batch.action_is_pad).sum())
        geometry, features = self.network.geometry, scene.geometry
        if geometry is not None and features is not None and features.points is not None and batch.depth is not None:
            counts |= geometry.counts(features, batch.depth, batch.view_intrinsics, batch.view_world_to_camera)
        if scene.pointing is not None:
            counts |= pointing_counts(scene.pointing, batch)
        # compared between samples: NaN for one sample, or 0 for geometry exchanged with itself
        compared = torch.tensor(len(batch) if len(batch) > 1 else 0)
        return counts | dict.fromkeys(("geometry_slot", "geometry_moves_cm", "geometry_worth_cm"), compared)

    def sample(self, scene: Scene, batch: MultiViewPolicyBatch) -> Tensor:
        """Sample actions ``[B, T, Da]``; the noise of each depends only on its demonstration and frame."""
        seeds = (batch.demo_index * SEED_STRIDE + batch.frame_index).tolist()
        noise = seeded_noise(seeds, (self.network.head.horizon, self.actions.size), self.device)
        return self.network.sample(scene, noise, self.state(batch), self.sampling)

    @torch.no_grad()
    def metrics(self, scene: Scene, batch: MultiViewPolicyBatch, sampled: Tensor) -> dict[str, Tensor]:
        """Errors of sampled actions over the steps that are not padding, and the head's shares of attention."""
        position, quaternion, gripper = self.decode(sampled, batch)
        true_position, true_quaternion, _ = self.actions.target_poses(batch)
        valid = ~batch.action_is_pad
        values = {
            "position_cm": (position - true_position).norm(dim=-1) * 100,
            "height_m": (position - true_position)[..., 2].abs(),
            "rotation_deg": torch.rad2deg(geodesic_angle(quaternion, true_quaternion)),
            "gripper_acc": ((gripper > CLOSED) == (batch.gripper > CLOSED)).float(),
        }
        means = {name: value.masked_fill(~valid, 0.0).sum() / valid.sum() for name, value in values.items()}
        if any(scene.groups[1:]):
            record = AttentionRecord(scene.groups)
            level = torch.full((len(sampled),), 0.5, device=self.device)
            self.network.velocity(scene, sampled, level, self.state(batch), record)
            shares = torch.stack([share.mean(dim=0) for share in record.shares]).mean(dim=0)
            named = (("geometry_share", 1), ("pointed_share", 2))
            means |= {name: shares[group] for name, group in named if scene.groups[group]}
        return means

    @torch.no_grad()
    def diagnostics(self, scene: Scene, batch: MultiViewPolicyBatch, sampled: Tensor) -> dict[str, Tensor]:
        """How the head uses geometry and pointed tokens (see `keygrip.models.geometry_vla.diagnostics`)."""
        figures = exchanged_geometry(self, scene, batch, sampled)
        if not any(scene.groups[1:]):
            return figures
        record = AttentionRecord(scene.groups, sizes=True)
        level = torch.full((len(sampled),), 0.5, device=self.device)
        self.network.velocity(scene, sampled, level, self.state(batch), record)
        return context_figures(scene, record) | figures

    @torch.no_grad()
    def grip_errors(self, batch: MultiViewPolicyBatch, sampled: Tensor) -> dict[str, Tensor]:
        """Position errors, horizontal and in height, cm, at the G steps of the batch where a gripper closes: ``[G]``
        each. They decide whether a grasp succeeds; the mean over all steps is mostly over approaches in free space."""
        position, _, _ = self.decode(sampled, batch)
        shut = torch.cat([batch.start_gripper[..., None], batch.gripper], dim=-1) < CLOSED  # [B, A, 1 + T]
        closes = shut[..., 1:] & ~shut[..., :-1] & ~batch.action_is_pad
        errors_cm = 100 * (position - self.actions.target_poses(batch)[0])[closes]
        return {"grip_side_cm": errors_cm[:, :2].norm(dim=-1), "grip_height_cm": errors_cm[:, 2].abs()}

    @torch.no_grad()
    def figure(self, scene: Scene, batch: MultiViewPolicyBatch, sample: int = 0) -> np.ndarray:
        """Draw one sample's plan and depth together with the recorded ones, ``[H, W, 3]`` uint8."""
        actions = self.sample(scene, batch)
        planned, _, _ = self.decode(actions, batch)
        shown = replace(batch, position=self.actions.target_poses(batch)[0])
        return scene_figure(shown, planned, scene.geometry, sample, scene.pointing)

    def loss(self, batch: MultiViewPolicyBatch) -> Tensor:
        return self.losses(self(batch), batch)["total"]

    def dry_run(self, batch: MultiViewPolicyBatch) -> dict[str, Any]:
        """Forward pass of one batch: shapes, numbers of tokens that a block reads, parameters by part (millions; all
        and trained) and losses."""
        with torch.no_grad():
            scene = self(batch)
            losses = self.losses(scene, batch)
        names = ("prompt", "geometry", "pointed")
        return {
            "images": list(batch.images.shape),
            "actions": [len(batch.images), self.network.head.horizon, self.actions.size],
            "context_tokens": dict(zip(names, scene.groups, strict=True)),
            "parameters_m": parameters_m(self.network),
            "losses": {name: round(float(value), 4) for name, value in losses.items()},
        }

    def _show(self, scene: Scene, batch: MultiViewPolicyBatch) -> None:
        if not self.loggers:
            return
        image = self.figure(scene, batch)  # on every process: with sharded parameters, all must take part
        self.show_image("val/scene", image)

    def training_step(self, batch: MultiViewPolicyBatch, batch_idx: int) -> Tensor:
        with trained_on(self.device):
            losses = self.losses(self(batch), batch)
        self.log_values("train", mean_over_processes(losses), len(batch), BAR)
        # With accumulated batches this is exact for the action loss. The losses of depth and of maps, which are means
        # over other numbers of elements, get the same weights: one factor per batch cannot correct several means.
        return self.mean_of_step(losses["total"], self.actions.mask(batch).sum())

    def validation_step(self, batch: MultiViewPolicyBatch, batch_idx: int) -> None:
        scene = self(batch)
        sampled = self.sample(scene, batch)
        values = self.losses(scene, batch) | self.metrics(scene, batch, sampled)
        if batch_idx < DIAGNOSED:
            values |= self.diagnostics(scene, batch, sampled)
        self.log_values("val", values, len(batch), BAR, self.counts(scene, batch))
        for name, errors in self.grip_errors(batch, sampled).items():
            self._grips[name].append(errors)
        if batch_idx == 0 and self.images_are_due(self.log_images_every_n_steps):
            self._show(scene, batch)

    def on_validation_epoch_start(self) -> None:
        self._grips = defaultdict(list)

    def on_validation_epoch_end(self) -> None:
        for name, errors in self._grips.items():
            # Over all processes, since one process may have no such step; NaN if no gripper closes at all.
            found = torch.cat(errors)
            mean = global_sum(found.sum()) / global_sum(found.new_tensor(float(len(found))))
            self.log(f"val/{name}", mean, sync_dist=True)
