"""The pages of a Parquet file, described without decoding their values.

A file's footer says how many values and bytes each of its columns has, but Arrow unpacks and decodes what the header
in front of each page says; the two need not agree. The headers are structures of Thrift's compact protocol, as
parquet.thrift of the Apache Parquet format describes them.
"""

from __future__ import annotations

from collections.abc import Iterator
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
STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, STRUCT = 0, 1, 2, 3, 4, 5, 6, 7, 8, 12
CODECS = {"SNAPPY": "snappy", "GZIP": "gzip", "BROTLI": "brotli", "ZSTD": "zstd"}
LARGEST_BLOCK = 4096  # numbers of a block of DELTA_BINARY_PACKED that are decoded here; writers use 128 and 256
MOST_ENTRIES = 1 << 20  # of a dictionary that is searched for its longest text


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


def pages(file: BinaryIO, leaf: pyarrow.parquet.ColumnChunkMetaData) -> Iterator[Page]:
    """The pages of a part of a column that Arrow reads: until they have as many values as the footer says.

    Raises:
        ValueError: a header is none, or the file ends before that.
    """
    position, seen = leaf.data_page_offset, 0
    if leaf.has_dictionary_page and 0 < (leaf.dictionary_page_offset or 0) < position:
        position = leaf.dictionary_page_offset
    while seen < leaf.num_values:
        file.seek(position)
        header = _structure(file)
        kind, size, stored = (header.get(number, -1) for number in (1, 2, 3))
        place, needed = HEADERS.get(kind, (0, ()))  # pages of other kinds have no values, and Arrow passes over them
        fields = header.get(place, {})
        if any(type(each) is not int or each < 0 for each in (kind, size, stored, *(fields.get(n) for n in needed))):
            raise ValueError(f"the header of a page at byte {position} is damaged")
        page = Page(kind, file.tell(), stored, size, fields.get(1, 0), fields)
        position = page.start + page.stored
        seen += 0 if kind == DICTIONARY else page.values
        yield page


def text_bound(
    file: BinaryIO,
    page: Page,
    leaf: pyarrow.parquet.ColumnChunkMetaData,
    column: pyarrow.parquet.ColumnSchema,
    longest: int,
) -> int:
    """Bytes that the texts of a data page may have beyond those of the page, because it names parts of them only.

    The page is unpacked for this, and must have been allowed for.

    Args:
        longest: bytes of the longest text of the dictionary, where texts come one by one and not as its numbers.
    """
    if page.kind not in (DATA, DATA_V2):
        return 0
    if page.encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY):
        return page.values * longest
    if page.encoding != DELTA_BYTE_ARRAY:
        return 0
    # A text begins like the one before it, so that each may be as long as the page. How much they really repeat stands
    # at the beginning of the page, in numbers; where those are not as writers make them, the worst is assumed.
    try:
        return _sum_of_deltas(_values(file, page, leaf, column), page.values)
    except (ValueError, OSError, IndexError):  # also what Arrow raises of pages that it cannot unpack
        return page.values * page.size


def longest_text(file: BinaryIO, page: Page, leaf: pyarrow.parquet.ColumnChunkMetaData) -> int:
    """Bytes of the longest text of a page with a dictionary, at most; the page must have been allowed for."""
    if page.values > MOST_ENTRIES:
        return page.size
    try:
        content = _unpacked(file, page.start, page.stored, page.size, leaf.compression)
    except (ValueError, OSError):
        return page.size
    longest = at = 0
    for _ in range(page.values):
        if at >= len(content):
            break
        length = int.from_bytes(content[at : at + 4], "little")
        longest = max(longest, length)
        at += 4 + length
    return min(longest, page.size)


# ---- content ---------------------------------------------------------------------------------------------------------


def _unpacked(file: BinaryIO, start: int, stored: int, size: int, compression: str) -> memoryview:
    import pyarrow

    file.seek(start)
    content = file.read(stored)
    if compression == "UNCOMPRESSED":
        return memoryview(content)
    if compression not in CODECS:
        raise ValueError(f"pages packed by {compression} are not unpacked here")
    return memoryview(pyarrow.Codec(CODECS[compression]).decompress(content, size)).cast("B")  # not signed


def _values(
    file: BinaryIO, page: Page, leaf: pyarrow.parquet.ColumnChunkMetaData, column: pyarrow.parquet.ColumnSchema
) -> memoryview:
    """A data page's content, without the levels of nested and missing values that come first."""
    if page.kind == DATA_V2:  # levels are not packed
        levels = page.fields[5] + page.fields[6]
        if levels > min(page.stored, page.size):
            raise ValueError("the levels are larger than their page")
        compression = "UNCOMPRESSED" if page.fields.get(7) is False else leaf.compression
        return _unpacked(file, page.start + levels, page.stored - levels, page.size - levels, compression)
    content = _unpacked(file, page.start, page.stored, page.size, leaf.compression)
    at = 0
    for most, encoding in ((column.max_repetition_level, 4), (column.max_definition_level, 3)):
        if most > 0:
            if page.fields.get(encoding) != RLE:
                raise ValueError("levels of an old encoding are not read here")
            at += 4 + int.from_bytes(content[at : at + 4], "little")
    return content[at:]


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
    if not 0 < block <= LARGEST_BLOCK or length * parts != block or length % 8 or count > most or last < 0:
        raise ValueError("this is not DELTA_BINARY_PACKED as writers make it")
    total, left = last if count else 0, count - 1
    while left > 0:
        least, at = _zigzag(content, at)
        widths, at = content[at : at + parts], at + parts
        if len(widths) < parts:
            raise ValueError("the page ends within a block")
        for width in widths:
            if left <= 0:
                break
            packed = np.frombuffer(content[at : at + width * length // 8], np.uint8)
            if width > 32 or abs(least) > 1 << 32 or len(packed) < width * length // 8:
                raise ValueError("the page ends within a block, or its numbers are too large")
            at += len(packed)
            bits = np.unpackbits(packed, bitorder="little").reshape(length, width)
            deltas = bits @ (1 << np.arange(width, dtype=np.int64)) + least
            numbers = last + np.cumsum(deltas[:left])
            # Arrow's numbers have 32 bits and begin anew beyond them: one that does is not what a writer meant
            if numbers.min() < 0 or numbers.max() >= 1 << 31:
                raise ValueError("a length is out of range")
            total, last, left = total + int(numbers.sum()), int(numbers[-1]), left - length
    return total


# ---- Thrift ----------------------------------------------------------------------------------------------------------


def _structure(file: BinaryIO, depth: int = 0) -> dict[int, Any]:
    """The fields of a structure by number: those of 32 bits, those that are true or false, and structures in it; others
    are left out.

    Raises:
        ValueError: it is none that Parquet's headers of pages have.
    """
    fields: dict[int, Any] = {}
    number = 0
    while (start := _byte(file)) != STOP:
        kind = start & 15
        number = number + (start >> 4) if start >> 4 else _signed(_read_varint(file))
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
            file.seek(length, 1)
        elif kind == STRUCT and depth < 4:
            value = _structure(file, depth + 1)
        else:
            raise ValueError(f"the header of a page before byte {file.tell()} is damaged")
        # Of a field that comes twice, the last one would count: no writer makes one.
        if number <= 0 or number in fields or (isinstance(value, int) and not -(1 << 31) <= value < 1 << 31):
            raise ValueError(f"the header of a page before byte {file.tell()} is damaged")
        fields[number] = value
    return fields


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


def _varint(content: memoryview, at: int) -> tuple[int, int]:
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
