"""Geometry encoders for the action head: their interface, and a small multi-view transformer that learns depth together
with the actions. The frozen MapAnything is in `mapanything.py`.

Shape legend: B samples, V views, S side of an image, N patches of a view, G = V N tokens, D their width, c cells along
a side of a patch, g = c S / patch cells along a side of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keygrip.data.batches import normalised
from keygrip.models.geometry.cameras import camera_centre, cell_centres, pixel_rays, transform
from keygrip.models.nn.attention import Attention
from keygrip.models.nn.sinusoids import sinusoidal_features
from keygrip.training.checkpoints import load_module
from keygrip.training.distributed import global_mean
from keygrip.training.parts import ReadWhere, model_part

if TYPE_CHECKING:
    from keygrip.models.backbone import DinoBackbone

DECIMETRES = 10  # per metre


@dataclass(frozen=True)
class GeometryFeatures:
    """Output of a geometry encoder.

    Attributes:
        tokens: ``[B, G, D]``, view after view.
        points: predicted world points ``[B, V, g, g, 3]``, metres, and log_depth: predicted log of the depth in metres,
            ``[B, V, g, g]``; None if the encoder has no head for them.
        scale: ``[B, D]``, a token that contains the scene's metric scale; None if the encoder has no such token.
    """

    tokens: Tensor
    points: Tensor | None = None
    log_depth: Tensor | None = None
    scale: Tensor | None = None

    def detach(self) -> GeometryFeatures:
        """Without gradients."""
        parts = (self.tokens, self.points, self.log_depth, self.scale)
        return GeometryFeatures(*(None if part is None else part.detach() for part in parts))  # type: ignore[arg-type]


class GeometryEncoder(nn.Module, ABC):
    """Interface of a geometry encoder for the action head: ``dim``, the width D of its tokens, and ``forward``.

    Attributes:
        one_graph: whether torch can compile its ``forward`` as a whole.
        action_gradient: whether the action loss trains the encoder; false: its features are detached before the policy
            reads them.
    """

    dim: int
    one_graph: bool = False
    action_gradient: bool = True

    @abstractmethod
    def forward(self, images: Tensor, intrinsics: Tensor, world_to_camera: Tensor) -> GeometryFeatures:
        """Features of uint8 ``[B, V, 3, S, S]`` images with cameras ``[B, V, 3, 3]`` and ``[B, V, 4, 4]``."""

    def losses(
        self, features: GeometryFeatures, depth: Tensor, intrinsics: Tensor, world_to_camera: Tensor
    ) -> dict[str, Tensor]:
        """Losses by name, from depth ``[B, V, S, S]`` (metres, 0: unknown); empty if the encoder does not learn from
        depth."""
        return {}

    def counts(
        self, features: GeometryFeatures, depth: Tensor, intrinsics: Tensor, world_to_camera: Tensor
    ) -> dict[str, Tensor]:
        """Number of cells over which each of `losses` is a mean, by the same names."""
        return {}

    @property
    def learns_depth(self) -> bool:
        """Whether it has losses on depth."""
        return False

    @property
    def predicts_points(self) -> bool:
        """Whether its features hold world points."""
        return False

    @property
    def reads_cameras(self) -> bool | tuple[str, ...]:
        """Whether features depend on intrinsics and camera poses; names: only on those of these cameras."""
        return False

    def take_calibrated(self, cameras: Sequence[str]) -> None:
        """Called with the names of the cameras that are calibrated in all demonstrations, before training and (with the
        checkpoint's names) on loading a checkpoint. An encoder that uses the available calibrations decides here."""

    @property
    def gives_scale(self) -> bool:
        """Whether its features hold a scale token."""
        return False

    def grid_side(self, image_size: int | None = None) -> int | None:
        """Patches along a side of a view whose images have sides of ``image_size`` pixels (None: not known yet).

        Returns None if the number is not known.
        """
        return None

    def take_start(self, trust: Sequence[str] = (), offered: Mapping[str, Any] | None = None) -> None:
        """Called once at the start of training: an encoder that starts from another run's weights loads them.

        Args:
            trust: packages whose parts that run may use. offered: files that it may need, by the name of their setting.
        """

    def sharded_parts(self) -> list[nn.Module]:
        """Blocks that are only called through their `forward`, which FSDP may shard one by one."""
        return []

    def outside_modules(self) -> list[nn.Module]:
        """Modules that it uses without having them as submodules: not trained, not saved and not sharded, but included
        in the counts of memory and parameters (`keygrip.training.memory`)."""
        return []


# ---------------------------------------------------------------------- trained on the simulator's depth


class ViewBlock(nn.Module):
    """Pre-norm self-attention and MLP over ``[B, N, D]``."""

    def __init__(self, dim: int, heads: int, expansion: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, expansion * dim), nn.GELU(), nn.Linear(expansion * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.mlp_norm(x))


@model_part(from_checkpoint={"init_from": None})
class DinoMultiView(GeometryEncoder):
    """The shared backbone on each view, then blocks that attend within each view and over all views in turn, as in
    Wang et al., "VGGT: Visual Geometry Grounded Transformer" (2025). For each cell of a patch, a head predicts the
    world point that is visible there and its depth.

    It learns from depth maps together with the actions, so no pretrained geometry is needed if a simulator gives depth.

    Args:
        backbone: the shared DINO module. views: V at most. dim: D. layers: blocks, in turn within each view (the first)
            and over all views; a single block attends over all views. heads: of attention. cells: c, along a side of a
            patch.
        camera_rays: the encoder also reads each patch's viewing ray (that is, the calibration), not only the images.
        action_gradient: the action loss also trains it; false: only depth does.
        point_weight, depth_weight: weights of the two losses: mean absolute error of points in decimetres, and of the
            log depth.
        max_depth_m: farther cells are left out of the losses: walls and floor would outweigh the table.
        init_from: a run of `model=depth_reader` whose encoder this one starts from; it is trained if missing.
        frozen: the encoder is not trained and stays in eval mode, like MapAnything.
    """

    one_graph = True
    # the logged errors of a frozen encoder are of cells within max_depth_m too, but it no longer limits what is learned
    read_where: ClassVar = dict.fromkeys(
        ("action_gradient", "point_weight", "depth_weight"), ReadWhere("frozen", False)
    )
    read_where |= dict.fromkeys(("backbone.drop_path", "backbone.gradient_checkpointing"), ReadWhere("frozen", False))
    read_where |= {
        "max_depth_m": ReadWhere("point_weight depth_weight"),
        # a frozen encoder has a head where one of the weights is not 0, although it reads the weights for nothing else
        "cells": ReadWhere("point_weight depth_weight", even_unused=True),
    }

    def __init__(
        self,
        backbone: DinoBackbone,
        views: int,
        dim: int = 128,
        layers: int = 2,
        heads: int = 4,
        cells: int = 2,
        camera_rays: bool = False,
        action_gradient: bool = True,
        point_weight: float = 0.2,
        depth_weight: float = 0.5,
        max_depth_m: float = 2.0,
        init_from: str | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        if views < 1 or layers < 1 or cells < 1:
            raise ValueError("geometry: views, layers and cells are at least 1.")
        if backbone.patch_size % cells:
            raise ValueError(f"geometry.cells={cells} must divide the backbone's patch size {backbone.patch_size}.")
        if point_weight < 0 or depth_weight < 0 or max_depth_m <= 0:
            raise ValueError("geometry: weights must not be negative, and max_depth_m is positive.")
        self.backbone, self.dim, self.cells = backbone, dim, cells
        self.camera_rays, self.action_gradient, self.max_depth_m = camera_rays, action_gradient, max_depth_m
        self.weights = {"points": point_weight, "depth": depth_weight}
        self.reduce = nn.Linear(backbone.embed_dim, dim)
        self.view_tokens = nn.Parameter(0.02 * torch.randn(views, dim))
        self.rays = nn.Linear(6, dim) if camera_rays else None
        self.blocks = nn.ModuleList(ViewBlock(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, cells * cells * 4) if point_weight or depth_weight else None
        if self.head is None and not action_gradient:
            raise ValueError(
                "geometry.action_gradient=false trains the encoder by depth alone, and geometry.point_weight=0 "
                "geometry.depth_weight=0 leave none of it: set one of them above 0, or action_gradient=true."
            )
        if init_from is not None and backbone.loaded_weights != "random":
            raise ValueError(
                f"geometry.init_from and the backbone's weights ({backbone.loaded_weights}) both give the encoder's "
                "weights: set geometry.init_from=null or backbone.weights=random"
            )
        self.init_from, self.frozen = init_from, frozen
        if frozen:
            self.requires_grad_(False)
            self.eval()

    def train(self, mode: bool = True) -> DinoMultiView:
        """As `nn.Module.train`, except that a frozen encoder stays in eval mode."""
        return super().train(mode and not self.frozen)

    @property
    def learns_depth(self) -> bool:
        return self.head is not None and not self.frozen

    @property
    def predicts_points(self) -> bool:
        return self.head is not None

    @property
    def reads_cameras(self) -> bool:
        return self.camera_rays

    def grid_side(self, image_size: int | None = None) -> int | None:
        return None if image_size is None else image_size // self.backbone.patch_size

    def take_start(self, trust: Sequence[str] = (), offered: Mapping[str, Any] | None = None) -> None:
        """Load the encoder of the run to start from, if there is one.

        Args:
            trust, offered: as in `keygrip.training.checkpoints.load_module`.

        Raises:
            ValueError: the run is of another kind, or its encoder has other sizes.
        """
        if self.init_from is None:
            if self.frozen and self.backbone.loaded_weights == "random":
                raise ValueError(
                    "geometry.frozen=true would keep random weights: set geometry.init_from to a trained run."
                )
            return
        module = load_module(self.init_from, trust=trust, offered=offered)
        trained = getattr(module, "network", None)
        if not isinstance(trained, DinoMultiView):
            raise ValueError(
                f"geometry.init_from: {self.init_from} is a run of {type(module).__name__}, not of model=depth_reader."
            )
        source_state, own_state = trained.state_dict(), self.state_dict()
        sizes = {
            name: [list(state[name].shape) if name in state else None for state in (source_state, own_state)]
            for name in own_state | source_state
        }
        different = [name for name, (there, here) in sizes.items() if there != here]
        if different:
            there, here = sizes[different[0]]
            raise ValueError(
                f"geometry.init_from: the encoder of {self.init_from} has other sizes than this one ({different[0]} is "
                f"{there} there and {here} here; {len(different)} such in all): give its overrides the same geometry.* "
                "and backbone.*"
            )
        self.load_state_dict(source_state)

    def forward(self, images: Tensor, intrinsics: Tensor, world_to_camera: Tensor) -> GeometryFeatures:
        views = images.shape[1]
        if views > len(self.view_tokens):
            raise ValueError(
                f"The geometry encoder was built for {len(self.view_tokens)} views, got {views}: set geometry.views."
            )
        backbone = self.backbone
        features = backbone(normalised(images.flatten(0, 1), backbone.mean, backbone.std))
        height, width = features.grid
        tokens = self.reduce(features.patches).unflatten(0, (-1, views))  # [B, V, N, D]
        tokens = tokens + self._places(height, width, tokens.device) + self.view_tokens[:views, None]
        if self.rays is not None:
            tokens = tokens + self.rays(self._plucker(intrinsics, world_to_camera, images.shape[-1], height))
        for index, block in enumerate(self.blocks):
            # Within each view, then over all views; a single block attends over all views.
            within_view = index % 2 == 0 and len(self.blocks) > 1
            shape = tokens.shape
            tokens = block(tokens.flatten(0, 1) if within_view else tokens.flatten(1, 2)).reshape(shape)
        tokens = self.norm(tokens)
        if self.head is None:
            return GeometryFeatures(tokens.flatten(1, 2))
        cells = self.head(tokens).unflatten(-1, (self.cells, self.cells, 4)).unflatten(2, (height, width))
        cells = cells.transpose(3, 4).flatten(4, 5).flatten(2, 3).float()  # [B, V, h c, w c, 4]
        return GeometryFeatures(tokens.flatten(1, 2), cells[..., :3], cells[..., 3])

    def _places(self, height: int, width: int, device: torch.device) -> Tensor:
        """Features of each patch's position in its image, ``[N, D]``."""
        half = self.dim // 4 * 2
        rows, columns = sinusoidal_features(height, half), sinusoidal_features(width, half)
        both = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1)
        return F.pad(both.flatten(0, 1), (0, self.dim - 2 * half)).to(device)

    def _plucker(self, intrinsics: Tensor, world_to_camera: Tensor, size: int, side: int) -> Tensor:
        """Direction and moment of the ray through each patch's centre, world frame, ``[B, V, N, 6]``."""
        centres = cell_centres(side, size, device=intrinsics.device).flatten(0, 1)  # [N, 2]
        cameras = intrinsics.float()[:, :, None], world_to_camera.float()[:, :, None]
        pixels = centres.expand(*intrinsics.shape[:2], -1, -1)
        directions = pixel_rays(pixels, *(camera.expand(-1, -1, len(centres), -1, -1) for camera in cameras))
        origin = camera_centre(world_to_camera.float())[:, :, None].expand_as(directions)
        return torch.cat([directions, torch.linalg.cross(origin, directions)], dim=-1)

    def losses(
        self, features: GeometryFeatures, depth: Tensor, intrinsics: Tensor, world_to_camera: Tensor
    ) -> dict[str, Tensor]:
        """`points` and `depth`, weighted; and their errors without weight or gradient, `point_cm` and `depth_cm`."""
        assert features.points is not None
        assert features.log_depth is not None
        points, known, metres = self._targets(features, depth, intrinsics, world_to_camera)
        count = known.sum()
        distance = (features.points - points).abs().sum(-1).masked_fill(~known, 0.0)
        ratio = (features.log_depth - metres.clamp(min=1e-3).log()).abs().masked_fill(~known, 0.0)
        with torch.no_grad():
            point_error = (features.points - points).norm(dim=-1).masked_fill(~known, 0.0)
            depth_error = (features.log_depth.exp() - metres).abs().masked_fill(~known, 0.0)
            point_cm, depth_cm = (100 * global_mean(error.sum(), count) for error in (point_error, depth_error))
        return {
            "points": self.weights["points"] * DECIMETRES * global_mean(distance.sum(), count),
            "depth": self.weights["depth"] * global_mean(ratio.sum(), count),
            "point_cm": point_cm,
            "depth_cm": depth_cm,
        }

    def counts(
        self, features: GeometryFeatures, depth: Tensor, intrinsics: Tensor, world_to_camera: Tensor
    ) -> dict[str, Tensor]:
        _, known, _ = self._targets(features, depth, intrinsics, world_to_camera)
        return dict.fromkeys(("points", "depth", "point_cm", "depth_cm"), known.sum())

    def _targets(
        self, features: GeometryFeatures, depth: Tensor, intrinsics: Tensor, world_to_camera: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`depth_targets` of the cells for which the features contain predictions."""
        assert features.points is not None
        cells = features.points.shape[2]
        return depth_targets(depth, intrinsics, world_to_camera, cells=cells, limit=self.max_depth_m)

    def sharded_parts(self) -> list[nn.Module]:
        return list(self.blocks)


def depth_targets(
    depth: Tensor, intrinsics: Tensor, world_to_camera: Tensor, cells: int, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Depths and world points at the centres of a grid of cells.

    Args:
        depth: ``[B, V, S, S]`` metres along the optical axis, 0 unknown. intrinsics: ``[B, V, 3, 3]``.
        world_to_camera: ``[B, V, 4, 4]``. cells: g. limit: metres beyond which nothing counts as known.

    Returns:
        World points ``[B, V, g, g, 3]``, which are known (bool ``[B, V, g, g]``), and the depth ``[B, V, g, g]``.
    """
    size = depth.shape[-1]
    pixels = cell_centres(cells, size, device=depth.device)  # [g, g, 2]
    # Depth of the pixel that contains a cell's centre, and the point on the ray through that pixel's centre.
    index = pixels.floor().long().clamp(max=size - 1)
    metres = depth[..., index[..., 1], index[..., 0]].float()
    known = (metres > 0) & (metres < limit)
    places = torch.cat([index + 0.5, torch.ones_like(pixels[..., :1])], dim=-1)
    rays = torch.linalg.solve(intrinsics.float()[:, :, None, None], places[..., None])[..., 0]
    rotation, shift = world_to_camera[..., :3, :3].float(), world_to_camera[..., :3, 3].float()
    camera = rays * metres[..., None] - shift[:, :, None, None]
    world = transform(rotation.transpose(-1, -2)[:, :, None, None], camera)
    return world, known, metres
