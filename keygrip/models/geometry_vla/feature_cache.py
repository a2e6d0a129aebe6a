"""Disk cache for the features of a frozen encoder, keyed by the content of the images.

There is one file per feature, named by a hash of the encoder and the images' bytes. Any number of processes may share
the folder: files are written atomically, features that another process has removed are computed again, and the total
size is counted under a lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from keygrip.artifacts import locked, write_bytes, write_text

log = logging.getLogger(__name__)

KEPT_SHARE = 0.9  # share of the limit that is left when files are removed, so not every new file causes a removal
LARGEST_HALF = 6e4  # beyond it a float16 is infinite
CHECKSUM = "crc32"  # of a feature's bytes, in its file's metadata
SURPRISING = 20_000  # number of images without a hit after which a warning is logged


class FeatureCache:
    """A folder of features with a size limit; the least recently used features are removed first.

    Args:
        folder: created if missing. limit_gb: of all files together.

    Raises:
        ValueError: the limit is not above 0.
    """

    def __init__(self, folder: str | Path, limit_gb: float) -> None:
        if limit_gb <= 0:
            raise ValueError(f"geometry.cache.limit_gb={limit_gb}: give a size, or geometry.cache=null for no cache.")
        self.folder, self.limit = Path(folder), int(limit_gb * 1e9)
        self._requests, self._hits = 0, 0

    def features(
        self, images: Tensor, maker: str, compute: Callable[..., Tensor], conditions: Sequence[Tensor] = ()
    ) -> Tensor:
        """Features of images: cached ones are read, the others are computed and cached.

        Args:
            images: uint8 ``[B, ...]``. maker: identifies the encoder, its weights and its settings.
            compute: computes features ``[b, ...]`` of some of the images ``[b, ...]`` and their conditions.
            conditions: other inputs that the features depend on, ``[B, ...]`` each (cameras).

        Returns:
            ``[B, ...]`` float32 on the device of the images. They are rounded to float16 (float32 if they exceed its
            range), also when they have just been computed: the same images always give the same features.
        """
        if images.dtype != torch.uint8:
            raise ValueError(
                f"Features are kept by the bytes of their images, which must be uint8, not {images.dtype}."
            )
        keys = [_key(row, maker) for row in zip(*(part.cpu() for part in (images, *conditions)), strict=True)]
        cached = [self._read(key) for key in keys]
        missing = [row for row, feature in enumerate(cached) if feature is None]
        self._count_hits(len(cached), len(cached) - len(missing))
        if missing:
            computed = compute(*(part[missing] for part in (images, *conditions))).detach().cpu()
            for row, feature in zip(missing, computed, strict=True):
                small = feature.float()
                small = small.half() if bool((small.abs() < LARGEST_HALF).all()) else small
                self._write(keys[row], small)
                cached[row] = small
        return torch.stack([feature.float() for feature in cached if feature is not None]).to(images.device)

    def _count_hits(self, requests: int, hits: int) -> None:
        """Count requests and hits; warn once if the cache has no effect."""
        before = self._requests
        self._requests, self._hits = before + requests, self._hits + hits
        if before < SURPRISING <= self._requests and not self._hits:
            log.warning(
                "of %d images none came twice: the cache of geometry features only costs time; random crops and "
                "colours make every image new (data.augmentation=null), or set geometry.cache=null",
                self._requests,
            )

    def size(self) -> int:
        """Return the bytes in use, from the counter that all processes share, or of the files if it is missing, as in a
        copy of the folder without hidden files."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int((self.folder / ".size").read_text())
        return sum(size for _, size, _ in self._files())

    # ------------------------------------------------------------------ files

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> Tensor | None:
        path = self._path(key)
        try:
            content = path.read_bytes()
            feature, checksum = load(content)["feature"], _metadata(content).get(CHECKSUM)
            if checksum is None:  # cannot be checked: treated as missing
                return None
            if checksum != _checksum(feature):
                raise ValueError("its checksum differs")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            log.warning("%s cannot be read (%s): computed again", path, error)
            return None
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)  # marks it as recently used
        return feature

    def _write(self, key: str, feature: Tensor) -> None:
        path, content = self._path(key), save({"feature": feature.contiguous()}, {CHECKSUM: _checksum(feature)})
        try:
            with locked(self.folder / ".lock", together_without=True):
                size = self.size() + len(content) - (path.stat().st_size if path.exists() else 0)
                # Counted before it is written: if a process ends between the two, the counter is too large rather than
                # too small, so that the files stay within the limit.
                write_text(self.folder / ".size", str(size))
                write_bytes(path, content)
                if size > self.limit:
                    write_text(self.folder / ".size", str(self._evict_oldest()))
        except OSError as error:
            raise OSError(
                f"the cache of geometry features cannot be written ({error}): give geometry.cache.folder a disk with "
                "room, with which a run may be resumed too"
            ) from error

    def _files(self) -> list[tuple[int, int, Path]]:
        """Return the time of last use, the size and the path of each feature's file."""
        files = []
        for path in self.folder.glob("*/*.safetensors"):
            with contextlib.suppress(FileNotFoundError):
                state = path.stat()
                files.append((state.st_mtime_ns, state.st_size, path))
        return files

    def _evict_oldest(self) -> int:
        """Remove the least recently used files until the rest fits; return the size of the rest."""
        files = self._files()
        size = sum(each for _, each, _ in files)
        for _, each, path in sorted(files):
            if size <= KEPT_SHARE * self.limit:
                break
            path.unlink(missing_ok=True)
            size -= each
        return size


def _checksum(feature: Tensor) -> str:
    return str(zlib.crc32(feature.contiguous().numpy().tobytes()))


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return dict(header.get("__metadata__") or {})


def _key(row: Sequence[Tensor], maker: str) -> str:
    """Key of an image and its conditions."""
    digest = hashlib.sha256(f"{maker}:{tuple(row[0].shape)}:".encode())
    for part in row:
        digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()
