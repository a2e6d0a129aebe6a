"""Read frames of videos by index or by time, and write H.264 videos.

Every video of the project is decoded and written here. Legend of shapes: N frames, H and W the size of an image.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
from PIL import Image

from keygrip.data.bad_samples import convert_errors
from keygrip.data.video_containers import open_container, open_source
from keygrip.data.video_frames import stored_frame, untimed_order, upright_frame, yuv420p
from keygrip.data.video_index import VideoIndex, file_identity, video_index

SEEK_S = 8.0  # seek if the wanted frame is further ahead than this, the usual distance of key frames
FURTHEST_BACK_S = 60.0  # a seek may land on a key frame before the frame decoded last, but not further back than this
CUT_OFF_S = 0.25  # if the packets end this much before the file's stated length, a part of the file is missing
TIME_TOLERANCE_S = 2e-3  # containers round time stamps to milliseconds, twice
Converted = TypeVar("Converted")

# ---- frames by index -------------------------------------------------------------------------------------------------


class _OpenVideo:
    """One open container; `read` decodes forward if possible and seeks otherwise.

    A seek goes to the last key frame that is not *shown* after the wanted frame, and its first packet is checked: with
    B-frames, decoding and presentation order differ, and some demuxers land one group of pictures too late.
    """

    def __init__(self, path: Path, index: VideoIndex) -> None:
        self.container, self.stream = open_container(path)
        self.path, self.times, self.keys = path, index.times, index.keys
        self.position: int | None = None  # presentation time of the frame returned last
        self.decoder: Any = None

    def close(self) -> None:
        self.decoder = None
        self.container.close()

    def _seek_and_decode(self, key: int) -> Any:
        """Return the decoded frames from key frame number `key` (-1: the start of the file) on; None if the seek landed
        after that key frame."""
        if key >= 0:
            start_pts, decoding_time = self.keys[key].tolist()
            self.container.seek(decoding_time, stream=self.stream, backward=True)
        else:
            start_pts = int(self.times[0])
            self.container.seek(min(0, start_pts), stream=self.stream, backward=True)
        packets = self.container.demux(self.stream)
        first = next(packets, None)
        while first is not None and first.pts is None and first.size > 0:
            first = next(packets, None)
        if first is None or first.pts is None or (key >= 0 and first.pts > start_pts):
            return None

        def decode() -> Iterable[Any]:
            yield from first.decode()
            for packet in packets:
                yield from packet.decode()

        return iter(decode())

    def _advance(self, target: int) -> Any:
        """Decode forward to the frame shown at `target` and return it; None if the decoder passes it or ends."""
        for frame in self.decoder:
            if frame.pts is None:
                continue
            self.position = frame.pts
            if frame.pts == target:
                return frame
            if frame.pts > target:
                return None
        return None

    def read(self, index: int) -> np.ndarray:
        target = int(self.times[index])
        # last key frame not shown after it; -1: none
        nearest = int(np.searchsorted(self.keys[:, 0], target, side="right")) - 1
        nearest_key = self.keys[nearest, 0] if nearest >= 0 else self.times[0]
        try:
            # decode forward from the current position, unless a key frame before the target makes a seek cheaper
            if self.decoder is not None and self.position is not None and nearest_key <= self.position < target:
                frame = self._advance(target)
                if frame is not None:
                    return stored_frame(frame)
            for key in (*range(nearest, max(-1, nearest - 3), -1), -1):
                self.stream.codec_context.flush_buffers()
                self.decoder = self._seek_and_decode(key)
                frame = self._advance(target) if self.decoder is not None else None
                if frame is not None:
                    if frame.is_corrupt:
                        break
                    return stored_frame(frame)
        except (av.FFmpegError, EOFError, ValueError) as error:
            self.decoder = self.position = None
            raise OSError(
                f"{self.path}: frame {index} cannot be decoded ({error}); the video is cut off or damaged"
            ) from error
        self.decoder = self.position = None
        raise OSError(f"{self.path}: frame {index} cannot be decoded; the video is cut off or damaged")


_OPEN_VIDEOS = threading.local()  # by_file: each thread's own containers, since a decoder has one position
_OPEN_VIDEO_LIMIT = 16  # open containers per thread; each holds a decoder with a few frames


def _open_video(path: Path) -> _OpenVideo:
    """Return this thread's open container for `path`; one inherited by fork is not used: it shares its file offset."""
    videos: OrderedDict[tuple[int, str], _OpenVideo] = vars(_OPEN_VIDEOS).setdefault("by_file", OrderedDict())
    key = (os.getpid(), file_identity(path))
    if key not in videos:
        videos[key] = _OpenVideo(path, video_index(path))
        while len(videos) > _OPEN_VIDEO_LIMIT:
            (process, _), oldest = videos.popitem(last=False)
            if process == os.getpid():
                oldest.close()
    videos.move_to_end(key)
    return videos[key]


def count_frames(path: Path) -> int:
    """Count the frames of a video file from its packets, without decoding. Raise OSError if it cannot be read."""
    return len(video_index(path).times)


def frame_times(path: Path) -> np.ndarray:
    """Return the times [N] at which a video's frames are shown, in seconds from the first frame, without decoding.

    Raises:
        OSError: the file cannot be read.
    """
    index = video_index(path)
    return np.asarray((index.times - index.times[:1]) * index.unit_s)


def read_frame(path: Path, index: int) -> np.ndarray:
    """Read frame `index` of a video file; exact for every group-of-pictures structure.

    Containers stay open in this thread, so that neighbouring frames are decoded only once.

    Returns:
        H x W x 3 uint8 RGB.

    Raises:
        OSError: the frame cannot be decoded. IndexError: the file has no such frame.
    """
    return _open_video(path).read(index)


def frames_between(path: Path, start: int, stop: int) -> Iterator[np.ndarray]:
    """Yield frames `start` to `stop` - 1 of a video file in order, each H x W x 3 uint8 RGB.

    Each call opens the file again, so that several threads may read videos at the same time.

    Raises:
        OSError: a frame cannot be decoded. IndexError: the file has no such frame.
    """
    video = _OpenVideo(path, video_index(path))
    try:
        for index in range(start, stop):
            yield video.read(index)
    finally:
        video.close()


# ---- frames by time --------------------------------------------------------------------------------------------------


def duration_s(source: bytes | str | Path) -> float:
    """Return a video's duration in seconds, from a file or its content. Raise ValueError if it cannot be read."""
    with convert_errors("the video cannot be decoded"), _open_for_block(source) as (container, stream):
        return _stream_length_s(source, container, stream)


def frames_at(
    source: bytes | str | Path,
    times: Callable[[float], Sequence[float] | np.ndarray],
    convert: Callable[[Image.Image], Converted],
) -> list[Converted]:
    """Read the frames that are shown at given times: for each time the last frame that began before it. Frames are
    rotated upright if the file states their orientation (videos from phones do), and have square pixels.

    Between times that are far apart, reading seeks from key frame to key frame if the file allows it.

    Args:
        source: the file, or its content as bytes.
        times: maps the video's length in seconds to the wanted times, ascending, in seconds from the first frame.
        convert: applied to each frame at once, so that only the converted frames stay in memory.

    Raises:
        ValueError: the video cannot be decoded, or ends before the last time.
    """
    try:
        return _decode_frames_at(source, times, convert, seek=True)
    except _CannotSeek:
        return _decode_frames_at(source, times, convert, seek=False)


class _CannotSeek(Exception):
    """The file has no index of its key frames, or a wrong one."""


def _decode_frames_at(
    source: bytes | str | Path,
    times: Callable[[float], Sequence[float] | np.ndarray],
    convert: Callable[[Image.Image], Converted],
    seek: bool,
) -> list[Converted]:
    images: list[Converted] = []
    with convert_errors("the video cannot be decoded"), _open_for_block(source) as (container, stream):
        duration = _stream_length_s(source, container, stream)
        targets = times(duration)
        start: float | None = None
        current: Any = None
        begin = end = gap = 0.0  # times at which `current` begins and ends; longest display time of a frame so far
        sought, worth_it = -1, SEEK_S
        frames = container.decode(stream)
        untimed = untimed_order(container, stream)
        seek = seek and not untimed
        while (frame := next(frames, None)) is not None:
            if frame.is_corrupt:
                if sought >= 0:  # perhaps because data before the key frame are missing after the seek
                    raise _CannotSeek
                raise ValueError(f"its frame at {float(frame.time or 0.0):.1f} s is damaged")
            time_s = float(frame.time or 0.0) if not untimed else float((frame.dts or 0) * frame.time_base)
            if untimed and frame.dts is None and current is not None:  # the last frames
                time_s = begin + (start or 0.0) + (gap or float((frame.duration or 0) * frame.time_base))
            start = time_s if start is None else start
            while (
                current is not None
                and len(images) < len(targets)
                and time_s - start > targets[len(images)] + TIME_TOLERANCE_S
            ):
                images.append(convert(upright_frame(current, stream.sample_aspect_ratio)))
            if len(images) == len(targets):
                break
            gap = max(gap, time_s - start - begin) if current is not None else gap
            current, begin = frame, time_s - start
            end = begin + max(gap, float((frame.duration or 0) * frame.time_base))
            if seek and sought < len(images) and targets[len(images)] - begin > worth_it:
                sought = len(images)  # only once: the key frame may lie before the current frame
                frames, landed = _from_key_frame(container, stream, start + float(targets[len(images)]), time_s)
                worth_it *= 2 if landed <= time_s else 1  # the distance between key frames is larger than that
                current = None
        while current is not None and len(images) < len(targets) and targets[len(images)] < end + TIME_TOLERANCE_S:
            images.append(convert(upright_frame(current, stream.sample_aspect_ratio)))
    if len(images) < len(targets):
        raise ValueError(f"the video says it lasts {duration:.1f} s, but only {end:.1f} s of it can be decoded")
    return images


def _from_key_frame(container: Any, stream: Any, target: float, current: float) -> tuple[Iterator[Any], float]:
    """Seek to the last key frame at or before `target`; return the frames from there on, and the key frame's time.
    `current` is the time of the frame decoded last.

    Raises:
        _CannotSeek: the frames begin after `target`, or long before `current`.
    """
    try:
        container.seek(int(target / stream.time_base), stream=stream)
        frames = container.decode(stream)
        first = next(frames, None)
    except (av.FFmpegError, OverflowError) as error:
        raise _CannotSeek from error
    if first is None or first.time is None or not current - FURTHEST_BACK_S < first.time <= target + TIME_TOLERANCE_S:
        raise _CannotSeek
    return itertools.chain([first], frames), float(first.time)


@contextlib.contextmanager
def _open_for_block(source: bytes | str | Path) -> Iterator[tuple[Any, Any]]:
    container, stream = open_source(source)
    with container:
        yield container, stream


def _stream_length_s(source: bytes | str | Path, container: Any, stream: Any) -> float:
    """Return a video stream's length in seconds from its header, or from its packets if longer or not in the header.

    The length in an mp4 header is in decoding order: with B-frames and uneven times it may end long before the last
    frame is shown. In an AVI it depends on the size of the file, which may be cut off; the number of frames stays that
    of the whole video. Matroska, WebM and ASF (WMV) state only the length of the longest stream, including audio, from
    time 0; the frames of an ASF may begin later.

    Raises:
        ValueError: there are no frames, or the packets end before the time that the file states.
    """
    # for Matroska, libav may report the length of the whole file as that of the stream
    if stream.duration is None or stream.time_base is None or "matroska" in container.format.name:
        return _packets_length_s(source)
    late = max(0, stream.start_time or 0) if container.format.name == "asf" else 0
    declared = float((stream.duration - late) * stream.time_base)
    if container.format.name == "avi" and stream.frames and stream.average_rate:
        declared = max(declared, float(stream.frames / stream.average_rate))
        if untimed_order(container, stream):
            return declared
    with _open_for_block(source) as (reopened, images):
        first = images.start_time or 0
        try:
            reopened.seek(first + images.duration, stream=images)  # to the last key frame
            packets = reopened.demux(images)
            intervals = sorted((p.pts, p.duration or 0) for p in packets if p.pts is not None and not p.is_discard)
        except av.FFmpegError:  # seeking is impossible, or the file is cut off there: decoding reports what is missing
            return declared
        last, duration = intervals[-1] if intervals else (first, 0)
        if len(intervals) > 1:  # packet durations are in decoding order too
            duration = min(duration, last - intervals[-2][0])
        return max(declared, float((last + duration - first) * images.time_base))


def _packets_length_s(source: bytes | str | Path) -> float:
    """Return a video stream's length in seconds from its packets, for containers that state only their own length."""
    intervals: list[tuple[int, int]] = []
    end_s, untimed = 0.0, False  # end time of the packets of all streams; whether some packets have no time
    with _open_for_block(source) as (container, images):
        for packet in container.demux():
            if packet.pts is None or packet.is_discard:
                untimed |= packet.pts is None and packet.size > 0
                continue
            end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == images.index:
                intervals.append((packet.pts, packet.duration or 0))
        if not intervals:
            raise ValueError("its frames carry no times: put it into an mp4" if untimed else "it holds no frames")
        intervals.sort()
        first, (last, duration) = intervals[0][0], intervals[-1]
        gaps = [after - before for (before, _), (after, _) in itertools.pairwise(intervals)]
        stated = None if container.duration is None else container.duration / av.time_base
        # the last frame may be shown for longer than its packet says, but hardly for twice as long as any before it
        slack = CUT_OFF_S + 2 * float(max(gaps, default=0) * images.time_base)
        if stated is not None and end_s + slack < stated:
            raise ValueError(f"it says it lasts {stated:.1f} s and ends after {end_s:.1f} s: it is cut off or damaged")
        return float((last + (duration or (gaps[-1] if gaps else 0)) - first) * images.time_base)


# ---- whole videos ----------------------------------------------------------------------------------------------------


def read_video(path: str | Path, every: int = 1) -> np.ndarray:
    """Read every n-th frame of a video, [N, H, W, 3] uint8. Raise ValueError if it cannot be decoded."""
    with convert_errors("the video cannot be decoded"), _open_for_block(path) as (container, stream):
        decoded = enumerate(container.decode(stream))
        return np.stack([stored_frame(frame) for i, frame in decoded if i % every == 0])


@contextlib.contextmanager
def live_frames(source: str, format: str | None, options: Mapping[str, str]) -> Iterator[Iterator[tuple[Any, Any]]]:
    """Yield an iterator over frames [H, W, 3] uint8 and their times in s or None, of a device, file or stream.

    Args:
        source: e.g. /dev/video0. format: of the device, e.g. v4l2; None: detected. options: for FFmpeg.

    Raises:
        ValueError: the source cannot be opened, or ends unexpectedly.
    """
    with convert_errors(source), av.open(source, format=format, options=dict(options)) as container:
        yield ((stored_frame(frame), frame.time) for frame in container.decode(video=0))


class VideoWriter:
    """H.264 in an mp4 container, without B-frames and with a key frame every half second, for fast random access.

    Args:
        path: the file to write. width, height: even numbers of pixels. fps: frames per second.
    """

    def __init__(self, path: Path, width: int, height: int, fps: float) -> None:
        if width % 2 or height % 2:
            raise ValueError(f"video needs even image sizes, not {width} x {height}; write JPEG files instead")
        self.container = av.open(str(path), "w", format="mp4")
        self.stream: Any = self.container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        self.stream.options = {"crf": "18", "bf": "0", "g": str(max(1, round(fps / 2))), "preset": "veryfast"}

    def write(self, image: np.ndarray) -> None:
        """Append an image, H x W x 3 uint8 RGB. Raise ValueError if it has another size or type."""
        if image.shape != (self.stream.height, self.stream.width, 3) or image.dtype != np.uint8:
            raise ValueError(
                f"the video takes {self.stream.height} x {self.stream.width} x 3 uint8, not {image.shape} {image.dtype}"
            )
        self.container.mux(self.stream.encode(av.VideoFrame.from_ndarray(yuv420p(image), format="yuv420p")))

    def close(self) -> None:
        """Write the frames that are still in the encoder, and close the file."""
        self.container.mux(self.stream.encode())
        self.container.close()


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write frames [N, H, W, 3] uint8 as H.264; H and W must be even."""
    writer = VideoWriter(path, frames.shape[2], frames.shape[1], fps)
    try:
        for frame in frames:
            writer.write(frame)
    finally:
        writer.close()
