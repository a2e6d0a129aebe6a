"""See `mapanything`."""

from __future__ import annotations

from types import SimpleNamespace

import torch

IMAGE_NORMALIZATION_DICT = {
    "dummy": SimpleNamespace(mean=torch.zeros(3), std=torch.ones(3)),
    "odd": SimpleNamespace(mean=torch.tensor([0.1, 0.2, 0.3]), std=torch.tensor([0.5, 0.25, 0.4])),
}
