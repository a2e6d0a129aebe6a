"""Shards of images of the simulated table, with captions and ground truth; `data=robot_images` creates them itself."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from PIL import Image

from keygrip.data.image_text.bucket_folders import write_info
from keygrip.data.image_text.crops import Bucket, nearest_bucket, shared_crop
from keygrip.data.image_text.samples import describe_image_text
from keygrip.data.image_text.sources.encoding import as_tensor, encode_images, prepare_image
from keygrip.data.shards.set_writer import MadeSample, write_shards
from keygrip.envs.yam.stills import Still, StillCell, StillOptions
from keygrip.recording.split_seeds import split_seeds


@dataclass
class ImageMaker:
    """Create the sample of an image's seed. The simulator and the encoders are built in the process that uses them.

    Args:
        buckets: the bucket closest to the image's aspect ratio is used. encoders: config of the encoders.
    """

    options: StillOptions
    buckets: Sequence[Bucket]
    encoders: Mapping[str, Any]
    _built: tuple[StillCell, Any] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_built": None}

    def bucket_of(self, seed: int) -> Bucket:
        """Return the bucket of a seed's image."""
        return nearest_bucket(*self.options.size_of(seed), self.buckets)

    def __call__(self, seed: int) -> Iterable[MadeSample]:
        if self._built is None:
            self._built = (StillCell(self.options), build_encoders(self.encoders))
        cell, encoders = self._built
        still, bucket = cell.still(seed), self.bucket_of(seed)
        extra = {"evidence": evidence(still, bucket)}
        ready = prepare_image(
            Image.fromarray(still.pixels), still.caption, bucket, encoders, f"picture-{seed:07d}", extra
        )
        encoded = encode_images(encoders, as_tensor([ready.pixels]), as_tensor([ready.view]), [ready.caption])
        pixels = None if encoders.exact else ready.pixels
        yield MadeSample(ready.key, *encoded.sample(0, ready.record, trim_text=False, image=pixels))

    def close(self) -> None:
        """Free the GL contexts of this process."""
        if self._built is not None:
            self._built[0].close()
            self._built = None


def build_encoders(config: Mapping[str, Any]) -> Any:
    """Build the encoders of a config."""
    return instantiate(dict(config), _convert_="all")


def evidence(still: Still, bucket: Bucket) -> dict[str, Any]:
    """Return an image's ground truth: positions (x, y) in fractions of the crop, the cube's colour, the seed."""
    height, width = still.pixels.shape[:2]
    left, top, right, bottom = shared_crop(width, height, bucket)

    def place(pixel: tuple[float, float]) -> list[float]:
        return [round((pixel[0] - left) / (right - left), 5), round((pixel[1] - top) / (bottom - top), 5)]

    return {"cube": place(still.cube), "block": place(still.block), "colour": still.colour, "seed": still.seed}


def make_images(root: Path | str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Render images and encode them into `<root>/train`, `val` and `test`; no seed is in two splits.

    Args:
        root: folder of the splits.
        options: `train`, `val`, `test` (numbers of images), `images_per_shard`, `processes` (None: one per core),
            `buckets` ([[width, height], ...]), `encoders` (their config), and `image`: the fields of
            :class:`keygrip.envs.yam.stills.StillOptions`.

    Returns:
        samples by split and seconds.

    Raises:
        ValueError: the fields have their former name, `picture`.
    """
    started = time.monotonic()
    if "picture" in options:
        raise ValueError("the option 'picture' of the images is now 'image'")
    still_options = StillOptions(**(options.get("image") or {}))
    buckets = [Bucket(int(width), int(height)) for width, height in options["buckets"]]
    encoders = build_encoders(options["encoders"])
    identity = {"fingerprint": encoders.fingerprint, "description": encoders.description}
    per_shard, report = int(options.get("images_per_shard", 250)), dict[str, Any](root=str(root))
    maker = ImageMaker(still_options, buckets, options["encoders"])
    for split, all_seeds in split_seeds(options).items():
        by_bucket: dict[Bucket, list[int]] = {}
        for seed in all_seeds:
            by_bucket.setdefault(maker.bucket_of(seed), []).append(seed)
        report[split] = 0
        for bucket, seeds in sorted(by_bucket.items()):
            settings = {
                "picture": still_options.as_dict(),  # stored under the setting's former name: sets stay valid
                "encoders": identity,
                "first_seed": all_seeds.start,
                "bucket": bucket.name,
            }
            is_small = len(seeds) <= 2 * per_shard  # starting processes would take longer
            written = write_shards(
                Path(root) / split / bucket.name,
                seeds,
                maker,
                settings,
                per_shard,
                "shard",
                1 if is_small else options.get("processes"),
                describe=describe_image_text,
            )
            report[split] += written.samples
    maker.close()
    write_info(root, identity)
    return report | {"wall_s": round(time.monotonic() - started, 1)}
