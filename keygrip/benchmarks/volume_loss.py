"""The exact volume loss, factorised (one camera) or streamed over the heights (two cameras), compared with the loss on
the dense volume.

Both sides start from the same leaf tensors (the pixel and height parts of the queries, and the feature map), compute
the parts of the volume with the same products, and compute the gradients of the leaves. One side sums two small
softmaxes, the other materialises the volume. As in a training step, logits are freed once the backward pass has used
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from keygrip.benchmarks.measuring import Timed, interleaved_seconds, milliseconds, peak_extra_bytes
from keygrip.models.nn.sinusoids import sinusoidal_features
from keygrip.models.volume_query.volume import VolumeLogits, hard_target, volume_cross_entropy
from keygrip.models.volume_query.world import VoxelProjection, WorldScores, project_voxels
from keygrip.progress import Progress

IMAGE_SIZE = 448  # side of both cameras' images, pixels


@dataclass(frozen=True)
class VolumeLoss(Timed):
    """Forward and backward time and extra memory of both sides, in float32, on the CPU and on a GPU if there is one.

    Figures without a horizon in their name are those of the last horizon. Two views are measured only at the last
    horizon.

    Args (in addition to those of `Timed`, whose limits in seconds apply to each horizon):
        horizons: values of T. batch_size: B. pred_size: P, cells along a side. height_bins: Z.
        d_feat, d_sin_z: widths of the pixel and height parts of a query.
    """

    horizons: Sequence[int]
    batch_size: int
    pred_size: int
    height_bins: int
    d_feat: int
    d_sin_z: int

    def run(self, quick: bool) -> dict[str, float]:
        """Return the figures of all horizons and devices.

        Raises:
            RuntimeError: the two sides do not give the same gradients, so a comparison would be meaningless.
        """
        devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
        figures: dict[str, float] = {}
        with Progress(
            total=len(devices) * (len(self.horizons) + 1), desc="volume_loss", unit="setting", leave=False
        ) as bar:
            for device in devices:
                prefix = "gpu_" if device.type == "cuda" else ""
                for horizon in self.horizons:
                    figures |= self._measure(horizon, device, prefix, quick)
                    bar.update()
                figures |= self._measure(self.horizons[-1], device, f"{prefix}two_views_", quick, two_views=True)
                bar.update()
                for name in ("time_ratio", "memory_ratio", "two_views_time_ratio", "two_views_memory_ratio"):
                    figures[f"{prefix}{name}"] = figures[f"{prefix}{name}_t{self.horizons[-1]}"]
        headlines = [name for name in figures if name.endswith(("time_ratio", "memory_ratio"))]
        return {name: figures[name] for name in headlines} | figures

    def _measure(
        self, horizon: int, device: torch.device, prefix: str, quick: bool, two_views: bool = False
    ) -> dict[str, float]:
        problem = Problem.random(self, horizon, device, two_views)
        sides = {"factorised": problem.factorised, "dense": problem.dense}
        _check_equal({name: work() for name, work in sides.items()})
        repetitions, limit_s = self.effort(quick)
        seconds = interleaved_seconds(sides, repetitions, device, limit_s)
        extra = {name: peak_extra_bytes(work, device) for name, work in sides.items()}
        times = {name: milliseconds(values) for name, values in seconds.items()}
        suffix = f"t{horizon}"
        return {
            f"{prefix}time_ratio_{suffix}": round(times["dense"] / times["factorised"], 2),
            f"{prefix}memory_ratio_{suffix}": round(extra["dense"] / extra["factorised"], 2),
            **{f"{prefix}{name}_{suffix}_ms": value for name, value in times.items()},
            **{f"{prefix}{name}_{suffix}_extra_mb": round(value / 1e6, 3) for name, value in extra.items()},
        }


@dataclass(frozen=True)
class Problem:
    """One loss to compute, with its leaf tensors.

    Attributes:
        q_feat: ``[B, T, C]``. features: ``[B, C, P, P]``. q_z: ``[B, T, D]``; these three have gradients.
        sin_z: ``[Z, D]``. constant: ``[B, T]``. cells: ``[B, T, 2]`` (row, column). heights: ``[B, T]``.
        further: features of a second camera ``[B, 1, C, P, P]``, with gradient, and the projection of the first
            camera's voxels into them; None: one camera.
    """

    q_feat: Tensor
    features: Tensor
    q_z: Tensor
    sin_z: Tensor
    constant: Tensor
    cells: Tensor
    heights: Tensor
    further: tuple[Tensor, VoxelProjection] | None = None

    @classmethod
    def random(cls, sizes: VolumeLoss, horizon: int, device: torch.device, two_views: bool = False) -> Problem:
        """Return a problem with standard normal queries and features and uniform targets, the same on every device."""
        generator = torch.Generator().manual_seed(0)
        batch, side = sizes.batch_size, sizes.pred_size

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        def uniform(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator).to(device)

        problem = cls(
            q_feat=normal(batch, horizon, sizes.d_feat).requires_grad_(),
            features=normal(batch, sizes.d_feat, side, side).requires_grad_(),
            q_z=normal(batch, horizon, sizes.d_sin_z).requires_grad_(),
            sin_z=sinusoidal_features(sizes.height_bins, sizes.d_sin_z).to(device),
            constant=normal(batch, horizon),
            cells=uniform(side, batch, horizon, 2),
            heights=uniform(sizes.height_bins, batch, horizon),
        )
        if not two_views:
            return problem
        maps = normal(batch, 1, sizes.d_feat, side, side).requires_grad_()
        intrinsics, poses, heights = _two_cameras(batch, sizes.height_bins)
        projected = project_voxels(intrinsics.to(device), poses.to(device), heights.to(device), side, IMAGE_SIZE)
        return replace(problem, further=(maps, projected))

    def logits(self) -> VolumeLogits:
        """Return the parts of the volume, with leading shape ``[B, T]``."""
        pixel = torch.einsum("btc,bchw->bthw", self.q_feat, self.features)
        world = None
        if self.further is not None:
            world = WorldScores(torch.einsum("btc,bvchw->btvhw", self.q_feat, self.further[0]), self.further[1])
        return VolumeLogits(pixel, self.q_z @ self.sin_z.T, self.constant, world)

    def factorised(self) -> tuple[Tensor, ...]:
        """Return the gradients of the leaves, computed with two small softmaxes, or with sums streamed over heights."""
        return self._gradients(volume_cross_entropy(self.logits(), hard_target(self.cells, self.heights)).mean())

    def dense(self) -> tuple[Tensor, ...]:
        """Return the gradients of the leaves, computed with the materialised volume."""
        side = self.features.shape[-1]
        voxels = (self.heights * side + self.cells[..., 0]) * side + self.cells[..., 1]  # index into [Z, P, P]
        return self._gradients(F.cross_entropy(self.logits().dense().flatten(2).flatten(0, 1), voxels.flatten()))

    def _gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        leaves = (self.q_feat, self.features, self.q_z)
        return torch.autograd.grad(loss, leaves if self.further is None else (*leaves, self.further[0]))


def _two_cameras(batch: int, height_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return intrinsics ``[B, 2, 3, 3]`` and poses ``[B, 2, 4, 4]`` of two cameras above a table, 90 degrees apart, and
    heights ``[Z]`` up to 20 cm."""
    poses = []
    for azimuth in (0.0, math.pi / 2):
        back = torch.tensor([math.cos(azimuth), math.sin(azimuth), 1.0]) / math.sqrt(2)  # towards the camera, 1 m away
        right = torch.tensor([-math.sin(azimuth), math.cos(azimuth), 0.0])
        turn = torch.stack([right, torch.linalg.cross(right, back), -back])  # rows: x right, y down, z forward
        pose = torch.eye(4)
        pose[:3, :3], pose[:3, 3] = turn, turn @ -back
        poses.append(pose)
    focal = 1.5 * IMAGE_SIZE
    intrinsics = torch.tensor([[focal, 0, IMAGE_SIZE / 2], [0, focal, IMAGE_SIZE / 2], [0, 0, 1.0]])
    heights = (torch.arange(height_bins) + 0.5) * (0.2 / height_bins)
    return intrinsics.expand(batch, 2, 3, 3), torch.stack(poses).expand(batch, 2, 4, 4), heights


def _check_equal(gradients: dict[str, tuple[Tensor, ...]]) -> None:
    for factorised, dense in zip(gradients["factorised"], gradients["dense"], strict=True):
        difference = float((factorised - dense).abs().max() / dense.abs().max())
        if not difference < 1e-3:  # float32: sums over a hundred thousand voxels differ by less
            raise RuntimeError(f"the factorised loss and the dense one have gradients that differ by {difference:.1e}")
