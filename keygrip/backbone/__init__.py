"""The DINO backbone shared by all four systems. The only package that imports timm."""

from __future__ import annotations

from keygrip.backbone.architectures import VARIANTS
from keygrip.backbone.dino import DinoBackbone
from keygrip.backbone.features import BlockKV, DinoFeatures

__all__ = ["VARIANTS", "BlockKV", "DinoBackbone", "DinoFeatures"]
