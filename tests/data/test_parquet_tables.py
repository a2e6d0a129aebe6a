"""Untrusted Parquet tables: the unpacked size of a small file is computed before the file is unpacked."""

from __future__ import annotations

import datetime
import decimal
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from keygrip.data import parquet_tables
from keygrip.data.bad_samples import BadSample
from keygrip.data.parquet_tables import Allowance, column_types, is_too_large, read_table, text_bytes
from keygrip.data.video_text.sources.tables import row_groups

LIMIT = 1 << 20


@pytest.fixture(autouse=True)
def lower_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_tables, "MAX_ARRAY_BYTES", LIMIT)


def write(path: Path, table: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(table), path, **{"compression": "zstd", **options})
    return path


def varint(value: int) -> bytes:
    """Encode a non-negative integer as in Thrift's compact protocol."""
    value, found = 2 * value, bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def claim(path: Path, numbers: dict[int, int], pages: bytes = b"", encodings: tuple[bytes, bytes] = (b"", b"")) -> None:
    """Replace integers in a file's footer by others, each in the same number of bytes.

    Args:
        pages: inserted before the footer. encodings: bytes of the footer, and the bytes that replace them.
    """
    content = path.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer = content[start:-8].replace(*encodings)
    for old, new in numbers.items():
        before, after = varint(old), varint(new)
        assert footer.count(before)
        assert len(after) <= len(before)
        if len(after) < len(before):
            between = bytes([128] * (len(before) - len(after) - 1))
            after = after[:-1] + bytes([after[-1] | 128]) + between + b"\0"
        footer = footer.replace(before, after)
    path.write_bytes(content[:start] + pages + footer + content[-8:])


def chunk(path: Path) -> Any:
    return parquet.read_metadata(path).row_group(0).column(0)


TEXT = "x" * 10_000
ENDINGS = [TEXT + str(n) for n in range(200)]
OF_VIEWS = arrow.struct([("a", arrow.list_(arrow.large_list_view(arrow.string()))), ("n", arrow.int8())])
DEEP: Any = 1
for _ in range(40):
    DEEP = {"a": DEEP}
BOMBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a text in a dictionary": ({"a": [TEXT] * 200}, {}),
    "in lists": ({"a": [[TEXT] * 100] * 2}, {}),
    "in structures": ({"a": [{"bytes": TEXT.encode(), "path": None}] * 200}, {}),
    "in maps": ({"a": arrow.array([[("k", TEXT)]] * 200, arrow.map_(arrow.string(), arrow.string()))}, {}),
    "pages of one byte": ({"a": ["x" * (2 * LIMIT)]}, {"use_dictionary": False}),
    "a run of numbers": ({"a": [0] * 50_000}, {}),
    "a run in one row": ({"a": [[0.0] * 50_000]}, {}),
    "rows of nothing": ({"a": arrow.nulls(50_000, arrow.int64())}, {}),
    "in views of lists": ({"a": arrow.array([[TEXT] * 100] * 2, arrow.list_view(arrow.string()))}, {}),
    "in large views of lists": ({"a": arrow.array([[TEXT]] * 200, arrow.large_list_view(arrow.string()))}, {}),
    "in JSON": ({"a": arrow.array([f'["{TEXT}"]'] * 200, arrow.json_())}, {}),
    "values of a fixed size": ({"a": arrow.array([b"x" * 10_000] * 200, arrow.binary(10_000))}, {}),
    "structures in structures": ({"a": [DEEP] * 200}, {}),
    "beginnings in lists": (
        {"a": [ENDINGS]},
        {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY", "data_page_version": "2.0"},
    ),
    "beginnings": ({"a": ENDINGS}, {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}),
}


@pytest.mark.parametrize("store_schema", [False, True])
@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_does_not_become_a_large_table(tmp_path: Path, kind: str, store_schema: bool) -> None:
    table, options = BOMBS[kind]
    path = write(tmp_path / "train-0.parquet", table, store_schema=store_schema, **options)
    assert path.stat().st_size < 16_000
    with pytest.raises(BadSample, match=rf"train-0.parquet: unpacked, it has more than the {LIMIT} bytes"):
        read_table(path)
    if kind == "a text in a dictionary":  # 64 of its rows are within the limit, and are freed before the next
        assert [row["a"] for _, row in row_groups(tmp_path, "train-*", ["a"], "it")[0].rows(["a"])] == [TEXT] * 200
    elif kind == "in lists":
        said = rf"cannot be read \(unpacked, it has more than the {LIMIT} bytes.* into several files\)$"
        with pytest.raises(ValueError, match=said) as refused:  # without the advice to download it again
            list(row_groups(tmp_path, "train-*", ["a"], "it")[0].rows(["a"]))
        assert is_too_large(refused.value)


@pytest.mark.parametrize("lie", ["values", "bytes"])
def test_what_the_footer_says_of_its_columns_does_not_count(tmp_path: Path, lie: str) -> None:
    if lie == "values":
        path = write(tmp_path / "a.parquet", {"a": [[0] * 50_000]})
        claim(path, {50_000: 1})
        assert chunk(path).num_values == 1
    else:
        path = write(tmp_path / "a.parquet", {"a": ["x" * (2 * LIMIT)]}, use_dictionary=False, write_statistics=False)
        claim(path, {chunk(path).total_uncompressed_size: 100})
        assert chunk(path).total_uncompressed_size == 100
    with pytest.raises(BadSample, match=f"unpacked, it has more than the {LIMIT} bytes"):
        read_table(path)


READ = """
import os, resource, sys
from pathlib import Path
from keygrip.data import parquet_tables
from keygrip.data.bad_samples import BadSample
import pyarrow.parquet

parquet_tables.read_table(Path(sys.argv[1]))  # what it loads at first is not counted
parquet_tables.MAX_ARRAY_BYTES = 1 << 20
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
if child := os.fork():  # the limit and what was read before are each reader's own
    assert os.waitpid(child, 0)[1] == 0
resource.setrlimit(resource.RLIMIT_AS, (taken + (48 << 20),) * 2)
try:
    if child:
        pyarrow.parquet.read_table(sys.argv[2], use_threads=False)
    else:
        parquet_tables.read_table(Path(sys.argv[2]))
except (BadSample, MemoryError) as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("kind", ["a run in one row", "a page of one byte", "beginnings in one row"])
@pytest.mark.quick_sets(1)
def test_a_hostile_file_is_refused_within_little_memory(tmp_path: Path, kind: str) -> None:
    """The process may use 48 MB more than it has. Arrow alone, which unpacks the file, fails within this limit."""
    path = tmp_path / "hostile.parquet"
    options: dict[str, Any] = {"use_dictionary": False, "write_statistics": False}
    if kind == "a run in one row":
        count = 20_000_000
        zeros = arrow.repeat(arrow.scalar(0, arrow.int8()), count)
        write(path, {"a": arrow.ListArray.from_arrays([0, count], zeros)})
        claim(path, {count: 1})
    elif kind == "a page of one byte":
        write(path, {"a": ["x" * 100_000_000]}, **options)
        claim(path, {chunk(path).total_uncompressed_size: 100})
    else:
        texts = ["x" * 10_000 + str(number) for number in range(10_000)]
        write(path, {"a": [texts]}, column_encoding="DELTA_BYTE_ARRAY", **options)
    assert path.stat().st_size < 150_000
    small = write(tmp_path / "small.parquet", {"a": ["x"]})
    ours, arrows = subprocess.run(
        [sys.executable, "-c", READ, small, path],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"},
    ).stdout.splitlines()
    assert "unpacked, it has more than the 1048576 bytes" in ours
    assert arrows.startswith("ArrowMemoryError")


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["snappy", "gzip", "brotli", "zstd", "lz4", "none"])
def test_texts_stored_by_their_beginnings_count_as_they_are(tmp_path: Path, codec: str, version: str) -> None:
    """Writers of version 2 (parquet-mr, arrow-rs) store texts by common prefixes if the texts do not repeat as a
    whole."""
    chance = random.Random(0)
    texts = [f"{chance.random()} " * chance.randrange(1, 50) for _ in range(4000)]
    tables: dict[str, list[Any]] = {
        "a": [None if chance.random() < 0.2 else text for text in texts],
        "a.list.element": [
            None if row % 5 == 0 else [None, *texts[4 * row : 4 * row + row % 5]] for row in range(1000)
        ],
    }
    for place, values in tables.items():
        options = {"use_dictionary": False, "column_encoding": {place: "DELTA_BYTE_ARRAY"}, "compression": codec}
        path = write(tmp_path / "a.parquet", {"a": values}, data_page_version=version, **options)
        assert chunk(path).total_uncompressed_size > 500_000
        allowance = Allowance([path])
        allowance.left = allowance.total = 16 << 20
        assert read_table(path, None, allowance)["a"].to_pylist() == values


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_texts_partly_of_a_dictionary_count_as_they_are(tmp_path: Path, encoding: str) -> None:
    """A writer of version 2 stops using a dictionary within a row group when the dictionary becomes too large."""
    number = {"DELTA_BYTE_ARRAY": 7, "DELTA_LENGTH_BYTE_ARRAY": 6}[encoding]

    def joined(first: list[str], then: list[str]) -> Path:
        options = {"compression": "none", "write_statistics": False, "store_schema": False}
        rest = write(tmp_path / "rest", {"a": then}, use_dictionary=False, column_encoding=encoding, **options)
        path, size = write(tmp_path / "a.parquet", {"a": first}, **options), chunk(rest).total_compressed_size
        pages = rest.read_bytes()[4 : 4 + size]
        sizes = {len(first): len(first) + len(then), chunk(path).total_compressed_size: 0}
        sizes[chunk(path).total_compressed_size] = chunk(path).total_compressed_size + size
        claim(path, sizes, pages, (b"\x35\0\x06\x10", bytes([0x35, 2 * number, 6, 16])))
        assert encoding in chunk(path).encodings
        return path

    first, then = ["one", "two"] * 150 + [TEXT], [f"the {each}th" for each in range(200)]
    assert read_table(joined(first, then))["a"].to_pylist() == first + then
    with pytest.raises(BadSample, match=f"unpacked, it has more than the {LIMIT} bytes"):
        read_table(joined([TEXT] * 300, then))


def test_files_that_are_held_together_share_one_allowance(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{number}.parquet", {"a": [TEXT] * 60}) for number in range(2)]
    allowance = Allowance(paths)
    assert [len(read_table(path)) for path in paths] == [60, 60]
    assert len(read_table(paths[0], None, allowance)) == 60
    with pytest.raises(BadSample, match=r"1\.parquet: unpacked"):
        read_table(paths[1], None, allowance)


def test_a_large_file_may_become_larger(tmp_path: Path) -> None:
    values = [[float(n), n / 7.0] for n in range(30_000)]
    path = write(tmp_path / "a.parquet", {"a": values})
    assert read_table(path)["a"].to_pylist() == values


@pytest.mark.parametrize("codec", ["snappy", "zstd", "gzip", "lz4", "none"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_pages_of_any_version_and_codec_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, version: str
) -> None:
    monkeypatch.setattr(parquet_tables, "MAX_ARRAY_BYTES", 16 * LIMIT)
    columns = {
        "text": [None, "a", "bc" * 50] * 1000,
        "turns": [[{"from": "q", "value": str(row)}] * (row % 3) for row in range(3000)],
        "n": [*range(3000)],
        "flags": [[row % 2 == 0, None] for row in range(3000)],
    }
    options = {"compression": codec, "data_page_version": version, "data_page_size": 1000, "row_group_size": 1100}
    path = write(tmp_path / "a.parquet", columns, write_page_index=True, **options)
    assert read_table(path).to_pydict() == columns
    empty = arrow.table(columns).slice(0, 0)
    parquet.write_table(empty, path, compression=codec, data_page_version=version)
    assert read_table(path).to_pydict() == {name: [] for name in columns}


def test_a_damaged_header_of_a_page_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"a": [1.5, 2.5]}, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[chunk(path).data_page_offset] = 0xFF
    path.write_bytes(content)
    with pytest.raises(BadSample, match=r"a\.parquet: the header of a page .*is damaged"):
        read_table(path)
    with pytest.raises(ValueError, match=r"the header of a page .*is damaged\): download it again"):
        list(row_groups(tmp_path, "a.parquet", ["a"], "it")[0].rows(["a"]))


@pytest.mark.parametrize("encoding", [None, "PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_ordinary_tables_are_as_arrow_reads_them(tmp_path: Path, encoding: str | None) -> None:
    texts = {
        "text": ["a", None, "a", "b"] * 5,
        "tasks": [["a", "bc"], [], None, ["a"]] * 5,
        "image": [{"bytes": b"\x00\xff", "path": "p"}, None] * 10,
        "turns": [[{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]] * 20,
    }
    numbers = {
        "n": range(20),
        "a.b": [[0.5, 1.5]] * 20,
        "fixed": arrow.array([[1.0, 2.0, 3.0]] * 20, arrow.list_(arrow.float32(), 3)),
        "kind": arrow.array(["u", "v"] * 10).dictionary_encode(),
        "map": arrow.array([[("k", "v")]] * 20, arrow.map_(arrow.string(), arrow.string())),
        "digest": arrow.array([b"abcd"] * 20, arrow.binary(4)),
        "views": arrow.array([["a", "bc"], [], None, ["a"]] * 5, arrow.list_view(arrow.string())),
        "of views": arrow.array([{"a": [["b", None]], "n": 1}, None] * 10, OF_VIEWS),
        "answer": arrow.array(['{"a": 1}', None] * 10, arrow.json_()),
        "amount": arrow.array([decimal.Decimal("1.50"), None] * 10),
        "at": arrow.array([datetime.datetime(2025, 1, 2), None] * 10),
    }
    paths = ["text", "tasks.list.element", "image.bytes", "image.path"]
    paths += [f"turns.list.element.{name}" for name in ("role", "content")]
    options: dict[str, Any] = {}
    if encoding is not None:
        options = {"use_dictionary": False, "column_encoding": dict.fromkeys(paths, encoding)}
    path = write(tmp_path / "a.parquet", {**texts, **numbers}, row_group_size=7, **options)
    expected = parquet.read_table(path)
    assert list(column_types(path)) == expected.column_names
    assert read_table(path).to_pylist() == expected.to_pylist()
    assert read_table(path, ["a.b", "tasks"]).to_pydict() == expected.select(["a.b", "tasks"]).to_pydict()
    for group in row_groups(tmp_path, "*.parquet", ["turns"], "it"):
        read = [*group.rows(["turns", "image"])]
        assert [row for _, row in read] == expected.select(["turns", "image"]).to_pylist()[group.first_row :][:7]
        assert [number for number, _ in read] == [*range(group.first_row, group.first_row + len(read))]


@pytest.mark.parametrize("store_schema", [False, True])
def test_one_long_text_of_a_dictionary_does_not_count_for_all(tmp_path: Path, store_schema: bool) -> None:
    """JSON is returned value by value: 6000 times 20 kB would be refused."""
    values = [f'{{"answer": {row % 40}}}' for row in range(6000)]
    values[5] = f'{{"answer": "{TEXT + TEXT}"}}'
    path = write(tmp_path / "a.parquet", {"a": arrow.array(values, arrow.json_())}, store_schema=store_schema)
    assert str(parquet.read_schema(path).field("a").type) == "extension<arrow.json>"
    assert read_table(path)["a"].to_pylist() == values


def test_a_type_whose_texts_are_not_known_is_named() -> None:
    runs = arrow.RunEndEncodedArray.from_arrays(arrow.array([3], arrow.int32()), arrow.array([TEXT]))
    for values in (runs, arrow.array([{"a": None}] * 3).from_arrays([runs], ["a"])):
        with pytest.raises(ValueError, match=r"values of type run_end_encoded.*are not read"):
            text_bytes(arrow.record_batch({"a": values}))
