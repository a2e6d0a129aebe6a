"""Pages of Parquet files built by hand: what their headers state, how long examining them can take, and how long their
texts are."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from keygrip.data import parquet_tables
from keygrip.data.bad_samples import BadSample
from keygrip.data.parquet_pages import DATA, DICTIONARY, STEP_BYTES, Page, codecs, pages, text_bound, texts_of
from keygrip.data.parquet_tables import read_table, rows_of

LIMIT = 1 << 20
I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12  # types of Thrift
INT64, BYTE_ARRAY = 2, 6  # types of Parquet
PLAIN, DELTA_BYTE_ARRAY, RLE_DICTIONARY = 0, 7, 8
HADOOP_LZ4, LZ4_RAW = 5, 7


@pytest.fixture(autouse=True)
def lower_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_tables, "MAX_ARRAY_BYTES", LIMIT)


# ---- Thrift and files ------------------------------------------------------------------------------------------------


def plain(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def signed(value: int) -> bytes:
    return plain(2 * value if value >= 0 else -2 * value - 1)


def listed(kind: int, contents: Iterable[bytes]) -> bytes:
    contents = [*contents]
    return bytes([0xF0 | kind]) + plain(len(contents)) + b"".join(contents)


def structure(*fields: tuple[int, int, Any]) -> bytes:
    """Encode a Thrift struct: number, type and value of each field, with field numbers in their long form."""
    content = b""
    for number, kind, value in fields:
        encoded = signed(value) if kind in (I32, I64) else plain(len(value)) + value if kind == BINARY else value
        content += bytes([kind]) + signed(number) + encoded
    return content + b"\0"


def page(values: int, content: bytes, encoding: int = PLAIN, size: int | None = None) -> bytes:
    inner = structure((1, I32, values), (2, I32, encoding), (3, I32, 3), (4, I32, 3))
    size = len(content) if size is None else size
    return structure((1, I32, 0), (2, I32, size), (3, I32, len(content)), (5, STRUCT, inner)) + content


def dictionary(*texts: bytes) -> bytes:
    content = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    inner = structure((1, I32, len(texts)), (2, I32, PLAIN))
    return structure((1, I32, 2), (2, I32, len(content)), (3, I32, len(content)), (7, STRUCT, inner)) + content


def table(
    path: Path,
    content: bytes,
    values: int,
    kind: int = INT64,
    codec: int = 0,
    groups: int = 1,
    stored: int | None = None,
    dictionary_bytes: int = 0,
    encoding: int = PLAIN,
    writer: bytes = b"",
) -> Path:
    """Write a file with one column `a` of pages.

    Args:
        values: number of rows that the footer states. groups: row groups of the same pages. stored: bytes of the pages
            that the footer states. dictionary_bytes: of the first page, if it is a dictionary of JSON. encoding: of the
            values.
    """
    column = [(1, I32, kind), (3, I32, 0), (4, BINARY, b"a")]
    if dictionary_bytes:
        column.append((10, STRUCT, structure((12, STRUCT, b"\0"))))
    stored = len(content) if stored is None else stored
    chunk = [(1, I32, kind), (2, LIST, listed(I32, [signed(encoding)])), (3, LIST, listed(BINARY, [b"\x01a"]))]
    chunk += [(4, I32, codec), (5, I64, values), (6, I64, stored), (7, I64, stored), (9, I64, 4 + dictionary_bytes)]
    if dictionary_bytes:
        chunk.append((11, I64, 4))
    columns = listed(STRUCT, [structure((2, I64, 4), (3, STRUCT, structure(*chunk)))])
    group = structure((1, LIST, columns), (2, I64, stored), (3, I64, values))
    schema = listed(STRUCT, [structure((4, BINARY, b"schema"), (5, I32, 1)), structure(*column)])
    all_groups = listed(STRUCT, [group] * groups)
    footer = structure(
        (1, I32, 2), (2, LIST, schema), (3, I64, values * groups), (4, LIST, all_groups), (6, BINARY, writer)
    )
    path.write_bytes(b"PAR1" + content + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    return path


def numbers(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in values)


def test_a_file_made_here_is_one(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", page(2, numbers(7, 8)) + page(1, numbers(9)), 3)
    assert read_table(path)["a"].to_pylist() == parquet.read_table(path)["a"].to_pylist() == [7, 8, 9]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\xff" * 4 + b"PAR1", b"PAR1" + bytes(4) + b"PARE"])
def test_a_file_without_a_footer_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(BadSample, match=r"a\.parquet: it does not end as a Parquet file does"):
        read_table(path)


# ---- headers ---------------------------------------------------------------------------------------------------------

INNER = [(1, I32, 3), (2, I32, PLAIN), (3, I32, 3), (4, I32, 3)]
OUTER: list[tuple[int, int, Any]] = [(1, I32, 0), (2, I32, 24), (3, I32, 24), (5, STRUCT, structure(*INNER))]
FEW: list[tuple[int, int, Any]] = [(1, I32, 1), *INNER[1:]]
MANY = [(number, I32, 0) for number in range(6, 46)]
TWO_OF_40 = structure(*INNER, (5, STRUCT, structure(*MANY)), *MANY)
# Arrow reads each of them, with three values in the page
HEADERS = {
    "values whose number overflows": [*OUTER[:3], (5, STRUCT, structure(*FEW, ((1 << 16) + 1, I32, 3)))],
    "values twice": [*OUTER[:3], (5, STRUCT, structure(*FEW, (1, I32, 3)))],
    "a size whose number overflows": [OUTER[0], (2, I32, 1), *OUTER[2:], ((1 << 16) + 2, I32, 24)],
    "a stored size whose number overflows": [*OUTER[:2], (3, I32, 1), OUTER[3], ((1 << 16) + 3, I32, 24)],
    "a structure whose number overflows": [*OUTER[:3], (5, STRUCT, structure(*FEW)), ((1 << 16) + 5, *OUTER[3][1:])],
    "a structure twice": [*OUTER[:3], (5, STRUCT, structure(*FEW)), OUTER[3]],
    "numbers out of order": [OUTER[1], OUTER[0], *OUTER[2:]],
    "a number below 1": [(-5, I32, 0), *OUTER],
    "a number that no header has": [*OUTER, (65, I32, 0)],
    "too many fields": [*OUTER[:3], (5, STRUCT, TWO_OF_40)],
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_arrow_may_read_otherwise_are_refused(tmp_path: Path, kind: str) -> None:
    """Arrow keeps 16 bits of a field number, and the last of several fields with the same number."""
    values = 1 if kind.startswith(("values", "a structure")) else 3  # by the footer and one reading of the header
    path = table(tmp_path / "a.parquet", structure(*HEADERS[kind]) + numbers(7, 8, 9), values)
    assert parquet.read_table(path)["a"].to_pylist() == [7, 8, 9][:values]
    with pytest.raises(BadSample, match=r"a\.parquet: the header of a page before byte \d+ is damaged"):
        read_table(path)


def test_a_header_of_very_many_fields_is_not_read_through(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", b"\x11" * 100_000 + b"\0" * 8, 1)
    with pytest.raises(BadSample, match=r"the header of a page before byte 69 is damaged"):
        read_table(path)


@pytest.mark.parametrize("length", [1 << 31, 1 << 64])
def test_a_header_with_a_text_beyond_all_sizes_is_damaged(tmp_path: Path, length: int) -> None:
    path = table(tmp_path / "a.parquet", bytes([BINARY]) + signed(1) + plain(length) + numbers(7), 1)
    with pytest.raises(BadSample, match=r"the header of a page before byte \d+ is damaged"):
        read_table(path)


# ---- how many pages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [page(0, b""), page(1, numbers(7))], ids=["empty", "of one value"])
def test_very_many_pages_take_too_much(tmp_path: Path, one: bytes) -> None:
    path = table(tmp_path / "a.parquet", one * 300 + page(1000, numbers(*range(1000))), 1000)
    with pytest.raises(BadSample, match=r"unpacked, it has more than the \d+ bytes"):
        read_table(path)
    path = table(tmp_path / "a.parquet", page(1, numbers(7)) * 100, 100)
    assert read_table(path)["a"].to_pylist() == [7] * 100


def test_row_groups_do_not_share_pages(tmp_path: Path) -> None:
    """Otherwise all pages of the file would be examined for each of thousands of row groups."""
    content = page(100, numbers(*range(100)))
    path = table(tmp_path / "a.parquet", content, 100, groups=2)
    assert parquet.read_table(path).num_rows == 200
    for read in (lambda: read_table(path), lambda: [*rows_of(path, 0, ["a"], 64)]):
        said = rf"its row groups have {2 * len(content)} bytes together, more than the {path.stat().st_size} of the"
        with pytest.raises(BadSample, match=said):
            read()


def test_pages_are_within_their_column(tmp_path: Path) -> None:
    content = page(100, numbers(*range(100)))
    path = table(tmp_path / "a.parquet", content * 2, 200, stored=len(content))
    with pytest.raises(BadSample, match=r"the page at byte \d+ is not within what the footer says of its column"):
        read_table(path)
    old = b"parquet-mr version 1.2.8"  # such writers state too small sizes
    path = table(tmp_path / "a.parquet", content, 100, stored=len(content) - 40, writer=old)
    assert read_table(path)["a"].to_pylist() == [*range(100)]


def test_a_second_dictionary_is_refused(tmp_path: Path) -> None:
    first = dictionary(b"1")
    content = first + dictionary(b"2") + page(3, b"\x00\x06", RLE_DICTIONARY)
    path = table(tmp_path / "a.parquet", content, 3, BYTE_ARRAY, dictionary_bytes=len(first))
    with pytest.raises(BadSample, match=r"the page at byte \d+ is a second dictionary of its column"):
        read_table(path)


def test_a_footer_is_examined_once_for_all_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, examined, original = tmp_path / "a.parquet", [], parquet.read_metadata
    parquet.write_table(arrow.table({"a": [*range(50)]}), path, row_group_size=1)

    def read_metadata(source: Any) -> Any:
        examined.append(source)
        return original(source)

    monkeypatch.setattr(parquet, "read_metadata", read_metadata)
    assert [row["a"] for group in range(50) for row in rows_of(path, group, ["a"], 64)] == [*range(50)]
    assert len(examined) == 1
    parquet.write_table(arrow.table({"a": [*range(50, 100)]}), path, row_group_size=1)  # a file of the same size
    assert [row["a"] for row in rows_of(path, 7, ["a"], 64)] == [57]


# ---- texts -----------------------------------------------------------------------------------------------------------


def bounds(path: Path, one_by_one: bool) -> list[tuple[Page, int]]:
    """Return the pages with values of a file's only column, each with the number of bytes that its texts may have
    beyond it."""
    metadata, texts, found = parquet.read_metadata(path), None, []
    leaf, column = metadata.row_group(0).column(0), metadata.schema.column(0)
    content = path.read_bytes()
    [[number]] = codecs(content[-8 - int.from_bytes(content[-8:-4], "little") : -8])

    def codec() -> int:
        return number

    with path.open("rb") as file:
        for each in pages(file, leaf):
            if each.kind == DICTIONARY:
                texts = texts_of(file, each, codec) if one_by_one else None
            else:
                found.append((each, text_bound(file, each, codec, column, texts)))
    return found


CHANCE = random.Random(0)
BEGINNINGS: dict[str, Callable[[int], str]] = {
    "as they come": lambda row: "x" * CHANCE.randrange(40) + str(row),
    "steps of all sizes": lambda row: "x" * CHANCE.randrange(1 << row % 10),
    "all as long": lambda row: "the same" if row else "",
    "none": lambda row: chr(97 + row % 26),
}


def in_common(first: str, then: str) -> int:
    return next((n for n, (a, b) in enumerate(zip(first, then, strict=False)) if a != b), min(len(first), len(then)))


@pytest.mark.parametrize("count", [1, 129, 70_000])
@pytest.mark.parametrize("kind", BEGINNINGS)
def test_what_texts_have_in_common_is_summed_up(tmp_path: Path, kind: str, count: int) -> None:
    texts, path = [BEGINNINGS[kind](row) for row in range(count)], tmp_path / "a.parquet"
    options: dict[str, Any] = {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}
    parquet.write_table(arrow.table({"a": texts}), path, data_page_size=1 << 24, **options)
    rest = iter(texts)
    for each, found in bounds(path, one_by_one=False):
        here = [*itertools.islice(rest, each.values)]
        assert found == sum(in_common(*pair) for pair in itertools.pairwise(here))
    assert not [*rest]


def blocks(count: int, block: int, parts: int) -> bytes:
    """Encode zeros as DELTA_BINARY_PACKED with a bit width of 0."""
    return plain(block) + plain(parts) + plain(count) + b"\0" + bytes(1 + parts) * -(-count // block)


@pytest.mark.parametrize(("block", "parts"), [(8, 1), (64, 2), (128, 8), (192, 6)])
def test_blocks_of_other_sizes_count_as_the_worst(tmp_path: Path, block: int, parts: int) -> None:
    """Arrow refuses such blocks; examining very many of them would take long."""
    good = blocks(10_000, 128, 4) * 2
    path = table(
        tmp_path / "a.parquet", page(10_000, good, DELTA_BYTE_ARRAY), 10_000, BYTE_ARRAY, encoding=DELTA_BYTE_ARRAY
    )
    assert read_table(path)["a"].to_pylist() == [b""] * 10_000
    bad = blocks(10_000, block, parts) * 2
    path = table(
        tmp_path / "a.parquet", page(10_000, bad, DELTA_BYTE_ARRAY), 10_000, BYTE_ARRAY, encoding=DELTA_BYTE_ARRAY
    )
    with pytest.raises(OSError, match="multiple of"):
        parquet.read_table(path)
    [(each, found)] = bounds(path, one_by_one=False)
    assert found == each.values * each.size
    with pytest.raises(BadSample, match=f"unpacked, it has more than the {LIMIT} bytes"):
        read_table(path)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("entries", [1, 2, 9, 300, 5000])
def test_texts_of_a_dictionary_are_summed_up(tmp_path: Path, entries: int, missing: bool, version: str) -> None:
    chance, path = random.Random(entries), tmp_path / "a.parquet"
    texts = [str(number) * chance.randrange(1, 20) for number in range(entries)]
    values: list[str | None] = []
    while len(values) < 40_000:  # single values and runs
        values += [None if missing and chance.random() < 0.2 else chance.choice(texts)] * chance.choice([1, 1, 1, 30])
    parquet.write_table(arrow.table({"a": [*texts, *values]}), path, data_page_version=version)
    rest = iter([*texts, *values])
    for each, found in bounds(path, one_by_one=True):
        exact = sum(len(text or "") for text in itertools.islice(rest, each.values))
        filled_up = 7 * len(texts[0]) if missing else 0
        assert 0 <= found - exact - STEP_BYTES <= STEP_BYTES * each.values // 8 + filled_up
        assert each.kind != DATA or version == "1.0"
    assert not [*rest]


RUNS = {
    "a run": (1, plain(2 * 50) + b"\x01", 50 * 20, 1),
    "a run longer than the page": (1, plain(2 * 1000) + b"\x01", 50 * 20, 1),
    "runs of one": (1, b"\x02\x01\x02\x00" * 25, 25 * 21, 50),
    "packed": (1, plain(2 * 7 + 1) + b"\x0f" * 7, 4 * 6 * 21 + 2 * 20, 1),
    "packed without bits": (0, plain(2 * 7 + 1), 50, 1),
    "nothing": (0, b"", 0, 0),
}


@pytest.mark.parametrize("kind", RUNS)
def test_runs_of_a_dictionary_s_numbers_are_counted(tmp_path: Path, kind: str) -> None:
    width, runs, exact, count = RUNS[kind]
    first = dictionary(b"1", b"2" * 20)
    content = first + page(50, bytes([width]) + runs, RLE_DICTIONARY)
    path = table(tmp_path / "a.parquet", content, 50, BYTE_ARRAY, dictionary_bytes=len(first))
    assert [found for _, found in bounds(path, one_by_one=True)] == [exact + STEP_BYTES * count]


@pytest.mark.parametrize("runs", [b"\x00\x01" * 25, b"\x64\x02", plain(1 << 33) + b"\x01", b"\xff"], ids=repr)
def test_numbers_of_a_dictionary_that_are_damaged_count_as_the_worst(tmp_path: Path, runs: bytes) -> None:
    first = dictionary(b"1", b"2" * 20)
    content = first + page(50, b"\x02" + runs, RLE_DICTIONARY)
    path = table(tmp_path / "a.parquet", content, 50, BYTE_ARRAY, dictionary_bytes=len(first))
    assert [found for _, found in bounds(path, one_by_one=True)] == [50 * 20]


def test_the_older_lz4_counts_as_the_worst(tmp_path: Path) -> None:
    """Its pages may have a frame or not, so that our decompression may give another result than Arrow's."""
    content = blocks(2000, 128, 4) * 2
    packed = arrow.Codec("lz4_raw").compress(content, asbytes=True)
    one = page(2000, packed, DELTA_BYTE_ARRAY, size=len(content))
    paths = {
        codec: table(tmp_path / f"{codec}.parquet", one, 2000, BYTE_ARRAY, codec, encoding=DELTA_BYTE_ARRAY)
        for codec in (LZ4_RAW, HADOOP_LZ4)
    }
    found = {codec: [bound for _, bound in bounds(path, one_by_one=False)] for codec, path in paths.items()}
    assert found == {LZ4_RAW: [0], HADOOP_LZ4: [2000 * len(content)]}
    assert read_table(paths[LZ4_RAW])["a"].to_pylist() == [b""] * 2000


@pytest.mark.parametrize("codec", [3, 8, 100])
def test_a_codec_that_arrow_does_not_know_does_not_end_the_process(tmp_path: Path, codec: int) -> None:
    """Arrow ends the process if it is asked for the name of such a codec. Before 26 it reads such pages as
    uncompressed."""
    content = page(20, blocks(20, 128, 4) * 2, DELTA_BYTE_ARRAY)
    path = table(tmp_path / "a.parquet", content, 20, BYTE_ARRAY, codec, encoding=DELTA_BYTE_ARRAY)
    refused = pytest.raises(BadSample, match=r"a\.parquet: .*(codec|LZO)")
    old = codec != 3 and int(arrow.__version__.split(".")[0]) < 26
    with contextlib.nullcontext() if old else refused:
        assert len(read_table(path)) == 20


@pytest.mark.parametrize("options", [{}, {"compression": {"a": "zstd", "b.list.element": "gzip", "c": "none"}}])
def test_the_codecs_of_a_footer_are_found(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "a.parquet"
    columns = {"a": ["x" * 300] * 9, "b": [[1.5, None]] * 9, "c": arrow.array([True] * 9)}
    columns["at"] = arrow.array([0] * 9, arrow.timestamp("us", "UTC"))
    parquet.write_table(arrow.table(columns), path, row_group_size=3, write_page_index=True, **options)
    content = path.read_bytes()
    found = codecs(content[-8 - int.from_bytes(content[-8:-4], "little") : -8])
    metadata = parquet.read_metadata(path)
    names = {0: "UNCOMPRESSED", 1: "SNAPPY", 2: "GZIP", 6: "ZSTD"}
    for group, numbers_of_group in enumerate(found):
        columns_of_group = [metadata.row_group(group).column(each) for each in range(4)]
        assert [names[number] for number in numbers_of_group] == [each.compression for each in columns_of_group]
    assert len(found) == 3


@pytest.mark.parametrize(
    "footer",
    [
        b"",
        b"\x49\x19" + b"\x19" * 5000,
        structure((4, LIST, listed(STRUCT, [b"\0"]))),
        structure(((1 << 16) + 4, I32, 1)),
    ],
    ids=["none", "lists in lists", "a row group of nothing", "a number that overflows"],
)
def test_a_footer_as_no_writer_makes_it_has_no_codecs(footer: bytes) -> None:
    with pytest.raises(ValueError, match=r"the f(ile|ooter) "):
        codecs(footer)
