"""Precomputing image shards: images per second, and the share of time that the encoders wait for data."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.config import compose
from keygrip.data.image_text.sources.images import encode_folder
from keygrip.data.video_text.conversations import encode_jpeg


@dataclass(frozen=True)
class Precompute:
    """`step=images` on images as a camera's, into a folder that is removed again.

    ``items_per_s`` and ``data_wait_share`` (from the first batch on), ``encode_share``, ``start_s`` (until the first
    batch), ``mb_per_item`` on the disk.

    Args:
        overrides: of ``keygrip.train``, which say what encoders; their weights are random unless they name others.
        images, quick_images: how many JPEG files. width, height: of each.
        size, bucket_step: of the buckets.
        batch_size, workers, device: see :func:`keygrip.data.image_text.sources.images.encode_folder`.
    """

    overrides: list[str]
    images: int
    quick_images: int
    width: int
    height: int
    size: int
    bucket_step: int
    batch_size: int
    workers: int | None
    device: str

    def run(self, quick: bool) -> dict[str, float]:
        """The figures."""
        from hydra.utils import instantiate

        encoders: Any = instantiate(compose("train", self.overrides).encoders, _convert_="all")
        with tempfile.TemporaryDirectory(prefix="keygrip-bench-") as name:
            source, root = Path(name) / "images", Path(name) / "shards"
            count = self.write(source, self.quick_images if quick else self.images)
            report = encode_folder(
                source,
                root,
                encoders,
                self.size,
                self.bucket_step,
                max_aspect=2.0,
                images_per_shard=max(8, count // 4),
                batch_size=self.batch_size,
                workers=self.workers,
                device=self.device,
            )
            stored = sum(path.stat().st_size for path in root.rglob("*.tar"))
        assert report["samples"] == count
        names = ("items_per_s", "data_wait_share", "encode_share", "start_s", "wall_s")
        return {**{name: report[name] for name in names}, "items": count, "mb_per_item": stored / count / 2**20}

    def write(self, folder: Path, count: int) -> int:
        """Writes captioned JPEG files about as hard to decode as photographs, wide and upright; their number."""

        rng = np.random.default_rng(0)
        folder.mkdir(parents=True)
        coarse = rng.integers(0, 256, (8, self.height // 8, self.width // 8, 3), dtype=np.uint8)
        whole = [np.kron(frame, np.ones((8, 8, 1), np.uint8)) for frame in coarse]
        files = [encode_jpeg(frame if n % 2 else frame.transpose(1, 0, 2), 90) for n, frame in enumerate(whole)]
        for number in range(count):
            # No two files have the same content: those would be one image. Decoders ignore what follows the image.
            (folder / f"{number:06d}.jpg").write_bytes(files[number % len(files)] + number.to_bytes(4, "big"))
            (folder / f"{number:06d}.txt").write_text(f"noise number {number} in many colours")
        return count
