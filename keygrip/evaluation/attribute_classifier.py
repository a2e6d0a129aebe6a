"""A classifier for images of the simulated table: a small network that predicts the positions of cube and block, the
cube's colour, and which objects are present. It is trained on real images only. Its own error on held-out images is
reported with every figure that it gives.

Its features also give a distance between images, a substitute under its own name when the LPIPS weights are not
available.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from keygrip.artifacts import atomic_write, make_once
from keygrip.data.batches import ImageTextBatch
from keygrip.models.patch_dit.encoders import Encoders
from keygrip.progress import Progress
from keygrip.training.integrity import load_tensors

if TYPE_CHECKING:
    from keygrip.data.image_text.datamodule import ImageShards

log = logging.getLogger(__name__)

VERSION = 3  # version of the network and its training; files of another version are not used
THINGS = ("cube", "block")
NEAR_PX = 4.0  # pixels, for an image whose shorter side is scaled to 64 pixels
REFERENCE_EDGE = 64


@dataclass(frozen=True)
class ClassifierOptions:
    """Training options of a classifier.

    Args:
        width: of its layers. steps, batch_size, lr: of training; on the simulator's images a hundred steps are nearly
            enough. noise: largest noise added to images; none by default, because a classifier trained on noisy images
            does not detect noise.
    """

    width: int = 24
    steps: int = 400
    batch_size: int = 32
    lr: float = 3e-3
    noise: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """Predictions of the classifier for B images.

    Args:
        places: [B, 2, 2] cube and block, (x, y) in fractions of the image.
        colours: [B, K] logits.
        features: [B, F, h, w] of its layers, concatenated.
        heat: [B, 2, h, w] logits of the maps.
        objects: [B, K + 1, h, w] logits for the centre of a cube of each colour, or of a block (the last), at this
            cell.
    """

    places: Tensor
    colours: Tensor
    features: Tensor
    heat: Tensor
    objects: Tensor


class AttributeClassifier(nn.Module):
    """Convolutions at half the image's resolution. A map for each object, whose centre of mass is the object's
    position, and maps of object centres, which can represent none or several of a kind (Zhou et al., "Objects as
    Points", 2019).

    Args:
        colours: names. width: of the layers.
    """

    def __init__(self, colours: Sequence[str], width: int = 32) -> None:
        super().__init__()
        self.colours = list(colours)
        self.stem = nn.Conv2d(3, width, 5, stride=2, padding=2)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in (1, 2, 4, 1))
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(4))
        self.maps = nn.Conv2d(width, len(THINGS), 1)
        self.centres = nn.Conv2d(width, len(self.colours) + 1, 1)
        nn.init.constant_(self.centres.bias, -4.0)  # type: ignore[arg-type]  # there is no centre in nearly all cells
        self.colour = nn.Sequential(nn.Linear(width + 3, 64), nn.GELU(), nn.Linear(64, len(self.colours)))

    def forward(self, images: Tensor) -> Verdict:
        """Predict for images [B, 3, H, W] in 0..1."""
        x = functional.gelu(self.stem(images * 2 - 1))
        features = []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + functional.gelu(layer(norm(x)))
            features.append(x)
        heat = self.maps(x)
        shares = heat.flatten(2).softmax(dim=-1).unflatten(-1, heat.shape[2:])  # [B, 2, h, w]
        rows, columns = ((torch.arange(n, device=heat.device) + 0.5) / n for n in heat.shape[2:])
        places = torch.stack([(shares.sum(2) * columns).sum(-1), (shares.sum(3) * rows).sum(-1)], dim=-1)
        small = functional.adaptive_avg_pool2d(images, heat.shape[2:])
        local_features = torch.cat([x, small], dim=1)
        pooled = torch.einsum("bhw,bfhw->bf", shares[:, 0], local_features)  # features at the cube's position
        return Verdict(places, self.colour(pooled), torch.cat(features, dim=1), heat, self.centres(x))


def count_objects(objects: Tensor) -> tuple[Tensor, Tensor]:
    """Count the cubes of each colour [B, K] and the blocks [B] in images.

    An object is a cell whose probability is above one half and the highest within 4 pixels (of 64).

    Args:
        objects: logits [B, K + 1, h, w], of a `Verdict`.
    """
    radius = max(1, round(NEAR_PX / REFERENCE_EDGE * min(objects.shape[2:])))

    def peaks(shares: Tensor) -> Tensor:
        highest = functional.max_pool2d(shares[:, None], 2 * radius + 1, stride=1, padding=radius)[:, 0]
        return (shares == highest) & (shares > 0.5)

    shares = objects.sigmoid()
    cube, colour = shares[:, :-1].max(dim=1)  # one cell has at most one cube, of any colour
    colours = torch.arange(objects.shape[1] - 1, device=objects.device)
    kinds = (colour[..., None] == colours) & peaks(cube)[..., None]  # [B, h, w, K]
    return kinds.sum(dim=(1, 2)), peaks(shares[:, -1]).sum(dim=(1, 2))


def objects_as_named(objects: Tensor, colours: Tensor) -> Tensor:
    """Return bool [B]: whether images show exactly one cube, of the colour [B], and one block."""
    cubes, blocks = count_objects(objects)
    named = cubes.gather(1, colours.to(cubes.device)[:, None])[:, 0]
    return (named == 1) & (cubes.sum(dim=1) == 1) & (blocks == 1)


@dataclass(frozen=True)
class ClassifierError:
    """The classifier's own error on held-out real images.

    Args:
        images: their number. cube_px, block_px: mean distance, at 64 pixels. near: fraction of cubes found within 4 px.
        colour: fraction of correct colours. objects: fraction of images with exactly the true cube and block found.
    """

    images: int
    cube_px: float
    block_px: float
    near: float
    colour: float
    objects: float


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier with its measured error."""

    network: AttributeClassifier
    error: ClassifierError
    fingerprint: str


# ---- images to learn from ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """Ground truth of B images: places [B, 2, 2] (cube and block; x, y in fractions) and colours [B]."""

    places: Tensor
    colours: Tensor

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]], names: Sequence[str]) -> Truth:
        """Read the ground truth from the records of images that all have evidence."""
        evidence = [record["evidence"] for record in records]
        places = torch.tensor([[e[thing] for thing in THINGS] for e in evidence], dtype=torch.float32)
        return cls(places, torch.tensor([list(names).index(e["colour"]) for e in evidence]))


def has_evidence(records: Iterable[dict[str, Any]]) -> bool:
    """Return whether all records hold ground truth: positions of cube and block, and the cube's colour."""
    return all({*THINGS, "colour"} <= set(record.get("evidence") or {}) for record in records)


def real_images(encoders: Encoders, batch: ImageTextBatch) -> Tensor:
    """Return uint8 [B, 3, H, W]: the images of a batch, or its decoded latents if the shards do not store images."""
    if batch.images is not None:
        return batch.images.cpu()
    return (encoders.decode_latents(batch.latents) * 255).round().to(torch.uint8).cpu()


def distance_px(places: Tensor, truth: Tensor, size: tuple[int, int]) -> Tensor:
    """Return distances [...] in pixels of images whose shorter side has 64; places and truth [..., 2] in fractions.

    Args:
        size: (height, width) of the images, in any unit.
    """
    scale = torch.tensor([size[1], size[0]], device=places.device) * (REFERENCE_EDGE / min(size))
    return ((places - truth) * scale).norm(dim=-1)


# ---- training --------------------------------------------------------------------------------------------------------


def has_truth(data: ImageShards, split: str = "val", counts: Iterable[int] = ()) -> bool:
    """Return whether the shards hold ground truth, so that a classifier can be trained, tested and used on a split.

    Args:
        split: whose images are classified. counts: numbers of its images that are classified, each spread evenly over
            its buckets.

    Raises:
        ValueError: There are no validation images to test the classifier on, only some of the images of a split have
            ground truth, or those to test it on or to classify have a colour that no training image has.
    """
    first_records = {name: next(data.samples(name).records(), None) for name in ("train", "val")}
    if not all(record is None or has_evidence([record]) for record in first_records.values()):
        log.info("the first image of %s has no ground truth (evidence): objects are in no figure", data.place)
        return False
    classified = [record for count in counts for record in data.samples(split, count).records()]
    if classified and not any(has_evidence([record]) for record in classified):
        log.warning(
            "%s has ground truth (evidence) of its training images and none of its %s images: their objects are in no "
            "figure",
            data.place,
            split,
        )
        return False
    if first_records["val"] is None:
        raise ValueError(f"{data.place} has no validation images: a classifier could not be tested")
    _refuse_partial_truth(data, "train", data.samples("train").records())
    for name, records in (("val", list(data.samples("val").records())), (split, classified)):
        _refuse_partial_truth(data, name, records)
        _refuse_new_colours(data, name, {record["evidence"]["colour"] for record in records})
    return True


def _refuse_partial_truth(data: ImageShards, split: str, records: Iterable[dict[str, Any]]) -> None:
    if not has_evidence(records):
        raise ValueError(
            f"some {split} images of {data.place} have ground truth (evidence: cube, block and colour), and some have "
            "none or not all of it: give it for all of them, or for none"
        )


def _refuse_new_colours(data: ImageShards, split: str, colours: set[str]) -> None:
    """Raise ValueError if a held-out split has colours that no training image has."""
    missing = set(colours)
    for record in data.samples("train").records():
        if not missing:
            return
        if has_evidence([record]):
            missing.discard(record["evidence"]["colour"])
    if missing:
        raise ValueError(
            f"the {split} images of {data.place} show the colours {sorted(missing)}, which no training image shows, so "
            "that a classifier does not know them: add such training images, or leave these images out"
        )


def classifier_for(
    data: ImageShards,
    encoders: Encoders,
    options: ClassifierOptions | None = None,
    split: str = "val",
    counts: Iterable[int] = (),
) -> TrainedClassifier | None:
    """Return the classifier of some image shards, stored next to them and trained first if missing. None if the shards
    hold no ground truth.

    Args:
        split, counts: see `has_truth`.

    Raises:
        ValueError: See `has_truth`.
    """
    options = options or ClassifierOptions()
    if not has_truth(data, split, counts):
        return None
    identity = {"version": VERSION, "data": data.fingerprint, "autoencoder": encoders.autoencoder.description()}
    fingerprint = hashlib.sha256(json.dumps({**identity, **asdict(options)}, sort_keys=True).encode()).hexdigest()[:16]
    file = data.folder / f"attribute_classifier-{fingerprint}.pt"
    held_out = data.fingerprint_of("val")

    def make(path: Path) -> None:
        if path.is_file():
            trained = tested_again(load_classifier(path, fingerprint), data, encoders)
        else:
            trained = train_classifier(data, encoders, options, fingerprint)
        _save(trained, held_out, options, path)

    def complete(path: Path) -> bool:
        return path.is_file() and load_tensors(path).get("held_out") == held_out

    make_once(file, complete, make, together_without=True)
    return load_classifier(file, fingerprint)


def _save(trained: TrainedClassifier, held_out: str, options: ClassifierOptions, file: Path) -> None:
    content = {
        "held_out": held_out,  # fingerprint of the images on which the error was measured
        "fingerprint": trained.fingerprint,
        "colours": trained.network.colours,
        "width": options.width,
        "error": asdict(trained.error),
        "weights": trained.network.state_dict(),
    }
    with atomic_write(file) as stream:
        torch.save(content, stream)


def load_classifier(file: Path, fingerprint: str) -> TrainedClassifier:
    """Load a classifier from its file. Raises ValueError if it is a different one."""
    content = load_tensors(file)
    if content["fingerprint"] != fingerprint:
        raise ValueError(
            f"{file} is the classifier {content['fingerprint']}, not {fingerprint}: remove it, and it is trained again"
        )
    classifier = AttributeClassifier(content["colours"], content["width"])
    classifier.load_state_dict(content["weights"])
    return TrainedClassifier(classifier.eval(), ClassifierError(**content["error"]), fingerprint)


@dataclass(frozen=True)
class _Bucket:
    images: Tensor  # uint8 [N, 3, H, W]
    truth: Truth


def _load_buckets(data: ImageShards, encoders: Encoders, split: str, colours: list[str]) -> list[_Bucket]:
    """Load all images of a split with their truth, by size. Adds the new colours to `colours`, in order."""
    images: dict[tuple[int, int], list[Tensor]] = {}
    records: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for batch in data.held_out(split, with_images=True):
        _refuse_partial_truth(data, split, batch.records)
        decoded = real_images(encoders, batch)
        size = (decoded.shape[2], decoded.shape[3])
        images.setdefault(size, []).append(decoded)
        records.setdefault(size, []).extend(batch.records)
    split_colours = {record["evidence"]["colour"] for members in records.values() for record in members}
    colours += sorted(split_colours - set(colours))
    return [_Bucket(torch.cat(images[size]), Truth.of(records[size], colours)) for size in sorted(images)]


def train_classifier(
    data: ImageShards, encoders: Encoders, options: ClassifierOptions, fingerprint: str
) -> TrainedClassifier:
    """Train a classifier on the training split and test it on the validation split. A pure function of both."""
    colours: list[str] = []
    buckets = _load_buckets(data, encoders, "train", colours)
    held_out = _load_buckets(data, encoders, "val", [*colours])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = AttributeClassifier(colours, options.width)
    optimizer = torch.optim.AdamW(classifier.parameters(), options.lr, weight_decay=0.01)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    shares = np.array([len(bucket.images) for bucket in buckets], float)
    with torch.enable_grad():
        for step in Progress(range(options.steps), desc="classifier", unit="step", leave=False):
            progress = (step + 1) / options.steps
            for group in optimizer.param_groups:
                group["lr"] = options.lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
            bucket = buckets[int(rng.choice(len(buckets), p=shares / shares.sum()))]
            chosen = torch.from_numpy(rng.integers(0, len(bucket.images), options.batch_size))
            images = bucket.images[chosen].float() / 255
            grain = torch.rand(len(images), 1, 1, 1, generator=generator) * options.noise
            images = images + grain * torch.randn(images.shape, generator=generator)
            loss = _loss(classifier, images, Truth(bucket.truth.places[chosen], bucket.truth.colours[chosen]))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimizer.step()
    return TrainedClassifier(classifier.eval(), _measure_error(classifier, held_out), fingerprint)


def tested_again(trained: TrainedClassifier, data: ImageShards, encoders: Encoders) -> TrainedClassifier:
    """Measure a classifier's error on the current validation split, whose colours `has_truth` has checked."""
    held_out = _load_buckets(data, encoders, "val", [*trained.network.colours])
    return replace(trained, error=_measure_error(trained.network, held_out))


def _measure_error(classifier: AttributeClassifier, held_out: Sequence[_Bucket]) -> ClassifierError:
    error = measure_classifier(classifier, [(bucket.images, bucket.truth) for bucket in held_out])
    log.info(
        "classifier: on %d held-out images it misses cubes by %.2f px, names %.1f %% of the colours rightly and finds "
        "exactly the objects in %.1f %%",
        error.images,
        error.cube_px,
        100 * error.colour,
        100 * error.objects,
    )
    return error


def _loss(classifier: AttributeClassifier, images: Tensor, truth: Truth) -> Tensor:
    """Loss of the correct cell of each map, the position within the cell, the colour, and the maps of centres."""
    verdict = classifier(images)
    heat = verdict.heat
    height, width = heat.shape[2:]
    size = torch.tensor([width, height])
    cell = (truth.places * size).long().clamp(min=0).minimum(size - 1)  # [B, 2, 2] column and row
    cell_index = cell[..., 1] * width + cell[..., 0]
    cell_loss = functional.cross_entropy(heat.flatten(0, 1).flatten(1), cell_index.flatten())
    position_loss = distance_px(verdict.places, truth.places, (height, width)).clamp(max=16).mean()
    colour_loss = functional.cross_entropy(verdict.colours, truth.colours)
    return cell_loss + 0.3 * position_loss + colour_loss + _centres_loss(verdict.objects, truth)


def _centres_loss(objects: Tensor, truth: Truth) -> Tensor:
    """Focal loss of the maps of centres; wrong peaks next to a centre cost less (Zhou et al., 2019, equation 1)."""
    count, kinds, height, width = objects.shape
    y, x = (torch.arange(n) + 0.5 for n in (height, width))
    columns, rows = truth.places[..., 0, None] * width, truth.places[..., 1, None] * height  # [B, 2, 1]
    spread = 2 * (1.5 / REFERENCE_EDGE * min(height, width)) ** 2
    peak = (-((rows - y) ** 2)[..., None] / spread - ((columns - x) ** 2)[..., None, :] / spread).exp()  # [B, 2, h, w]
    peak = peak / peak.amax(dim=(2, 3), keepdim=True).clamp(min=1e-6)
    target = torch.zeros_like(objects)
    indices = torch.arange(count)
    target[indices, truth.colours], target[indices, kinds - 1] = peak[:, 0], peak[:, 1]
    sure, unsure = functional.logsigmoid(objects), functional.logsigmoid(-objects)
    share = objects.sigmoid()
    losses = torch.where(target >= 1, (1 - share) ** 2 * sure, (1 - target) ** 4 * share**2 * unsure)
    return -losses.sum() / (2 * count)


@torch.no_grad()
def measure_classifier(classifier: AttributeClassifier, buckets: Sequence[tuple[Tensor, Truth]]) -> ClassifierError:
    """Measure the error on real images uint8 [N, 3, H, W], bucket by bucket."""
    distances, colour_hits, object_hits = [], [], []
    for images, truth in buckets:
        for start in range(0, len(images), 64):
            part = slice(start, start + 64)
            verdict = classifier(images[part].float() / 255)
            size = (images.shape[2], images.shape[3])
            distances.append(distance_px(verdict.places, truth.places[part], size))
            colour_hits.append(verdict.colours.argmax(dim=1) == truth.colours[part])
            object_hits.append(objects_as_named(verdict.objects, truth.colours[part]))
    distance, colours_right = torch.cat(distances), torch.cat(colour_hits)
    return ClassifierError(
        images=len(distance),
        cube_px=float(distance[:, 0].mean()),
        block_px=float(distance[:, 1].mean()),
        near=float((distance[:, 0] < NEAR_PX).float().mean()),
        colour=float(colours_right.float().mean()),
        objects=float(torch.cat(object_hits).float().mean()),
    )


def feature_distance(left: Tensor, right: Tensor) -> Tensor:
    """Return [B]: 1 - cosine between features [B, F, ...] at the same positions, averaged over positions."""
    cosine = functional.cosine_similarity(left.flatten(2), right.flatten(2), dim=1)
    return 1 - cosine.mean(dim=1)
