"""Parquet tables that nobody vouches for: what a small file would unpack to is counted before it is unpacked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from keygrip.data import parquet_tables
from keygrip.data.bad_samples import BadSample
from keygrip.data.parquet_tables import Allowance, column_types, read_table
from keygrip.data.video_text.sources.tables import row_groups

LIMIT = 1 << 20


@pytest.fixture(autouse=True)
def lower_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_tables, "MAX_ARRAY_BYTES", LIMIT)


def write(path: Path, table: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(table), path, compression="zstd", **options)
    return path


TEXT = "x" * 10_000
ENDINGS = [TEXT + str(n) for n in range(200)]
BOMBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a text in a dictionary": ({"a": [TEXT] * 200}, {}),
    "in lists": ({"a": [[TEXT] * 100] * 2}, {}),
    "in structures": ({"a": [{"bytes": TEXT.encode(), "path": None}] * 200}, {}),
    "in maps": ({"a": arrow.array([[("k", TEXT)]] * 200, arrow.map_(arrow.string(), arrow.string()))}, {}),
    "pages of one byte": ({"a": ["x" * (2 * LIMIT)]}, {"use_dictionary": False}),
    "a run of numbers": ({"a": [0] * 50_000}, {}),
    "a run in one row": ({"a": [[0.0] * 50_000]}, {}),
    "rows of nothing": ({"a": arrow.nulls(50_000, arrow.int64())}, {}),
    "values of a fixed size": ({"a": arrow.array([b"x" * 10_000] * 200, arrow.binary(10_000))}, {}),
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
    if kind == "a text in a dictionary":  # 64 of its rows are within the limit, and are let go of before the next
        assert [row["a"] for _, row in row_groups(tmp_path, "train-*", ["a"], "it")[0].rows(["a"])] == [TEXT] * 200
    elif kind == "in lists":
        with pytest.raises(ValueError, match=rf"cannot be read \(unpacked, it has more than the {LIMIT} bytes"):
            list(row_groups(tmp_path, "train-*", ["a"], "it")[0].rows(["a"]))


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
