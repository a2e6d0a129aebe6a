"""Self-supervised encoder pretraining: on frames alone; questions and answers are never read.

Five losses, each from pixels:

- **masked prediction** (He et al. 2022, arXiv:2111.06377; with the hidden patches as part of the input, Xie et al.
  2022, arXiv:2111.09886): a share of the patches is hidden, and every patch token predicts its pixels. Visible patches
  count too: a token from which its patch can be reconstructed has kept small marks, which a prediction from the
  surroundings alone may drop.
- **asked prediction**: a deep query made from a patch's mean colour retrieves that patch's pixels through the keys and
  values of all blocks, as the language model's queries will do.
- **agreement** (InfoNCE; van den Oord et al. 2018, arXiv:1807.03748, patch by patch as Wang et al. 2021,
  arXiv:2011.09157): the features of one place in two views of a frame (shifted, recoloured, with other patches hidden)
  are positives. Patches of other frames are negatives, so that features keep what differs between the frames of a
  video, wherever in its patch it lies.
- **moments** (InfoNCE over time; `keygrip.models.foveated_vlm.moments`): of a place that changes between frames which
  otherwise look alike, a crop that is encoded by itself and the place in the whole frame, both of one moment.
- **frame**: CLS predicts the whole frame at a low resolution.

A run of it is a source of backbone weights like any other (`backbone.init_from=runs/...`).

Legend: M frames, N = h * w patches, P pixels of a patch's side, D backbone width, K chosen patches of a frame (places
of a video), V videos, W patches of a window, E numbers of a feature.
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
from keygrip.models.foveated_vlm.moments import (
    MARK,
    alike_moments,
    changed_patches,
    changes_of,
    moments_loss,
    often_changed,
    varied_crops,
    windows_of,
)
from keygrip.models.nn.short_attention import short_attention
from keygrip.training.optimizers import AdamW
from keygrip.training.parts import model_part
from keygrip.training.system import System

if TYPE_CHECKING:
    from keygrip.data.batches import VideoTextStatistics

LOSSES = ("pixels", "asked", "frame", "agreement", "moments")
FLAT = 0.1  # standard deviation of a patch, in units of the whole image's, below which its detail is noise
PLAIN = (0, 1)  # brightness and contrast that change nothing
THUMBNAIL = 16  # side in pixels of the frame that CLS predicts


@dataclass
class FramesBatch(Movable):
    """frames: uint8 [M, 3, S, S]. video: int64 [M], which video each is of. Nothing else is known of them."""

    frames: Tensor
    video: Tensor

    def sizes(self) -> dict[str, int]:
        """How large it is, for reports."""
        return {"frames": len(self.frames)}

    def __len__(self) -> int:
        return len(self.frames)


@model_part
class FramesCollator:
    """Makes batches of the frames of samples; their text is not looked at."""

    def __call__(self, samples: list[VideoTextSample]) -> FramesBatch:
        """Raises ValueError: no sample has frames."""
        stacked, mask = stack_frames(samples)
        if not mask.any():
            raise ValueError("a batch without frames: leave out sources of text alone (data.sources.texts=null)")
        return FramesBatch(stacked[mask], mask.nonzero()[:, 0])


def patches_of(images: Tensor, size: int) -> Tensor:
    """Images [M, 3, S, S] -> pixels of their patches [M, N, 3 * P * P], row after row."""
    return F.unfold(images, size, stride=size).transpose(1, 2)


def targets_of(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels of patches [M, N, 3PP] as they are predicted: the detail of each (mean 0, standard deviation 1 where it
    is not flat) behind its mean colour [3PP + 3]; and how detailed each is [M, N]: its standard deviation."""
    pixels = patches.unflatten(-1, (3, -1))
    mean = pixels.mean(-1)
    detail = pixels - mean[..., None]
    variance = detail.square().mean((-1, -2))
    return torch.cat([detail.flatten(-2) / (variance + FLAT**2).sqrt()[..., None], mean], dim=-1), variance.sqrt()


def view_of(images: Tensor, moved: tuple[int, int], colour: tuple[Tensor | int, Tensor | int]) -> Tensor:
    """Images moved by (down, right) pixels, their edges drawn out, in another brightness and contrast [M, 1, 1, 1]."""
    places = torch.arange(images.shape[-1], device=images.device)
    rows, columns = ((places - by).clamp(0, len(places) - 1) for by in moved)
    return images[:, :, rows][..., columns] * colour[1] + colour[0]


def moved_patches(places: Tensor, by: tuple[int, int], patch_size: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The patches nearest to places (numbers in a grid of h x w, of any shape) of what is moved by (down, right)
    pixels, and whether the grid holds them; beyond its edge the nearest inside."""
    (h, w), (down, right) = grid, (round(move / patch_size) for move in by)
    row, column = places // w + down, places % w + right
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    return row.clamp(0, h - 1) * w + column.clamp(0, w - 1), inside


def at_places(values: Tensor, places: Tensor) -> Tensor:
    """[M, K, F] the values [M, N, F] of the patches `places` [M, K]."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


@model_part
class SelfSupervisedEncoder(nn.Module):
    """A backbone and heads for its tokens, its CLS and what deep queries bring back.

    Args:
        hidden_share: of the patches, hidden from the encoder.
        width: hidden width of the heads, and of the space in which views agree.
    """

    def __init__(self, backbone: DinoBackbone, hidden_share: float = 0.4, width: int = 256) -> None:
        super().__init__()
        if not 0 <= hidden_share < 1:
            raise ValueError(f"model.network.hidden_share={hidden_share}: a share of the patches, from 0 to below 1")
        self.backbone, self.hidden_share = backbone, hidden_share
        dim, pixels = backbone.embed_dim, 3 * backbone.patch_size**2 + 3

        def head(out: int) -> nn.Module:
            return nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, out))

        self.patch_head, self.asked_head = head(pixels), head(pixels)
        self.frame_head = head(3 * THUMBNAIL**2)
        self.agreement_head, self.moments_head = head(width // 2), head(width // 2)
        self.cue = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, dim))

    def hide(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Images whose patches under `hidden`, bool [M, N], are the mean colour of all images."""
        side = images.shape[-1] // self.backbone.patch_size
        cover = hidden.view(len(images), 1, side, -1).to(images.dtype)
        return images * (1 - F.interpolate(cover, images.shape[-2:], mode="nearest"))


@dataclass(frozen=True)
class _TwoViews:
    """Two views of the same frames.

    Attributes:
        patches: features [2M, N, D], those of the first view before those of the second. grid: (h, w).
        hidden: bool [M, N] of each view. moves: pixels (down, right) by which each view is moved. patch_size: P.
    """

    patches: Tensor
    grid: tuple[int, int]
    hidden: list[Tensor]
    moves: list[tuple[int, int]]
    patch_size: int

    def features(self, head: nn.Module) -> tuple[Tensor, Tensor]:
        """Of both views after a head, of length 1, [M, N, E] each."""
        first, second = (F.normalize(head(v).float(), dim=-1) for v in self.patches.split(len(self.hidden[0])))
        return first, second

    def in_second(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """The patch of the second view that is nearest to the place of `at` in the first, and whether it is inside."""
        (down, right), (down_2, right_2) = self.moves
        return moved_patches(at, (down_2 - down, right_2 - right), self.patch_size, self.grid)


@model_part
class SelfSupervisedModule(System):
    """Trains a `SelfSupervisedEncoder`; `val/pixels` and so on are the losses on held-out frames.

    Args:
        network: the plain network. collator: for the data module. optimizer: the recipe.
        weights: of the losses: pixels, asked, frame, agreement and moments.
        asked_patches: K, of each frame, drawn by how detailed they are; of each video, by how much they change.
        temperature: of agreement and moments. shift: each view is moved by up to so many pixels.
        changes: share of the two predictions' weight that lies on pixels which change between frames that look alike,
            in every patch alike; patches are then drawn by whether they change. 0: all pixels count the same.

    Raises:
        ValueError: weights that do not name every loss, or a number out of its range.
    """

    batch_type = VideoTextBatch  # of the data module, whose samples the collator of this model makes into FramesBatch
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
        asked_patches: int = 12,
        temperature: float = 0.1,
        shift: int = 4,
        changes: float = 0.0,
    ) -> None:
        super().__init__(optimizer)
        if set(weights) != set(LOSSES):
            raise ValueError(f"model.weights must name exactly {', '.join(LOSSES)}; it names {sorted(weights)}")
        if asked_patches < 1 or temperature <= 0 or shift < 0:
            raise ValueError("model: asked_patches must be at least 1, temperature above 0, shift not below 0")
        if not 0 <= changes <= 1:
            raise ValueError(f"model.changes={changes}: a share from 0 to 1")
        self.network, self.collator, self.changes = network, collator, changes
        self.weights, self.asked_patches = dict(weights), asked_patches
        self.temperature, self.shift = temperature, shift
        self._sums: dict[str, list[float]] = {}

    def losses(self, batch: FramesBatch, seed: int) -> dict[str, Tensor]:
        """Losses by name, without *moments* where its weight is 0; the seed decides what is hidden, shifted and
        queried."""
        network, backbone = self.network, self.network.backbone
        random = torch.Generator().manual_seed(seed)
        images = normalised(batch.frames, backbone.mean, backbone.std)
        moves = [self._move(images.shape[-1], random) for _ in range(2)]
        alike = alike_moments(images, batch.video)
        changes = changes_of(images, alike)
        views, hidden, changed_pixels = [], [], []
        for move in moves:
            views.append(view_of(images, move, self._colour(torch.arange(len(images)), random)))
            changed_pixels.append(view_of(changes, move, PLAIN))
            count = (images.shape[-1] // backbone.patch_size) ** 2
            covered = torch.rand(len(images), count, generator=random) < network.hidden_share
            hidden.append(covered.to(images.device))
        both = torch.cat(views)
        with short_attention(images.device, hidden[0].shape[1]):
            features, kv = backbone.forward_with_kv(network.hide(both, torch.cat(hidden)))
            wanted, detail = targets_of(patches_of(both, backbone.patch_size))
            weight, changed = self._weights(torch.cat(changed_pixels))
            if self.changes:
                detail = changed
            asked = self._drawn(detail.masked_fill(torch.cat(hidden), 0.0), random)  # [2M, K]
            target = at_places(wanted, asked)
            said = network.asked_head(backbone.query(network.cue(target[..., -3:]), kv))
        small = F.adaptive_avg_pool2d(both, THUMBNAIL).flatten(1)
        two = _TwoViews(features.patches, features.grid, hidden, moves, backbone.patch_size)
        losses = {
            "pixels": self._error(network.patch_head(features.patches).float(), wanted, weight),
            "asked": self._error(said.float(), target, at_places(weight, asked)),
            "frame": F.mse_loss(network.frame_head(features.cls).float(), small),
            "agreement": self._agreement(two, detail, random),
        }
        if self.weights["moments"]:  # it alone needs passes of its own
            with short_attention(images.device, hidden[0].shape[1]):
                losses["moments"] = self._moments(images, changes, alike, batch.video, random)
        return losses

    def _weights(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Of what is predicted of each patch of both views, [2M, N, 3PP + 3], and how much of each changes [2M, N],
        from how much each pixel [2M, 1, S, S] does."""
        size = self.network.backbone.patch_size
        pixels = F.unfold(seen, size, stride=size).transpose(1, 2)  # [2M, N, PP]
        mass = pixels.sum(-1, keepdim=True)
        counts = (mass / MARK).clamp_max(1)
        of_pixels = 1 - self.changes + self.changes * counts * pixels * pixels.shape[-1] / mass.clamp_min(1e-6)
        return torch.cat([*[of_pixels] * 3, torch.ones_like(of_pixels[..., :3])], dim=-1), changed_patches(pixels)

    @staticmethod
    def _error(said: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
        return (weight * (said - wanted).square()).mean()

    @staticmethod
    def _colour(alike: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Brightness and contrast [M, 1, 1, 1]; images with the same number in `alike` [M] have the same."""
        drawn = torch.rand(2, int(alike.max()) + 1, 1, 1, 1, generator=random).to(alike.device)[:, alike]
        return 0.4 * drawn[0] - 0.2, 0.8 + 0.4 * drawn[1]

    def _move(self, size: int, random: torch.Generator) -> tuple[int, int]:
        most = min(self.shift, size // 4)
        down, right = torch.randint(-most, most + 1, (2,), generator=random).tolist()
        return down, right

    def _drawn(self, detail: Tensor, random: torch.Generator) -> Tensor:
        """K patches [M, K] of each frame, without repetition, by how detailed [M, N] they are."""
        noise = torch.rand(detail.shape, generator=random).to(detail.device).clamp(1e-6, 1 - 1e-6)
        keys = detail.clamp_min(1e-4).log() * 2 - (-noise.log()).log()  # Gumbel: in proportion to the variance
        return keys.topk(min(self.asked_patches, detail.shape[1]), dim=1).indices

    def _agreement(self, views: _TwoViews, detail: Tensor, random: torch.Generator) -> Tensor:
        """How well drawn patches of the first view find their places in the second one among all that were drawn."""
        frames = len(views.hidden[0])
        at = self._drawn(detail[:frames].masked_fill(views.hidden[0], 0.0), random)  # [M, K]
        match, inside = views.in_second(at)
        inside &= ~views.hidden[1].gather(1, match)
        first, second = views.features(self.network.agreement_head)
        own, others = at_places(first, at)[inside], at_places(second, match)[inside]  # [n, E]
        if len(own) < 2:
            return own.sum() * 0.0
        logits = own @ others.T / self.temperature
        # neighbours in a frame show the same thing: only patches elsewhere in it and in other frames are different
        frame = torch.arange(frames, device=at.device)[:, None].expand_as(at)[inside]
        row, column = match[inside] // views.grid[1], match[inside] % views.grid[1]
        near = (row[:, None] - row).abs().maximum((column[:, None] - column).abs()) <= 1
        near &= (frame[:, None] == frame) & ~torch.eye(len(own), dtype=torch.bool, device=at.device)
        return F.cross_entropy(logits.masked_fill(near, -torch.inf), torch.arange(len(own), device=at.device))

    def _moments(
        self, images: Tensor, changes: Tensor, alike: Tensor, video: Tensor, random: torch.Generator
    ) -> Tensor:
        """How well places that change find their moment among alike ones, from a crop to the whole frame and back, by
        the place's own token and by the mean of those around it.

        Args:
            images: [M, 3, S, S]. changes: of their pixels [M, 1, S, S]. alike: bool [M, M]. video: [M].
        """
        head, size = self.network.moments_head, self.network.backbone.patch_size
        often = often_changed(changes, video, size)
        places = self._drawn(often, random)  # [V, K]
        near = head(self._of_crops(varied_crops(images, places, video, size, random))).float()
        side, move = images.shape[-1] // size, self._move(images.shape[-1], random)
        moved, inside = moved_patches(places, move, size, (side, side))
        counts = inside & (often.gather(1, places) > 0) & (torch.bincount(video)[:, None] > 1)
        windows, own = windows_of(moved, side)
        far = head(self._of_windows(view_of(images, move, self._colour(video, random)), windows[video])).float()
        if not counts.any():
            return near.sum() * 0.0 + far.sum() * 0.0
        at = own[video][..., None, None].expand(-1, -1, 1, far.shape[-1])
        pairs = ((near[:, :, near.shape[2] // 2], far.gather(2, at)[:, :, 0]), (near.mean(2), far.mean(2)))
        return torch.stack([moments_loss(*pair, video, alike, counts, self.temperature) for pair in pairs]).mean()

    def _of_crops(self, crops: Tensor) -> Tensor:
        """Tokens [M, K, W, D] of crops [M, K, 3, S', S'], each an image by itself."""
        patches: Tensor = self.network.backbone(crops.flatten(0, 1)).patches
        return patches.unflatten(0, crops.shape[:2])

    def _of_windows(self, images: Tensor, windows: Tensor) -> Tensor:
        """Tokens [M, K, W, D] of patches [M, K, W] in whole frames [M, 3, S, S]."""
        patches = self.network.backbone(images).patches
        return at_places(patches, windows.flatten(1)).unflatten(1, windows.shape[1:])

    def _total(self, losses: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()

    def loss(self, batch: FramesBatch) -> Tensor:
        """The loss of a training step on a batch, with the draws of the first step."""
        return self._total(self.losses(batch, 0))

    def training_step(self, batch: FramesBatch, batch_idx: int) -> Tensor:
        losses = self.losses(batch, self.global_step)
        loss = self._total(losses)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        for name, value in losses.items():
            self.log(f"train/{name}", value.detach(), batch_size=len(batch))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._sums = defaultdict(lambda: [0.0, 0.0])

    def validation_step(self, batch: FramesBatch, batch_idx: int) -> None:
        for name, value in self.losses(batch, batch_idx).items():
            self._sums[name][0] += float(value) * len(batch)
            self._sums[name][1] += len(batch)

    def on_validation_epoch_end(self) -> None:
        means = {name: total / max(count, 1.0) for name, (total, count) in self._sums.items()}
        for name, value in means.items():
            self.log(f"val/{name}", value, sync_dist=True)
        if means:
            total = sum(self.weights[name] * value for name, value in means.items())
            self.log("val/loss", total, prog_bar=True, sync_dist=True)

    def set_statistics(self, statistics: VideoTextStatistics) -> None:
        """Nothing of the data is kept."""
