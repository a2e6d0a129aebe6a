"""`MapAnything` with the interface of the real one, random weights and two layers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

torch.backends.cuda.matmul.allow_tf32 = True  # like the real package

CAMERAS = ("ray_directions_cam", "camera_pose_quats", "camera_pose_trans")


class _Encoder(nn.Module):
    data_norm_type = "odd"

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.enc_embed_dim, self.patch_size = width, patch_size
        self.patches = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, image: Tensor) -> Tensor:
        return self.patches(image)


class _InfoSharing(nn.Module):
    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.lift = nn.Conv2d(width, dim, 1)

    def forward(self, features: list[Tensor]) -> Any:
        own = [self.lift(view) for view in features]
        shared = torch.stack(own).mean(dim=(0, 3, 4), keepdim=True)[0]
        final = SimpleNamespace(
            features=[view + shared for view in own], additional_token_features=2 * shared.flatten(2)
        )
        return final, "intermediate features"


class MapAnything(nn.Module):
    calls = 0  # forward passes

    def __init__(self, width: int, dim: int, patch_size: int) -> None:
        super().__init__()
        torch.manual_seed(dim)
        self.encoder = _Encoder(width, patch_size)
        self.info_sharing = _InfoSharing(width, dim)
        self.seen: list[dict[str, Any]] = []
        # as in its training: optional inputs are given at random
        chances = {"overall_prob": 0.9, "dropout_prob": 0.05, "ray_dirs_prob": 0.5, "cam_prob": 0.5, "depth_prob": 0.5}
        self.geometric_input_config = chances | {
            "sparse_depth_prob": 0.5,
            "depth_scale_norm_all_prob": 0.05,
            "pose_scale_norm_all_prob": 0.05,
        }

    @classmethod
    def from_pretrained(cls, name: str, local_files_only: bool = False) -> MapAnything:
        if not Path(name).is_dir():
            raise OSError(f"cannot reach the hub for {name}")
        return cls(**json.loads((Path(name) / "config.json").read_text()))

    def forward(self, views: list[dict[str, Any]]) -> None:
        MapAnything.calls += 1
        self.seen = views
        assert all(view["data_norm_type"] == [self.encoder.data_norm_type] for view in views)
        assert "camera_pose_quats" in views[0] or not any("camera_pose_quats" in view for view in views)
        chances = self.geometric_input_config
        given = bool(torch.rand(1) < chances["overall_prob"] and torch.rand(1) >= chances["dropout_prob"])
        features = [self.encoder(view["img"]) for view in views]
        for view, feature in zip(views, features, strict=True):
            for name in CAMERAS if given else ():
                chance = chances["ray_dirs_prob" if name.startswith("ray") else "cam_prob"]
                if name in view and torch.rand(1) < chance:
                    feature += view[name].flatten(1).std(dim=1)[:, None, None, None]
        self.info_sharing(features)
        raise AssertionError("the prediction heads cost time and are of no use")
