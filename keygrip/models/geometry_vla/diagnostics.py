"""Validation metrics of how the action head uses geometry tokens.

Shape legend: B samples, M tokens of a context, K tokens of a group of them, H width, A arms, T steps, Da numbers of an
action step.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from keygrip.models.nn.attention import AttentionRecord

if TYPE_CHECKING:
    from keygrip.data.batches import MultiViewPolicyBatch
    from keygrip.models.geometry_vla.geometry import GeometryFeatures
    from keygrip.models.geometry_vla.module import GeometryVLAModule
    from keygrip.models.geometry_vla.network import Scene

GROUPS = ("prompt", "geometry", "pointed")


@torch.no_grad()
def context_figures(scene: Scene, record: AttentionRecord) -> dict[str, Tensor]:
    """How the head's cross-attention uses each group of a context's tokens, as means over blocks and samples.

    ``<group>_share``: its share of the attention. ``<group>_even``: its share under uniform attention.
    ``<group>_read``: its share, by size, of what attention adds to the head's tokens. ``<group>_rms``: root mean square
    of its tokens as the head reads them (with `context_norm` 1 before positions are added). For geometry tokens also
    ``geometry_alike``, the mean cosine between tokens of a sample (1 if they are all equal, like a single mean), and
    ``geometry_slot``, the share of their variance that lies between the K tokens and is the same in all samples: it
    depends on where a token lies, not on what is there.

    Args:
        record: of a pass of the head with the scene's groups. Groups without tokens are left out.
    """
    shares = torch.stack([share.mean(dim=0) for share in record.shares]).mean(dim=0)
    reads = torch.stack([read.mean(dim=0) for read in record.reads]).mean(dim=0)
    mask = scene.contexts[0].mask
    tokens = torch.stack([context.tokens for context in scene.contexts])  # [blocks, B, M, H]
    counted = torch.ones_like(tokens[0, ..., 0]) if mask is None else mask.to(tokens.dtype)  # [B, M]
    figures: dict[str, Tensor] = {}
    parts = tokens.split(list(scene.groups), dim=2)
    for index, (name, part, valid) in enumerate(
        zip(GROUPS, parts, counted.split(list(scene.groups), dim=1), strict=True)
    ):
        if not part.shape[2]:
            continue
        figures[f"{name}_share"], figures[f"{name}_read"] = shares[index], reads[index]
        figures[f"{name}_even"] = (valid.sum(dim=1) / counted.sum(dim=1)).mean()
        squares = part.square().mean(dim=-1) * valid  # [blocks, B, K]
        figures[f"{name}_rms"] = (squares.sum(dim=(1, 2)) / valid.sum()).sqrt().mean()
    geometry = parts[GROUPS.index("geometry")]
    if geometry.shape[2] > 1:
        figures["geometry_alike"] = torch.stack([token_similarity(part) for part in geometry]).mean()
        figures["geometry_slot"] = torch.stack([slot_share(part) for part in geometry]).mean()
    return figures


def token_similarity(tokens: Tensor) -> Tensor:
    """The mean cosine between two different tokens of a sample, of ``[B, K, H]`` with K > 1."""
    count, unit = tokens.shape[1], F.normalize(tokens, dim=-1)
    pairs = unit.sum(dim=1).square().sum(dim=-1) - unit.square().sum(dim=(1, 2))  # [B]
    return (pairs / (count * (count - 1))).mean()


def slot_share(tokens: Tensor) -> Tensor:
    """The share of the variance of tokens ``[B, K, H]`` that depends on which of the K tokens it is and not on the
    sample: variance components of a one-way analysis. NaN for one sample."""
    if len(tokens) < 2:
        return tokens.new_tensor(torch.nan)
    within = tokens.var(dim=0).mean()  # around each slot's mean over the samples
    # Means of B samples differ by chance too.
    between = (tokens.mean(dim=0).var(dim=0).mean() - within / len(tokens)).clamp(min=0)
    return between / (between + within).clamp(min=torch.finfo(tokens.dtype).tiny)


@torch.no_grad()
def exchanged_geometry(
    module: GeometryVLAModule, scene: Scene, batch: MultiViewPolicyBatch, sampled: Tensor
) -> dict[str, Tensor]:
    """Effect of geometry on plans: plan again with the geometry features of another demonstration.

    ``geometry_moves_cm``: how far planned positions move; 0 if the policy does not read geometry.
    ``geometry_worth_cm``: by how much their error grows; about 0 if plans move and do not get worse.

    Args:
        sampled: actions ``[B, T, Da]`` of the batch, from the noise that `module.sample` draws for it.

    Returns:
        Both; empty without geometry. In a batch of one demonstration, another frame replaces the other demonstration.
    """
    if scene.geometry is None:
        return {}
    valid = ~batch.action_is_pad
    other_demos = (batch.demo_index != batch.demo_index.roll(1))[:, None, None] & valid
    # No branch on the data: with sharded parameters every process must run the encoders.
    weights = torch.where(other_demos.any(), other_demos, valid).float()  # [B, A, T]
    changed = module.network.encode(
        batch.images,
        batch.instruction,
        batch.view_intrinsics,
        batch.view_world_to_camera,
        geometry=_roll_features(scene.geometry),
    )
    changed = module.with_places(changed, batch.embodiment)
    original, _, _ = module.decode(sampled, batch)
    exchanged, _, _ = module.decode(module.sample(changed, batch), batch)
    true, _, _ = module.actions.target_poses(batch)
    error_increase = (exchanged - true).norm(dim=-1) - (original - true).norm(dim=-1)
    distance = (exchanged - original).norm(dim=-1)
    figures = {"geometry_moves_cm": distance, "geometry_worth_cm": error_increase}
    return {name: 100 * (values * weights).sum() / weights.sum().clamp(min=1) for name, values in figures.items()}


def _roll_features(features: GeometryFeatures) -> GeometryFeatures:
    """Replace each sample's features by those of the previous sample, the first's by the last's."""
    parts = {field.name: getattr(features, field.name) for field in fields(features)}
    return replace(features, **{name: part.roll(1, dims=0) for name, part in parts.items() if part is not None})
