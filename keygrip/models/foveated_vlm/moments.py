"""The *moments* loss of self-supervised pretraining: what changes at a place, found without a label.

Of a video, the places count that differ between frames which otherwise look alike (the digits on the cubes, not the arm
that passes over them). A crop around such a place, encoded by itself, and the same place in the whole frame are
positives where they are of one moment; the same place at the moments that look most alike as a whole is the negative
(InfoNCE; van den Oord et al. 2018, arXiv:1807.03748). What stays at the place (the object, its colour, the table)
cannot tell these apart, nor can what the crop does not show, nor what takes much room: features must keep what changes
there.

A crop is turned, scaled, moved, and its colours are exchanged, at all moments of a place alike: what changes must be
said in the same way however it is turned and coloured. Local against global views are those of Caron et al. 2021,
arXiv:2104.14294; exchanged colours those of Chen et al. 2020, arXiv:2002.05709.

Legend: M frames, V videos, K places of a video, P pixels of a patch's side, S' pixels of a crop's side, E numbers of a
feature, W patches of a window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHANGED = 0.2  # a pixel's deviation from what is usual, in standard deviations of images, that gets weight 0.5
MARK = 16  # changed pixels from which on a patch has full weight
OFTEN = 0.25  # quantile over a video's moments by which a place changes: what passes by leaves most moments as they are
STILL = 0.1  # share of a patch's weight, at that quantile, below which it does not change
WINDOW = 3  # patches along the side of a crop
ALIKE = 6  # moments among which a place finds its own, itself among them
TURN = 0.35  # rad
SCALE = 1.25
MOVE = 0.375  # of a patch
LIGHT = 0.3  # brightness, and contrast from 1


def alike_moments(images: Tensor, video: Tensor) -> Tensor:
    """bool [M, M]: of each frame [M, 3, S, S] the `ALIKE` frames of its video that look most like it as a whole, itself
    among them."""
    flat = images.flatten(1)
    distance = torch.cdist(flat, flat).masked_fill(video[:, None] != video, torch.inf)
    distance.fill_diagonal_(-1.0)
    rank = distance.argsort(dim=1).argsort(dim=1)
    return (rank < ALIKE) & (video[:, None] == video)


def changes_of(images: Tensor, among: Tensor) -> Tensor:
    """How much each pixel of [M, 3, S, S] differs from its median over the frames `among` (bool [M, M], a row for each
    frame): [M, 1, S, S] in 0 to 1.

    Not from the mean: what passes by does not change the moments in which it is elsewhere.
    """
    usual = torch.stack([median(images[others]) for others in among])
    squared = (images - usual).square().mean(1, keepdim=True)
    return squared / (squared + CHANGED**2)


def median(values: Tensor) -> Tensor:
    """Over the first dimension; of an even number the mean of the middle two."""
    ordered, middle = values.sort(0).values, len(values) // 2
    return (ordered[middle] + ordered[(len(values) - 1) // 2]) / 2


def changed_patches(pixels: Tensor) -> Tensor:
    """How much patches change, in 0 to 1 [M, N], from how much their pixels do [M, N, P P]."""
    return (pixels.sum(-1) / MARK).clamp_max(1).sqrt()


def often_changed(changes: Tensor, video: Tensor, patch_size: int) -> Tensor:
    """How much patches change at most moments of their video [V, N], from `changes_of` its frames; 0: they do not."""
    changed = changed_patches(F.unfold(changes, patch_size, stride=patch_size).transpose(1, 2))
    often = torch.stack([changed[video == one].quantile(OFTEN, dim=0) for one in range(int(video.max()) + 1)])
    return often.masked_fill(often < STILL, 0.0)


def crops_of(images: Tensor, centre: Tensor, side: int, angle: Tensor, scale: Tensor) -> Tensor:
    """Squares of `side` pixels cut out of images, [M, K, 3, side, side]; beyond an image's edge its border goes on.

    Args:
        images: [M, 3, S, S]. centre: [M, K, 2] their middles (x, y) in pixels, the first pixel's middle is 0.
        angle: [M, K] rad by which the contents appear turned, against the clock. scale: [M, K] pixels of the image per
            pixel of the crop.
    """
    steps = torch.arange(side, device=images.device) - (side - 1) / 2
    x, y = steps.expand(side, side), steps[:, None].expand(side, side)
    cos, sin = ((scale * turned)[..., None, None] for turned in (angle.cos(), angle.sin()))
    where = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1) + centre[:, :, None, None]
    where = (where * 2 + 1) / images.shape[-1] - 1  # [M, K, side, side, 2]
    found = F.grid_sample(images, where.flatten(1, 2), padding_mode="border", align_corners=False)
    return found.unflatten(2, (-1, side)).transpose(1, 2)


def varied_crops(images: Tensor, places: Tensor, video: Tensor, patch_size: int, random: torch.Generator) -> Tensor:
    """Crops [M, K, 3, S', S'] of `WINDOW` x `WINDOW` patches around the patches `places` [V, K], those of one place all
    turned, scaled, moved and coloured alike."""
    grid = images.shape[-1] // patch_size
    drawn = torch.rand(4, *places.shape, generator=random).to(images.device) * 2 - 1
    centre = torch.stack([places % grid, places // grid], dim=-1) * patch_size + (patch_size - 1) / 2
    centre = centre + MOVE * patch_size * drawn[2:].permute(1, 2, 0)
    crops = crops_of(images, centre[video], WINDOW * patch_size, TURN * drawn[0][video], SCALE ** drawn[1][video])
    return recoloured(crops, video, random)


def recoloured(crops: Tensor, video: Tensor, random: torch.Generator) -> Tensor:
    """Crops [M, K, 3, S', S'] with channels exchanged, partly grey, in another brightness and contrast; those of one
    place of a video alike."""
    shape = (int(video.max()) + 1, crops.shape[1])
    order = torch.rand(*shape, 3, generator=random).argsort(dim=-1)
    grey = torch.rand(*shape, 1, 1, generator=random)
    parts = torch.rand(*shape, 1, 3, generator=random)
    mix = (1 - grey) * torch.eye(3)[order] + grey * parts / parts.sum(-1, keepdim=True)
    mixed = torch.einsum("mkij,mkjhw->mkihw", mix.to(crops)[video], crops)
    light = LIGHT * (2 * torch.rand(2, *shape, 1, 1, 1, generator=random).to(crops) - 1)[:, video]
    return mixed * (1 + light[0]) + light[1]


def windows_of(places: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Patches [V, K, W] of the windows of `WINDOW` x `WINDOW` patches around places [V, K] in a grid of `side` x
    `side`, moved inside where they would reach beyond its edge; and which of them each place is [V, K]."""
    wide = min(WINDOW, side)
    row, column = ((place - wide // 2).clamp(0, side - wide) for place in (places // side, places % side))
    steps = torch.arange(wide, device=places.device)
    windows = ((row[..., None, None] + steps[:, None]) * side + column[..., None, None] + steps).flatten(2)
    return windows, (places // side - row) * wide + places % side - column


def moments_loss(near: Tensor, far: Tensor, video: Tensor, alike: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy with which places find their moment among the alike ones, from crop to frame and back.

    Args:
        near, far: [M, K, E] of the crops and of the whole frames. video: [M]. alike: bool [M, M]. counts: bool [V, K].
    """
    logits = torch.einsum("mke,nke->mkn", _deviations(near, video), _deviations(far, video)) / temperature
    wanted = torch.arange(len(video), device=video.device)[:, None].expand(-1, near.shape[1])[counts[video]]
    both = [each.masked_fill(~alike[:, None], -torch.inf)[counts[video]] for each in (logits, logits.permute(2, 1, 0))]
    return torch.stack([F.cross_entropy(each, wanted) for each in both]).mean()


def _deviations(values: Tensor, video: Tensor) -> Tensor:
    """What differs at each place [M, K, E] from its mean over the moments of its video, of length 1: the mean is nearly
    all of a new network's features, and would make all moments alike."""
    lengths = torch.bincount(video)
    mean = values.new_zeros(len(lengths), *values.shape[1:]).index_add_(0, video, values)
    return F.normalize(values - (mean / lengths.clamp_min(1)[:, None, None])[video], dim=-1)
