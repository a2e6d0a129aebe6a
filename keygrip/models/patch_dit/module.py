"""Training of the patch-conditioned DiT: flow matching with dropped conditions, monitoring, samples of fixed seeds."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from keygrip.data.batches import ImageTextBatch, ImageTextStatistics
from keygrip.models.nn.flow_matching import TimestepSampler, interpolate, resolution_shift, shifted
from keygrip.models.nn.lora import Adapter, LoRA, add_lora
from keygrip.models.patch_dit.alignment import FeatureAlignment
from keygrip.models.patch_dit.context import ConditionDropout, Conditions
from keygrip.models.patch_dit.encoders import Encoders
from keygrip.models.patch_dit.feature_statistics import STATE, UNKNOWN, FeatureStatistics
from keygrip.models.patch_dit.few_steps import FewSteps
from keygrip.models.patch_dit.figures import image_grid
from keygrip.models.patch_dit.guide import EarlyGuide
from keygrip.models.patch_dit.init_source import StatisticsOf, checked_statistics_of, normalise_as, read_source
from keygrip.models.patch_dit.monitor import RANGES, LossTable, attention_at_half_noise, gradient_figures, velocity_norm
from keygrip.models.patch_dit.network import DiTOutput, PatchDiT
from keygrip.models.patch_dit.sampler import Edit, Sampling, sample
from keygrip.models.patch_dit.warm_start import rename_rules, warm_start
from keygrip.training.checkpoints import stored_beside_weights
from keygrip.training.distributed import global_mean, mean_over_processes
from keygrip.training.loggers import takes_images
from keygrip.training.monitors import RangeChecks
from keygrip.training.optimizers import AdamW
from keygrip.training.parts import ReadWhere, model_part
from keygrip.training.system import System

log = logging.getLogger(__name__)

# Conditions under which validation computes the loss of the same images and noise.
VALIDATED = {"both": (True, True), "text": (True, False), "dino": (False, True), "none": (False, False)}


@model_part(from_checkpoint={"init_from": None})
class PatchDiTModule(System):
    """Loss: mean squared error of the velocity.

    Args:
        network: makes the network from latent_channels, text_dim and dino_dim, which come from the encoders.
        encoders: those that the shards were made with. They are frozen, and their large weights are not stored.
        optimizer: its settings. timesteps: samples those of training. dropout: shares of the categories.
        sampling: how images are sampled in training, and the default of `keygrip.sample`.
        alignment: makes the alignment of a block with the DINO features, from width, dino_dim and depth; None: no
            alignment.
        init_from: a run folder, checkpoint or file of weights to start from; read when training is set up.
        init_from_min_share: share of the network's weights that must come from there. init_from_renames: regular
            expressions and their replacements, for names of other implementations. init_from_statistics: how features
            are normalised: "source", as in that run; "data", by the training shards; "identity", not at all; "auto":
            source for a keygrip run, data for other files.
        few_steps: distils the network of `init_from` into one that is sampled in few steps; None: plain training.
        shift_tokens: images with more latent tokens than this are trained and sampled at noise levels shifted towards
            noise, by sqrt(tokens / shift_tokens), see `resolution_shift`; None: the same levels for all images.
        lora: trains low-rank differences to the fixed network of `init_from`; None: all weights are trained.
        guide: makes, from a copy of the network, the worse version of it that `sampling.guide_scale` guides away from;
            None: no guide.
        monitor_every_n_steps: steps between checks of norms and attention; 0: none. monitor_from_step: for warnings.
        log_images_every_n_steps: minimum steps between samples in validation; 0: none. shown: samples per row.
    """

    read_where: ClassVar = {
        "init_from_min_share": ReadWhere("init_from"),
        "init_from_renames": ReadWhere("init_from"),
        "init_from_statistics": ReadWhere("init_from"),
        "monitor_from_step": ReadWhere("monitor_every_n_steps"),
        "shown": ReadWhere("log_images_every_n_steps"),
        "timesteps": ReadWhere("few_steps", None),
    }
    batch_type = ImageTextBatch
    evaluation_kind = "image_text"
    about = "patch_dit, a diffusion transformer: images from text and a reference's DINO patches"
    toy_overrides = (
        *("data=robot_images", "encoders=tiny", "data.make.options.train=32", "data.make.options.val=8"),
        *("data.make.options.test=8", "data.make.options.processes=1", "data.batch_size=2"),
        *("model.network.width=64", "model.network.depth=2", "model.network.heads=2"),
    )
    headline_metrics = (
        *("train/loss", "val/loss", "val/loss_text", "val/loss_dino", "val/loss_none"),
        *("val/shuffled_over_both", "val/alignment", "train/alignment"),
    )

    def __init__(
        self,
        network: Callable[..., PatchDiT],
        encoders: Encoders,
        optimizer: AdamW,
        timesteps: TimestepSampler,
        dropout: ConditionDropout,
        sampling: Sampling,
        alignment: Callable[..., FeatureAlignment] | None = None,
        init_from: str | None = None,
        monitor_every_n_steps: int = 100,
        monitor_from_step: int = 200,
        log_images_every_n_steps: int = 500,
        shown: int = 6,
        init_from_min_share: float = 0.5,
        init_from_renames: Mapping[str, str] | Sequence[Sequence[str]] | None = None,
        lora: LoRA | None = None,
        few_steps: FewSteps | None = None,
        shift_tokens: int | None = None,
        init_from_statistics: StatisticsOf = "auto",
        guide: Callable[..., EarlyGuide] | None = None,
    ) -> None:
        super().__init__(optimizer)
        if shift_tokens is not None and shift_tokens < 1:
            raise ValueError(f"model.shift_tokens counts latent tokens, from 1, not {shift_tokens}; null: no shift")
        self.shift_tokens = shift_tokens
        if min(monitor_every_n_steps, log_images_every_n_steps) < 0 or shown < 1:
            raise ValueError(
                "model: monitor_every_n_steps and log_images_every_n_steps must not be negative, shown above 0"
            )
        self.encoders = encoders
        self.network = network(
            latent_channels=encoders.latent_channels, text_dim=encoders.text_dim, dino_dim=encoders.dino_dim
        )
        dropout.check(self.network.use_dino_patches, few_steps is not None)
        sizes = self.network.width, encoders.dino_dim, self.network.depth
        self.alignment = None if alignment is None else alignment(*sizes)
        if self.alignment is not None:
            self.alignment.check(dropout, self.network.use_dino_patches)
        self.statistics = FeatureStatistics(encoders.latent_channels, encoders.dino_dim)
        self.timesteps, self.dropout, self.sampling = timesteps, dropout, sampling
        self.init_from, self.init_from_min_share = init_from, init_from_min_share
        self.init_from_renames = rename_rules(init_from_renames)
        self.init_from_statistics = checked_statistics_of(init_from_statistics)
        self.lora, self.few_steps = lora, few_steps
        if few_steps is not None:
            few_steps.check(sampling)
            if self.alignment is not None:
                raise ValueError("model.few_steps learns from its teacher alone: leave model.alignment out")
        if guide is not None and (lora is not None or few_steps is not None):
            raise ValueError("model.guide has no place beside model.lora or model.few_steps: leave it out")
        if sampling.guide_scale and guide is None:
            raise ValueError(f"model.sampling.guide_scale={sampling.guide_scale} has no effect without model.guide: 0")
        drawn = {"sampling": sampling} | ({"few_steps.teacher": few_steps.teacher} if few_steps is not None else {})
        for name, guidance in drawn.items():
            if guidance.cls_scale is not None and not self.network.use_dino_patches:
                idle = f"model.{name}.cls_scale={guidance.cls_scale}"
                raise ValueError(f"{idle} has no effect without patches (use_dino_patches=false): null")
        self.guide = None if guide is None else guide(network=copy.deepcopy(self.network))
        if lora is not None:
            add_lora(self.network, lora)
        self.monitor_every_n_steps, self.log_images_every_n_steps, self.shown = (
            monitor_every_n_steps,
            log_images_every_n_steps,
            shown,
        )
        self.health = RangeChecks(RANGES, monitor_from_step)
        self.losses = LossTable()
        self._encoder_weights: dict[str, Any] = {"view": None, "autoencoder": None}
        self._encoders_ready = False
        self._drawn_at = -1
        self._to_show: list[ImageTextBatch] = []  # the first validation batches, enough for a row of samples
        self._can_decode = True

    # -- set-up -------------------------------------------------------------------------------------------------------

    def resume_data(self, datamodule: Any, checkpoint: Mapping[str, Any]) -> None:
        """Load the encoders' stored weights: a resumed run does not need the files that they came from. Raise
        ValueError if they are missing or do not fit."""
        self.encoders.load_weights(stored_beside_weights(checkpoint, STATE, "view", "autoencoder"))

    def set_statistics(self, statistics: ImageTextStatistics) -> None:
        """Store the shards' normalisation, and load the weights to start from, if there are any.

        Raises:
            ValueError: shards of other encoders, or a warm start with no matching weights. FileNotFoundError: no such
                file.
        """
        self.encoders.check_shards(statistics)
        self.statistics.take(statistics)
        self.network.check_sizes([*statistics.latent_sizes, *statistics.val_latent_sizes])
        self._encoder_weights = dict(self.encoders.weights())
        if self.init_from is not None and (not self.resumed or self.few_steps is not None):
            source = read_source(self.init_from)
            windows = None if self.few_steps is None else self.few_steps.timestep_shift
            source.refuse_other_shift(self.shift_tokens, self.network.patch_size, windows)
            setting = "model.few_steps" if self.few_steps else "model.lora" if self.lora else None
            warm_start(self.network, source, self.init_from_renames, self.init_from_min_share, setting)
            if self.few_steps is None:  # its recipes set a rate for students
                log.info(
                    "training goes on from there at optimizer.lr=%g; half the rate of random weights is a first choice",
                    self.optimizer_recipe.lr,
                )
            normalise_as(source, self.statistics, self.init_from_statistics, self.few_steps is not None)
            if self.few_steps is not None:
                self.few_steps.take_teacher(self.network, source)
        elif self.init_from is None and (self.lora is not None or self.few_steps is not None):
            raise ValueError("model.lora and model.few_steps need a trained network: name it with model.init_from=RUN")

    @property
    def adapter(self) -> Adapter | None:
        """The part that LoRA trains; None without LoRA."""
        return None if self.lora is None else Adapter(self.network, self.lora, inputs=self.statistics.normalisation)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[STATE] = {"statistics": self.statistics.plain(), **self._encoder_weights}
        if self.few_steps is not None and self.few_steps.teacher_digest is not None:
            checkpoint[STATE]["teacher_digest"] = self.few_steps.teacher_digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stored = stored_beside_weights(checkpoint, STATE, "statistics", "view", "autoencoder")
        self.statistics.load_plain(stored["statistics"], checkpoint.get("state_dict", {}))
        if self.few_steps is not None:
            self.few_steps.refuse_other_teacher(stored.get("teacher_digest"))
        self._encoder_weights = {name: stored[name] for name in ("view", "autoencoder")}

    def ready_encoders(self) -> Encoders:
        """The encoders on this module's device, with the stored weights of their small parts.

        Raises:
            ValueError: the training shards were made with other encoders, whose features differ.
        """
        if not self._encoders_ready:
            made_with = self.statistics.encoders
            if made_with == UNKNOWN:
                log.warning("the training shards do not say with which encoders they were made: these are not checked")
                self.encoders.load_weights(self._encoder_weights)
            else:
                self.encoders.load_state({**self._encoder_weights, "fingerprint": made_with})
            self._encoders_ready = True
        return self.encoders.to(self.device)

    def trained_part(self) -> nn.Module:
        return self  # includes the alignment's projection, which is also trained

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if self.due(self.monitor_every_n_steps):
            self._report(gradient_figures(self.network, with_patches=self.lora is None and self.few_steps is None))
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def outside_modules(self) -> list[nn.Module]:
        """The teacher of a student, and the teacher's guide."""
        return [] if self.few_steps is None else self.few_steps.networks()

    def sharded_parts(self) -> list[Any]:
        """Blocks, which are only called through their `forward`, and which FSDP may shard one by one."""
        return [*self.network.blocks, *([] if self.guide is None else self.guide.network.blocks)]

    def check_run(self, max_steps: int, begins: bool) -> None:
        """Raise ValueError if the run ends before the guide's step, or begins with a detail head of other cells than
        the latents have (earlier runs may)."""
        if self.guide is not None:
            self.guide.check(max_steps)
        if begins and self.network.detail is not None:
            self.network.detail.check(self.encoders.autoencoder.stride if self.encoders.exact else 1)

    def on_train_batch_start(self, *_: Any) -> None:
        if self.guide is not None:
            self.guide.take(self.network, self)

    # -- steps --------------------------------------------------------------------------------------------------------

    def noised(self, data: Tensor, noise: Tensor, level: Tensor, context: Any) -> tuple[DiTOutput, Tensor]:
        """The network's output at x_s, and each sample's loss ``[B]`` float32."""
        tap = None if self.alignment is None else self.alignment.block
        x = interpolate(data, noise, level)
        output = self.network(x, level, context, tap=tap)
        error = output.velocity.float() - self.network.target(x, data, noise, level).float()
        return output, error.pow(2).mean(dim=(1, 2, 3))

    def loss(self, batch: ImageTextBatch) -> Tensor:
        """The loss at half noise, with nothing dropped; of a student, in the window whose teacher computes most."""
        data = self.statistics.normalised("latent", batch.latents)
        conditions, count = self.statistics.conditions(batch), len(data)
        if self.few_steps is not None:
            return self.few_steps.largest_loss(self.network, data, conditions, self.shift_of(data))
        everything = torch.ones(count, dtype=torch.bool, device=data.device)
        noise, level = torch.randn_like(data), torch.full((count,), 0.5, device=data.device)
        context = self.network.context_builder(conditions, everything, everything, aspect_of(data))
        return self.noised(data, noise, level, context)[1].mean()

    def dry_run(self, batch: ImageTextBatch) -> dict[str, Any]:
        """As in the base class, with the number of tokens of a latent."""
        return {"latent_tokens": int(np.prod(self.network.grid(batch.latents)))} | super().dry_run(batch)

    def shift_of(self, latents: Tensor) -> float:
        """How far the noise levels of latents ``[B, C, h, w]`` are shifted for their resolution; 1: not at all."""
        if self.shift_tokens is None:
            return 1.0
        rows, columns = self.network.grid(latents)
        return resolution_shift(rows * columns, self.shift_tokens)

    def sampling_with(self, changes: Mapping[str, Any]) -> Sampling:
        """The module's own sampling with some parts changed, see `Sampling.changed`.

        Raises:
            ValueError: also if a few-steps student would be sampled in another way than it is trained for.
        """
        sampling = self.sampling.changed(changes)
        if sampling.guide_scale and self.guide_network is None:
            if changes.get("guide_scale"):
                raise ValueError(
                    f"guide_scale={sampling.guide_scale} has no effect: this model has no guide, leave it out"
                )
            log.warning("this model has no guide yet, and its own guide_scale=%g is left out", sampling.guide_scale)
            sampling = replace(sampling, guide_scale=0.0)
        if self.few_steps is not None:
            self.few_steps.check(sampling)
        return sampling

    @property
    def guide_network(self) -> PatchDiT | None:
        """The network that `guide_scale` guides away from; None: there is no guide, or its step is not reached."""
        return self.guide.network if self.guide is not None and self.guide.taken else None

    def sampling_at(self, size: tuple[int, int], sampling: Sampling | None = None) -> Sampling:
        """Sampling of latents of size (h, w): the module's own or the given one, shifted for the resolution."""
        usual = sampling or self.sampling
        shift = self.shift_of(torch.empty(0, self.network.latent_channels, *size))
        return replace(usual, timestep_shift=usual.timestep_shift * shift)

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        data = self.statistics.normalised("latent", batch.latents)
        conditions, aspect, count = self.statistics.conditions(batch), aspect_of(data), len(data)
        conditions = self.dropout.masked(conditions)
        if self.few_steps is not None:
            loss = self.few_steps.loss(self.network, data, conditions, self.dropout, self.shift_of(data))
            self.log_values("train", mean_over_processes({"total": loss}), count)
            return loss
        level, category = self.timesteps(count, self.device), self.dropout.draw(count, self.device)
        level = shifted(level, self.shift_of(data))
        keep_text, keep_cls, keep_patches = self.dropout.kept(category)
        context = self.network.context_builder(conditions, keep_text, keep_cls, aspect, keep_patches)
        output, losses = self.noised(data, torch.randn_like(data), level, context)
        loss = global_mean(losses.sum(), count)
        alignment_loss = self._alignment_loss("train", output, data, conditions, keep_patches)
        self.log_values("train", mean_over_processes({"total": loss}), count)
        self.losses.add(losses.detach(), level, category)
        if self.due(self.trainer.log_every_n_steps):  # type: ignore[attr-defined]
            for name, value in self.losses.report().items():
                self.log(f"train/{name}", value, batch_size=count)
        if self.due(self.monitor_every_n_steps):
            self._report({"velocity_norm": velocity_norm(output.velocity)})
            self._report(attention_at_half_noise(self.network, data, conditions, aspect))
        return loss + alignment_loss

    def on_validation_epoch_start(self) -> None:
        self._to_show = []

    @torch.no_grad()
    def validation_step(self, batch: ImageTextBatch, batch_idx: int) -> None:
        """The loss on fixed noise and levels, under each combination of conditions and with shuffled patches; for a
        student, the loss of its windows."""
        data = self.statistics.normalised("latent", batch.latents)
        conditions, aspect, count = self.statistics.conditions(batch), aspect_of(data), len(data)
        generator = torch.Generator().manual_seed(batch_idx * 1009 + self.global_rank)
        if self.few_steps is not None:  # a student does not learn plain flow matching
            shift = self.shift_of(data)
            loss = self.few_steps.validation_loss(self.network, data, conditions, generator, shift)
            self.log("val/loss", loss, prog_bar=True, batch_size=count, sync_dist=True)
            self._keep_to_show(batch)
            return
        noise = torch.randn(data.shape, generator=generator).to(data)
        level = torch.rand(count, generator=generator).to(self.device)
        means: dict[str, Tensor] = {}
        for name, (text, dino) in VALIDATED.items():
            keep = (torch.full((count,), flag, device=self.device) for flag in (text, dino))
            output, losses = self.noised(data, noise, level, self.network.context_builder(conditions, *keep, aspect))
            means[name] = losses.mean()
            if self.alignment and name == ("text" if self.alignment.only_without_patches else "both"):
                has_patches = torch.full((count,), dino, device=self.device)
                self._alignment_loss("val", output, data, conditions, has_patches)
        if self.network.use_dino_patches and conditions.patches is not None:
            order = torch.randperm(conditions.patches.shape[1], generator=generator).to(self.device)
            shuffled = replace(conditions, patches=conditions.patches[:, order])
            everything = torch.ones(count, dtype=torch.bool, device=self.device)
            context = self.network.context_builder(shuffled, everything, everything, aspect)
            means["shuffled"] = self.noised(data, noise, level, context)[1].mean()
        self.log("val/loss", means.pop("both"), prog_bar=True, batch_size=count, sync_dist=True)
        for name, value in means.items():
            self.log(f"val/loss_{name}", value, batch_size=count, sync_dist=True)
        self._keep_to_show(batch)

    def _keep_to_show(self, batch: ImageTextBatch) -> None:
        """Keep batches of one size for the samples that are shown, until they are enough."""
        held = self._to_show
        if not held or (sum(map(len, held)) < self.shown and batch.latents.shape[1:] == held[0].latents.shape[1:]):
            held.append(batch)

    def on_validation_epoch_end(self) -> None:
        if self._to_show:
            with self.trainer.precision_plugin.forward_context():  # Lightning's own covers only steps
                self._show(ImageTextBatch.joined(self._to_show))
        logged = self.trainer.callback_metrics
        if "val/loss_shuffled" in logged:
            ratio = logged["val/loss_shuffled"] / logged["val/loss"]
            self.log("val/shuffled_over_both", ratio, sync_dist=True)
            if not self.trainer.sanity_checking and self.trainer.is_global_zero:
                self.health.check({"shuffled_over_both": float(ratio)}, self.global_step)

    def _alignment_loss(
        self, split: str, output: DiTOutput, data: Tensor, conditions: Conditions, has_patches: Tensor
    ) -> Tensor:
        """The weighted loss of the alignment, and of val the mean over the samples that count.

        In training it is divided by the number of samples that count on average, not in this batch: its expected value
        is the same, also if the samples of a step come in small batches, of which some have no such sample.
        """
        if self.alignment is None or output.tapped is None or conditions.patches is None:
            return torch.zeros((), device=self.device)
        losses = self.alignment(output.tapped, self.network.grid(data), conditions.patches, conditions.patch_grid)
        counted = self.alignment.counted(has_patches)
        total = (losses * counted).sum()
        if split == "val":
            mean = global_mean(total, counted.sum())
            self.log("val/alignment", mean.detach(), batch_size=len(losses), sync_dist=True)
            return mean
        self.losses.add_alignment(losses.detach(), counted)
        loss = global_mean(total, len(losses) * self.alignment.counted_share(self.dropout))
        return loss * self.alignment.weight_at(self.progress())

    def _report(self, figures: dict[str, Tensor]) -> None:
        """Log directly, whatever the loggers' interval, and compare with the healthy ranges."""
        values = {name: float(value) for name, value in figures.items()}
        for logger in self.loggers:
            logger.log_metrics({f"health/{name}": value for name, value in values.items()}, step=self.global_step)
        if self.trainer.is_global_zero:
            self.health.check(values, self.global_step)

    # -- images -----------------------------------------------------------------------------------------------------

    def draw(
        self,
        conditions: Conditions,
        size: tuple[int, int],
        seeds: Sequence[int],
        sampling: Sampling | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
        edit: Edit | None = None,
    ) -> Tensor:
        """Images ``[B, 3, H, W]`` float32 in 0..1.

        Args:
            conditions: normalised, of len(seeds) samples; see `keygrip.models.patch_dit.feature_statistics`.
            size: (h, w) of the latents. sampling: None: the module's own. on_step, edit: see `sample`.
        """
        way = self.sampling_at(size, sampling)
        latents = sample(self.network, conditions, size, way, seeds, on_step, edit=edit, guide=self.guide_network)
        return self.encoders.to(self.device).decode_latents(self.statistics.restored(latents))

    @torch.no_grad()
    def _show(self, batch: ImageTextBatch) -> None:
        """Log samples for the first validation images, always the same images and seeds. In the check before the first
        step, only test whether the autoencoder is available."""
        due = self._drawn_at < 0 or self.global_step - self._drawn_at >= self.log_images_every_n_steps
        if not self.log_images_every_n_steps or not due or not takes_images(self.loggers):
            return
        count = min(self.shown, len(batch))
        real = self._decoded(batch.latents[:count])
        if real is None or self.trainer.sanity_checking:
            return
        self._drawn_at = self.global_step
        whole = self.statistics.conditions(batch).first(count)
        size, seeds = (batch.latents.shape[2], batch.latents.shape[3]), list(range(count))
        ways = {
            "text and DINO": whole,
            "text alone": whole.without_dino(),
            "DINO alone": replace(whole, text=None, text_mask=None),
            "its own text, DINO of the next": whole.with_dino_of(torch.arange(count).roll(-1)),
        }
        rows = [("real", real)]
        # without a guide, or before its step, there is no guidance by it
        sampling = self.sampling if self.guide_network is not None else replace(self.sampling, guide_scale=0.0)
        rows += [(title, self.draw(conditions, size, seeds, sampling)) for title, conditions in ways.items()]
        if self.trainer.is_global_zero:
            # One image has no next one. The row is drawn all the same: processes of FSDP need equal numbers of passes.
            self.show_image("val/samples", image_grid(rows if count > 1 else rows[:-1]))
            captions = "\n".join(f"{number}. {text}" for number, text in enumerate(batch.captions[:count], start=1))
            self.show_text("val/captions", captions)

    def _decoded(self, latents: Tensor) -> Tensor | None:
        """Images of latents ``[B, C, h, w]``; None if the autoencoder is not available, with one warning: training
        does not need it, since its shards contain latents."""
        if not self._can_decode:
            return None
        try:
            return self.encoders.to(self.device).decode_latents(latents)
        except (FileNotFoundError, ImportError) as error:
            self._can_decode = False
            log.warning(
                "no samples are drawn in training (model.log_images_every_n_steps=0 leaves them out): %s", error
            )
            return None


def aspect_of(latents: Tensor) -> float:
    """Width over height of images, from their latents ``[B, C, h, w]``."""
    return latents.shape[3] / latents.shape[2]
