"""WebVid: videos with one caption each. Reads the two common layouts:

- the list of the data set (CSV with `videoid`, `page_dir`, `name`) next to `videos/<page_dir>/<videoid>.mp4`, or
- tar files with `<key>.mp4` (webm, mkv, ...) and `<key>.txt` (or `caption` in `<key>.json`; if both exist, the txt is
  used), as video downloaders write them; the parts of a key may be anywhere in their tar file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keygrip.data.bad_samples import BadSample, convert_errors
from keygrip.data.csv_tables import table_rows
from keygrip.data.shards.index import COMPRESSED, Parts, lower_case, members_of
from keygrip.data.shards.keys import sample_key
from keygrip.data.shards.separate_images import TEXT
from keygrip.data.shards.set_writer import Broken, MadeSample, write_shards
from keygrip.data.shards.writer import compressed_shards, tar_files
from keygrip.data.source_files import file_below, files_in, refuse_written_into_source
from keygrip.data.untrusted_files import parse_fields, read_text
from keygrip.data.video_text.conversations import (
    MAX_FRAMES,
    VIDEO,
    caption,
    decode_timed,
    describe_video_text,
    encode_jpeg,
    media_of,
    rate_of,
    shard_frame_settings,
    video_text_parts,
)
from keygrip.data.video_text.foreign_text import REQUESTS

log = logging.getLogger(__name__)

REQUEST = REQUESTS["webvid"]
MAX_LIST_BYTES = 1 << 33
MAX_VIDEO_BYTES = 1 << 32  # including its text
COLUMNS = ("videoid", "page_dir", "name")


@dataclass(frozen=True)
class WebVidRow:
    """A row of the list."""

    key: str
    video: Path
    text: str
    problem: str = ""  # why the row cannot be used

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True)
class WebVidMaker:
    """Makes samples from a row, or from all videos of a tar file: one frame per second, at most `max_frames`."""

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
        for entry in tar_samples(item):
            if isinstance(entry, Broken):
                yield entry
                continue
            key, parts = entry
            try:
                with convert_errors(f"{key} of {item}"):
                    video, text = _video_name(parts), _find_caption(parts)
                    sample = self._sample(sample_key(f"{item.stem}-{key}"), parts[video], text)
            except BadSample as error:
                yield Broken(str(error))
            else:
                yield sample

    def _sample(self, key: str, video: bytes | str, text: str) -> MadeSample:
        if not text.strip():
            raise ValueError(f"{key} has no caption")
        frames, times = decode_timed(video, self.image_size, self.fit, self.max_frames)
        conversations = [caption(text.strip(), request=REQUEST)]
        return MadeSample(
            key, *video_text_parts([encode_jpeg(f) for f in frames], conversations, "webvid", rate_of(times))
        )


def _video_name(parts: Parts) -> str:
    """Return the name of the only video. Raise ValueError if there are several."""
    video, _ = media_of({name: content for name, content in parts.items() if name in VIDEO})
    assert video is not None
    return video


def _find_caption(parts: Parts) -> str:
    """Return the caption. Raise ValueError if there is none."""
    if "txt" in parts:
        return parts["txt"].decode("utf-8-sig")
    if "json" not in parts:
        raise ValueError("it has no caption: neither txt nor json")
    content = parse_fields(parts["json"], "json", ["caption"])
    text = content.get("caption") if isinstance(content, Mapping) else None
    if text is None:
        has_key = isinstance(content, Mapping) and "caption" in content
        raise ValueError(f"it has no caption: no txt, and {'a null as' if has_key else 'no'} `caption` in its json")
    if not isinstance(text, str):
        raise ValueError("its caption is not text")
    return text


def tar_samples(path: Path) -> Iterator[tuple[str, Parts] | Broken]:
    """Yield the key, video and text of every sample in a tar file, with part names in lower case, or the reason why the
    sample cannot be used. For a tar file that is cut off, yield the samples before the cut."""
    listing = members_of(path)
    yield from (Broken(f"{key} of {path}: {reason}") for key, reason in listing.bad.items())
    for key, members in listing.parts.items():
        if key in listing.bad:
            continue
        try:
            with convert_errors(f"{key} of {path}"):
                parts = _read_parts(path, members)
        except BadSample as error:
            yield Broken(str(error))
        else:
            yield key, parts
    if listing.fault is not None:
        yield Broken(f"{listing.fault}; its videos up to there are kept")


def _read_parts(path: Path, members: Sequence[tuple[str, int, int]]) -> Parts:
    """Read the video and the text of a sample. Raise ValueError if there is no video, or it is too large."""
    used_members = [member for member in members if member[0].lower() in (*VIDEO, *TEXT)]
    if not any(name.lower() in VIDEO for name, _, _ in used_members):
        raise ValueError(f"it holds no video, only {', '.join(sorted(name for name, _, _ in members))}")
    if sum(size for _, _, size in used_members) > MAX_VIDEO_BYTES:
        raise ValueError(f"it has more than the {MAX_VIDEO_BYTES} bytes that a video may have")
    parts = {}
    with path.open("rb") as file:
        for name, offset, size in used_members:
            file.seek(offset)
            parts[name] = file.read(size)
    return lower_case(parts)


def webvid_rows(source: Path) -> list[WebVidRow]:
    """Return the rows of the lists in a folder, each video once with its first caption; further captions are logged."""
    rows: dict[str, WebVidRow] = {}
    repeated_keys: list[str] = []
    for path in files_in(source, ".csv"):
        with convert_errors(path):
            text = read_text(path, MAX_LIST_BYTES)
            for number, (_, line) in enumerate(table_rows(text, COLUMNS, "a list of WebVid"), 2):
                if not line["videoid"] or line["page_dir"] is None:
                    key = f"row {number} of {path.name}"
                    rows[key] = WebVidRow(key, source, "", f"{key}: it has no videoid or no page_dir")
                    continue
                key = line["videoid"].strip()
                try:
                    video = file_below(source, source / "videos" / line["page_dir"].strip(), f"{key}.mp4")
                    if "/" in key:  # the videoid becomes the sample's key in its shard
                        raise ValueError(f"its videoid {key[:200]!r} is a path")
                except ValueError as error:
                    key = f"row {number} of {path.name}"
                    rows[key] = WebVidRow(key, source, "", f"{key}: {error}")
                    continue
                row = rows.setdefault(key, WebVidRow(sample_key(key), video, line["name"] or ""))
                if row.text != (line["name"] or ""):
                    repeated_keys.append(key)
    if repeated_keys:
        log.warning(
            "%d rows give a video another caption; the first is kept (%s, ...)", len(repeated_keys), repeated_keys[0]
        )
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
    """Write WebVid as shards of frames with captions.

    Args:
        source: see the module. root: of the set. image_size, fit: of the frames.
        videos_per_shard: for lists; a tar file becomes one shard. workers: processes; None: one per core.
        max_failed_share: a larger share of missing or broken videos, or of compressed tar files, is an error.
        max_frames: number of evenly spaced frames for videos with more seconds.

    Raises:
        FileNotFoundError: there is neither a list nor a tar file. ValueError: max_frames is out of range, or too many
            videos are broken.
    """
    refuse_written_into_source(root, source, below=False)
    source = Path(source)
    rows, tars, compressed = webvid_rows(source), tar_files(source), compressed_shards(source)
    if not rows and not tars:
        hint = f"; {compressed[0].name} is compressed, {COMPRESSED}" if compressed else ""
        raise FileNotFoundError(
            f"no list (*.csv beside videos/) and no tar files in {source}: download WebVid there, with its own script "
            f"or a video downloader that writes tar files{hint}"
        )
    by_list = bool(rows) and (not tars or (source / "videos").is_dir())
    if by_list and (tars or compressed):
        log.warning("%s: %d tar files are not read", source, len(tars) + len(compressed))
    if by_list:
        compressed = []
    elif rows:
        log.warning("%s: the lists (*.csv), beside which there is no videos/, are not read", source)
    for path in compressed:
        log.warning("left out: %s is compressed, %s", path, COMPRESSED)
    if len(compressed) > max_failed_share * (len(tars) + len(compressed)):
        raise ValueError(
            f"{len(compressed)} of {len(tars) + len(compressed)} tar files in {source} are compressed, more than "
            f"max_failed_share={max_failed_share:g} allows; {compressed[0].name} is compressed, {COMPRESSED}"
        )
    settings = {"data": "webvid", **shard_frame_settings(image_size, fit, max_frames)}
    maker = WebVidMaker(image_size, fit, max_frames)
    items: Sequence[WebVidRow] | Sequence[Path] = rows if by_list else tars
    items_per_shard = videos_per_shard if by_list else 1
    written = write_shards(
        root, items, maker, settings, items_per_shard, "webvid", workers, max_failed_share, describe=describe_video_text
    )
    written.failed += len(compressed)
    return written.report()
