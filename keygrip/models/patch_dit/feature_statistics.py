"""What a model stores about its image shards: normalisation and shapes of the features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from keygrip.artifacts import sha256_of
from keygrip.data.batches import ImageTextBatch, ImageTextStatistics
from keygrip.models.patch_dit.context import Conditions
from keygrip.training.host_copy import HostCopy

STATE = "patch_dit"  # checkpoint key of the module's state that is not in the weights
UNKNOWN = "unknown"  # fingerprint of shards that do not name their encoders
NORMALISED = ("latent", "cls", "patch")
LONGEST_SIDE = 4096  # of latents and of grids of patches, in cells


class FeatureStatistics(nn.Module):
    """Mean and standard deviation by channel of latents, CLS vectors and patches, in buffers; shapes as plain values.

    A sampler without them would decode noise, so using them before they are set raises ValueError. Channels that do not
    vary are shifted and not scaled.

    Args:
        latent_channels, dino_dim: sizes of the features.
    """

    known: Tensor

    def __init__(self, latent_channels: int, dino_dim: int) -> None:
        super().__init__()
        self._known = HostCopy()
        self.register_buffer("known", torch.tensor(False))
        for name, size in zip(NORMALISED, (latent_channels, dino_dim, dino_dim), strict=True):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.text_length = 0
        self.latent_sizes: list[tuple[int, int]] = []
        self.patch_grids: list[tuple[int, int]] = []
        self.fingerprint = ""
        self.encoders = ""

    def take(self, statistics: ImageTextStatistics) -> None:
        """Store the statistics that a data module computed on its training split.

        Raises:
            ValueError: the features have other widths than the network's.
        """
        for name in NORMALISED:
            for part in ("mean", "std"):
                buffer: Tensor = getattr(self, f"{name}_{part}")
                value = torch.as_tensor(getattr(statistics, f"{name}_{part}"), dtype=buffer.dtype)
                if value.shape != buffer.shape:
                    raise ValueError(
                        f"The shards' {name} features have {len(value)} channels and the network was built for "
                        f"{len(buffer)}: choose the encoders= that the shards were made with."
                    )
                buffer.copy_(value.where(value > 1e-6, 1.0) if part == "std" else value)
        self.text_length = statistics.text_length
        self.latent_sizes = [(int(h), int(w)) for h, w in statistics.latent_sizes]
        self.patch_grids = [(int(h), int(w)) for h, w in statistics.patch_grids]
        self.fingerprint, self.encoders = statistics.fingerprint, statistics.encoders
        self.known.fill_(True)

    def take_normalisation(self, buffers: Mapping[str, Tensor], where: str) -> list[str]:
        """Copy means and standard deviations from another model's buffers, for the kinds of features that have the same
        width there; return the other kinds.

        Args:
            buffers: such as ``latent_mean``, by name. where: their source, for messages.

        Raises:
            ValueError: buffers are missing, or are not valid means and standard deviations.
        """
        other = []
        for kind in NORMALISED:
            values = {part: buffers.get(f"{kind}_{part}") for part in ("mean", "std")}
            mean, std = values["mean"], values["std"]
            if mean is None or std is None or not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
                raise ValueError(f"{where} holds no normalisation of {kind} features")
            if mean.shape != getattr(self, f"{kind}_mean").shape or std.shape != mean.shape:
                other.append(kind)
                continue
            for part, value in (("mean", mean), ("std", std)):
                getattr(self, f"{kind}_{part}").copy_(value)
        return other

    def set_identity(self) -> None:
        """Set the identity: features are neither shifted nor scaled."""
        for kind in NORMALISED:
            getattr(self, f"{kind}_mean").zero_()
            getattr(self, f"{kind}_std").fill_(1.0)

    @property
    def normalisation(self) -> str:
        """Fingerprint of the means and standard deviations."""
        buffers = (getattr(self, f"{kind}_{part}") for kind in NORMALISED for part in ("mean", "std"))
        return sha256_of(buffer.float().cpu().numpy().tobytes() for buffer in buffers)[:16]

    def plain(self) -> dict[str, Any]:
        """The plain values (no tensors), for a checkpoint."""
        return {
            "text_length": self.text_length,
            "latent_sizes": [list(size) for size in self.latent_sizes],
            "patch_grids": [list(grid) for grid in self.patch_grids],
            "fingerprint": self.fingerprint,
            "encoders": self.encoders,
        }

    def load_plain(self, plain: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Load what `plain` returned.

        Args:
            weights: of the checkpoint, from which the means and standard deviations are loaded; when sharded training
                resumes they are not passed here.

        Raises:
            ValueError: sizes that no image has, or standard deviations that are not positive.
        """
        self.text_length = int(plain["text_length"])
        self.latent_sizes = _parse_sizes(plain["latent_sizes"], "latent_sizes")
        self.patch_grids = _parse_sizes(plain["patch_grids"], "patch_grids")
        self.fingerprint, self.encoders = plain["fingerprint"], plain["encoders"]
        for kind in NORMALISED:
            std = weights.get(f"statistics.{kind}_std")
            if std is not None and not (std > 0).all():
                raise ValueError(f"its {kind} features have a standard deviation that is not above 0")

    def normalised(self, name: str, features: Tensor) -> Tensor:
        """Features of the kind "latent" ``[B, C, h, w]``, "cls" ``[B, D]`` or "patch" ``[B, P, D]`` normalised for
        a network."""
        mean, std = self._of(name)
        return (features - mean) / std

    def restored(self, latents: Tensor) -> Tensor:
        """Undo the normalisation of latents ``[B, C, h, w]``, for an autoencoder."""
        mean, std = self._of("latent")
        return latents * std + mean

    def conditions(self, batch: ImageTextBatch) -> Conditions:
        """The conditions of a batch, normalised for a network."""
        return Conditions(
            batch.text_states,
            batch.text_mask,
            self.normalised("cls", batch.dino_cls),
            self.normalised("patch", batch.dino_patches),
            batch.patch_grid,
        )

    def _of(self, name: str) -> tuple[Tensor, Tensor]:
        if not self._known(self.known):
            raise ValueError(
                "The model has no statistics of its training images (normalisation of latents and features): train it, "
                "or load a checkpoint written by keygrip.train."
            )
        mean: Tensor = getattr(self, f"{name}_mean")
        std: Tensor = getattr(self, f"{name}_std")
        return (mean[:, None, None], std[:, None, None]) if name == "latent" else (mean, std)


def _parse_sizes(pairs: Any, name: str) -> list[tuple[int, int]]:
    """Stored (height, width) pairs. Raise ValueError if there are none, or if numbers are not sizes."""
    sizes = [tuple(size) for size in pairs]
    if not sizes or not all(
        len(size) == 2 and all(type(side) is int and 1 <= side <= LONGEST_SIDE for side in size) for size in sizes
    ):
        raise ValueError(f"its {name} are {str(pairs)[:80]}: pairs of whole numbers from 1 to {LONGEST_SIDE}")
    return [(height, width) for height, width in sizes]
