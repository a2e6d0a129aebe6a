"""A small network for all tests of the folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from vlm_parts import small_backbone, small_language

from keygrip.models.foveated_vlm.network import FoveatedVLM


@pytest.fixture
def build() -> Callable[..., FoveatedVLM]:
    def make(variant: str = "dinov2_vits14", **options: object) -> FoveatedVLM:
        torch.manual_seed(0)
        network = FoveatedVLM(small_backbone(variant), small_language(), **options)  # type: ignore[arg-type]
        return network.eval()

    return make
