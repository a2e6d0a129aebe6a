"""Self-supervised encoder pretraining on frames alone; questions and answers are never read.

There are five losses, whose targets are computed from pixels:

- **pixels**: every patch token predicts the pixels of its patch, so that small marks are retained.
- **objects**: pixels are sampled. Through a linear head, the token of a sampled pixel's patch predicts the crop centred
  on the pixel's object (`keygrip.models.foveated_vlm.objects`) and the object's colour.
- **asked**: a deep query computed from an object's colour retrieves the same targets through the keys and values of all
  blocks, as the language model's queries will do later. Half of the colours are inexact, and some belong to no object.
  The target is then the sampled object nearest in colour, so that a query that is not yet right finds an object too.
- **contrast**: the result of the query must identify its object's crop among the crops of all frames of the batch
  (InfoNCE; van den Oord et al. 2018, arXiv:1807.03748). Crops of one object at different times differ only in what
  changes there. These are few of their pixels, but only they can separate the crops in this loss.
- **frame**: CLS predicts the whole frame at a low resolution.

A run of this pretraining is a source of backbone weights like any other (`backbone.init_from=runs/...`).

Legend: M frames, N = h * w patches, P pixels of a patch's side, S pixels of a frame's side, D backbone width, K objects
sampled per frame, C pixels of a crop, E width of the embeddings of queries and crops that are compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keygrip.data.batches import Movable, VideoTextBatch, VideoTextSample, normalised, stack_frames
from keygrip.models.backbone import DinoBackbone
from keygrip.models.foveated_vlm.objects import SIDE, crops_of, draw_objects
from keygrip.models.nn.precision import without_autocast
from keygrip.models.nn.processor_attention import trained_on
from keygrip.training.distributed import check_weights, global_mean, mean_over_processes, world_size
from keygrip.training.optimizers import AdamW
from keygrip.training.parts import model_part
from keygrip.training.system import System

if TYPE_CHECKING:
    from keygrip.data.batches import VideoTextStatistics

LOSSES = ("pixels", "objects", "asked", "contrast", "frame")
TEMPERATURE = 0.1  # of the contrast loss
SAME = 4.0  # pixels; two samples of a frame whose centres are closer belong to one object
EMBEDDING = 64  # E
FLAT = 0.1  # standard deviation of a patch or crop, relative to whole images, below which its detail is noise
THUMBNAIL = 16  # side in pixels of the frame that CLS predicts
COLOUR = 0.3  # weight of an object's colour relative to its crop
EXACT, NEAR = 0.5, 0.25  # shares of the queries with an object's own colour and a colour near it; the rest: any colour
NEAR_STD, ANY_STD = 0.5, 1.2  # standard deviations of the near and of any colours, normalised like images


@dataclass
class FramesBatch(Movable):
    """frames: uint8 [M, 3, S, S], without labels."""

    frames: Tensor

    def sizes(self) -> dict[str, int]:
        """Return the size of the batch, for reports."""
        return {"frames": len(self.frames)}

    def __len__(self) -> int:
        return len(self.frames)


@model_part
class FramesCollator:
    """Make batches from the frames of samples; their text is not read."""

    def __call__(self, samples: list[VideoTextSample]) -> FramesBatch:
        """Make a batch. Raises ValueError: no sample has frames."""
        stacked, mask = stack_frames(samples)
        if not mask.any():
            raise ValueError("a batch without frames: leave out sources of text alone (data.sources.texts=null)")
        return FramesBatch(stacked[mask])


def patches_of(images: Tensor, size: int) -> Tensor:
    """Images [M, 3, S, S] -> pixels of their patches [M, N, 3 * P * P], row by row."""
    return F.unfold(images, size, stride=size).transpose(1, 2)


def patch_targets(patches: Tensor) -> Tensor:
    """Convert pixels of patches [M, N, 3PP] to targets [M, N, 3PP + 3]: the detail of each patch (mean 0, and standard
    deviation 1 where it is not flat), followed by its mean colour."""
    pixels = patches.unflatten(-1, (3, -1))
    mean = pixels.mean(-1)
    return torch.cat([detail_of(pixels - mean[..., None], 2), mean], dim=-1)


def detail_of(values: Tensor, axes: int) -> Tensor:
    """Flatten the last `axes` axes and normalise them to mean 0, and standard deviation 1 where they are not flat."""
    flat = values.flatten(-axes)
    flat = flat - flat.mean(-1, keepdim=True)
    return flat / (flat.square().mean(-1, keepdim=True) + FLAT**2).sqrt()


def shift_images(images: Tensor, down: int, right: int) -> Tensor:
    """Shift images [M, 3, S, S] by whole pixels; their edges are repeated."""
    coordinates = torch.arange(images.shape[-1], device=images.device)
    rows, columns = ((coordinates - shift).clamp(0, len(coordinates) - 1) for shift in (down, right))
    return images[:, :, rows][..., columns]


def sample_query_colours(colour: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample query colours [M, K, 3] from the objects' own colours [M, K, 3]; also return the indices [M, K] of the
    target objects: of the K objects of the frame, those nearest to the query colours."""
    noise = torch.randn(colour.shape, generator=random).to(colour)
    kind = torch.rand(colour.shape[:2], generator=random).to(colour)[..., None]
    near = torch.where(kind < EXACT + NEAR, colour + NEAR_STD * noise, ANY_STD * noise)
    query_colours = torch.where(kind < EXACT, colour, near)
    return query_colours, torch.cdist(query_colours, colour).argmin(-1)


@model_part
class SelfSupervisedEncoder(nn.Module):
    """A backbone with heads for its patch tokens, its CLS token and the outputs of deep queries.

    Args:
        width: hidden width of the heads of patches and CLS, and of the MLPs that embed crops and query colours.
    """

    def __init__(self, backbone: DinoBackbone, width: int = 256) -> None:
        super().__init__()
        self.backbone = backbone
        dim, pixels = backbone.embed_dim, 3 * backbone.patch_size**2 + 3

        def head(out: int) -> nn.Module:
            return nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, out))

        self.patch_head, self.frame_head = head(pixels), head(3 * THUMBNAIL**2)
        # linear: the features themselves then contain the prediction, in the same form wherever the object lies
        self.object_head, self.asked_head = nn.Linear(dim, SIDE**2 + 3), nn.Linear(dim, SIDE**2 + 3)
        self.asked_embedding = nn.Linear(dim, EMBEDDING)
        self.crop_embedding = nn.Sequential(nn.Linear(SIDE**2, width), nn.GELU(), nn.Linear(width, EMBEDDING))
        self.cue = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, dim))


@model_part
class SelfSupervisedModule(System):
    """Train a `SelfSupervisedEncoder`; `val/pixels` and so on are the losses on held-out frames.

    Args:
        network: the network without training code. collator: for the data module. optimizer: the optimizer recipe.
        weights: loss weights: pixels, objects, asked, contrast and frame.
        objects: K, objects sampled per frame. shift: frames are shifted by at most this many pixels.

    Raises:
        ValueError: weights that do not name every loss or are all 0, or a number out of its range.
    """

    batch_type = VideoTextBatch  # of the data module; this model's collator converts its samples to FramesBatch
    toy_overrides = (
        *("data=robot_tours", "backbone.image_size=64", "backbone.width=32", "backbone.depth=2", "backbone.heads=2"),
        *("data.sources.tours.make.options.train=6", "data.sources.tours.make.options.val=2"),
        *("data.sources.tours.make.options.test=2", "data.sources.tours.make.options.processes=1"),
        *("data.sources.tours_1=null", "data.sources.tours_2=null", "data.sources.tours_3=null"),
        *("data.curriculum=null", "data.sources.texts=null", "data.batch_size=2"),
    )
    headline_metrics = ("train/loss", "val/loss", *(f"val/{name}" for name in LOSSES))

    def __init__(
        self,
        network: SelfSupervisedEncoder,
        collator: FramesCollator,
        optimizer: AdamW,
        weights: Mapping[str, float],
        objects: int = 16,
        shift: int = 8,
    ) -> None:
        super().__init__(optimizer)
        if set(weights) != set(LOSSES):
            raise ValueError(f"model.weights must name exactly {', '.join(LOSSES)}; it names {sorted(weights)}")
        check_weights({f"model.weights.{name}": weight for name, weight in weights.items()})
        if objects < 1 or shift < 0:
            raise ValueError("model: objects must be at least 1, shift not below 0")
        self.network, self.collator = network, collator
        self.weights, self.objects, self.shift = dict(weights), objects, shift
        self._sums: dict[str, list[float]] = {}

    def losses(self, batch: FramesBatch, seed: int) -> dict[str, Tensor]:
        """Return the losses by name; the seed determines the shift of the frames and the sampled objects."""
        network, backbone = self.network, self.network.backbone
        random = torch.Generator().manual_seed(seed)
        max_shift = min(self.shift, batch.frames.shape[-1] // 4)
        down, right = torch.randint(-max_shift, max_shift + 1, (2,), generator=random).tolist()
        frames = shift_images(batch.frames, down, right)
        with without_autocast(frames):
            plain = frames.float() / 255
            objects = draw_objects(plain, self.objects, random)
            images = normalised(frames, backbone.mean, backbone.std)
            crops = crops_of(images.mean(1, keepdim=True), objects.centre)
            mean, std = (images.new_tensor(each) for each in (backbone.mean, backbone.std))
            colour = (objects.colour - mean) / std
            object_targets = torch.cat([detail_of(crops, 3), colour], dim=-1)  # [M, K, C + 3]
        with trained_on(images.device):
            features, kv = backbone.forward_with_kv(images)
            query_colours, target_indices = sample_query_colours(colour, random)
            query_output = backbone.query(network.cue(query_colours), kv)
            asked_predictions = network.asked_head(query_output)
        column, row = (objects.drawn // backbone.patch_size).long().unbind(-1)
        patch_index = (row * features.grid[1] + column)[..., None].expand(-1, -1, features.patches.shape[-1])
        object_predictions = network.object_head(features.patches.gather(1, patch_index))
        thumbnails = F.adaptive_avg_pool2d(images, THUMBNAIL).flatten(1)
        pixels = patch_targets(patches_of(images, backbone.patch_size))
        return {
            "pixels": F.mse_loss(network.patch_head(features.patches).float(), pixels),
            "objects": _object_error(object_predictions.float(), object_targets),
            "asked": _object_error(
                asked_predictions.float(), object_targets.gather(1, target_indices[..., None].expand_as(object_targets))
            ),
            "contrast": self._contrast(query_output, object_targets[..., :-3], objects.centre, target_indices),
            "frame": F.mse_loss(network.frame_head(features.cls).float(), thumbnails),
        }

    def _contrast(self, query_outputs: Tensor, crops: Tensor, centre: Tensor, target_objects: Tensor) -> Tensor:
        """Return the mean cross-entropy of identifying the target object's crop from a query's result, among the crops
        of all frames; other samples of the same object in its frame are excluded.

        Args:
            query_outputs: [M, K, D], results of the queries. crops: [M, K, C]. centre: [M, K, 2].
            target_objects: [M, K], indices of the target objects in their frame.
        """
        query_embeddings = F.normalize(self.network.asked_embedding(query_outputs).float().flatten(0, 1), dim=-1)
        crop_embeddings = F.normalize(self.network.crop_embedding(crops).float().flatten(0, 1), dim=-1)  # [M * K, E]
        frames, objects_per_frame = target_objects.shape
        frame = torch.arange(frames, device=centre.device)
        target_indices = (frame[:, None] * objects_per_frame + target_objects).flatten()
        centres, frame = centre.flatten(0, 1), frame.repeat_interleave(objects_per_frame)
        same_object = (torch.cdist(centres[target_indices], centres) < SAME) & (frame[:, None] == frame)
        same_object = same_object.scatter(1, target_indices[:, None], False)
        logits = (query_embeddings @ crop_embeddings.T / TEMPERATURE).masked_fill(same_object, -torch.inf)
        return F.cross_entropy(logits, target_indices)

    def _total(self, losses: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()

    def loss(self, batch: FramesBatch) -> Tensor:
        """The loss of a training step on a batch, with the random samples of the first step."""
        return self._total(self.losses(batch, 0))

    def training_step(self, batch: FramesBatch, batch_idx: int) -> Tensor:
        losses = self.losses(batch, self._seed(batch_idx))
        means = torch.stack([*losses.values(), self._total(losses)])
        shares = global_mean(means * len(batch), len(batch))  # processes differ in their number of frames
        logged = mean_over_processes(dict(zip((*losses, "total"), shares.unbind(), strict=True)))
        self.log_values("train", logged, len(batch))
        return shares[-1]

    def sharded_parts(self) -> list[nn.Module]:
        """Return no part: the encoder's blocks are also called in parts, not only through their ``forward``."""
        return []

    def _seed(self, batch_idx: int) -> int:
        """Return the random seed of a training batch: it differs by step, process and batch of an accumulated step."""
        part = batch_idx % self.trainer.accumulate_grad_batches * world_size() + self.global_rank
        return self.global_step + (part << 32)

    def on_validation_epoch_start(self) -> None:
        self._sums = defaultdict(lambda: [0.0, 0.0])

    def validation_step(self, batch: FramesBatch, batch_idx: int) -> None:
        for name, value in self.losses(batch, batch_idx).items():
            self._sums[name][0] += float(value) * len(batch)
            self._sums[name][1] += len(batch)

    def on_validation_epoch_end(self) -> None:
        if not self._sums:
            return
        (count,) = {count for _, count in self._sums.values()}  # every loss covers all frames
        means = {name: total / count for name, (total, _) in self._sums.items()}
        for name, value in means.items():
            self.log(f"val/{name}", value, batch_size=count, sync_dist=True)
        total = sum(self.weights[name] * value for name, value in means.items())
        self.log("val/loss", total, prog_bar=True, batch_size=count, sync_dist=True)

    def set_statistics(self, statistics: VideoTextStatistics) -> None:
        """Nothing about the data is stored."""


def _object_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of crops plus COLOUR times that of colours, from tensors [M, K, C + 3]."""
    squared = (predicted - target).square()
    return squared[..., :-3].mean() + COLOUR * squared[..., -3:].mean()
