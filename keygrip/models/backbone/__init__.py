"""The DINO backbone shared by all four systems. The only package that imports timm."""

from __future__ import annotations

from keygrip.models.backbone.architectures import VARIANTS
from keygrip.models.backbone.dino import DinoBackbone
from keygrip.models.backbone.features import BlockKV, DinoFeatures

__all__ = ["VARIANTS", "BlockKV", "DinoBackbone", "DinoFeatures"]
