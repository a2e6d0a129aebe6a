"""Parquet tables that nobody vouches for.

In Parquet a text that repeats is stored once and named by number, a number that repeats is a run, and pages are
compressed, so that a file of a few kilobytes may stand for gigabytes. What a table takes as Python's objects is
therefore counted first: values and bytes by the file's own description before anything is decoded, texts while they
are still numbers of a dictionary, a batch at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keygrip.data.bad_samples import guard
from keygrip.data.untrusted_files import MAX_ARRAY_BYTES, regular_file

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

EXPANSION = 64  # a large file may become so many times its own size, a small one MAX_ARRAY_BYTES
VALUE_BYTES = 32  # of a number or a reference in a list of Python's
BATCH_ROWS = 4096  # decoded at once


class Allowance:
    """The bytes that tables may still take in memory; one for all the files that are held together.

    Args:
        paths: the files.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.total = max(MAX_ARRAY_BYTES, EXPANSION * sum(regular_file(path).st_size for path in paths))
        self.left = self.total

    def take(self, size: int) -> None:
        """Raises ValueError: it is more than is left."""
        self.left -= size
        if self.left < 0:
            raise ValueError(f"unpacked, it has more than the {self.total} bytes that a table of its size may have")


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    """A Parquet file to read from. Its texts come as dictionaries, so that one that repeats is held once.

    Raises:
        BadSample: it is no regular file or no Parquet file; also what the block raises of a broken one.
    """
    import pyarrow.parquet as parquet

    regular_file(path)
    with guard(path):
        metadata = parquet.read_metadata(path)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        texts = [
            metadata.schema.column(number).path
            for number in range(len(metadata.schema))
            if metadata.schema.column(number).physical_type == "BYTE_ARRAY"
            and not any(_is_delta(group.column(number)) for group in groups)  # Arrow makes no dictionary of those
        ]
        with parquet.ParquetFile(path, metadata=metadata, read_dictionary=texts) as file:
            yield file


def column_types(path: Path) -> dict[str, str]:
    """Arrow's type of each column, by name and in order. Raises BadSample: it is no Parquet file."""
    import pyarrow.parquet as parquet

    regular_file(path)
    with guard(path):
        return {field.name: str(field.type) for field in parquet.read_schema(path)}


def refuse_large(
    file: pyarrow.parquet.ParquetFile, groups: Iterable[int], columns: Collection[str] | None, allowance: Allowance
) -> None:
    """Counts rows, values and bytes of some row groups as the file describes them, without reading any.

    Args:
        columns: names; None: all.

    Raises:
        ValueError: they are more than is allowed.
    """
    lengths = [file.metadata.schema.column(each).length for each in range(len(file.metadata.schema))]
    for number in groups:
        group = file.metadata.row_group(number)
        leaves = [(group.column(each), length) for each, length in enumerate(lengths)]
        wanted = [leaf for leaf in leaves if columns is None or _is_in(leaf[0].path_in_schema, columns)]
        values = max(group.num_rows, 0) + sum(max(leaf.num_values, 0) for leaf, _ in wanted)
        allowance.take(max(VALUE_BYTES * values, sum(_largest(leaf, length) for leaf, length in wanted)))


def _is_delta(leaf: pyarrow.parquet.ColumnChunkMetaData) -> bool:
    return any(encoding.startswith("DELTA") for encoding in leaf.encodings)


def _largest(leaf: pyarrow.parquet.ColumnChunkMetaData, length: int) -> int:
    """Bytes of a part of a column, at most; `length` of each value where its type fixes it. Texts that come as
    dictionaries are counted when they are read."""
    size, count = max(leaf.total_uncompressed_size, 0), max(leaf.num_values, 0)
    # with DELTA_BYTE_ARRAY a text repeats the beginning of the one before it, and none comes as a dictionary
    repeating = {"DELTA_BYTE_ARRAY", "PLAIN_DICTIONARY", "RLE_DICTIONARY"} & {*leaf.encodings}
    if leaf.physical_type == "BYTE_ARRAY" and _is_delta(leaf) and repeating:
        return size * count
    return max(size, length * count)


def _is_in(leaf: str, columns: Collection[str]) -> bool:
    """Whether a leaf, such as `images.list.element.bytes`, is part of a column; a column's name may have dots."""
    parts = leaf.split(".")
    return any(".".join(parts[:length]) in columns for length in range(1, len(parts) + 1))


def read_table(path: Path, columns: Collection[str] | None = None, allowance: Allowance | None = None) -> pyarrow.Table:
    """A Parquet file's table, or some of its columns.

    Args:
        allowance: shared by several files; None: of this one.

    Raises:
        BadSample: it cannot be read, or would become too large.
    """
    import pyarrow

    allowance = Allowance([path]) if allowance is None else allowance
    with open_parquet(path) as file:
        refuse_large(file, range(file.num_row_groups), columns, allowance)
        schema = file.schema_arrow if columns is None else pyarrow.schema([file.schema_arrow.field(c) for c in columns])
        batches = []
        for group in range(file.num_row_groups):  # each has dictionaries of its own, which Arrow does not join in lists
            for batch in file.iter_batches(BATCH_ROWS, [group], None if columns is None else [*columns]):
                allowance.take(text_bytes(batch))
                batches.append(without_dictionaries(batch))
        return pyarrow.Table.from_batches(batches, pyarrow.schema([_plain_field(field) for field in schema]))


def text_bytes(batch: pyarrow.RecordBatch) -> int:
    """Bytes of all texts of a batch of `open_parquet`, each counted as often as it stands there."""
    return sum(_text_bytes(column) for column in batch.columns)


def _text_bytes(values: Any) -> int:
    import pyarrow
    import pyarrow.compute as compute

    kind = values.type
    if pyarrow.types.is_dictionary(kind):
        if not _is_text(kind.value_type):
            return len(values) * VALUE_BYTES
        lengths = compute.cast(compute.binary_length(values.dictionary), pyarrow.int64())
        return int(compute.sum(lengths.take(values.indices)).as_py() or 0)
    if pyarrow.types.is_map(kind):
        return _text_bytes(values.keys) + _text_bytes(values.items)
    if pyarrow.types.is_struct(kind):
        return sum(_text_bytes(field) for field in values.flatten())
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        return _text_bytes(values.flatten())
    return int(values.nbytes) if _is_text(kind) or pyarrow.types.is_fixed_size_binary(kind) else 0


def _is_text(kind: Any) -> bool:
    import pyarrow

    tests = (pyarrow.types.is_string, pyarrow.types.is_binary, pyarrow.types.is_large_string)
    return any(test(kind) for test in (*tests, pyarrow.types.is_large_binary))


def without_dictionaries(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """The batch with its texts themselves in place of their numbers; `text_bytes` says how large that becomes."""
    import pyarrow

    fields = [_plain_field(field) for field in batch.schema]
    columns = [
        column if column.type == field.type else column.cast(field.type)
        for column, field in zip(batch.columns, fields, strict=True)
    ]
    return pyarrow.RecordBatch.from_arrays(columns, schema=pyarrow.schema(fields))


def _plain_field(field: pyarrow.Field) -> pyarrow.Field:
    return field.with_type(_plain(field.type))


def _plain(kind: Any) -> Any:
    """The type with values in place of dictionaries, at any depth."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        return kind.value_type
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([_plain_field(field) for field in kind])
    if pyarrow.types.is_map(kind):
        return pyarrow.map_(_plain_field(kind.key_field), _plain_field(kind.item_field))
    if pyarrow.types.is_fixed_size_list(kind):
        return pyarrow.list_(_plain_field(kind.value_field), kind.list_size)
    if pyarrow.types.is_large_list(kind):
        return pyarrow.large_list(_plain_field(kind.value_field))
    return pyarrow.list_(_plain_field(kind.value_field)) if pyarrow.types.is_list(kind) else kind


def rows_of(path: Path, group: int, columns: Collection[str], batch_rows: int) -> Iterator[dict[str, Any]]:
    """The rows of a row group, a few at a time.

    Raises:
        BadSample: it cannot be read, or a few rows would become too large.
    """
    with open_parquet(path) as file:
        refuse_large(file, [group], columns, Allowance([path]))
        for batch in file.iter_batches(batch_rows, [group], [*columns]):
            Allowance([path]).take(text_bytes(batch))  # each batch is let go of before the next
            yield from without_dictionaries(batch).to_pylist()
