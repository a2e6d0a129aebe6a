"""Context of the DiT's blocks: text, CLS and patch tokens, with null embeddings in place of dropped conditions.

The same builder makes the context in training and in sampling, so the mask and the rules are the same.

Shape legend: B samples, L text tokens, Dt width of a text state, Dd width of a DINO feature, P = gh * gw patches, D
width of the network, M = L + 1 + P context tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from keygrip.models.patch_dit.positions import grid_positions, position_features
from keygrip.training.parts import model_part


@dataclass(frozen=True)
class Conditions:
    """Conditions of images: normalised features. Text or DINO features may be missing.

    Args:
        text: ``[B, L, Dt]``, or None. text_mask: bool ``[B, L]``, True for real tokens; a row without real tokens
            counts as no text.
        cls: ``[B, Dd]``, or None. patches: ``[B, P, Dd]``, or None; row after row of patch_grid.
        patch_grid: (gh, gw); also needed without patches: it determines the number of null patches in their place.
        patch_mask: bool ``[B, P]``; False: the null embedding replaces the patch. None: all patches count.
    """

    text: Tensor | None
    text_mask: Tensor | None
    cls: Tensor | None
    patches: Tensor | None
    patch_grid: tuple[int, int]
    patch_mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.patch_mask is not None and (self.patches is None or self.patch_mask.shape != self.patches.shape[:2]):
            raise ValueError("A mask of patches says of each patch of each sample whether it counts: bool [B, P].")
        if (self.text is None) != (self.text_mask is None):
            raise ValueError("Text states and their mask belong together: give both or neither.")
        if self.patches is not None and self.cls is None:
            raise ValueError("DINO patches come with the CLS vector of the same image: give both or neither.")
        if self.patches is not None and self.patches.shape[1] != self.patch_grid[0] * self.patch_grid[1]:
            raise ValueError(
                f"A grid of {self.patch_grid[0]} x {self.patch_grid[1]} has "
                f"{self.patch_grid[0] * self.patch_grid[1]} patches, got {self.patches.shape[1]}."
            )

    @property
    def has_text(self) -> bool:
        """Whether there are text states."""
        return self.text is not None

    @property
    def has_dino(self) -> bool:
        """Whether there is a CLS vector (patches never come without one)."""
        return self.cls is not None

    def repeated(self, times: int) -> Conditions:
        """Repeat the whole batch ``times`` times."""
        return self._map(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))

    def interleaved(self, times: int) -> Conditions:
        """Repeat each sample ``times`` times in a row."""
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def first(self, count: int) -> Conditions:
        """The first samples."""
        return self._map(lambda tensor: tensor[:count])

    def with_dino_of(self, index: Tensor) -> Conditions:
        """Combine each sample's own text with the DINO features of sample ``index`` ``[B]``."""
        other = self._map(lambda tensor: tensor[index.to(tensor.device)])
        return replace(self, cls=other.cls, patches=other.patches, patch_mask=other.patch_mask)

    def without_dino(self) -> Conditions:
        """Keep only the text."""
        return replace(self, cls=None, patches=None, patch_mask=None)

    def to(self, device: torch.device | str) -> Conditions:
        """Move to a device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        parts = (self.text, self.text_mask, self.cls, self.patches, self.patch_mask)
        text, text_mask, cls, patches, patch_mask = (None if part is None else change(part) for part in parts)
        return Conditions(text, text_mask, cls, patches, self.patch_grid, patch_mask)


@dataclass(frozen=True)
class Context:
    """The context tokens of a batch; the CLS vector becomes a token when the noise level is added to it.

    Args:
        text: ``[B, L, D]``. text_mask: bool ``[B, L]``, or None if every text token counts.
        cls: ``[B, D]``, without the noise level. patches: ``[B, P, D]``, or None if the network has none.
    """

    text: Tensor
    text_mask: Tensor | None
    cls: Tensor
    patches: Tensor | None

    @property
    def groups(self) -> tuple[int, int, int]:
        """Numbers of text, CLS and patch tokens; their sum is M."""
        return self.text.shape[1], 1, 0 if self.patches is None else self.patches.shape[1]

    def tokens(self, cls_token: Tensor) -> Tensor:
        """``[B, M, D]``: text, the given CLS token ``[B, D]``, which includes the noise level, and patches."""
        parts = [self.text, cls_token[:, None].to(self.text.dtype)]
        return torch.cat(parts if self.patches is None else [*parts, self.patches], dim=1)

    @property
    def mask(self) -> Tensor | None:
        """Bool ``[B, M]``, True = attend; None if every token counts. DINO tokens always count."""
        if self.text_mask is None:
            return None
        _, cls_count, patches = self.groups
        return torch.cat([self.text_mask, self.text_mask.new_ones(len(self.text_mask), cls_count + patches)], dim=1)

    def trimmed(self) -> Context:
        """Remove the text tokens that are masked in all rows of the batch."""
        if self.text_mask is None:
            return self
        used = self.text_mask.any(dim=0)
        mask = self.text_mask[:, used]
        return replace(self, text=self.text[:, used], text_mask=None if bool(mask.all()) else mask)


class ContextBuilder(nn.Module):
    """Converts features to context tokens, in the same way for training and for every branch of sampling.

    Args:
        width: D. text_dim: Dt. dino_dim: Dd.
        use_dino_patches: False: text and CLS only, the baseline.
        patch_positions: False: patches without positions, which attention cannot distinguish from shuffled patches
            (for comparison).
        position_cells: see `position_features`.
    """

    def __init__(
        self,
        width: int,
        text_dim: int,
        dino_dim: int,
        use_dino_patches: bool = True,
        patch_positions: bool = True,
        position_cells: int = 32,
    ) -> None:
        super().__init__()
        self.width, self.position_cells = width, position_cells
        self.patch_positions = patch_positions
        self.text_proj = nn.Linear(text_dim, width)
        self.dino_proj = nn.Linear(dino_dim, width)
        # One token stands for "no text": the embedding of a dropped caption must not depend on its length.
        self.null_text = nn.Parameter(torch.randn(width) * 0.02)
        self.null_dino = nn.Parameter(torch.randn(width) * 0.02)
        self.dino_patch_proj = nn.Linear(dino_dim, width) if use_dino_patches else None
        # Initially zero: null patches then contain only their positions. One vector for any number of patches.
        self.null_dino_patches = nn.Parameter(torch.zeros(width)) if use_dino_patches else None

    def forward(
        self,
        conditions: Conditions,
        keep_text: Tensor,
        keep_dino: Tensor,
        aspect: float,
        keep_patches: Tensor | None = None,
    ) -> Context:
        """The context of a batch.

        Args:
            conditions: of the batch. keep_text, keep_dino: bool ``[B]``; False: use the null embedding instead.
            aspect: width over height of the images.
            keep_patches: bool ``[B]``, for the patches; None: as keep_dino, which then applies to CLS vector and
                patches.
        """
        text, text_mask = self._text(conditions, keep_text)
        cls = self.null_dino.expand(len(keep_dino), -1)
        if conditions.cls is not None:
            projected = self.dino_proj(conditions.cls)
            cls = torch.where(keep_dino[:, None], projected, cls.to(projected.dtype))
        keep_patches = keep_dino if keep_patches is None else keep_patches
        return Context(text, text_mask, cls, self._patches(conditions, keep_patches, aspect))

    def _text(self, conditions: Conditions, keep: Tensor) -> tuple[Tensor, Tensor]:
        null = self.null_text.expand(len(keep), 1, -1)
        if conditions.text is None or conditions.text_mask is None:
            return null, torch.ones(len(keep), 1, dtype=torch.bool, device=keep.device)
        projected, mask = self.text_proj(conditions.text), conditions.text_mask
        keep = (keep & mask.any(dim=1))[:, None]  # an empty caption counts as no caption
        first = torch.zeros_like(mask)
        first[:, 0] = True
        return torch.where(keep[..., None], projected, null.to(projected.dtype)), torch.where(keep, mask, first)

    def _patches(self, conditions: Conditions, keep: Tensor, aspect: float) -> Tensor | None:
        if self.dino_patch_proj is None or self.null_dino_patches is None:
            return None
        rows, columns = conditions.patch_grid
        patches = self.null_dino_patches.expand(len(keep), rows * columns, -1)
        if conditions.patches is not None:
            projected = self.dino_patch_proj(conditions.patches)
            patch_mask = keep[:, None] if conditions.patch_mask is None else keep[:, None] & conditions.patch_mask
            patches = torch.where(patch_mask[..., None], projected, patches.to(projected.dtype))
        if self.patch_positions:
            positions = grid_positions((rows, columns), aspect, keep.device)
            patches = patches + position_features(positions, self.width, self.position_cells).to(patches.dtype)
        return patches


CATEGORIES = ("none", "text", "dino", "both")


@model_part
@dataclass(frozen=True)
class ConditionDropout:
    """Dropout of conditions: one category per training sample, with shares that add up to 1 (Ho and Salimans,
    "Classifier-Free Diffusion Guidance", 2022, with two conditions).

    Args:
        none, text, dino, both: shares of the categories.
        cls_alone, patches_alone: of the samples that keep DINO features, the shares that keep the CLS vector without
            patches, and patches without the CLS vector. Guidance with separate scales for the two
            (`Sampling.cls_scale`) needs cls_alone above 0.
        masked_patches: share of all samples in which only the patches inside, or only those outside, a random rectangle
            count, as with the masks of `keygrip sample image_mask=`.
    """

    none: float = 0.10
    text: float = 0.30
    dino: float = 0.05
    both: float = 0.55
    cls_alone: float = 0.0
    patches_alone: float = 0.0
    masked_patches: float = 0.0

    def __post_init__(self) -> None:
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(
                f"model.dropout: shares of {', '.join(CATEGORIES)} must not be negative and add up to 1, "
                f"got {list(self.shares)}."
            )
        if min(self.cls_alone, self.patches_alone) < 0 or self.cls_alone + self.patches_alone > 1:
            raise ValueError("model.dropout: cls_alone and patches_alone are shares that add up to 1 at most.")
        if not 0 <= self.masked_patches <= 1:
            raise ValueError(f"model.dropout.masked_patches={self.masked_patches}: a share, from 0 to 1.")

    def check(self, use_dino_patches: bool, few_steps: bool) -> None:
        """Raise ValueError for a share that has no effect in a network without patches, or with `model.few_steps`."""
        for name in ("masked_patches", "cls_alone", "patches_alone"):
            if getattr(self, name) and not use_dino_patches:
                raise ValueError(f"model.dropout.{name} has no effect without patches (use_dino_patches=false): 0")
            if getattr(self, name) and few_steps and name != "masked_patches":
                raise ValueError(f"model.dropout.{name} has no effect with model.few_steps, which drops whole kinds: 0")

    @property
    def shares(self) -> Sequence[float]:
        return self.none, self.text, self.dino, self.both

    @property
    def without_patches(self) -> float:
        """The share of samples that keep no patches."""
        return self.none + self.text + (self.dino + self.both) * self.cls_alone

    def draw(self, count: int, device: torch.device | str | None = None) -> Tensor:
        """Sample categories ``[count]`` int64, indices into ``CATEGORIES``, with torch's global generator."""
        edges = torch.tensor(self.shares, device=device).cumsum(0)[:-1]
        return torch.bucketize(torch.rand(count, device=device), edges, right=True)

    def kept(self, category: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whether samples of these categories keep their text, their CLS vector and their patches: bool ``[B]`` each,
        sampled with torch's global generator if CLS and patches are dropped separately."""
        text, dino = kept(category)
        if not self.cls_alone and not self.patches_alone:
            return text, dino, dino
        draw = torch.rand(len(category), device=category.device)
        without_patches = draw < self.cls_alone
        without_cls = ~without_patches & (draw < self.cls_alone + self.patches_alone)
        return text, dino & ~without_cls, dino & ~without_patches

    def masked(self, conditions: Conditions) -> Conditions:
        """Mask patches outside a random part of some images, with torch's global generator; unchanged if
        `masked_patches` is 0."""
        if not self.masked_patches or conditions.patches is None:
            return conditions
        count, device = len(conditions.patches), conditions.patches.device
        inside = torch.ones(count, 1, 1, dtype=torch.bool, device=device)
        for axis, cells in enumerate(conditions.patch_grid, start=1):
            length = torch.randint(1, cells + 1, (count, 1), device=device)
            start = (torch.rand(count, 1, device=device) * (cells - length + 1)).long()
            cell_index = torch.arange(cells, device=device)
            inside = inside & ((cell_index >= start) & (cell_index < start + length)).unsqueeze(3 - axis)
        inside = inside.flatten(1)  # [B, P]
        outside, uniform = torch.rand(count, 1, device=device) < 0.5, torch.rand(count, 1, device=device)
        mask = torch.where(outside, ~inside, inside) | (uniform >= self.masked_patches)
        given_mask = conditions.patch_mask
        return replace(conditions, patch_mask=mask if given_mask is None else mask & given_mask)


def kept(category: Tensor) -> tuple[Tensor, Tensor]:
    """Whether samples of these categories keep their text, and their DINO features: two bool tensors ``[B]``."""
    return (category == 1) | (category == 3), category >= 2
