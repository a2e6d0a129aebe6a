"""Training of keygrip's own autoencoder on the images of shards that contain exact pixels (`encoders=tiny`)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from keygrip.data.batches import ImageTextBatch, ImageTextStatistics
from keygrip.models.patch_dit.autoencoders import PixelPacking
from keygrip.models.patch_dit.encoders import Encoders
from keygrip.models.patch_dit.figures import image_grid
from keygrip.models.patch_dit.trained_autoencoder import ConvAutoencoder, ResidualBlock
from keygrip.training.distributed import global_mean, mean_over_processes
from keygrip.training.optimizers import AdamW
from keygrip.training.parts import ReadWhere, model_part
from keygrip.training.system import System


@model_part(from_checkpoint={"init_from": None})
class AutoencoderModule(System):
    """Loss: mean absolute error of pixels and of their differences to neighbours, and a small KL divergence of the
    posterior from a standard normal distribution.

    The error of differences penalises grain and blurred edges, which change the error of pixels little.

    Args:
        network: the autoencoder. encoders: of the shards, which contain exact pixels. optimizer: its settings.
        difference_weight: of the error of differences. kl_weight: of the mean divergence per value of a latent.
        log_images_every_n_steps: minimum steps between validations that show images; 0: none.
        shown: number of images that a validation shows. init_from: run folder or checkpoint of such an autoencoder from
            whose weights training starts. decoder_only: keep the encoder of `init_from`, and therefore its latents, and
            train the decoder only; models already trained on these latents keep the decoder stored with them.
            latent_noise: largest standard deviation of noise added to the decoder's inputs in training, in standard
            deviations of a latent's channel; sampled per image from 0 to this value. A diffusion model's samples are
            never exactly latents of images.

    Raises:
        ValueError: negative weights, encoders whose latents are not pixels, or `decoder_only` without `init_from`.
    """

    batch_type = ImageTextBatch
    read_where: ClassVar = {
        "kl_weight": ReadWhere("decoder_only", False),
        "shown": ReadWhere("log_images_every_n_steps"),
    }
    toy_overrides = (
        *("data=robot_images", "encoders=tiny", "data.make.options.train=32", "data.make.options.val=8"),
        *("data.make.options.test=8", "data.make.options.processes=1", "data.batch_size=2"),
        *("model.network.width=8", "model.network.channels=4"),
    )
    headline_metrics = ("train/loss", "val/loss", "val/psnr_db", "val/differences")

    def __init__(
        self,
        network: ConvAutoencoder,
        encoders: Encoders,
        optimizer: AdamW,
        difference_weight: float = 1.0,
        kl_weight: float = 1e-4,
        log_images_every_n_steps: int = 1,
        shown: int = 6,
        init_from: str | None = None,
        decoder_only: bool = False,
        latent_noise: float = 0.0,
    ) -> None:
        super().__init__(optimizer)
        if min(difference_weight, kl_weight, latent_noise, log_images_every_n_steps) < 0 or shown < 1:
            raise ValueError(
                "model: log_images_every_n_steps, difference_weight, kl_weight and latent_noise must not be negative, "
                "and shown must be above 0"
            )
        packing = encoders.autoencoder
        if not isinstance(packing, PixelPacking):
            raise ValueError(
                f"an autoencoder is trained on shards that hold pixels exactly (encoders=tiny), not on latents of "
                f"{type(packing).__name__}"
            )
        self.network, self.packing = network, packing
        self.difference_weight, self.kl_weight, self.shown = difference_weight, kl_weight, shown
        self.log_images_every_n_steps = log_images_every_n_steps
        self.init_from, self.decoder_only, self.latent_noise = init_from, decoder_only, latent_noise
        network.encoder.requires_grad_(not decoder_only)

    def sharded_parts(self) -> list[Any]:
        """Residual blocks, which are only called through their `forward`, and which FSDP may shard one by one."""
        return [part for part in self.network.modules() if isinstance(part, ResidualBlock)]

    def set_statistics(self, statistics: ImageTextStatistics) -> None:
        """Raise ValueError if the shards contain anything but packed pixels, or images of sizes that do not divide."""
        if len(statistics.latent_mean) != self.packing.channels:
            raise ValueError(
                f"the shards' latents have {len(statistics.latent_mean)} channels, packed pixels "
                f"{self.packing.channels}: choose shards and encoders of exact pixel packing (encoders=tiny)"
            )
        for rows, columns in (*statistics.latent_sizes, *statistics.val_latent_sizes):
            if rows * self.packing.stride % self.network.stride or columns * self.packing.stride % self.network.stride:
                raise ValueError(
                    f"images of {columns * self.packing.stride} x {rows * self.packing.stride} pixels do not divide by "
                    f"model.network.stride={self.network.stride}"
                )
        if self.init_from is None:
            if self.decoder_only:
                raise ValueError(
                    "model.decoder_only=true keeps a trained encoder: name its run with model.init_from=RUN"
                )
        elif not self.resumed:
            self.take_weights(self.init_from, "an autoencoder")

    def pixels(self, batch: ImageTextBatch) -> Tensor:
        """Images [B, 3, H, W] in -1..1."""
        return self.packing.decode(batch.latents) * 2 - 1

    def losses(self, pixels: Tensor, sampled: bool) -> dict[str, Tensor]:
        """Losses of each image, [B] each: `pixels`, `differences`, `kl` and their weighted sum `total`.

        Args:
            sampled: sample latents from the posterior and add `latent_noise`; otherwise use the posterior's mean.
        """
        mean, log_variance = self.network.posterior(pixels)
        latents = mean
        if sampled:
            latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
            if self.latent_noise:
                unit = self.latent_noise * mean.detach().std(dim=(0, 2, 3), keepdim=True)
                latents = latents + unit * torch.rand_like(mean[:, :1, :1, :1]) * torch.randn_like(mean)
        error = self.network.decode(latents).float() - pixels
        terms = {
            "pixels": error.abs().mean(dim=(1, 2, 3)),
            "differences": sum(
                (error.diff(dim=axis).abs().mean(dim=(1, 2, 3)) for axis in (2, 3)),
                start=torch.zeros((), device=error.device),
            ),
            "kl": 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).float().mean(dim=(1, 2, 3)),
        }
        weights = {"pixels": 1.0, "differences": self.difference_weight, "kl": self.kl_weight}
        total = sum((weights[name] * value for name, value in terms.items()), start=torch.zeros_like(terms["pixels"]))
        return {**terms, "total": total}

    def loss(self, batch: ImageTextBatch) -> Tensor:
        """The mean loss of a batch."""
        return self.losses(self.pixels(batch), sampled=True)["total"].mean()

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        losses = self.losses(self.pixels(batch), sampled=True)
        means = {name: global_mean(value.sum(), len(batch)) for name, value in losses.items()}
        self.log_values("train", mean_over_processes(means), len(batch))
        return means["total"]

    @torch.no_grad()
    def validation_step(self, batch: ImageTextBatch, batch_idx: int) -> None:
        pixels = self.pixels(batch)
        values = {name: value.mean() for name, value in self.losses(pixels, sampled=False).items()}
        reconstruction = ((self.network(pixels).float() + 1) / 2).clamp(0, 1)
        error = (reconstruction - (pixels + 1) / 2).pow(2).mean(dim=(1, 2, 3)).clamp(min=1e-10)
        self.log_values("val", {**values, "psnr_db": (-10 * error.log10()).mean()}, len(batch))
        if batch_idx or self.trainer.sanity_checking or not self.images_are_due(self.log_images_every_n_steps):
            return
        if self.shows_images:
            rows = [("images", (pixels[: self.shown] + 1) / 2), ("as they come back", reconstruction[: self.shown])]
            self.show_image("val/images", image_grid(rows))
