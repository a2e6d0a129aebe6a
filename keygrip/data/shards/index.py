"""The index of a shard: the position of every member in a tar file, and a row of columns per sample.

A shard set is a folder (or a URL) with ``*.tar`` files in webdataset's layout, an index ``<shard>.index.npz`` for each,
and ``manifest.json``, written last. A sample consists of all files of a tar, at any position, that share the part of
their name before the first dot; the text after the dot names the member ("json", "00.jpg", "01.jpg", ...). The index
contains the position of each member and one row of columns per sample (frames, text length, width, ...). The order of
samples, buckets and mixtures are computed from these without opening a tar. The meaning of members and columns is
defined by `keygrip.data.video_text.conversations` and `keygrip.data.image_text.samples`.
"""

from __future__ import annotations

import io
import tarfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np

from keygrip.data.bad_samples import BadSample, convert_errors
from keygrip.data.shards.keys import sample_key
from keygrip.data.shards.separate_images import group_members, media_without_text
from keygrip.data.source_files import is_utf8
from keygrip.data.untrusted_files import read_npz, regular_file

SCHEMA = "keygrip.shards/1"
MANIFEST = "manifest.json"
SPLITS = ("train", "val", "test")  # folders of a set that is divided into splits
INDEX_SUFFIX = ".index.npz"
OWN = ("keys", "first_part", "part_names", "part_offsets", "part_sizes", "part_crcs")  # arrays of an index file
END_OF_TAR = 1024  # bytes of zeros
COMPRESSED_BEGIN = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
COMPRESSED = "and samples are read at random: unpack it to a plain .tar first"
MAX_SAMPLE_BYTES = 1 << 31
MOST_FRAMES = 4096  # of any sample; in practice memory is the limit before that
MOST_PARTS = MOST_FRAMES + 64  # of a sample: its images and the texts about them
# Limits for a tar's global pax headers, which apply to every member. Tools write one or two, such as a commit hash.
MOST_PAX_HEADERS, LONGEST_PAX_HEADERS = 100, 1 << 16
# Characters. The arrays of an index are as wide as their longest entry, so that one long entry enlarges all the others.
LONGEST_KEY, LONGEST_PART, LONGEST_TEXT = 256, 128, 1024
Parts = dict[str, bytes]
Row = Mapping[str, int | float | str]
Describe = Callable[[Parts], Row]


class ShardError(ValueError):
    """A shard is cut off, is not a tar file, or does not agree with its index. The message names the shard."""


@dataclass(frozen=True)
class ShardIndex:
    """The positions of everything in a shard: N samples, M parts.

    Args:
        keys: [N] str. first_part: [N + 1] int64, sample i has the parts first_part[i] to first_part[i + 1] - 1.
        part_names: [M] str. part_offsets, part_sizes: [M] int64 bytes. part_crcs: [M] int64, CRC-32 of their bytes.
        columns: by name, [N] int64, float64 or str.
        size: of the tar, bytes. bad: samples that are left out, by key with the reason; only those that this tar alone
            shows to be bad. Samples that are divided between tars are left out by the manifest; the index contains them
            like other samples.
        textless: the samples in `bad` with images or videos but no text, by key with the names of these members; None:
            unknown, in an index made by an earlier version.
    """

    keys: np.ndarray
    first_part: np.ndarray
    part_names: np.ndarray
    part_offsets: np.ndarray
    part_sizes: np.ndarray
    part_crcs: np.ndarray
    columns: dict[str, np.ndarray]
    size: int
    bad: dict[str, str] = field(default_factory=dict)
    textless: dict[str, tuple[str, ...]] | None = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def to_bytes(self) -> bytes:
        """Return the content of an index file; the same index always gives the same bytes."""
        arrays = {
            "keys": self.keys,
            "first_part": self.first_part,
            "part_names": self.part_names,
            "part_offsets": self.part_offsets,
            "part_sizes": self.part_sizes,
            "part_crcs": self.part_crcs,
            "size": np.int64(self.size),
            **{f"column/{name}": values for name, values in self.columns.items()},
        }
        if self.bad:
            arrays |= {"bad_keys": np.array([*self.bad]), "bad_reasons": np.array([*self.bad.values()])}
        if self.bad and self.textless is not None:
            names = [name for each in self.textless.values() for name in each]
            arrays |= {
                "textless": np.array([*self.textless], dtype=np.str_),
                "textless_names": np.array(names, dtype=np.str_),
            }
            arrays["textless_counts"] = np.array([len(each) for each in self.textless.values()], dtype=np.int64)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> ShardIndex:
        """Parse the content of an index file. Raise ShardError if it is not an index; `name` is for the message."""
        try:
            arrays = read_npz(content, where=name)
            with convert_errors(name):
                columns = {k.removeprefix("column/"): v for k, v in arrays.items() if k.startswith("column/")}
                own_arrays = {key: arrays[key] for key in OWN}
                reasons = (arrays[key].tolist() for key in ("bad_keys", "bad_reasons") if key in arrays)
                bad = dict(zip(*reasons, strict=True))
                index = cls(
                    **own_arrays,
                    columns=columns,
                    size=int(arrays["size"]),
                    bad=bad,
                    textless=_parse_textless(arrays, bad),
                )
                index._check()
                return index
        except BadSample as error:
            raise ShardError(
                f"{name} is not a shard index ({error.what}): make it again with step=manifest again=true"
            ) from error

    def _check(self) -> None:
        """Raise ValueError if the arrays do not belong together or refer to positions outside the tar."""
        samples, members = len(self.keys), len(self.part_names)
        integer_arrays = (self.first_part, self.part_offsets, self.part_sizes, self.part_crcs)
        if any(values.ndim != 1 for values in (self.keys, self.part_names, *integer_arrays, *self.columns.values())):
            raise ValueError("an array has more than one dimension")
        if any(values.dtype.kind != "i" for values in integer_arrays) or {
            self.keys.dtype.kind,
            self.part_names.dtype.kind,
        } != {"U"}:
            raise ValueError("an array is of another type")
        ends = self.part_offsets.astype(np.float64) + self.part_sizes  # in float64: no overflow
        if (
            len(self.first_part) != samples + 1
            or self.first_part[0] != 0
            or self.first_part[-1] != members
            or (np.diff(self.first_part) < 0).any()
            or len(self.part_offsets) != members
            or len(self.part_sizes) != members
            or len(self.part_crcs) != members
            or any(len(values) != samples for values in self.columns.values())
            or (members and (self.part_offsets.min() < 0 or self.part_sizes.min() < 0 or ends.max() > self.size))
        ):
            raise ValueError("its arrays do not belong together")

    def without(self, keys: Collection[str]) -> ShardIndex:
        """Return the index without the samples with these keys."""
        keep = np.array([key not in keys for key in self.keys.tolist()], dtype=bool)
        counts = np.diff(self.first_part)
        members = np.repeat(keep, counts)
        return replace(
            self,
            keys=self.keys[keep],
            first_part=np.cumsum([0, *counts[keep].tolist()]),
            part_names=self.part_names[members],
            part_offsets=self.part_offsets[members],
            part_sizes=self.part_sizes[members],
            part_crcs=self.part_crcs[members],
            columns={name: values[keep] for name, values in self.columns.items()},
        )


def _parse_textless(arrays: Mapping[str, np.ndarray], bad: Mapping[str, str]) -> dict[str, tuple[str, ...]] | None:
    """Read `ShardIndex.textless` from the arrays of an index file. Raise ValueError or KeyError if they are damaged."""
    if "textless_names" not in arrays:  # no sample is bad, or an earlier version made the index
        return None if bad else {}
    names, counts = arrays["textless_names"].tolist(), arrays["textless_counts"].tolist()
    if sum(counts) != len(names) or min(counts, default=0) < 0:
        raise ValueError("its images without text do not belong together")
    remaining_names = iter(names)
    pairs = zip(arrays["textless"].tolist(), counts, strict=True)
    return {str(key): tuple(map(str, islice(remaining_names, count))) for key, count in pairs}


def make_index(
    keys: Sequence[str],
    parts: Sequence[Sequence[tuple[str, int, int, int]]],
    rows: Sequence[Row],
    size: int,
    bad: Mapping[str, str] | None = None,
) -> ShardIndex:
    """Create the index of samples whose parts are given as (name, offset, bytes, CRC-32)."""
    flat = [part for sample in parts for part in sample]
    names, offsets, sizes, crcs = zip(*flat, strict=True) if flat else ((), (), (), ())
    columns = {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    return ShardIndex(
        keys=np.array(keys, dtype=np.str_),
        first_part=np.cumsum([0, *(len(sample) for sample in parts)]),
        part_names=np.array(names, dtype=np.str_),
        part_offsets=np.array(offsets, dtype=np.int64),
        part_sizes=np.array(sizes, dtype=np.int64),
        part_crcs=np.array(crcs, dtype=np.int64),
        columns=columns,
        size=size,
        bad=dict(bad or {}),
    )


def split_name(name: str) -> tuple[str, str]:
    """Split the name of a file in a tar into key and part: "a/b.00.jpg" gives ("a/b", "00.jpg")."""
    folder, _, file = name.rpartition("/")
    stem, _, part = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), part


def lower_case(parts: Mapping[str, bytes]) -> Parts:
    """Return the parts with their names in lower case. Raise ValueError if two parts then have the same name."""
    lower = {name.lower(): content for name, content in parts.items()}
    if len(lower) < len(parts):
        raise ValueError(f"two of its members differ by upper and lower case alone: {', '.join(sorted(parts))}")
    return lower


def index_shard(path: Path, describe: Describe) -> ShardIndex:
    """Read all headers of a shard and the samples' content, and create the index. Samples that `describe` refuses are
    left out, with the reason in `bad`.

    Raises:
        ShardError: the shard is cut off (also between two files), is not a tar, or is compressed.
    """
    try:
        with convert_errors(path):
            return _index_tar(path, describe)
    except BadSample as error:
        if isinstance(error.__cause__, ShardError):
            raise error.__cause__ from None
        raise ShardError(f"{path} is not a whole tar file: {error.what}") from error


def _index_tar(path: Path, describe: Describe) -> ShardIndex:
    members = members_of(path)
    if members.fault is not None:
        raise members.fault
    gathered_parts, refused = group_members(members.parts, members.bad)
    bad = {**members.bad, **refused}
    with path.open("rb") as raw:
        rows: dict[str, Row] = {}
        crcs: dict[str, list[int]] = {}
        for key, parts in gathered_parts.items():
            if key in bad:
                continue
            try:
                if len(parts) > MOST_PARTS:  # including images that have their own keys
                    raise BadSample(
                        key, f"it has {len(parts)} parts, more than the {MOST_PARTS} that a sample may have"
                    )
                if sum(length for _, _, length in parts) > MAX_SAMPLE_BYTES:
                    raise BadSample(key, f"it has more than the {MAX_SAMPLE_BYTES} bytes that a sample may have")
                content = {}
                for name, offset, length in parts:
                    raw.seek(offset)
                    content[name] = raw.read(length)
                crcs[key] = [zlib.crc32(part) for part in content.values()]
                with convert_errors(key):
                    rows[key] = _check_row(describe(content))
            except BadSample as error:
                bad[key] = error.what
    bad |= (others := _of_another_kind(rows))
    rows = {key: row for key, row in rows.items() if key not in others}
    complete_parts = [[(*part, crc) for part, crc in zip(gathered_parts[key], crcs[key], strict=True)] for key in rows]
    index = make_index([*rows], complete_parts, [*rows.values()], members.size, bad)
    return replace(
        index, textless={key: names for key, names in media_without_text(gathered_parts).items() if key in bad}
    )


@dataclass(frozen=True)
class TarMembers:
    """The files of a tar file by sample; of a damaged tar, those before the damage.

    Args:
        size: of the tar, bytes.
        parts: by key, (name, offset, bytes) of the sample's files, at any position in the tar.
        bad: keys that cannot be samples, with the reason; they are in `parts` too. Bytes that are not UTF-8 are
            written as escapes, and a key that is too long is shortened to its end and a hash.
        fault: why the tar is not complete; None if it is. The sample in which the tar is cut off is left out.
    """

    size: int = 0
    parts: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    fault: ShardError | None = None


def members_of(path: Path) -> TarMembers:
    """Read the headers of a tar file. Hidden files, such as metadata that a file system adds, are ignored."""
    members = TarMembers()
    try:
        members = replace(members, size=regular_file(path).st_size)
        with convert_errors(path), tarfile.open(path, "r:") as tar, path.open("rb") as raw:
            _add_members(members, path, tar, raw)
    except BadSample as error:
        cause = error.__cause__
        if isinstance(cause, ShardError):
            return replace(members, fault=cause)
        if isinstance(cause, tarfile.ReadError) and not members.parts and _is_compressed(path):
            return replace(members, fault=ShardError(f"{path} is compressed, {COMPRESSED}"))
        return replace(members, fault=ShardError(f"{path} is not a whole tar file: {error.what}"))
    return members


def _add_members(members: TarMembers, path: Path, tar: tarfile.TarFile, raw: IO[bytes]) -> None:
    """Add the members from the headers to `members`.

    Raises:
        ShardError: the tar is cut off, or continues after its end, or has more global headers than any tool writes.
    """
    end, seen = 0, set[tuple[str, str]]()
    _refuse_global_headers(path, tar)
    for member in tar:
        # otherwise `tarfile` keeps all members and their headers in memory
        tar.members.clear()  # type: ignore[attr-defined]
        _refuse_global_headers(path, tar)
        key, part = split_name(unicodedata.normalize("NFC", member.name))  # macOS stores letters and accents separately
        hidden = not key.rpartition("/")[2]
        key, length = _escape_key(key)
        name = f"{key}.{_escape_key(part)[0][:LONGEST_PART]}"
        if member.size < 0 or member.offset_data < end:  # tarfile itself would loop forever
            raise ShardError(f"{path} is not a whole tar file: the size of {name} is wrong")
        # a sparse file states its size including holes, a hard link that of its target: the tar does not contain these
        end = (
            tar.offset
            if member.issparse() or not member.isfile()
            else member.offset_data + (member.size + 511) // 512 * 512
        )
        if end > members.size:
            members.parts.pop(key, None)
            raise ShardError(f"{path} is cut off in {name}")
        if member.isdir() or hidden:
            continue
        if not is_utf8(member.name):
            members.bad[key] = "its name is not UTF-8: pack its files under another one"
        elif length > LONGEST_KEY:
            members.bad[key] = f"its key has {length} characters, more than the {LONGEST_KEY} that a key may have"
        elif len(part) > LONGEST_PART:
            members.bad[key] = (
                f"its part {part[:40]!r}... has {len(part)} characters, more than the {LONGEST_PART} of one"
            )
        elif not member.isfile():
            members.bad[key] = f"its part {part!r} is a link or a device, not a file"
        elif member.issparse():
            members.bad[key] = f"its part {part!r} is stored as a sparse file: pack it without --sparse"
        parts = members.parts.setdefault(key, [])
        if len(parts) >= MOST_PARTS:
            members.bad.setdefault(
                key,
                f"it has more than the {MOST_PARTS} parts that a sample may have. Where these are several samples, a "
                "key ends at the first dot of a name: write another character for the others",
            )
            continue
        if key not in members.bad and (key, part) in seen:
            members.bad[key] = f"it has the part {part!r} twice: the key stands for two samples"
        seen.add((key, part))
        parts.append((part, member.offset_data, member.size))
    raw.seek(end)
    closing = raw.read(END_OF_TAR)
    if len(closing) < END_OF_TAR or any(closing):
        raise ShardError(f"{path} is cut off: the end mark after its {len(members.parts)} samples is missing")
    while trailing := raw.read(1 << 20):
        if any(trailing):
            raise ShardError(
                f"{path} goes on after the end mark behind its {len(members.parts)} samples: tar files joined by cat "
                "are read to the first mark alone; unpack it with `tar -xif` and pack it again"
            )


def _refuse_global_headers(path: Path, tar: tarfile.TarFile) -> None:
    """Raise ShardError if there are too many global headers: `tarfile` copies them into every member."""
    count = len(tar.pax_headers)
    length = sum(len(name) + len(value) for name, value in tar.pax_headers.items())
    if count > MOST_PAX_HEADERS or length > LONGEST_PAX_HEADERS:
        raise ShardError(
            f"{path} has {count} global pax headers, more than the {MOST_PAX_HEADERS} (or {LONGEST_PAX_HEADERS} "
            "characters) that it may have: unpack it and pack it again"
        )


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8).startswith(COMPRESSED_BEGIN)


def _escape_key(key: str) -> tuple[str, int]:
    """Return a key in a form that can be written (escapes for bytes that are not UTF-8, shortened if it is too long),
    and its original number of characters."""
    text = key.encode("utf-8", "backslashreplace").decode()
    return (text if len(text) <= LONGEST_KEY else sample_key(text)), len(text)


def _of_another_kind(rows: Mapping[str, Row]) -> dict[str, str]:
    """Return the samples whose columns are not those of most samples in their tar, by key with the reason: an index has
    one set of columns."""
    most_common = Counter(frozenset(row) for row in rows.values()).most_common(1)
    reasons = {}
    for key, row in rows.items():
        usual = most_common[0][0]
        if different := [*sorted(usual - set(row)), *sorted(set(row) - usual)]:
            reasons[key] = (
                "it is of another kind than most samples of its tar (only one of the two has "
                f"{', '.join(different[:3])}): add the parts that it lacks, or move it to a set of its own"
            )
    return reasons


def _check_row(row: Row) -> Row:
    """Return the row. Raise ValueError if an index column cannot store one of its numbers or texts."""
    for name, value in row.items():
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            raise ValueError(
                f"its {name} have {len(value)} characters, more than the {LONGEST_TEXT} that they may have"
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"its {name} is out of range")
    return row


def index_path(shard: Path) -> Path:
    """Return the path of a shard's index file, which is next to the shard."""
    return shard.with_name(shard.name + INDEX_SUFFIX)
