"""Read the page headers of a Parquet file without decoding the values.

A file's footer states how many values and bytes each column has, but Arrow decompresses and decodes according to the
header in front of each page. The two need not agree. The headers are structures of Thrift's compact protocol, defined
in parquet.thrift of the Apache Parquet format.
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

# constants of the format: types of pages, encodings, types of Thrift's compact protocol
DATA, DICTIONARY, DATA_V2 = 0, 2, 3
# by type of page: the field of its header that holds the header of this type, and the required fields of the latter
HEADERS = {DATA: (5, (1, 2, 3, 4)), DICTIONARY: (7, (1, 2)), DATA_V2: (8, (1, 4, 5, 6))}
PLAIN_DICTIONARY, RLE, DELTA_BYTE_ARRAY, RLE_DICTIONARY = 2, 3, 7, 8
STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, STRUCT = 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12
# Arrow's names of the codecs by their number in the format. Number 5, Hadoop's LZ4, is left out: a decompressor used
# here may not agree with Arrow's.
CODECS = {0: None, 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
# field numbers that lead to a codec in the footer: row groups, their columns, metadata of a column, its codec
ROW_GROUPS, COLUMNS, COLUMN, CODEC = 4, 1, 3, 4
LARGEST_FOOTER = 1 << 22  # bytes; codecs are not read from larger footers
MOST_FIELDS = 64  # fields in a header, nested ones included; also the largest field number. Parquet has 25 and 9
MARGIN = 100  # bytes that Arrow reads beyond a column: old writers did not count the header of its dictionary
LARGEST_BLOCK = 4096  # values in a DELTA_BINARY_PACKED block that is decoded here; writers use 128 and 256
MOST_ENTRIES = 1 << 20  # entries of a dictionary whose texts are measured one by one
MOST_RUNS = 1 << 20  # runs of dictionary indices in a page that are decoded here
STEP_BYTES = 128  # counted for each run and each dictionary text: many of them take long, though no memory
BATCH = 1 << 16  # values that are decoded at once


@dataclass(frozen=True)
class Page:
    """One page. `start`: offset of its content in the file. `stored`: bytes of the content in the file. `size`: bytes
    after decompression. `values`: number of values, nulls included. `fields`: of the type-specific header, by number.
    """

    kind: int
    start: int
    stored: int
    size: int
    values: int
    fields: dict[int, Any]

    @property
    def encoding(self) -> int:
        """Encoding of the values of a data page, as the format's number."""
        return int(self.fields[4 if self.kind == DATA_V2 else 2])


@dataclass(frozen=True)
class Texts:
    """The lengths of a dictionary's texts. `longest`: an upper bound for the bytes of the longest text. `lengths`:
    bytes of each text [N] int64; None if only `longest` is known."""

    longest: int
    lengths: np.ndarray | None = None


def pages(file: BinaryIO, leaf: pyarrow.parquet.ColumnChunkMetaData) -> Iterator[Page]:
    """Yield the pages of a column chunk that Arrow reads, until they have as many values as the footer states.

    Raises:
        ValueError: a header is invalid, or the file or the column chunk ends too early.
    """
    position, value_count, dictionaries = leaf.data_page_offset, 0, 0
    if leaf.has_dictionary_page and 0 < (leaf.dictionary_page_offset or 0) < position:
        position = leaf.dictionary_page_offset
    end = position + max(leaf.total_compressed_size, 0) + MARGIN
    while value_count < leaf.num_values:
        file.seek(position)
        header = _read_structure(file)
        kind, size, stored = (header.get(field_id, -1) for field_id in (1, 2, 3))
        header_id, needed = HEADERS.get(kind, (0, ()))  # pages of other kinds have no values, and Arrow skips them
        fields = header.get(header_id, {})
        if any(type(each) is not int or each < 0 for each in (kind, size, stored, *(fields.get(n) for n in needed))):
            raise ValueError(f"the header of a page at byte {position} is damaged")
        page = Page(kind, file.tell(), stored, size, fields.get(1, 0), fields)
        dictionaries += kind == DICTIONARY
        if dictionaries > 1:  # Arrow does not read a second dictionary
            raise ValueError(f"the page at byte {position} is a second dictionary of its column")
        position = page.start + page.stored
        if position > end:  # Arrow would not read there
            raise ValueError(f"the page at byte {page.start} is not within what the footer says of its column")
        value_count += 0 if kind == DICTIONARY else page.values
        yield page


def text_bound(
    file: BinaryIO,
    page: Page,
    codec: Callable[[], int],
    column: pyarrow.parquet.ColumnSchema,
    texts: Texts | None,
) -> int:
    """Return an upper bound for the bytes of a data page's texts beyond the page's own size. Texts can be larger than
    their page because the page stores only dictionary indices or differences to the previous text.

    The page is decompressed for this; its size must already have been counted against the allowance.

    Args:
        codec: returns the number of the column's codec. texts: those of the dictionary, if Arrow decodes the texts one
            by one and not as dictionary indices.
    """
    if page.kind not in (DATA, DATA_V2):
        return 0
    # The page contains the lengths of the texts as integers. If they are not encoded as writers do it, the worst case
    # is assumed. Arrow raises the same errors for pages that it cannot decompress.
    if page.encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY) and texts is not None:
        if texts.lengths is None:
            return page.values * texts.longest
        try:
            return _sum_dictionary_text_bytes(
                bytes(_read_page_values(file, page, codec(), column)), texts.lengths, page.values
            )
        except (ValueError, OSError, IndexError):
            return page.values * texts.longest
    if page.encoding != DELTA_BYTE_ARRAY:
        return 0
    try:  # a text may share a prefix with the previous text, so each text may be as long as the page
        return _sum_delta_packed(_read_page_values(file, page, codec(), column), page.values)
    except (ValueError, OSError, IndexError):
        return page.values * page.size


def texts_of(file: BinaryIO, page: Page, codec: Callable[[], int]) -> Texts:
    """Return the lengths of the texts in a dictionary page. Its size must already have been counted against the
    allowance. `codec`: see `text_bound`."""
    if page.values > MOST_ENTRIES:
        return Texts(page.size)
    try:
        content = _decompress_page(file, page.start, page.stored, page.size, codec())
    except (ValueError, OSError, IndexError):
        return Texts(page.size)
    read_uint32 = struct.Struct("<I").unpack_from
    lengths, offset = [], 0
    for _ in range(page.values):
        if offset + 4 > len(content):  # Arrow refuses such a dictionary
            break
        (length,) = read_uint32(content, offset)
        lengths.append(length)
        offset += 4 + length
    clipped_lengths = np.minimum(np.array(lengths, np.int64), page.size)
    return Texts(int(clipped_lengths.max(initial=0)), clipped_lengths)


# ---- content ---------------------------------------------------------------------------------------------------------


def _decompress_page(file: BinaryIO, start: int, stored: int, size: int, codec: int) -> memoryview:
    import pyarrow

    file.seek(start)
    content = file.read(stored)
    if codec not in CODECS:
        raise ValueError(f"pages packed by codec {codec} are not unpacked here")
    name = CODECS[codec]
    # the bytes of an Arrow buffer are signed
    return memoryview(pyarrow.Codec(name).decompress(content, size)).cast("B") if name else memoryview(content)


def _read_page_values(file: BinaryIO, page: Page, codec: int, column: pyarrow.parquet.ColumnSchema) -> memoryview:
    """Return a data page's content without the repetition and definition levels at its beginning."""
    if page.kind == DATA_V2:  # levels are not compressed
        levels = page.fields[5] + page.fields[6]
        if levels > min(page.stored, page.size):
            raise ValueError("the levels are larger than their page")
        codec = 0 if page.fields.get(7) is False else codec
        return _decompress_page(file, page.start + levels, page.stored - levels, page.size - levels, codec)
    content = _decompress_page(file, page.start, page.stored, page.size, codec)
    offset = 0
    for most, encoding in ((column.max_repetition_level, 4), (column.max_definition_level, 3)):
        if most > 0:
            if page.fields.get(encoding) != RLE:
                raise ValueError("levels of an old encoding are not read here")
            offset += 4 + int.from_bytes(content[offset : offset + 4], "little")
    return content[offset:]


def _sum_dictionary_text_bytes(content: bytes, lengths: np.ndarray, max_texts: int) -> int:
    """Sum the bytes of the texts that a page refers to by dictionary index (in the format's hybrid of runs and packed
    bits), plus STEP_BYTES per run. If values are null, the padding of the last group of eight indices counts too.

    Args:
        lengths: of the dictionary's texts [N] int64. max_texts: largest number of texts.

    Raises:
        ValueError or IndexError: the indices are not encoded as writers do it, or are not in the dictionary.
    """
    if not content:  # all values are null
        return 0
    width, offset, remaining, total, runs = content[0], 1, max_texts, 0, 0
    if width > 32:
        raise ValueError("numbers have at most 32 bits")
    number_bytes = (width + 7) // 8
    packed = bytearray()
    repeated_indices: list[int] = []  # the repeated index of each run; `counts` has the number of repetitions
    counts: list[int] = []
    while remaining > 0 and offset < len(content):
        run, offset = (content[offset], offset + 1) if content[offset] < 128 else _parse_varint(content, offset)
        runs += 1
        if not 1 < run < 1 << 32 or runs > MOST_RUNS:
            raise ValueError("a run is empty or too long, or there are too many")
        if not run & 1:
            repeated_indices.append(int.from_bytes(content[offset : offset + number_bytes], "little"))
            counts.append(min(run >> 1, remaining))
            offset += number_bytes
            remaining -= run >> 1
        elif not width:
            repeated_indices.append(0)
            counts.append(min(8 * (run >> 1), remaining))
            remaining -= 8 * (run >> 1)
        else:
            end = min(offset + (run >> 1) * width, len(content))  # groups of eight indices, each of `width` bits
            while remaining > 0 and offset < end:
                chunk = content[offset : min(offset + width * BATCH // 8, end)]
                offset += len(chunk)
                packed += chunk + bytes(-len(chunk) % width)
                remaining -= 8 * -(-len(chunk) // width)
                if remaining <= 0 or len(packed) >= width * BATCH // 8:
                    indices = _unpack_bits(bytes(packed), width)
                    total += int(lengths[indices[: len(indices) + min(remaining, 0)]].sum())
                    packed.clear()
    total += int(lengths[_unpack_bits(bytes(packed), width)].sum()) + STEP_BYTES * runs
    return total + int((lengths[np.array(repeated_indices, np.int64)] * np.array(counts, np.int64)).sum())


def _unpack_bits(packed: bytes, width: int) -> np.ndarray:
    """Unpack integers of `width` bits, at most 32, from N bytes, the lowest bit first: [8 * N // width] int64."""
    if not width:
        return np.zeros(0, np.int64)
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
    wide = np.zeros((len(bits) // width, 32), np.uint8)
    wide[:, :width] = bits.reshape(len(wide), width)
    return np.packbits(wide, axis=1, bitorder="little").view("<u4")[:, 0].astype(np.int64)


def _sum_delta_packed(content: memoryview, max_integers: int) -> int:
    """Sum non-negative 32-bit integers in the encoding DELTA_BINARY_PACKED at the beginning of a page.

    Args:
        max_integers: the largest number of integers.

    Raises:
        ValueError or IndexError: they are not encoded as writers do it.
    """
    block, offset = _parse_varint(content, 0)
    miniblocks, offset = _parse_varint(content, offset)
    count, offset = _parse_varint(content, offset)
    last, offset = _parse_signed_varint(content, offset)
    length = block // miniblocks if miniblocks else 0
    # Arrow also requires that blocks have a multiple of 128 values, and their miniblocks a multiple of 32
    if not 0 < block <= LARGEST_BLOCK or length * miniblocks != block or block % 128 or length % 32:
        raise ValueError("blocks are not as writers make them")
    if count > max_integers or not 0 <= last < 1 << 31:
        raise ValueError("there are too many lengths, or one is out of range")
    stored = np.frombuffer(content, np.uint8)
    total, remaining = last if count else 0, count - 1
    while remaining > 0:
        starts: list[int] = []
        widths: list[int] = []
        min_deltas: list[int] = []
        while len(starts) * length < min(remaining, BATCH):
            min_delta, offset = _parse_signed_varint(content, offset)
            if abs(min_delta) > 1 << 32:
                raise ValueError("a length is out of range")
            needed = min(miniblocks, -(-remaining // length) - len(starts))  # the last block may have fewer
            widths_offset, offset = offset, offset + miniblocks
            for width in content[widths_offset : widths_offset + needed]:
                starts.append(offset)
                offset += width * length // 8
            widths += content[widths_offset : widths_offset + needed]
            min_deltas += [min_delta] * needed
            if len(widths) < len(min_deltas) or offset > len(content):
                raise ValueError("the page ends within a block")
        deltas = _decode_miniblocks(stored, np.array(starts), np.array(widths), length) + np.array(min_deltas)[:, None]
        values = last + np.cumsum(deltas.reshape(-1)[:remaining])
        # Arrow's 32-bit integers overflow beyond this range: such values do not come from a correct writer
        if values.min() < 0 or values.max() >= 1 << 31:
            raise ValueError("a length is out of range")
        total, last, remaining = total + int(values.sum()), int(values[-1]), remaining - len(values)
    return total


def _decode_miniblocks(page_bytes: np.ndarray, starts: np.ndarray, widths: np.ndarray, length: int) -> np.ndarray:
    """Decode the parts of blocks: [P, length] int64, from the bytes of a page and each part's offset and width [P].

    Raises:
        ValueError: integers have more than 32 bits.
    """
    if widths.max() > 32:
        raise ValueError("numbers have more than 32 bits")
    deltas = np.zeros((len(starts), length), np.int64)
    for width in np.unique(widths[widths > 0]).tolist():
        indices = np.flatnonzero(widths == width)
        byte_indices = starts[indices, None] + np.arange(width * length // 8)
        deltas[indices] = _unpack_bits(page_bytes[byte_indices].tobytes(), width).reshape(len(indices), length)
    return deltas


# ---- Thrift ----------------------------------------------------------------------------------------------------------


def _read_structure(file: BinaryIO, depth: int = 0, remaining_fields: Iterator[int] | None = None) -> dict[int, Any]:
    """Read the fields of a structure by number. The values are 32-bit integers, booleans and nested structures; fields
    of other types have the value None.

    Args:
        remaining_fields: yields one item for each field that the header may still have.

    Raises:
        ValueError: no page header of Parquet has such a structure.
    """
    fields: dict[int, Any] = {}
    remaining_fields = iter(range(MOST_FIELDS)) if remaining_fields is None else remaining_fields
    field_id = 0
    while (start := _read_byte(file)) != STOP:
        kind = start & 15
        previous_id, field_id = field_id, field_id + (start >> 4) if start >> 4 else _decode_zigzag(_read_varint(file))
        # Writers write fields in order. Arrow accepts any order, uses the last field with an id, and of the id its
        # lowest 16 bits.
        if not previous_id < field_id <= MOST_FIELDS or next(remaining_fields, None) is None:
            raise ValueError(f"the header of a page before byte {file.tell()} is damaged")
        value: Any = None
        if kind in (TRUE, FALSE):
            value = kind == TRUE
        elif kind == BYTE:
            _read_byte(file)
        elif kind in (I16, I32, I64):
            value = _decode_zigzag(_read_varint(file))
            value = value if kind == I32 else None
        elif kind in (DOUBLE, BINARY):
            length = 8 if kind == DOUBLE else _read_varint(file)
            if length >= 1 << 31:
                raise ValueError(f"the header of a page before byte {file.tell()} is damaged")
            file.seek(length, 1)
        elif kind == STRUCT and depth < 4:
            value = _read_structure(file, depth + 1, remaining_fields)
        else:
            raise ValueError(f"the header of a page before byte {file.tell()} is damaged")
        if isinstance(value, int) and not -(1 << 31) <= value < 1 << 31:
            raise ValueError(f"the header of a page before byte {file.tell()} is damaged")
        fields[field_id] = value
    return fields


def codecs(footer: bytes) -> list[list[int]]:
    """Read the codec number of each column, by row group. Arrow's own accessor aborts the process for an unknown codec;
    Arrow's reader only raises an error.

    Raises:
        ValueError: the footer is not as writers make it, or too large.
    """
    if len(footer) > LARGEST_FOOTER:
        raise ValueError("the footer is too large")
    wanted: dict[int, Any] = {ROW_GROUPS: {COLUMNS: {COLUMN: {CODEC: {}}}}}
    try:
        groups = _read_selected_fields(io.BytesIO(footer), STRUCT, wanted)[ROW_GROUPS]
        return [[int(column[COLUMN][CODEC]) for column in group[COLUMNS]] for group in groups]
    except (LookupError, TypeError) as error:
        raise ValueError("the footer lacks the codec of a column") from error


def _read_selected_fields(file: BinaryIO, kind: int, wanted: dict[int, Any] | None, depth: int = 0) -> Any:
    """Read an integer, a list or a structure, and skip the fields that are not in `wanted`.

    Args:
        wanted: the needed fields of a structure by number, each with the `wanted` of its own value; None: none.

    Raises:
        ValueError: no Parquet footer has such a value.
    """
    if kind == LIST and depth < 16:
        start = _read_byte(file)
        count = start >> 4 if start >> 4 < 15 else _read_varint(file)
        values = (_read_selected_fields(file, start & 15, wanted, depth + 1) for _ in range(count))
        return collections.deque(values, None if wanted is not None else 0)
    if kind == STRUCT and depth < 16:
        fields, field_id = {}, 0
        while (start := _read_byte(file)) != STOP:
            previous_id, field_id = (
                field_id,
                field_id + (start >> 4) if start >> 4 else _decode_zigzag(_read_varint(file)),
            )
            if not previous_id < field_id <= MOST_FIELDS:
                raise ValueError("the footer has fields that no writer makes")
            inner = None if wanted is None else wanted.get(field_id)
            value = None if start & 15 in (TRUE, FALSE) else _read_selected_fields(file, start & 15, inner, depth + 1)
            if inner is not None:
                fields[field_id] = value
        return fields
    if kind in (I16, I32, I64):
        return _decode_zigzag(_read_varint(file))
    if kind not in (TRUE, FALSE, BYTE, DOUBLE, BINARY):
        raise ValueError("the footer has fields that no writer makes")
    length = 8 if kind == DOUBLE else _read_varint(file) if kind == BINARY else 1
    file.seek(min(length, LARGEST_FOOTER), 1)  # reading past the end returns nothing
    return None


def _read_byte(file: BinaryIO) -> int:
    found = file.read(1)
    if not found:
        raise ValueError("the file ends before the values that its footer counts")
    return found[0]


def _read_varint(file: BinaryIO) -> int:
    value = shift = 0
    while True:
        byte = _read_byte(file)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
        shift += 7
        if shift > 63:
            raise ValueError(f"the header of a page before byte {file.tell()} is damaged")


def _parse_varint(content: memoryview | bytes, offset: int) -> tuple[int, int]:
    """Read an integer of at most 64 bits; return it and the offset of the next one."""
    value = 0
    for shift in range(0, 64, 7):
        byte, offset = content[offset], offset + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, offset
    raise ValueError("a number has more than 64 bits")


def _decode_zigzag(value: int) -> int:
    return (value >> 1) ^ -(value & 1)


def _parse_signed_varint(content: memoryview, offset: int) -> tuple[int, int]:
    value, offset = _parse_varint(content, offset)
    return _decode_zigzag(value), offset
