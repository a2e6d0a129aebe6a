"""Frozen encoders whose features compare sets of images: one trained here without labels, or a published one."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from keygrip.artifacts import atomic_write, make_once, sha256_file
from keygrip.evaluation.attribute_classifier import real_images
from keygrip.evaluation.known_features import known_encoder
from keygrip.models.patch_dit.encoders import Encoders
from keygrip.progress import Progress
from keygrip.training.integrity import load_tensors

if TYPE_CHECKING:
    from keygrip.data.image_text.datamodule import ImageShards

log = logging.getLogger(__name__)

VERSION = 2  # version of the network and its training; files of another version are not used
KINDS = ("trained", "dinov3", "clip", "inception")
TEMPERATURE = 0.2


@dataclass(frozen=True)
class FeatureOptions:
    """Features in which sets of images are compared.

    Args:
        kind: "trained": an encoder trained without labels on the training images of the shards and stored next to
            them. From `weights`: "dinov3", the CLS vector of a backbone; "clip", the embedding on which CMMD is
            defined; "inception", the pooled features of the FID.
        weights: a local file, for "clip" a folder; None for "trained". variant: of the backbone. reference_images:
            number of real training images that sets are compared with.
        width, steps, batch_size, lr: of the encoder that is trained here. training_images: maximum number it is trained
            on, spread evenly over the set; they are held in memory, 786 kB each at 512 px.

    Raises:
        ValueError: The kind is unknown, weights are missing or not accepted, or a setting belongs to another kind.
    """

    kind: str = "trained"
    weights: str | None = None
    variant: str = "dinov3_vits16"
    reference_images: int = 512
    width: int = 32
    steps: int = 400
    batch_size: int = 48
    lr: float = 2e-3
    training_images: int = 4096

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"features.kind={self.kind!r}: choose {', '.join(KINDS)}")
        if (self.kind == "trained") != (self.weights is None):
            raise ValueError(
                f"features.kind={self.kind}: "
                + ("leave weights out" if self.weights else "name its file with weights=")
            )
        if min(self.reference_images, self.training_images, self.width, self.steps, self.batch_size) < 1:
            raise ValueError(
                "features: reference_images, training_images, width, steps and batch_size must be at least 1"
            )
        if self.width % 4:
            raise ValueError(f"features.width={self.width} must divide by 4")
        if self.kind != "dinov3":
            self._refuse_idle(["variant"], "of dinov3")
        if self.kind != "trained":
            self._refuse_idle(["width", "steps", "batch_size", "lr", "training_images"], "of an encoder trained here")

    def _refuse_idle(self, names: list[str], owner: str) -> None:
        for name in names:
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ValueError(f"features.{name} is {owner} and has no effect with features.kind={self.kind}")


@dataclass(frozen=True)
class FeatureEncoder:
    """features: images [B, 3, H, W] in 0..1 -> [B, F] float32. name, sha256: of the weights."""

    features: Callable[[Tensor], Tensor]
    name: str
    sha256: str


class SmallEncoder(nn.Module):
    """Four strided convolutions; the features are means and standard deviations of the last two maps, [B, 12 width].

    Args:
        width: of the first layer; later layers have two and four times as much.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [3, width, 2 * width, 2 * width, 4 * width]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.GroupNorm(4, size) for size in sizes[1:])
        self.head = nn.Sequential(nn.Linear(12 * width, 4 * width), nn.GELU(), nn.Linear(4 * width, 64))

    def forward(self, images: Tensor) -> Tensor:
        x = images * 2 - 1
        maps = []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = functional.gelu(norm(layer(x)))
            maps.append(x)
        statistics = []
        # for a map of one cell the variance is 0, and its square root must have a finite gradient
        for feature_map in maps[-2:]:
            statistics += [feature_map.mean(dim=(2, 3)), (feature_map.var(dim=(2, 3), correction=0) + 1e-6).sqrt()]
        return torch.cat(statistics, dim=1)


def feature_encoder(data: ImageShards, encoders: Encoders, options: FeatureOptions) -> FeatureEncoder:
    """Return the encoder selected by the options. The trained one is stored next to the shards and trained if missing.

    Raises:
        FileNotFoundError, ValueError: The weights do not exist or belong to another network.
    """
    if options.kind == "trained":
        return _load_or_train(data, encoders, options)
    network, name, sha256 = known_encoder(options.kind, Path(str(options.weights)), options.variant)
    return FeatureEncoder(network, name, sha256)


# ---- the encoder that is trained here --------------------------------------------------------------------------------


def _load_or_train(data: ImageShards, encoders: Encoders, options: FeatureOptions) -> FeatureEncoder:
    identity = {"version": VERSION, "data": data.fingerprint, "autoencoder": encoders.autoencoder.description()}
    names = ["width", "steps", "batch_size", "lr"]
    if len(data.samples("train")) > options.training_images:
        names.append("training_images")
    chosen = {name: asdict(options)[name] for name in names}
    fingerprint = hashlib.sha256(json.dumps({**identity, **chosen}, sort_keys=True).encode()).hexdigest()[:16]
    file = data.folder / f"image_encoder-{fingerprint}.pt"

    def make(path: Path) -> None:
        network = train_encoder(training_images(data, encoders, options.training_images), options)
        with atomic_write(path) as stream:
            torch.save({"width": options.width, "weights": network.state_dict()}, stream)

    make_once(file, Path.is_file, make, together_without=True)
    content = load_tensors(file)
    network = SmallEncoder(content["width"])
    network.load_state_dict(content["weights"])
    network.eval().requires_grad_(False)
    return FeatureEncoder(lambda images: network.to(images.device)(images), f"trained {fingerprint}", sha256_file(file))


def training_batches(data: ImageShards, encoders: Encoders, limit: int) -> Iterator[Tensor]:
    """Yield the images of `training_images` as uint8 [B, 3, H, W] of one size; only one batch is held in memory."""
    for batch in data.held_out("train", limit, with_images=True):
        yield real_images(encoders, batch)


def training_images(data: ImageShards, encoders: Encoders, limit: int) -> list[Tensor]:
    """Return uint8 [N, 3, H, W] of each size: at most `limit` training images, spread evenly over the buckets."""
    found: dict[tuple[int, ...], list[Tensor]] = {}
    for shown in training_batches(data, encoders, limit):
        found.setdefault(tuple(shown.shape[2:]), []).append(shown)
    return [torch.cat(found[size]) for size in sorted(found)]


def train_encoder(images: list[Tensor], options: FeatureOptions) -> SmallEncoder:
    """Train the encoder contrastively, without labels: two views of an image must be more similar than views of
    different images (Chen et al., "SimCLR", 2020). A pure function of its arguments.

    Views are crops of at least half the area, mirrored, and slightly lighter or darker. So images are distinguished by
    the objects that they show, their appearance and their arrangement. Grain is not changed between views, so that
    features may represent it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SmallEncoder(options.width)
    optimizer = torch.optim.AdamW(network.parameters(), options.lr, weight_decay=0.01)
    rng = np.random.default_rng(0)
    shares = np.array([len(part) for part in images], float)
    with torch.enable_grad():
        for step in Progress(range(options.steps), desc="image encoder", unit="step", leave=False):
            rate = options.lr * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * (step + 1) / options.steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            part = images[int(rng.choice(len(images), p=shares / shares.sum()))]
            batch = part[torch.from_numpy(rng.integers(0, len(part), options.batch_size))].float() / 255
            views = torch.cat([_augment(batch, rng), _augment(batch, rng)])
            embeddings = functional.normalize(network.head(network(views)), dim=-1)
            similarities = embeddings @ embeddings.T / TEMPERATURE
            similarities = similarities.masked_fill(torch.eye(len(embeddings), dtype=torch.bool), -torch.inf)
            loss = functional.cross_entropy(similarities, torch.arange(len(embeddings)).roll(options.batch_size))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return network.eval()


def _augment(images: Tensor, rng: Any) -> Tensor:
    """Return a view: one crop, mirroring and lightness per batch, so that its views differ only in the images."""
    height, width = images.shape[2:]
    share = math.sqrt(rng.uniform(0.5, 1.0))
    crop_height, crop_width = max(8, round(height * share)), max(8, round(width * share))
    top, left = int(rng.integers(0, height - crop_height + 1)), int(rng.integers(0, width - crop_width + 1))
    crop = images[:, :, top : top + crop_height, left : left + crop_width]
    crop = functional.interpolate(crop, (height, width), mode="bilinear", antialias=True)
    crop = crop.flip(3) if rng.random() < 0.5 else crop
    return (crop * float(rng.uniform(0.85, 1.15))).clamp(0, 1)
