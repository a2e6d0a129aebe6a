"""The pages of a Parquet file, described without decoding their values.

A file's footer says how many values and bytes each of its columns has, but Arrow unpacks and decodes what the header
in front of each page says; the two need not agree. The headers are structures of Thrift's compact protocol, as
parquet.thrift of the Apache Parquet format describes them.
"""

from __future__ import annotations

import collections
import io
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import pyarrow.parquet

# numbers of the format: types of pages, encodings, types of Thrift's compact protocol
DATA, DICTIONARY, DATA_V2 = 0, 2, 3
# by type of page: which field of its header has more of it, and which fields of that are always there
HEADERS = {DATA: (5, (1, 2, 3, 4)), DICTIONARY: (7, (1, 2)), DATA_V2: (8, (1, 4, 5, 6))}
PLAIN_DICTIONARY, RLE, DELTA_BYTE_ARRAY, RLE_DICTIONARY = 2, 3, 7, 8
STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, STRUCT = 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12
# codecs by the format's number, as Arrow calls them; what unpacks 5, the LZ4 of Hadoop, may not be what Arrow does
CODECS = {0: None, 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
# where a footer has its codecs: row groups, columns in them, what is said of each column
ROW_GROUPS, COLUMNS, COLUMN, CODEC = 4, 1, 3, 4
LARGEST_FOOTER = 1 << 22  # bytes of one whose codecs are looked for
MOST_FIELDS = 64  # of a header, those of its structures included, and the largest number of one; Parquet has 25 and 9
MARGIN = 100  # bytes that Arrow reads beyond a column: old writers did not count the header of its dictionary
LARGEST_BLOCK = 4096  # numbers of a block of DELTA_BINARY_PACKED that are decoded here; writers use 128 and 256
MOST_ENTRIES = 1 << 20  # of a dictionary whose texts are told apart
MOST_RUNS = 1 << 20  # of a page's numbers of a dictionary that are followed here
STEP_BYTES = 128  # what each of them counts as, and each text of a dictionary: many would take long, for no space
BATCH = 1 << 16  # numbers that are decoded at once


@dataclass(frozen=True)
class Page:
    """One page. `start`: of its content in the file. `stored`: bytes of the content there. `size`: bytes unpacked.
    `values`: their number, with those that are missing. `fields`: of the header of its kind, by number."""

    kind: int
    start: int
    stored: int
    size: int
    values: int
    fields: dict[int, Any]

    @property
    def encoding(self) -> int:
        """How the values of a page with data are encoded, by the format's number."""
        return int(self.fields[4 if self.kind == DATA_V2 else 2])


@dataclass(frozen=True)
class Texts:
    """The texts of a dictionary. `longest`: bytes of the longest one, at most. `lengths`: bytes of each [N] int64; None
    if only `longest` is known."""

    longest: int
    lengths: np.ndarray | None = None


def pages(file: BinaryIO, leaf: pyarrow.parquet.ColumnChunkMetaData) -> Iterator[Page]:
    """The pages of a part of a column that Arrow reads: until they have as many values as the footer says.

    Raises:
        ValueError: a header is none, or the file or the column's part of it ends before that.
    """
    position, seen, dictionaries = leaf.data_page_offset, 0, 0
    if leaf.has_dictionary_page and 0 < (leaf.dictionary_page_offset or 0) < position:
        position = leaf.dictionary_page_offset
    end = position + max(leaf.total_compressed_size, 0) + MARGIN
    while seen < leaf.num_values:
        file.seek(position)
        header = _structure(file)
        kind, size, stored = (header.get(number, -1) for number in (1, 2, 3))
        place, needed = HEADERS.get(kind, (0, ()))  # pages of other kinds have no values, and Arrow passes over them
        fields = header.get(place, {})
        if any(type(each) is not int or each < 0 for each in (kind, size, stored, *(fields.get(n) for n in needed))):
            raise ValueError(f"the header of a page at byte {position} is damaged")
        page = Page(kind, file.tell(), stored, size, fields.get(1, 0), fields)
        dictionaries += kind == DICTIONARY
        if dictionaries > 1:  # Arrow reads none
            raise ValueError(f"the page at byte {position} is a second dictionary of its column")
        position = page.start + page.stored
        if position > end:  # where Arrow would not read
            raise ValueError(f"the page at byte {page.start} is not within what the footer says of its column")
        seen += 0 if kind == DICTIONARY else page.values
        yield page


def text_bound(
    file: BinaryIO,
    page: Page,
    codec: Callable[[], int],
    column: pyarrow.parquet.ColumnSchema,
    texts: Texts | None,
) -> int:
    """Bytes that the texts of a data page may have beyond those of the page, because it names parts of them only.

    The page is unpacked for this, and must have been allowed for.

    Args:
        codec: gives the number of the column's codec. texts: those of the dictionary, where they come one by one and
            not as its numbers.
    """
    if page.kind not in (DATA, DATA_V2):
        return 0
    # How long the texts are stands in the page, in numbers; where those are not as writers make them, the worst is
    # assumed. Those errors are also what Arrow raises of pages that it cannot unpack.
    if page.encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY) and texts is not None:
        if texts.lengths is None:
            return page.values * texts.longest
        try:
            return _sum_of_named(bytes(_values(file, page, codec(), column)), texts.lengths, page.values)
        except (ValueError, OSError, IndexError):
            return page.values * texts.longest
    if page.encoding != DELTA_BYTE_ARRAY:
        return 0
    try:  # a text begins like the one before it, so that each may be as long as the page
        return _sum_of_deltas(_values(file, page, codec(), column), page.values)
    except (ValueError, OSError, IndexError):
        return page.values * page.size


def texts_of(file: BinaryIO, page: Page, codec: Callable[[], int]) -> Texts:
    """The lengths of the texts of a page with a dictionary, which must have been allowed for. `codec`: see above."""
    if page.values > MOST_ENTRIES:
        return Texts(page.size)
    try:
        content = _unpacked(file, page.start, page.stored, page.size, codec())
    except (ValueError, OSError, IndexError):
        return Texts(page.size)
    number = struct.Struct("<I").unpack_from
    lengths, at = [], 0
    for _ in range(page.values):
        if at + 4 > len(content):  # Arrow refuses it
            break
        (length,) = number(content, at)
        lengths.append(length)
        at += 4 + length
    found = np.minimum(np.array(lengths, np.int64), page.size)
    return Texts(int(found.max(initial=0)), found)


# ---- content ---------------------------------------------------------------------------------------------------------


def _unpacked(file: BinaryIO, start: int, stored: int, size: int, codec: int) -> memoryview:
    import pyarrow

    file.seek(start)
    content = file.read(stored)
    if codec not in CODECS:
        raise ValueError(f"pages packed by codec {codec} are not unpacked here")
    name = CODECS[codec]
    # the numbers of a buffer of Arrow's are signed
    return memoryview(pyarrow.Codec(name).decompress(content, size)).cast("B") if name else memoryview(content)


def _values(file: BinaryIO, page: Page, codec: int, column: pyarrow.parquet.ColumnSchema) -> memoryview:
    """A data page's content, without the levels of nested and missing values that come first."""
    if page.kind == DATA_V2:  # levels are not packed
        levels = page.fields[5] + page.fields[6]
        if levels > min(page.stored, page.size):
            raise ValueError("the levels are larger than their page")
        codec = 0 if page.fields.get(7) is False else codec
        return _unpacked(file, page.start + levels, page.stored - levels, page.size - levels, codec)
    content = _unpacked(file, page.start, page.stored, page.size, codec)
    at = 0
    for most, encoding in ((column.max_repetition_level, 4), (column.max_definition_level, 3)):
        if most > 0:
            if page.fields.get(encoding) != RLE:
                raise ValueError("levels of an old encoding are not read here")
            at += 4 + int.from_bytes(content[at : at + 4], "little")
    return content[at:]


def _sum_of_named(content: bytes, lengths: np.ndarray, most: int) -> int:
    """Bytes of the texts that a page names by their numbers in the dictionary, in the format's hybrid of runs and
    packed bits, and STEP_BYTES for each run. Numbers that only fill up the last eight count too if values are missing.

    Args:
        lengths: of the dictionary's texts [N] int64. most: how many texts there may be.

    Raises:
        ValueError or IndexError: they are not as writers make them, or not in the dictionary.
    """
    if not content:  # all are missing
        return 0
    width, at, left, total, runs = content[0], 1, most, 0, 0
    if width > 32:
        raise ValueError("numbers have at most 32 bits")
    number_bytes = (width + 7) // 8
    packed = bytearray()
    named: list[int] = []  # numbers that come in runs, and how often
    counts: list[int] = []
    while left > 0 and at < len(content):
        run, at = (content[at], at + 1) if content[at] < 128 else _varint(content, at)
        runs += 1
        if not 1 < run < 1 << 32 or runs > MOST_RUNS:
            raise ValueError("a run is empty or too long, or there are too many")
        if not run & 1:
            named.append(int.from_bytes(content[at : at + number_bytes], "little"))
            counts.append(min(run >> 1, left))
            at += number_bytes
            left -= run >> 1
        elif not width:
            named.append(0)
            counts.append(min(8 * (run >> 1), left))
            left -= 8 * (run >> 1)
        else:
            end = min(at + (run >> 1) * width, len(content))  # eights of numbers, each number of `width` bits
            while left > 0 and at < end:
                part = content[at : min(at + width * BATCH // 8, end)]
                at += len(part)
                packed += part + bytes(-len(part) % width)
                left -= 8 * -(-len(part) // width)
                if left <= 0 or len(packed) >= width * BATCH // 8:
                    numbers = _unpacked_bits(bytes(packed), width)
                    total += int(lengths[numbers[: len(numbers) + min(left, 0)]].sum())
                    packed.clear()
    total += int(lengths[_unpacked_bits(bytes(packed), width)].sum()) + STEP_BYTES * runs
    return total + int((lengths[np.array(named, np.int64)] * np.array(counts, np.int64)).sum())


def _unpacked_bits(packed: bytes, width: int) -> np.ndarray:
    """Numbers of `width` bits, at most 32, from N bytes, the lowest bit first: [8 * N // width] int64."""
    if not width:
        return np.zeros(0, np.int64)
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
    wide = np.zeros((len(bits) // width, 32), np.uint8)
    wide[:, :width] = bits.reshape(len(wide), width)
    return np.packbits(wide, axis=1, bitorder="little").view("<u4")[:, 0].astype(np.int64)


def _sum_of_deltas(content: memoryview, most: int) -> int:
    """The sum of numbers of 32 bits, none below 0, in the encoding DELTA_BINARY_PACKED, at the beginning of a page.

    Args:
        most: how many there may be.

    Raises:
        ValueError or IndexError: they are not as writers make them.
    """
    block, at = _varint(content, 0)
    parts, at = _varint(content, at)
    count, at = _varint(content, at)
    last, at = _zigzag(content, at)
    length = block // parts if parts else 0
    # Arrow too refuses other blocks than of 128 numbers each in parts of 32 each
    if not 0 < block <= LARGEST_BLOCK or length * parts != block or block % 128 or length % 32:
        raise ValueError("blocks are not as writers make them")
    if count > most or not 0 <= last < 1 << 31:
        raise ValueError("there are too many lengths, or one is out of range")
    stored = np.frombuffer(content, np.uint8)
    total, left = last if count else 0, count - 1
    while left > 0:
        starts: list[int] = []
        widths: list[int] = []
        leasts: list[int] = []
        while len(starts) * length < min(left, BATCH):
            least, at = _zigzag(content, at)
            if abs(least) > 1 << 32:
                raise ValueError("a length is out of range")
            needed = min(parts, -(-left // length) - len(starts))  # parts of the last block may be missing
            widths_at, at = at, at + parts
            for width in content[widths_at : widths_at + needed]:
                starts.append(at)
                at += width * length // 8
            widths += content[widths_at : widths_at + needed]
            leasts += [least] * needed
            if len(widths) < len(leasts) or at > len(content):
                raise ValueError("the page ends within a block")
        deltas = _deltas(stored, np.array(starts), np.array(widths), length) + np.array(leasts)[:, None]
        numbers = last + np.cumsum(deltas.reshape(-1)[:left])
        # Arrow's numbers have 32 bits and begin anew beyond them: one that does is not what a writer meant
        if numbers.min() < 0 or numbers.max() >= 1 << 31:
            raise ValueError("a length is out of range")
        total, last, left = total + int(numbers.sum()), int(numbers[-1]), left - len(numbers)
    return total


def _deltas(stored: np.ndarray, starts: np.ndarray, widths: np.ndarray, length: int) -> np.ndarray:
    """The numbers of parts of blocks: [P, length] int64, from the bytes of a page and each part's place and width [P].

    Raises:
        ValueError: numbers have more than 32 bits.
    """
    if widths.max() > 32:
        raise ValueError("numbers have more than 32 bits")
    found = np.zeros((len(starts), length), np.int64)
    for width in np.unique(widths[widths > 0]).tolist():
        these = np.flatnonzero(widths == width)
        places = starts[these, None] + np.arange(width * length // 8)
        found[these] = _unpacked_bits(stored[places].tobytes(), width).reshape(len(these), length)
    return found


# ---- Thrift ----------------------------------------------------------------------------------------------------------


def _structure(file: BinaryIO, depth: int = 0, left: Iterator[int] | None = None) -> dict[int, Any]:
    """The fields of a structure by number: those of 32 bits, those that are true or false, and structures in it; of
    others there is None.

    Args:
        left: gives something for each field that the header may still have.

    Raises:
        ValueError: it is none that Parquet's headers of pages have.
    """
    fields: dict[int, Any] = {}
    left = iter(range(MOST_FIELDS)) if left is None else left
    number = 0
    while (start := _byte(file)) != STOP:
        kind = start & 15
        before, number = number, number + (start >> 4) if start >> 4 else _signed(_read_varint(file))
        # Writers give fields in order. Arrow takes any, the last one of a number, and of a number its lowest 16 bits.
        if not before < number <= MOST_FIELDS or next(left, None) is None:
            raise ValueError(f"the header of a page before byte {file.tell()} is damaged")
        value: Any = None
        if kind in (TRUE, FALSE):
            value = kind == TRUE
        elif kind == BYTE:
            _byte(file)
        elif kind in (I16, I32, I64):
            value = _signed(_read_varint(file))
            value = value if kind == I32 else None
        elif kind in (DOUBLE, BINARY):
            length = 8 if kind == DOUBLE else _read_varint(file)
            if length >= 1 << 31:
                raise ValueError(f"the header of a page before byte {file.tell()} is damaged")
            file.seek(length, 1)
        elif kind == STRUCT and depth < 4:
            value = _structure(file, depth + 1, left)
        else:
            raise ValueError(f"the header of a page before byte {file.tell()} is damaged")
        if isinstance(value, int) and not -(1 << 31) <= value < 1 << 31:
            raise ValueError(f"the header of a page before byte {file.tell()} is damaged")
        fields[number] = value
    return fields


def codecs(footer: bytes) -> list[list[int]]:
    """The number of the codec of each column, by row group. Arrow ends the process where it is asked for one that it
    does not know, and only raises where it reads by it.

    Raises:
        ValueError: the footer is not as writers make it, or too large.
    """
    if len(footer) > LARGEST_FOOTER:
        raise ValueError("the footer is too large")
    wanted: dict[int, Any] = {ROW_GROUPS: {COLUMNS: {COLUMN: {CODEC: {}}}}}
    try:
        groups = _skimmed(io.BytesIO(footer), STRUCT, wanted)[ROW_GROUPS]
        return [[int(column[COLUMN][CODEC]) for column in group[COLUMNS]] for group in groups]
    except (LookupError, TypeError) as error:
        raise ValueError("the footer lacks the codec of a column") from error


def _skimmed(file: BinaryIO, kind: int, wanted: dict[int, Any] | None, depth: int = 0) -> Any:
    """A number, a list, or a structure with the fields that are wanted, by number, each with what is wanted of it.

    Raises:
        ValueError: it is none that Parquet's footers have.
    """
    if kind == LIST and depth < 16:
        start = _byte(file)
        count = start >> 4 if start >> 4 < 15 else _read_varint(file)
        values = (_skimmed(file, start & 15, wanted, depth + 1) for _ in range(count))
        return collections.deque(values, None if wanted is not None else 0)
    if kind == STRUCT and depth < 16:
        fields, number = {}, 0
        while (start := _byte(file)) != STOP:
            before, number = number, number + (start >> 4) if start >> 4 else _signed(_read_varint(file))
            if not before < number <= MOST_FIELDS:
                raise ValueError("the footer has fields that no writer makes")
            inner = None if wanted is None else wanted.get(number)
            value = None if start & 15 in (TRUE, FALSE) else _skimmed(file, start & 15, inner, depth + 1)
            if inner is not None:
                fields[number] = value
        return fields
    if kind in (I16, I32, I64):
        return _signed(_read_varint(file))
    if kind not in (TRUE, FALSE, BYTE, DOUBLE, BINARY):
        raise ValueError("the footer has fields that no writer makes")
    length = 8 if kind == DOUBLE else _read_varint(file) if kind == BINARY else 1
    file.seek(min(length, LARGEST_FOOTER), 1)  # nothing is found behind its end
    return None


def _byte(file: BinaryIO) -> int:
    found = file.read(1)
    if not found:
        raise ValueError("the file ends before the values that its footer counts")
    return found[0]


def _read_varint(file: BinaryIO) -> int:
    value = shift = 0
    while True:
        part = _byte(file)
        value |= (part & 127) << shift
        if part < 128:
            return value
        shift += 7
        if shift > 63:
            raise ValueError(f"the header of a page before byte {file.tell()} is damaged")


def _varint(content: memoryview | bytes, at: int) -> tuple[int, int]:
    """A number of at most 64 bits, and where the next one begins."""
    value = 0
    for shift in range(0, 64, 7):
        part, at = content[at], at + 1
        value |= (part & 127) << shift
        if part < 128:
            return value, at
    raise ValueError("a number has more than 64 bits")


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)


def _zigzag(content: memoryview, at: int) -> tuple[int, int]:
    value, at = _varint(content, at)
    return _signed(value), at
