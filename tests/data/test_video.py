"""Frames of videos by time: containers without a stream length, late starts, rounded time stamps, sparse frames."""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from shard_sets import picture

from keygrip.data import video, video_containers, video_frames, video_index
from keygrip.data.video import VideoWriter, duration_s, frames_at, read_frame, read_video, write_video
from keygrip.data.video_frames import upright_frame
from keygrip.data.video_text.conversations import decode_timed, describe_video_text


def write(
    path: Path,
    times: Sequence[float],
    fps: int,
    audio_s: float = 0.0,
    tick: int = 1000,
    b_frames: int = 0,
    noise: int = 0,
) -> Path:
    """Write a video in which the frame at `times[n]` has the shade 20 + 10 (n mod 20), with a silent sound track."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, tick)
        stream.options = {"bf": str(b_frames)}
        sound = file.add_stream("aac", rate=16000) if audio_s else None
        for number, time in enumerate(times):
            shade = rng.integers(-noise, noise + 1, (48, 64, 3)) + 20 + 10 * (number % 20)
            frame = av.VideoFrame.from_ndarray(shade.clip(0, 255).astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time * tick), Fraction(1, tick)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound is not None:
            for number in range(round(audio_s * 16000 / 1024)):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts = 16000, 1024 * number
                file.mux(sound.encode(silence))
            file.mux(sound.encode(None))
    return path


def numbers(frames: np.ndarray) -> list[int]:
    return [round((float(frame[8, 8].mean()) - 20) / 10) for frame in frames]


@pytest.mark.parametrize("ending", ["mkv", "mp4"])
@pytest.mark.parametrize("start", [0.0, 2.5])
@pytest.mark.parametrize("audio_s", [0.0, 9.0])
def test_sound_and_a_late_start_do_not_change_the_frames(
    tmp_path: Path, ending: str, start: float, audio_s: float
) -> None:
    path = write(tmp_path / f"a.{ending}", [start + n / 4 for n in range(16)], 4, audio_s)
    assert duration_s(path) == pytest.approx(4.0, abs=0.02)
    for source in (str(path), path.read_bytes()):
        assert numbers(decode_timed(source, 16, "stretch", 64)[0]) == [0, 4, 8, 12]
    if ending == "mkv":
        text = b'{"conversations": [{"turns": [{"role": "user", "text": "?"}, {"role": "assistant", "text": "!"}]}]}'
        assert describe_video_text({"mkv": path.read_bytes(), "json": text})["frames"] == 4


def test_time_stamps_in_milliseconds_lose_no_frame(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.mkv", [int(1000 * n / 3) / 1000 for n in range(9)], 3
    )  # 0, 0.333, 0.666, 1.0, ... truncated
    assert duration_s(path) == pytest.approx(2.999, abs=0.001)
    assert numbers(decode_timed(str(path), 16, "stretch", 64)[0]) == [0, 3, 6]


def test_matroska_of_few_frames_beside_longer_sound_is_read(tmp_path: Path) -> None:
    """For such files libav reports the length of the whole file for the video stream, as if the frames were cut off."""
    path = write(tmp_path / "a.mkv", [0, 1, 2, 3], 1, audio_s=20.0)
    with av.open(str(path)) as file:
        assert file.streams.video[0].duration is not None
    assert duration_s(path) == pytest.approx(4.0, abs=0.05)
    assert numbers(decode_timed(str(path), 16, "stretch", 64)[0]) == [0, 1, 2, 3]


def test_windows_media_whose_frames_begin_late_are_as_long_as_they_are_shown(tmp_path: Path) -> None:
    """Regression: its header counts from 0. For 4 seconds that begin at second 3, frames up to second 6 were
    requested."""
    with av.open(str(tmp_path / "a.wmv"), "w") as file:
        stream = file.add_stream("wmv2", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 + 10 * number, np.uint8), format="rgb24")
            frame.pts = 15 + number
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    assert duration_s(tmp_path / "a.wmv") == pytest.approx(4.0, abs=0.02)
    assert numbers(decode_timed(str(tmp_path / "a.wmv"), 16, "stretch", 64)[0]) == [0, 5, 10, 15]


def test_sparse_frames_are_those_on_show(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", [0.0, 2.5, 5.0, 5.5], 2)
    shown = frames_at(str(path), lambda _: [0, 1, 2, 2.4, 2.6, 4.9, 5.0, 5.6], lambda image: np.asarray(image))
    assert numbers(np.stack(shown)) == [0, 0, 0, 0, 1, 1, 2, 3]


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts", "avi"])
@pytest.mark.parametrize("group", [7, 250])
@pytest.mark.quick_sets(4)
def test_long_videos_are_skipped_through_to_the_same_frames(
    tmp_path: Path, ending: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The video has 100 s at 5 frames per second, frames with different shades, and B-frames. It is read from the file
    and from its bytes."""
    path = tmp_path / f"a.{ending}"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.options = {"g": str(group), "bf": "2", "sc_threshold": "0"}
        for number in range(500):
            image = np.full((32, 32, 3), 20 + number % 200, np.uint8)
            image[:16] = 20 + 40 * (number // 200)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode(None))
    sought: list[float] = []
    seek = video._from_key_frame
    monkeypatch.setattr(video, "_from_key_frame", lambda *a: (sought.append(a[2]), seek(*a))[1])

    def times(length: float) -> np.ndarray:
        return np.concatenate([np.linspace(0, length - 1, 9), [length - 0.15]])

    for source in (str(path), path.read_bytes()):
        frames = frames_at(source, times, np.asarray)
        if ending == "avi":  # it does not state when frames of this codec are shown
            assert not sought
        else:
            assert len(sought) >= (
                7 if group == 7 and ending != "ts" else 1
            )  # ts has no index: it is read from end to end
        for time, frame in zip(times(100), frames, strict=True):
            number = int(5 * time + 1e-6)
            assert abs(float(frame[24, 16, 0]) - 20 - number % 200) < 3
            assert abs(float(frame[8, 16, 0]) - 20 - 40 * (number // 200)) < 6
        monkeypatch.setattr(video, "SEEK_S", 1e9)
        for one, other in zip(frames, frames_at(source, times, np.asarray), strict=True):
            assert np.array_equal(one, other)
        monkeypatch.setattr(video, "SEEK_S", 8.0)
    with pytest.raises(ValueError, match=r"lasts 100\.\d s, but only"):
        frames_at(str(path), lambda length: [0, 50, length + 5], np.asarray)


def with_matrix(path: Path, *matrix: float) -> bytes:
    """Return a video of four colours, with the display matrix [[a, b], [c, d]] in the header of its track."""
    image = np.zeros((16, 32, 3), np.uint8)
    image[:8, 16:], image[8:, :16], image[8:, 16:] = (255, 0, 0), (0, 255, 0), (255, 255, 255)
    write_video(path, np.stack([image] * 4), 4)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 24 + 16  # of the matrix, after version, times, layer and volume
    a, b, c, d = (round(value * 65536) for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return bytes(content)


@pytest.mark.parametrize(
    ("matrix", "filters"),
    [
        ((1, 0, 0, 1), ()),
        ((0, 1, -1, 0), (("transpose", "clock"),)),
        ((-1, 0, 0, -1), (("hflip", ""), ("vflip", ""))),
        ((0, -1, 1, 0), (("transpose", "cclock"),)),
        ((-1, 0, 0, 1), (("hflip", ""),)),
        ((1, 0, 0, -1), (("vflip", ""),)),
        ((0, 1, 1, 0), (("transpose", "cclock_flip"),)),
        ((0, -1, -1, 0), (("transpose", "clock_flip"),)),
        ((2, 0, 0, -2), (("vflip", ""),)),
        ((0, 0, 0, 0), ()),
    ],
)
def test_videos_of_phones_are_upright_and_mirrored_as_ffmpeg_shows_them(
    tmp_path: Path, matrix: tuple[float, ...], filters: tuple[tuple[str, str], ...]
) -> None:
    """Frames stored rotated or mirrored, with a display matrix in the track's header, are shown upright. The filters
    are those that ffmpeg's `autorotate` inserts for the matrix (fftools/ffmpeg_filter.c)."""
    content = with_matrix(tmp_path / "a.mp4", *matrix)
    (shown,) = frames_at(content, lambda _: [0], np.asarray)
    with av.open(str(tmp_path / "a.mp4")) as file:  # the frame as stored
        graph = av.filter.Graph()
        buffer = graph.add_buffer(template=file.streams.video[0])
        graph.link_nodes(
            buffer, *(graph.add(name, given) for name, given in filters), graph.add("buffersink")
        ).configure()
        graph.push(next(file.decode(video=0)))
        wanted = graph.pull().to_ndarray(format="rgb24")
    assert shown.shape == wanted.shape
    assert ((shown > 128) == (wanted > 128)).mean() > 0.9


@pytest.mark.parametrize("matrix", [(0.7, 0.7, -0.7, 0.7), (1, 0, 0.5, 1), (-1, 0.1, 0.1, 1)])
def test_a_video_turned_by_another_angle_is_refused(tmp_path: Path, matrix: tuple[float, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"its display matrix \(.*\) turns its frames by no quarter turn: write it anew"
    ):
        frames_at(with_matrix(tmp_path / "a.mp4", *matrix), lambda _: [0], np.asarray)


def test_a_list_of_files_in_place_of_a_video_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg would read the files that the list names, also from the working directory, and show them as the video."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "secret.mp4", [0, 1], 1)
    write(tmp_path / "secret.ts", [0, 1], 1)
    lists = {
        "concat": b"ffconcat version 1.0\nfile 'secret.mp4'\n",
        "hls": b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3.0,\nsecret.ts\n#EXT-X-ENDLIST\n",
        "image": picture(90),
    }
    for name, content in lists.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(content)
        for source in (content, path, str(path)):
            with pytest.raises(ValueError, match=r"the video cannot be opened .* it is cut off or not a video"):
                frames_at(source, lambda _: [0], np.asarray)
        with pytest.raises(OSError, match=rf"{name}\.mp4: the video cannot be opened"):
            video.read_frame(path, 0)
    with pytest.raises(ValueError, match="none of the kinds of video that are read: mov, matroska, avi"):
        duration_s(lists["concat"])


@pytest.mark.parametrize(("shape", "shown"), [((2, 1), (32, 64)), ((1, 2), (64, 32)), ((4, 3), (32, 43))])
def test_pixels_that_are_not_square_are_shown_as_players_show_them(
    tmp_path: Path, shape: tuple[int, int], shown: tuple[int, int]
) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(*shape)
        for _ in range(4):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        file.mux(stream.encode(None))
    (frame,) = frames_at(str(tmp_path / "a.mkv"), lambda _: [0], np.asarray)
    assert frame.shape == (*shown, 3)


def test_a_cover_before_the_video_is_not_the_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        cover, stream = file.add_stream("mjpeg", rate=1), file.add_stream("libx264", rate=4)
        cover.width = cover.height = 16
        cover.pix_fmt = "yuvj420p"
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        file.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 + 10 * number, np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(cover.encode(None))
        file.mux(stream.encode(None))
    assert numbers(decode_timed(str(path), 32, "stretch", 64)[0]) == [0, 4, 8]
    assert read_video(path).shape == (12, 32, 32, 3)
    assert video.count_frames(path) == 12


def test_a_video_that_ends_early_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", [n / 10 for n in range(20)], 10)
    with pytest.raises(ValueError, match=r"lasts 2\.0 s, but only 2\.\d s of it can be decoded"):
        frames_at(str(path), lambda _: [0, 1, 4], lambda image: image)
    half = path.read_bytes()[: path.stat().st_size // 3]
    for content in (half, b"", b"\0" * 4000):
        with pytest.raises(ValueError, match="the video"):
            frames_at(content, lambda _: [0, 1.9], lambda image: image)


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv"])
def test_uneven_times_with_b_frames_lose_no_end(tmp_path: Path, ending: str) -> None:
    """The header of an mp4 counts in decoding order: it states 1.1 s of the 9 s."""
    path = write(tmp_path / f"a.{ending}", [n / 10 for n in range(10)] + [9.0], 10, b_frames=3)
    assert duration_s(path) == pytest.approx(9.1, abs=0.01)
    shown = frames_at(str(path), lambda _: [0, 1, 8.9, 9.05], lambda image: np.asarray(image))
    assert numbers(np.stack(shown)) == [0, 9, 9, 10]


@pytest.mark.parametrize("ending", ["mkv", "webm", "avi"])
@pytest.mark.parametrize("audio_s", [0.0, 4.0])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, ending: str, audio_s: float) -> None:
    """Its header states the original length, and the part that is there can be decoded."""
    if ending == "webm":
        path = tmp_path / "a.webm"
        write(tmp_path / "a.mkv", [n / 10 for n in range(40)], 10, audio_s, noise=60).rename(path)
    else:
        path = write(tmp_path / f"a.{ending}", [n / 10 for n in range(40)], 10, audio_s, noise=60)
    assert len(decode_timed(str(path), 16, "stretch", 64)[0]) == 4
    whole = path.read_bytes()
    for share in (0.25, 0.4):  # after that an AVI has little except its index
        with pytest.raises(ValueError, match=r"says it lasts 4\.\d s|cannot be decoded"):
            decode_timed(whole[: int(share * len(whole))], 16, "stretch", 64)


def test_a_raw_stream_without_times_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.h264"
    with av.open(str(write(tmp_path / "a.mp4", [0, 1], 1))) as file, av.open(str(path), "w", format="h264") as raw:
        stream = raw.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                raw.mux(packet)
    with pytest.raises(ValueError, match="its frames carry no times: put it into an mp4"):
        duration_s(path)


def test_writing_neither_darkens_nor_tints(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    grey = np.arange(0, 256, 5, dtype=np.uint8)[:, None].repeat(3, 1)
    uniform = np.concatenate([grey, generator.integers(10, 246, (30, 3), dtype=np.uint8)])
    down, across = np.mgrid[:48, :64]
    textured = np.stack([40 + 2.4 * across, 40 + 3.2 * down, 40 + 1.4 * (across + down)], axis=-1).astype(np.uint8)
    for name, images in (
        ("uniform", np.broadcast_to(uniform[:, None, None], (len(uniform), 48, 64, 3))),
        ("textured", np.stack([textured, textured[::-1], textured[:, ::-1]])),
    ):
        write_video(tmp_path / f"{name}.mp4", np.ascontiguousarray(images), fps=10)
        error = read_video(tmp_path / f"{name}.mp4").astype(np.float64) - images
        assert np.abs(error.mean(axis=(0, 1, 2))).max() < 0.6, name  # FFmpeg's own conversion: up to 1.4
    assert np.abs(error).mean() < 5


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "v.mp4", 64, 48, 10)
    with pytest.raises(ValueError, match=r"takes 48 x 64 x 3 uint8, not \(64, 48, 3\)"):
        writer.write(np.zeros((64, 48, 3), np.uint8))
    writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.close()


def test_a_file_named_by_a_time_of_day_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg takes the text before a colon as a protocol."""
    frames = np.stack([np.full((32, 32, 3), shade, np.uint8) for shade in (0, 90, 180)])
    write_video(tmp_path / "a.mp4", frames, 1)
    (tmp_path / "a.mp4").rename(tmp_path / "2024-05-01T10:30:00.mp4")
    monkeypatch.chdir(tmp_path)
    shades = frames_at("2024-05-01T10:30:00.mp4", lambda _: [0.0, 2.0], lambda image: np.asarray(image).mean())
    assert shades == pytest.approx([0, 180], abs=4)
    assert len(read_video(Path("2024-05-01T10:30:00.mp4"))) == 3


def test_damaged_frames_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", [n / 10 for n in range(60)], 7)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat")
    size = content.index(b"moov") - start if content.find(b"moov") > start else len(content) - start
    for n in range(30):
        content[start + size // 3 + n * size // 100] ^= 0xFF
    with pytest.raises(ValueError, match=r"damaged|cannot be decoded"):
        decode_timed(bytes(content), 16, "stretch", 64)


def test_frames_larger_than_their_header_says_are_refused() -> None:
    class Huge:
        width = height = 16000

    with pytest.raises(ValueError, match="more than the 67108864 pixels"):
        upright_frame(Huge(), None)


def growing(path: Path) -> Path:
    """Write six frames of 64 x 64 pixels, as the header states, and one of 160 x 160."""
    with av.open(str(path), "w", format="avi") as file:
        stream = file.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        for number, side in enumerate([64] * 6 + [160]):
            encoded = io.BytesIO()
            Image.new("RGB", (side, side), (90, 90, 90)).save(encoded, "JPEG")
            packet = av.Packet(encoded.getvalue())
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 10), True
            packet.pts = packet.dts = number
            packet.duration = 1
            file.mux(packet)
    return path


def test_each_frame_is_held_against_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_frame(growing(tmp_path / "whole.avi"), 6).shape == (160, 160, 3)
    monkeypatch.setattr(video_frames, "MAX_PIXELS", 100 * 100)
    path = growing(tmp_path / "a.avi")
    assert read_frame(path, 5).shape == (64, 64, 3)
    for index in (6, 6):  # also after it was refused once
        with pytest.raises(OSError, match=r"a\.avi: frame 6 .*more than the 10000 pixels"):
            read_frame(path, index)
    with pytest.raises(ValueError, match="cannot be decoded: a frame has more than the 10000 pixels"):
        read_video(path)


def test_a_frame_far_beyond_the_limit_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        video_containers, "MAX_PIXELS", 100 * 100
    )  # the decoder's limit is twice as high; the frame has 25 600
    path = growing(tmp_path / "a.avi")
    assert read_frame(path, 5).shape == (64, 64, 3)
    with pytest.raises(OSError, match=r"a\.avi: frame 6 cannot be decoded"):
        read_frame(path, 6)


def test_the_index_reads_the_stream_only_while_its_container_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.mp4", [n / 10 for n in range(8)], 10, tick=10240)
    container, stream = video_containers.open_container(path)

    class Stream:  # PyAV's is memory that closing the container frees: reading it later gives arbitrary data
        @property
        def time_base(self) -> Fraction:
            assert opened.open
            return stream.time_base

    class Container:
        open = True

        def demux(self, asked: Stream) -> Iterator[av.Packet]:
            return container.demux(stream)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            self.open = False

    opened = Container()
    monkeypatch.setattr(video_index, "open_container", lambda _: (opened, Stream()))
    with container:
        assert np.allclose(video.frame_times(path), np.arange(8) / 10)


def as_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the indices in memory, and the open containers."""
    monkeypatch.setattr(video_index, "_NOT_STORED", {})
    monkeypatch.setattr(video, "_OPEN_VIDEOS", threading.local())
    video_index._load.cache_clear()


def count_indexed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that receives each video whose packets are read."""
    indexed: list[Path] = []
    make = video_index._make_index
    monkeypatch.setattr(video_index, "_make_index", lambda path: indexed.append(path) or make(path))
    return indexed


def test_a_stored_index_replaces_reading_the_packets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demos").mkdir()
    path = write(tmp_path / "demos" / "a.mp4", [n / 10 for n in range(40)], 10, tick=10240, b_frames=2)
    made = video_index.video_index(path)
    times, frames = video.frame_times(path), [read_frame(path, n) for n in (39, 0, 17, 18)]
    assert made.times.dtype == made.keys.dtype == np.int64
    as_in_another_process(monkeypatch)
    indexed = count_indexed(monkeypatch)
    video_index.keep_indices(tmp_path / "demos", tmp_path / "cache")
    assert video.count_frames(path) == 40
    as_in_another_process(monkeypatch)
    assert np.array_equal(video.frame_times(path), times)
    for n, frame in zip((39, 0, 17, 18), frames, strict=True):
        assert np.array_equal(read_frame(path, n), frame)
    assert indexed == [path]
    assert video_index._NOT_STORED == {}
    read = video_index.video_index(path)
    assert np.array_equal(read.times, made.times)
    assert np.array_equal(read.keys, made.keys)
    assert read.unit_s == made.unit_s
    write(path, [n / 10 for n in range(30)], 10, tick=10240)  # another video of that name
    assert video.count_frames(path) == 30
    assert indexed == [path, path]


def test_indices_of_other_folders_are_not_stored(tmp_path: Path) -> None:
    (tmp_path / "demos").mkdir()
    video_index.keep_indices(tmp_path / "demos", tmp_path / "cache")
    assert video.count_frames(write(tmp_path / "a.mp4", [n / 10 for n in range(8)], 10, tick=10240)) == 8
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["no archive", "order", "keys", "unit", "pickle"])
def test_a_damaged_stored_index_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    path = write(tmp_path / "a.mp4", [n / 10 for n in range(8)], 10, tick=10240)
    video_index.keep_indices(tmp_path, tmp_path / "cache")
    index = video_index.video_index(path)
    (stored,) = (tmp_path / "cache").rglob("*.npz")
    arrays = {"times": index.times, "keys": index.keys, "unit_s": np.float64(index.unit_s)}
    wrong = {
        "order": {"times": index.times[::-1]},
        "keys": {"keys": index.keys + 1},
        "unit": {"unit_s": np.float64(np.nan)},
        "pickle": {"times": index.times.astype(object)},
    }
    if damage == "no archive":
        stored.write_bytes(stored.read_bytes()[:50])
    else:
        np.savez(stored, **(arrays | wrong[damage]))
    as_in_another_process(monkeypatch)
    indexed = count_indexed(monkeypatch)
    assert np.allclose(video.frame_times(path), np.arange(8) / 10)
    as_in_another_process(monkeypatch)
    assert video.count_frames(path) == 8
    assert indexed == [path]


def test_an_index_that_cannot_be_stored_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mp4", [n / 10 for n in range(8)], 10, tick=10240)
    (tmp_path / "cache").write_text("no folder")
    video_index.keep_indices(tmp_path, tmp_path / "cache")
    indexed = count_indexed(monkeypatch)
    assert [video.count_frames(path) for _ in range(3)] == [8, 8, 8]
    assert indexed == [path]


def test_threads_that_read_one_video_index_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mp4", [n / 10 for n in range(8)], 10, tick=10240)
    indexed = count_indexed(monkeypatch)
    started = threading.Barrier(4)

    def count(_: int) -> int:
        started.wait()
        return video.count_frames(path)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(count, range(4))) == [8] * 4
    assert indexed == [path]
    assert video_index._LOCKS == {}
