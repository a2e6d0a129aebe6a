"""Representation alignment (REPA): a loss aligns a middle block with the DINO patches of the clean image.

Paper: Yu et al., "Representation Alignment for Generation: Training Diffusion Transformers Is Easier Than You Think"
(2025). Here the features are also a condition; samples without these features must predict them unseen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keygrip.models.patch_dit.context import ConditionDropout
from keygrip.models.patch_dit.network import Tapped
from keygrip.training.parts import model_part


@model_part
class FeatureAlignment(nn.Module):
    """Loss: 1 - cosine between projected tokens of a block and the DINO features at their places.

    Args:
        width, depth: of the network. dino_dim: of the features.
        block: number of blocks after which tokens are compared; None: half of them. hidden: width of the projector;
            None: twice the network's.
        weight: of the loss at the start. decay_share: share of the run after which the weight has decreased linearly
            to zero; None: it is constant. Late in training the alignment impairs detail.
        only_without_patches: compute the loss only on samples whose patches are dropped; the other samples receive
            as a condition the features that they are compared with. False: on all samples.
    """

    def __init__(
        self,
        width: int,
        dino_dim: int,
        depth: int,
        block: int | None = None,
        hidden: int | None = None,
        weight: float = 0.5,
        decay_share: float | None = 0.5,
        only_without_patches: bool = False,
    ) -> None:
        super().__init__()
        block = max(1, depth // 2) if block is None else block
        hidden = 2 * width if hidden is None else hidden
        if not 1 <= block <= depth:
            raise ValueError(f"model.alignment.block={block}: counts blocks from 1, the network has {depth} blocks.")
        if weight <= 0 or (decay_share is not None and not 0 < decay_share <= 1):
            raise ValueError("model.alignment: weight must be above 0, and decay_share in (0, 1] or null.")
        self.block, self.weight, self.decay_share = block, weight, decay_share
        self.only_without_patches = only_without_patches
        self.projector = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dino_dim)
        )

    def weight_at(self, progress: float) -> float:
        """The weight at a share of the run, 0..1."""
        return self.weight if self.decay_share is None else self.weight * max(0.0, 1 - progress / self.decay_share)

    def check(self, dropout: ConditionDropout, use_dino_patches: bool) -> None:
        """Raise ValueError if `only_without_patches` has no effect in a training with these settings, or leaves no
        sample."""
        if not self.only_without_patches:
            return
        if not use_dino_patches:
            raise ValueError(
                "model.alignment.only_without_patches=true has no effect with model.network.use_dino_patches=false, "
                "where no sample has patches: false"
            )
        if not dropout.without_patches:
            raise ValueError(
                "model.alignment.only_without_patches=true finds no sample: model.dropout drops no patches; raise "
                "none, text or cls_alone, or give false"
            )

    def counted(self, has_patches: Tensor) -> Tensor:
        """Which samples count in the loss, bool ``[B]``. has_patches: bool ``[B]``, which of them keep patches."""
        return ~has_patches if self.only_without_patches else torch.ones_like(has_patches)

    def counted_share(self, dropout: ConditionDropout) -> float:
        """The share of training samples that count in the loss, on average."""
        return dropout.without_patches if self.only_without_patches else 1.0

    def forward(
        self, tapped: Tapped, token_grid: tuple[int, int], patches: Tensor, patch_grid: tuple[int, int]
    ) -> Tensor:
        """The loss of each sample, ``[B]`` float32.

        Args:
            tapped: tokens of the block. token_grid: (rows, columns) of all latent tokens.
            patches: ``[B, P, Dd]``, normalised. patch_grid: (gh, gw); features are resampled to the tokens' grid by
                area (bilinearly if that grid is finer): both grids cover the same image.
        """
        maps = patches.transpose(1, 2).unflatten(2, patch_grid)
        finer = token_grid[0] > patch_grid[0] or token_grid[1] > patch_grid[1]
        if finer:
            maps = F.interpolate(maps, size=token_grid, mode="bilinear", align_corners=False)
        else:
            maps = F.adaptive_avg_pool2d(maps, token_grid)
        targets = maps.flatten(2).transpose(1, 2)  # [B, N, Dd]
        if tapped.index is not None:
            targets = targets.gather(1, tapped.index[..., None].expand(-1, -1, targets.shape[-1]))
        similarity = F.cosine_similarity(self.projector(tapped.tokens).float(), targets.float(), dim=-1)
        return 1 - similarity.mean(dim=1)
