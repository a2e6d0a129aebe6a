"""Pointing: the vision-language model predicts where in each image the gripper will be.

A pretrained vision-language model can point. A model with random initial weights learns to attend to the target only
through the loss of the action head, which takes very many steps. Its image tokens are therefore also trained to predict
a map of pixels for each step of the action chunk, as in the volume-query policy, and for the next keyframe (where the
gripper closes or opens next). The targets of these maps are computed from the demonstrations.

Shape legend: B samples, V views, A arms, T steps, M maps of an arm in a view (T, or T + 1 with the keyframe's, which is
the last), P tokens along a side of an image, c cells along a side of a token, g = c P cells along a side of an image,
L tokens of a prompt, H width, S side of an image in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keygrip.data.batches import MultiViewPolicyBatch
from keygrip.models.geometry.cameras import camera_centre, inside_image, nearest_to_rays, pixel_rays, project
from keygrip.models.geometry_vla.geometry import DECIMETRES, GeometryFeatures
from keygrip.models.nn.image_sampling import bilinear_cells, gather_pixels
from keygrip.models.nn.sinusoids import continuous_features
from keygrip.training.distributed import global_mean

PLACE_FEATURES = 32  # sines and cosines of each coordinate
OFFSET_FEATURES = 16  # the same, for coordinates as shares of the workspace
FINENESS = 30.0  # highest frequency 1000 / 30: a twentieth of half the workspace changes its phase by 90 degrees
FARTHEST = 3.0  # limit of a meeting point's distance from the workspace's middle, in halves of the workspace
PEAK_REACH = 3  # cells to each side of a map's highest cell that count as its peak; targets cover two cells


class Pointing(nn.Module):
    """Logits over the cells of each image, for every arm and map.

    Args:
        width: H. arms: A. maps: M. cells: c.

    Raises:
        ValueError: fewer cells than one.
    """

    def __init__(self, width: int, arms: int, maps: int, cells: int) -> None:
        super().__init__()
        if cells < 1:
            raise ValueError(f"model.network.pointing_cells must not be negative, got {cells}.")
        self.arms, self.maps, self.cells = arms, maps, cells
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, arms * maps * cells * cells))

    def forward(self, hidden: Tensor, places: Tensor, views: int) -> Tensor:
        """Logits ``[B, V, A, M, g, g]`` of a layer's hidden states ``[B, L, H]``.

        Args:
            places: ``[B, L, 3]`` (see `keygrip.models.language.qwen_vl.Semantics`): view, row and column of tokens.
        """
        cells = (self.arms, self.maps, self.cells, self.cells)
        logits = self.read(image_tokens(hidden, places, views)).unflatten(-1, cells)  # [B, V, P, P, A, M, c, c]
        return logits.permute(0, 1, 4, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5)


class PatchPointing(nn.Module):
    """Logits of the same maps from the geometry encoder's patches, to be added to those of `Pointing`.

    Queries come from the image tokens of the language model, keys from the patches that each token covers, cell by
    cell. Language determines what is searched for; the encoder's backbone determines where in a patch it is. A vision
    tower that reads a patch through one matrix learns the latter slowly (`benchmarks/vla_metaworld.json`: 8.1 px
    without this module, 4.8 with it). Its logits are initially zero.

    Args:
        width: H. dim: D, of a geometry token. arms: A. maps: M. cells: along a side of a patch.
        features: of a query.
    """

    def __init__(self, width: int, dim: int, arms: int, maps: int, cells: int, features: int = 16) -> None:
        super().__init__()
        self.arms, self.maps, self.cells, self.features = arms, maps, cells, features
        self.ask = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, arms * maps * features))
        nn.init.zeros_(self.ask[1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.ask[1].bias)  # type: ignore[arg-type]
        self.answer = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, cells * cells * features)
        )

    def forward(self, hidden: Tensor, places: Tensor, views: int, patches: Tensor) -> Tensor:
        """Logits ``[B, V, A, M, g, g]`` of a layer's hidden states ``[B, L, H]`` and geometry tokens ``[B, G, D]``.

        Args:
            places: as for `Pointing`.

        Raises:
            ValueError: the patches do not lie on a square grid, or a token does not cover a whole number of them.
        """
        questions = self.ask(image_tokens(hidden, places, views)).unflatten(-1, (self.arms, self.maps, self.features))
        side, tokens = round((patches.shape[1] / views) ** 0.5), questions.shape[2]
        if views * side * side != patches.shape[1] or side % tokens:
            raise ValueError(
                f"model.network.pointing_patch_cells={self.cells}: {patches.shape[1]} geometry tokens of {views} views "
                f"do not lie on a square grid that {tokens} x {tokens} tokens of the language model divide: set it to "
                "0 with this geometry encoder."
            )
        patches_per_token = side // tokens
        answers = self.answer(patches).unflatten(-1, (self.cells, self.cells, self.features))
        answers = answers.unflatten(1, (views, tokens, patches_per_token, tokens, patches_per_token))
        # rows and columns of token (p, q), patch in the token (i, j), cell in the patch (c, d): to those of the image
        logits = torch.einsum("bvpqamf,bvpiqjcdf->bvampicqjd", questions, answers) * self.features**-0.5
        return logits.flatten(7, 9).flatten(4, 6)


def refuse_other_grid(patches: int, tokens: int, patch_cells: int, cells: int) -> None:
    """Refuse maps from the geometry encoder's patches if their cells differ from those of the image tokens.

    Args:
        patches, tokens: along a side of a view. patch_cells, cells: along a side of a patch, of a token.

    Raises:
        ValueError: the numbers of cells differ, or a token does not cover a whole number of patches.
    """
    setting = f"model.network.pointing_patch_cells={patch_cells}"
    if patches % tokens:
        raise ValueError(
            f"{setting}: the language model's {tokens} x {tokens} tokens of a view do not divide the geometry "
            f"encoder's {patches} x {patches} patches: set it to 0 with this geometry encoder."
        )
    if patches * patch_cells != tokens * cells:
        fitting = tokens * cells // patches if tokens * cells % patches == 0 else 0
        raise ValueError(
            f"{setting} gives maps of {patches * patch_cells} cells per side, and pointing_cells={cells} of "
            f"{tokens * cells}: both must give the same; set pointing_patch_cells={fitting}."
        )


def image_tokens(hidden: Tensor, places: Tensor, views: int) -> Tensor:
    """The states of images ``[B, V, P, P, H]`` among hidden states ``[B, L, H]``, by their places ``[B, L, 3]``."""
    images = hidden[places[..., 0] > 0].unflatten(0, (len(hidden), views, -1))
    side = round(images.shape[2] ** 0.5)
    return images.unflatten(2, (side, side))


class PointedTokens(nn.Module):
    """The content of the maps of `Pointing` as context tokens of the action head: one for every view, arm and map.

    Each token contains the mean of its map and, with a geometry encoder, that encoder's output there: its tokens and,
    if it predicts them, its world points, averaged with the map as weights. Language selects the image location;
    geometry supplies its 3D position. With `triangulated` each token also contains where the views' rays through the
    peaks of that map meet, and how far the rays are from that point. The maps are trained only on where the gripper
    went: with the action loss's gradient they predicted it less well.

    Args:
        width: H. arms: A. maps: M. views: V at most.
        geom_dim: width of a geometry token; None: only places in images. points: whether there are also world points.
        triangulated: whether there are meeting points.
    """

    def __init__(
        self,
        width: int,
        arms: int,
        maps: int,
        views: int,
        geom_dim: int | None = None,
        points: bool = True,
        triangulated: bool = False,
    ) -> None:
        super().__init__()
        self.places = nn.Linear(2 * PLACE_FEATURES, width)
        self.slots = nn.Parameter(0.02 * torch.randn(arms * maps, width))
        self.views = nn.Parameter(0.02 * torch.randn(views, width))
        self.seen = None if geom_dim is None else nn.Linear(geom_dim, width)
        self.points = None if geom_dim is None or not points else nn.Linear(3, width)
        self.meeting = nn.Linear(4, width) if triangulated else None

    def forward(
        self,
        logits: Tensor,
        geometry: GeometryFeatures | None = None,
        met: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """``[B, V A M, H]`` float32 from logits ``[B, V, A, M, g, g]`` and other features of the same images.

        Args:
            logits: of `Pointing`. geometry: features of the images, None without an encoder.
            met: `meeting_points` of the logits, with `triangulated`.

        Raises:
            ValueError: geometry tokens that do not lie on a square grid.
        """
        maps = probabilities(logits.detach()).flatten(2, 3)
        views = maps.shape[1]  # maps [B, V, A M, g, g]
        tokens = self.places(continuous_features(map_means(maps), PLACE_FEATURES).flatten(-2))
        tokens = tokens + self.slots + self.views[:views, None]
        if geometry is not None and self.seen is not None:
            patches = geometry.tokens.float().unflatten(1, (views, -1))  # [B, V, N, D]
            side = round(patches.shape[2] ** 0.5)
            if side * side != patches.shape[2]:
                raise ValueError(
                    f"model.network.pointed_tokens=true needs geometry tokens on a square grid, got {patches.shape[2]} "
                    "per view: set it to false with this geometry encoder."
                )
            tokens = tokens + self.seen(resampled(maps, side).flatten(-2) @ patches)
            if geometry.points is not None and self.points is not None:
                points = geometry.points.float()
                weights = resampled(maps, points.shape[2]).flatten(-2)
                tokens = tokens + self.points(weights @ points.flatten(2, 3) * DECIMETRES)
        if self.meeting is not None:
            assert met is not None
            positions, distances = (part.flatten(1, 2) for part in met)
            tokens = tokens + self.meeting(torch.cat([positions, distances[..., None]], dim=-1) * DECIMETRES)[:, None]
        return tokens.flatten(1, 2)


class PointedActions(nn.Module):
    """Term added to each action token of the head: where the rays meet for the maps of its own step and of the
    keyframe, relative to the world and to the gripper's present position. Initially zero.

    Pointed tokens contain the same points, among a hundred other tokens. A head that read its target from them followed
    it only in part: its plans tended to the middle of the training positions (`benchmarks/vla_metaworld.json`).

    Args:
        width: H. arms: A. steps: T. keyframe: whether there is a map for it.
    """

    def __init__(self, width: int, arms: int, steps: int, keyframe: bool) -> None:
        super().__init__()
        self.arms, self.steps, self.keyframe = arms, steps, keyframe
        coordinates = arms * 3 * (4 if keyframe else 2)
        self.mlp = nn.Sequential(
            nn.Linear(coordinates * (1 + OFFSET_FEATURES), width), nn.SiLU(), nn.Linear(width, width, bias=False)
        )
        nn.init.zeros_(self.mlp[2].weight)  # type: ignore[arg-type]

    def forward(self, met: Tensor, present: Tensor) -> Tensor:
        """``[B, T, H]`` of meeting points ``[B, A, M, 3]`` and present positions ``[B, A, 3]``, both normalised."""
        met = met.clamp(-FARTHEST, FARTHEST)  # rays that are nearly parallel may meet anywhere
        points = [met[:, :, : self.steps]]
        if self.keyframe:
            points.append(met[:, :, self.steps :].expand_as(points[0]))
        points += [point - present[:, :, None] for point in points]
        coordinates = torch.cat(points, dim=-1).transpose(1, 2).flatten(-2)  # [B, T, A x 12]
        waves = continuous_features(coordinates / FINENESS, OFFSET_FEATURES, longest=1 / FINENESS).flatten(-2)
        return self.mlp(torch.cat([coordinates, waves], dim=-1))


def probabilities(logits: Tensor) -> Tensor:
    """Maps ``[..., g, g]`` float32 that each add up to 1."""
    return logits.float().flatten(-2).softmax(dim=-1).unflatten(-1, logits.shape[-2:])


def map_means(maps: Tensor) -> Tensor:
    """x and y ``[..., 2]`` of maps ``[..., g, g]`` that each add up to 1, from 0 to 1 over the image."""
    centres = (torch.arange(maps.shape[-1], device=maps.device) + 0.5) / maps.shape[-1]
    return torch.stack([(maps.sum(-2) * centres).sum(-1), (maps.sum(-1) * centres).sum(-1)], dim=-1)


def peak_means(maps: Tensor) -> Tensor:
    """As `map_means`, over the cells around the highest cell only: small weights far away do not move the mean."""
    side = maps.shape[-1]
    highest = maps.flatten(-2).argmax(dim=-1)
    cells = torch.arange(side, device=maps.device)
    rows = (cells - (highest // side)[..., None]).abs() <= PEAK_REACH
    columns = (cells - (highest % side)[..., None]).abs() <= PEAK_REACH
    peaks = maps * rows[..., :, None] * columns[..., None, :]
    return map_means(peaks / peaks.sum(dim=(-2, -1), keepdim=True))


def meeting_points(logits: Tensor, intrinsics: Tensor, world_to_camera: Tensor) -> tuple[Tensor, Tensor]:
    """Where the views' rays through the peaks of maps meet, and how far the rays are from there. Without gradient.

    Args:
        logits: of the maps, ``[B, V, A, M, g, g]``.
        intrinsics: ``[B, V, 3, 3]`` for pixels as shares of the image, 0 to 1. world_to_camera: ``[B, V, 4, 4]``.

    Returns:
        ``[B, A, M, 3]`` and ``[B, A, M]`` metres (see `nearest_to_rays`).
    """
    maps = probabilities(logits.detach()).flatten(2, 3)
    cameras = intrinsics[:, :, None], world_to_camera[:, :, None]
    directions = pixel_rays(peak_means(maps), *cameras)  # [B, V, A M, 3]
    centres = camera_centre(cameras[1]).expand_as(directions)
    points, distances = nearest_to_rays(centres.transpose(1, 2), directions.transpose(1, 2))
    arms = logits.shape[2:4]
    return points.unflatten(1, arms), distances.unflatten(1, arms)


def resampled(maps: Tensor, side: int) -> Tensor:
    """Maps ``[..., g, g]`` that each add up to 1, resampled to ``side`` x ``side`` cells that add up to 1."""
    if maps.shape[-1] == side:
        return maps
    means = F.interpolate(maps.flatten(0, -3)[:, None], (side, side), mode="area")
    # If ``side`` does not divide g, neighbouring new cells share old ones, which then count twice.
    return (means / means.sum(dim=(-2, -1), keepdim=True)).reshape(*maps.shape[:-2], side, side)


def pointing_losses(logits: Tensor, batch: MultiViewPolicyBatch) -> dict[str, Tensor]:
    """Cross-entropy against the four cells around the pixel where the gripper will be: `pointing` over the steps, and
    `keyframe` if there is a map for it. Also the distances of the maps' means from that pixel, `pointing_px` and
    `keyframe_px`, without gradient.

    Steps that are padding or outside of an image do not count.

    Args:
        logits: ``[B, V, A, M, g, g]``.
    """
    losses: dict[str, Tensor] = {}
    for name, maps, pixels, counted in _map_targets(logits, batch):
        losses |= _map_losses(maps, pixels, counted, batch.images.shape[-1], name)
    return losses


def pointing_counts(logits: Tensor, batch: MultiViewPolicyBatch) -> dict[str, Tensor]:
    """Number of maps over which each of `pointing_losses` is a mean, by the same names."""
    targets = _map_targets(logits, batch)
    return {each: counted.sum() for name, *_, counted in targets for each in (name, f"{name}_px")}


def _map_targets(logits: Tensor, batch: MultiViewPolicyBatch) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """By name: maps ``[B, V, A, M, g, g]``, their target pixels ``[B, V, A, M, 2]``, and which of them count."""
    steps, size = batch.position.shape[2], batch.images.shape[-1]
    entries = [("pointing", logits[:, :, :, :steps], batch.position, ~batch.action_is_pad)]
    if logits.shape[3] > steps:
        all_valid = torch.ones_like(batch.action_is_pad[:, :, :1])
        entries.append(("keyframe", logits[:, :, :, steps:], batch.keyframe[:, :, None], all_valid))
    cameras = batch.view_intrinsics[:, :, None, None], batch.view_world_to_camera[:, :, None, None]
    targets = []
    for name, maps, position, valid in entries:
        pixels, _ = project(position[:, None], *cameras)
        targets.append((name, maps, pixels, inside_image(pixels, size, size) & valid[:, None]))
    return targets


def _map_losses(logits: Tensor, pixels: Tensor, counted: Tensor, size: int, name: str) -> dict[str, Tensor]:
    """Losses of maps ``[B, V, A, M, g, g]`` from `_map_targets`, for images of ``size`` pixels a side."""
    cells = logits.shape[-1]
    corners, weights = bilinear_cells(pixels.nan_to_num(0.0) * (cells / size), (cells, cells))  # [B, V, A, M, 4]
    logs = logits.float().flatten(-2).log_softmax(dim=-1).unflatten(-1, (cells, cells))
    cross_entropy = -(gather_pixels(logs, corners) * weights).sum(dim=-1)
    with torch.no_grad():
        pixel_error = (size * map_means(logs.exp()) - pixels.nan_to_num(0.0)).norm(dim=-1).masked_fill(~counted, 0.0)
        mean_error = global_mean(pixel_error.sum(), counted.sum())
    return {
        name: global_mean(cross_entropy.masked_fill(~counted, 0.0).sum(), counted.sum()),
        f"{name}_px": mean_error,
    }
