"""Precomputing image shards: images per second, and the fraction of time that the encoders wait for data."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate

from keygrip.config import compose
from keygrip.data.image_text.sources.images import encode_folder
from keygrip.data.video_text.conversations import encode_jpeg


@dataclass(frozen=True)
class Precompute:
    """Run `step=images` on images of the size of a camera's, with the output in a temporary folder.

    ``items_per_s`` and ``data_wait_share`` (both from the first batch on), ``encode_share``, ``start_s`` (time until
    the first batch), ``mb_per_item`` (size on disk).

    Args:
        overrides: overrides of ``keygrip.train`` that select the encoders; the encoders' weights are random unless the
            overrides name others.
        images, quick_images: number of JPEG files. width, height: size of each image.
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
        """Return the figures."""
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
        """Write captioned JPEG files, half of them in portrait format, about as costly to decode as photographs; return
        their number."""

        rng = np.random.default_rng(0)
        folder.mkdir(parents=True)
        coarse = rng.integers(0, 256, (8, self.height // 8, self.width // 8, 3), dtype=np.uint8)
        whole = [np.kron(frame, np.ones((8, 8, 1), np.uint8)) for frame in coarse]
        files = [encode_jpeg(frame if n % 2 else frame.transpose(1, 0, 2), 90) for n, frame in enumerate(whole)]
        for index in range(count):
            # All files must differ: files with equal content would count as one image. Decoders ignore trailing bytes.
            (folder / f"{index:06d}.jpg").write_bytes(files[index % len(files)] + index.to_bytes(4, "big"))
            (folder / f"{index:06d}.txt").write_text(f"noise number {index} in many colours")
        return count
