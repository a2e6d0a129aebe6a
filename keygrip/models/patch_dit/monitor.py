"""Monitored values other than the loss: shares of the dropout categories, losses by timestep and by category, norms,
and shares of cross-attention; some with the range in which they are healthy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from keygrip.models.nn.flow_matching import interpolate
from keygrip.models.patch_dit.context import CATEGORIES, Conditions
from keygrip.training.distributed import global_sum
from keygrip.training.monitors import Range, gradient_norm

if TYPE_CHECKING:
    from keygrip.models.patch_dit.network import PatchDiT

GROUPS = ("text", "cls", "patches")
ATTENDED = 4  # number of samples whose attention is monitored

RANGES = {
    "velocity_norm": Range(
        0.5, 3.0, "predicted velocities have left the size of the true ones (about 1.4): check the latents' statistics"
    ),
    "grad_norm": Range(0.0, 5.0, "gradients before clipping are large: lower optimizer.lr, or raise its warmup_steps"),
    "patch_gradient": Range(
        1e-7, math.inf, "no gradient reaches dino_patch_proj: the patches are not used (are they all equal?)"
    ),
    "attention_text": Range(0.005, 1.0, "almost no cross-attention goes to the text: it has no effect"),
    "attention_patches": Range(0.05, 1.0, "little cross-attention goes to the patches: the layout will not be learned"),
    "shuffled_over_both": Range(
        1.0, math.inf, "the loss is no higher with shuffled patches: their places are not used"
    ),
}


class LossTable:
    """Losses of single samples, summed by noise level and by dropout category since the last report; also the losses of
    the alignment.

    Args:
        bins: of equal width over the noise levels 0..1.
    """

    def __init__(self, bins: int = 5) -> None:
        self.bins = bins
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, loss: Tensor, level: Tensor, category: Tensor) -> None:
        """Losses, noise levels and categories, ``[B]`` each."""
        sums = self._sums_on(loss.device)
        values = torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)])
        by_level = (level * self.bins).long().clamp(0, self.bins - 1)
        sums.index_add_(1, by_level, values)
        sums.index_add_(1, category + self.bins, values)

    @torch.no_grad()
    def add_alignment(self, loss: Tensor, counted: Tensor) -> None:
        """Losses of the alignment, and which samples count, ``[B]`` each."""
        self._sums_on(loss.device)[:, -1] += torch.stack([(loss * counted).double().sum(), counted.double().sum()])

    def _sums_on(self, device: torch.device) -> Tensor:
        if self._sums is None:
            self._sums = torch.zeros(2, self.bins + len(CATEGORIES) + 1, dtype=torch.float64, device=device)
        return self._sums

    def report(self) -> dict[str, float]:
        """``loss_timestep_<from>_<to>``, ``loss_<category>``, ``share_<category>`` and ``alignment`` over all
        processes, and reset.

        Bins without samples are left out, and so is the alignment if no sample counted. Every process must call this
        method at the same step.
        """
        if self._sums is None:
            return {}
        sums, counts = (row.tolist() for row in global_sum(self._sums).cpu())
        self._sums = None
        names = [f"loss_timestep_{i / self.bins:.1f}_{(i + 1) / self.bins:.1f}" for i in range(self.bins)]
        names += [*(f"loss_{name}" for name in CATEGORIES), "alignment"]
        losses = {name: total / n for name, total, n in zip(names, sums, counts, strict=True) if n}
        of_category = counts[self.bins : -1]
        shares = (n / sum(of_category) for n in of_category)
        return losses | {f"share_{name}": share for name, share in zip(CATEGORIES, shares, strict=True)}


def velocity_norm(velocity: Tensor) -> Tensor:
    """Root mean square of velocities ``[B, C, h, w]``: about sqrt(2) where data and noise both have unit variance."""
    return velocity.detach().float().pow(2).mean().sqrt()


def gradient_figures(network: PatchDiT, with_patches: bool) -> dict[str, Tensor]:
    """Gradient norms of the whole network and of its patch projection.

    Args:
        with_patches: False: the projection may have no gradient, because only LoRA is trained or because a student
            drops the patches of whole batches; it is then left out.
    """
    figures = {"grad_norm": gradient_norm(network.parameters())}
    projection = network.context_builder.dino_patch_proj
    if projection is not None and with_patches:
        figures["patch_gradient"] = gradient_norm(projection.parameters())
    return figures


@torch.no_grad()
def attention_at_half_noise(
    network: PatchDiT, data: Tensor, conditions: Conditions, aspect: float
) -> dict[str, Tensor]:
    """Shares of cross-attention with both conditions, half-way between data and a fixed noise.

    Args:
        data: latents ``[B, C, h, w]``, normalised, of which the first few are used. conditions: theirs, normalised.
        aspect: width over height of the images.
    """
    data, conditions = data[:ATTENDED], conditions.first(ATTENDED)
    everything = torch.ones(len(data), dtype=torch.bool, device=data.device)
    level = torch.full((len(data),), 0.5, device=data.device)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0)).to(data)
    context = network.context_builder(conditions, everything, everything, aspect)
    return attention_figures(network.attention_shares(interpolate(data, noise, level), level, context))


def attention_figures(shares: Tensor) -> dict[str, Tensor]:
    """Convert attention shares ``[depth, B, 3]`` to one value for each group and block, and each group's mean.

    The values of patches are left out if there are none.
    """
    by_block = shares.mean(dim=1)  # [depth, 3]
    figures: dict[str, Tensor] = {}
    for column, group in enumerate(GROUPS):
        if group == "patches" and not bool(by_block[:, column].any()):
            continue
        figures[f"attention_{group}"] = by_block[:, column].mean()
        figures |= {f"attention_{group}_block_{block:02d}": row[column] for block, row in enumerate(by_block)}
    return figures
