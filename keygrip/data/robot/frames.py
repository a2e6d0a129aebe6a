"""Frames of a camera by index: image files, depth files, and videos. All can be pickled and hold no open file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from keygrip.data.robot.frame_rates import rates_differ
from keygrip.data.robot.schema import FrameSource
from keygrip.data.untrusted_files import open_image, read_bytes
from keygrip.data.video import count_frames, frame_times, read_frame
from keygrip.data.video_index import file_identity


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """Return a camera's image as uint8 [H, W, 3].

    Raises:
        ValueError: its values have more than 8 bits; a conversion would turn them white.
    """
    refuse_deep_pixels(image)
    return np.asarray(image.convert("RGB"))


def refuse_deep_pixels(image: Image.Image) -> None:
    """Raise ValueError if an image's values have more than 8 bits. Its pixels need not be decoded."""
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"it has more than 8 bits per pixel (mode {image.mode}), as depth has: save images with 8")


def depth_millimetres(depth: np.ndarray) -> np.ndarray:
    """Return a depth image as uint16 [H, W].

    Raises:
        ValueError: it cannot be uint16 millimetres. A conversion would change metres, a picture of depth with 8 bits,
            or values above 65535 to other distances.
    """
    if depth.ndim != 2:
        raise ValueError(f"depth must have one channel, it has shape {depth.shape}")
    if depth.dtype.kind not in "iu" or depth.dtype.itemsize < 2:
        raise ValueError(f"depth holds {depth.dtype}; uint16 millimetres are needed")
    if depth.size and not (depth.min() >= 0 and depth.max() <= np.iinfo(np.uint16).max):
        raise ValueError(
            f"depth holds {depth.dtype} from {depth.min()} to {depth.max()}; uint16 millimetres are needed, 0 to 65535"
        )
    return depth.astype(np.uint16)


def _rotate_image(image: np.ndarray, rotate: int) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(image, -rotate // 90)) if rotate else image


def _check_rotation(rotate: int) -> int:
    if rotate not in (0, 90, 180, 270):
        raise ValueError(f"rotate must be 0, 90, 180 or 270 degrees (clockwise), not {rotate}")
    return rotate


def checked_index(index: int, length: int, what: object) -> int:
    """Return `index`. Raise IndexError if it is not an index of `length` frames; `what` is for the message."""
    if not 0 <= index < length:
        raise IndexError(f"{what}: frame {index} asked for, it holds frames 0 to {length - 1}")
    return index


@runtime_checkable
class _Verifiable(Protocol):
    def verify(self) -> None: ...


def verify_source(frames: FrameSource) -> None:
    """Check the whole video that the frames come from, also if they are a selection in another order.

    Raises:
        OSError: its frames do not match the rows of the recording (see `VideoFrames.verify`).
    """
    if isinstance(frames, _Verifiable):
        frames.verify()


@dataclass(frozen=True)
class NoFrames:
    """A frame source without frames, for a camera that a demo lacks."""

    def __len__(self) -> int:
        return 0

    def read(self, index: int) -> np.ndarray:
        raise IndexError(f"frame {index} asked for of a camera that is not there")

    def identity(self) -> str:
        return "none"


@dataclass(frozen=True)
class NumberedFiles:
    """One file per frame. `pattern` holds one integer field for the frame number, such as `%06d.jpg`.

    Args:
        folder: where the files are.
        pattern: printf pattern of a file name.
        frames: number of files.
        start: number of the first file.
        rotate: clockwise degrees by which each image is rotated after decoding (0, 90, 180, 270).
    """

    folder: Path
    pattern: str
    frames: int
    start: int = 0
    rotate: int = 0

    def __post_init__(self) -> None:
        _check_rotation(self.rotate)

    def __len__(self) -> int:
        return self.frames

    def path(self, index: int) -> Path:
        """Return the file of a frame. Raise IndexError if there is no such frame."""
        return self.folder / (self.pattern % (self.start + checked_index(index, self.frames, self.folder)))

    def identity(self) -> str:
        with os.scandir(self.folder) as entries:
            lines = sorted(f"{e.name}:{e.stat().st_size}:{e.stat().st_mtime_ns}" for e in entries if e.is_file())
        return "\n".join([f"{self.folder.absolute()}:{self.pattern}:{self.start}:{self.frames}:{self.rotate}", *lines])


@dataclass(frozen=True)
class JpegFrames(NumberedFiles):
    """One image file per frame (JPEG or PNG)."""

    def read(self, index: int) -> np.ndarray:
        with open_image(self.path(index)) as image:
            return _rotate_image(rgb_pixels(image), self.rotate)

    def encoded(self, index: int) -> bytes | None:
        """Return the file's bytes if they can be copied unchanged (JPEG, not rotated), otherwise None."""
        path = self.path(index)
        return read_bytes(path) if not self.rotate and path.suffix.lower() in (".jpg", ".jpeg") else None


@dataclass(frozen=True)
class DepthFrames(NumberedFiles):
    """One 16-bit PNG file of depth per frame, millimetres; 0 means no reading."""

    def read(self, index: int) -> np.ndarray:
        path = self.path(index)
        with open_image(path) as image:
            pixels = np.asarray(image)
        try:
            depth = depth_millimetres(pixels)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return _rotate_image(depth, self.rotate)


@dataclass(frozen=True)
class VideoFrames:
    """Frames of a video file (anything that FFmpeg decodes). Any frame is read exactly, whatever the
    group-of-pictures structure.

    Args:
        path: the video.
        frames: number of frames of this source; None: all from `start` on. `read` and `verify` raise an error if the
            file holds fewer.
        start: frame of the file that is frame 0 here (several episodes may share a file).
        rotate: clockwise degrees by which each image is rotated after decoding.
        rate: frames per second of the rows that these frames belong to. `verify` refuses a file whose frames have other
            times, because rows would then get the wrong images; None: times are not compared.
        whole: `verify` also refuses a file that holds more frames.
    """

    path: Path
    frames: int | None = None
    start: int = 0
    rotate: int = 0
    rate: float | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        _check_rotation(self.rotate)

    def __len__(self) -> int:
        return self.frames if self.frames is not None else self.frames_in_file() - self.start

    def frames_in_file(self) -> int:
        """Frames in the whole file, counted from its packets. Raises OSError."""
        return count_frames(self.path)

    def verify(self) -> None:
        """Raise OSError if the file holds fewer frames than this source needs (counted from its packets), more frames
        (if `whole`), or frames at other times (if `rate` is given)."""
        count, needed = self.frames_in_file(), self.start + (self.frames or 1)
        if self.start < 0:
            raise OSError(f"{self.path}: the stretch of video begins {-self.start} frames before the file")
        if count < needed:
            raise OSError(f"{self.path}: the video holds {count} frames, {needed} are needed; it is cut off")
        if self.rate is not None:
            self._refuse_other_times(self.rate)
        if self.whole and count > needed:
            raise OSError(
                f"{self.path}: the video holds {count} frames for {needed} rows, so that rows would get others' images"
            )

    def _refuse_other_times(self, rate: float) -> None:
        times = frame_times(self.path)
        used = self.start + np.arange(len(self))
        late = times[used] - used / rate
        away = np.abs(late) > 0.5 / rate
        if not away.any():
            return
        video_fps = 1 / float(np.median(np.diff(times)))
        if rates_differ(video_fps, rate):
            raise OSError(
                f"{self.path}: the video has {video_fps:.4g} frames per second and the data set {rate:g}, so that rows "
                "would get others' images: encode it again at the data set's rate"
            )
        if self.whole and len(times) == len(used):
            return  # one frame per row, whatever their times
        first = int(np.argmax(away))
        raise OSError(
            f"{self.path}: frame {self.start + first} is shown {late[first]:+.3f} s away from its row, and so are "
            f"{int(away.sum())} of {len(late)}: frames are missing or not evenly spaced, so "
            "that rows would get others' images; leave the episode out, or encode its video again from the images"
        )

    def read(self, index: int) -> np.ndarray:
        checked_index(index, len(self), self.path)
        if self.start + index >= self.frames_in_file():
            self.verify()
        return _rotate_image(read_frame(self.path, self.start + index), self.rotate)

    def identity(self) -> str:
        return f"{file_identity(self.path)}:{self.start}:{self.frames}:{self.rotate}"
