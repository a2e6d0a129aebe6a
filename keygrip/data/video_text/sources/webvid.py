"""WebVid: videos with a caption each. Reads the two usual layouts:

- the list of the data set (CSV with `videoid`, `page_dir`, `name`) beside `videos/<page_dir>/<videoid>.mp4`, or
- tar files with `<key>.mp4` (webm, mkv, ...) and `<key>.txt` (or `caption` in `<key>.json`), as video downloaders
  write them.
"""

from __future__ import annotations

import csv
import io
import logging
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keygrip.data.bad_samples import (
    HOSTILE,
    BadSample,
    guard,
    is_of_the_machine,
    parse_json,
    read_text,
    reason_of,
    regular_file,
)
from keygrip.data.shards.index import Parts, lower_case, split_name
from keygrip.data.shards.set_writer import Broken, MadeSample, write_shards
from keygrip.data.video_text.conversations import (
    MAX_FRAMES,
    VIDEO,
    caption,
    decode_timed,
    describe_video_text,
    encode_jpeg,
    frame_limit,
    rate_of,
    video_text_parts,
)

log = logging.getLogger(__name__)

REQUEST = "What would be the WebVid caption for this video?"  # as the published model was asked
MAX_LIST_BYTES = 1 << 33
MAX_MEMBER_BYTES = 1 << 32
COLUMNS = ("videoid", "page_dir", "name")


@dataclass(frozen=True)
class WebVidRow:
    """A line of the list."""

    key: str
    video: Path
    text: str
    problem: str = ""  # why it cannot be used

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True)
class WebVidMaker:
    """Makes samples of a line, or of all videos of a tar file: one frame per second, of longer ones `max_frames`."""

    image_size: int
    fit: str
    max_frames: int = MAX_FRAMES

    def __call__(self, item: WebVidRow | Path) -> Iterable[MadeSample | Broken]:
        if isinstance(item, WebVidRow):
            if item.problem:
                raise ValueError(item.problem)
            if not item.video.is_file():
                raise FileNotFoundError(f"{item.video} was not downloaded")
            yield self._sample(item.key, str(item.video), item.text)
            return
        try:
            for key, parts in tar_samples(item):
                name = f"{item.stem}-{key}".replace(".", "-").replace("/", "-")[-90:]
                try:
                    with guard(f"{key} of {item}"):
                        parts = lower_case(parts)
                        video = next((name for name in VIDEO if name in parts), None)
                        if video is None:
                            raise ValueError(f"it holds no video, only {', '.join(sorted(parts))}")
                        sample = self._sample(name, parts[video], _caption_in(parts))
                except BadSample as error:
                    yield Broken(str(error))
                else:
                    yield sample
        except HOSTILE as error:
            if is_of_the_machine(error):
                raise
            yield Broken(f"{item} is cut off or damaged: {reason_of(error)}; its videos up to there are kept")

    def _sample(self, key: str, video: bytes | str, text: str) -> MadeSample:
        if not text.strip():
            raise ValueError(f"{key} has no caption")
        frames, times = decode_timed(video, self.image_size, self.fit, self.max_frames)
        said = [caption(text.strip(), request=REQUEST)]
        return MadeSample(key, *video_text_parts([encode_jpeg(f) for f in frames], said, "webvid", rate_of(times)))


def _caption_in(parts: Parts) -> str:
    if "txt" in parts:
        return parts["txt"].decode()
    found = parse_json(parts["json"], "json")["caption"]
    if not isinstance(found, str):
        raise ValueError("its caption is not text")
    return found


def tar_samples(path: Path) -> Iterator[tuple[str, Parts]]:
    """Whole samples of a tar file. Raises tarfile.TarError: it is cut off; the sample at the cut is not handed out."""
    key, parts, end = None, dict[str, bytes](), 0
    regular_file(path)
    with tarfile.open(path) as tar:
        for member in tar:
            if not 0 <= member.size <= MAX_MEMBER_BYTES or member.offset_data < end:
                raise tarfile.ReadError(f"the size of {member.name} is wrong")
            end = member.offset_data + member.size
            if not member.isfile():
                continue
            name, part = split_name(member.name)
            if key is not None and (name != key or part in parts):  # a part that comes twice begins another sample
                yield key, parts
                parts = {}
            key = name
            content = tar.extractfile(member)
            assert content is not None
            parts[part] = content.read()
            if len(parts[part]) != member.size:
                raise tarfile.ReadError(f"{member.name} ends early")
        if key is not None:
            yield key, parts
        file: Any = tar.fileobj
        file.seek(tar.offset)
        while more := file.read(1 << 20):
            if any(more):
                raise tarfile.ReadError(
                    "it goes on after its end mark (several joined by cat?): unpack it by `tar -xif`"
                )


def webvid_rows(source: Path) -> list[WebVidRow]:
    """All lines of the lists in a folder, each video once, with its first caption; further ones are said in the log."""
    rows: dict[str, WebVidRow] = {}
    again: list[str] = []
    for path in sorted(source.glob("*.csv")):
        with guard(path):
            reader = csv.DictReader(io.StringIO(read_text(path, MAX_LIST_BYTES), newline=""))
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"it has no column {missing[0]!r}: is it a list of WebVid?")
            for number, line in enumerate(reader, 2):
                if not line["videoid"] or line["page_dir"] is None:
                    key = f"row {number} of {path.name}"
                    rows[key] = WebVidRow(key, source, "", f"{key}: it has no videoid or no page_dir")
                    continue
                key = line["videoid"].strip()
                video = source / "videos" / line["page_dir"].strip() / f"{key}.mp4"
                row = rows.setdefault(key, WebVidRow(key, video, line["name"] or ""))
                if row.text != (line["name"] or ""):
                    again.append(key)
    if again:
        log.warning("%d rows give a video another caption; the first is kept (%s, ...)", len(again), again[0])
    return list(rows.values())


def webvid(
    source: Path | str,
    root: Path | str,
    image_size: int = 224,
    fit: str = "crop",
    videos_per_shard: int = 500,
    workers: int | None = None,
    max_failed_share: float = 0.5,
    max_frames: int = MAX_FRAMES,
) -> dict[str, Any]:
    """Writes WebVid as shards of frames with captions.

    Args:
        source: see the module. root: of the set. image_size, fit: of the frames.
        videos_per_shard: of lists; a tar file becomes a shard. workers: processes; None: one for each core.
        max_failed_share: more missing or broken videos than this are an error.
        max_frames: of videos of more seconds, so many evenly spaced ones.

    Raises:
        FileNotFoundError: neither a list nor tar files. ValueError: max_frames out of range.
    """
    source = Path(source)
    rows: list[Any] = webvid_rows(source)
    tars: list[Any] = sorted(path for path in source.glob("*.tar") if not path.name.startswith("."))
    if not rows and not tars:
        raise FileNotFoundError(
            f"no list (*.csv beside videos/) and no tar files in {source}: download WebVid there, with its own script "
            "or a video downloader that writes tar files"
        )
    if rows and tars:
        listed = (source / "videos").is_dir()
        left = f"{len(tars)} tar files" if listed else "the lists (*.csv), beside which there is no videos/,"
        log.warning("%s: %s are not read", source, left)
        rows = rows if listed else []
    settings = {"data": "webvid", "image_size": image_size, "fit": fit, **frame_limit(max_frames)}
    maker = WebVidMaker(image_size, fit, max_frames)
    items, each = (rows, videos_per_shard) if rows else (tars, 1)
    return write_shards(
        root, items, maker, settings, each, "webvid", workers, max_failed_share, describe=describe_video_text
    ).report()
