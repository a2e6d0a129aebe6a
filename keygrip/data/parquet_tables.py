"""Read Parquet tables from untrusted sources.

Parquet stores a repeated text once in a dictionary and refers to it by index, stores a repeated number as a run, and
compresses pages. A file of a few kilobytes can therefore expand to gigabytes. The memory that a table needs is counted
first, against an :class:`Allowance`:

- Before Arrow decodes a row group: the numbers of values and the decompressed bytes in the headers of its pages. Arrow
  allocates and decodes according to these (:mod:`keygrip.data.parquet_pages`). The sizes in the file's footer can be
  wrong and are ignored. Texts stored as differences to the previous text (DELTA_BYTE_ARRAY) count in full, with the
  lengths in the page. If those lengths are not as writers make them, or the page is compressed with Hadoop's LZ4, each
  text counts as long as its page. Texts of a dictionary that Arrow decodes one by one (JSON, columns with DELTA in
  another row group) count as often as pages refer to them. Each page counts for some additional bytes, so that a file
  with very many pages exceeds the allowance before it takes too long.
- After Arrow has decoded a batch and before its texts are expanded: the texts that dictionary indices refer to.

The guarantee: the counted bytes of everything that is in memory at one time are within the allowance. The process grows
by at most about twice the counted bytes while Arrow decodes, and by four times when rows become Python objects. The
memory that Arrow needs to read the footer itself is not counted.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keygrip.data.bad_samples import convert_errors
from keygrip.data.parquet_pages import DICTIONARY, STEP_BYTES, codecs, pages, text_bound, texts_of
from keygrip.data.untrusted_files import MAX_ARRAY_BYTES, regular_file

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

EXPANSION = 64  # a large file may expand to this multiple of its own size, a small one to MAX_ARRAY_BYTES
VALUE_BYTES = 32  # bytes of a number or a reference in a Python list
DICT_BYTES, LIST_BYTES = 256, 64  # bytes of a Python dict with one field, and of a Python list
PAGE_BYTES = 4096  # counted for each page in addition to its values: even an empty page takes time to read
BATCH_ROWS = 4096  # rows decoded at once
FOOTERS_KEPT = 8  # cached footers of the files read last: reading row groups one by one opens the file for each


class TooLarge(ValueError):
    """A table needs more memory than is allowed. :func:`is_too_large` finds it among the causes of other errors."""


def is_too_large(error: BaseException | None) -> bool:
    """Whether an error was caused by a table that is too large, and not by a damaged one."""
    return error is not None and (isinstance(error, TooLarge) or is_too_large(error.__cause__))


class Allowance:
    """The bytes that tables may still use in memory; shared by all files that are in memory at the same time.

    Args:
        paths: the files.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.total = max(MAX_ARRAY_BYTES, EXPANSION * sum(regular_file(path).st_size for path in paths))
        self.left = self.total

    def take(self, size: int) -> None:
        """Subtract `size` bytes. Raise TooLarge if more than the remaining bytes are needed."""
        self.left -= size
        if self.left < 0:
            raise TooLarge(
                f"unpacked, it has more than the {self.total} bytes that a table of its size may have: if its makers "
                "are to be trusted, write its rows into several files"
            )


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    """Open a Parquet file for reading. Texts are read as Arrow dictionaries, so that a repeated text is in memory once.

    Raises:
        BadSample: it is not a regular file or not a Parquet file; or the block raises an error of a broken file.
    """
    import pyarrow.parquet as parquet

    regular_file(path)
    with convert_errors(path):
        metadata, texts = _parse_footer(*_read_footer(path))
        with parquet.ParquetFile(path, metadata=metadata, read_dictionary=[*texts]) as file:
            yield file


def _read_footer(path: Path) -> tuple[bytes, int]:
    """Return a file's bytes from its footer on, and the file's size. Raise ValueError if it has no footer."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 8, 0))
        ending = file.read(8)
        length = 8 + int.from_bytes(ending[:4], "little")
        if ending[4:] != b"PAR1" or length > size - 4:
            raise ValueError("it does not end as a Parquet file does: it is none, or its end is missing")
        file.seek(size - length)
        return file.read(length), size


@functools.lru_cache(FOOTERS_KEPT)
def _parse_footer(footer: bytes, size: int) -> tuple[pyarrow.parquet.FileMetaData, tuple[str, ...]]:
    """Return the metadata in a file's footer, and the columns whose texts are read as dictionaries.

    Raises:
        ValueError: row groups share stored bytes: each one is within its allowance, but there may be thousands of them.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    metadata = parquet.read_metadata(pyarrow.BufferReader(b"PAR1" + footer))
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    stored = sum(max(group.column(n).total_compressed_size, 0) for group in groups for n in range(group.num_columns))
    if stored > size:
        raise ValueError(f"its row groups have {stored} bytes together, more than the {size} of the file")
    texts = (
        metadata.schema.column(index).path
        for index in range(len(metadata.schema))
        if metadata.schema.column(index).physical_type == "BYTE_ARRAY"
        # Arrow does not read these as dictionaries
        and not any("DELTA" in encoding for group in groups for encoding in group.column(index).encodings)
    )
    return metadata, tuple(texts)


@functools.lru_cache(FOOTERS_KEPT)
def _codecs(footer: bytes) -> list[list[int]]:
    """Return the `codecs` of a footer from `_read_footer`; if the footer is damaged, an empty list, cached too."""
    try:
        return codecs(footer[:-8])
    except ValueError:
        return []


def column_types(path: Path) -> dict[str, str]:
    """Return Arrow's type of each column, by name and in order. Raise BadSample if it is not a Parquet file."""
    import pyarrow.parquet as parquet

    regular_file(path)
    with convert_errors(path):
        return {field.name: str(field.type) for field in parquet.read_schema(path)}


def refuse_large(
    path: Path,
    file: pyarrow.parquet.ParquetFile,
    groups: Iterable[int],
    columns: Collection[str] | None,
    allowance: Allowance,
) -> None:
    """Count the memory that row groups need once Arrow has decoded them, from their page headers, which Arrow uses. The
    sizes in the footer are ignored. Texts that are read as dictionaries count once each, as they are stored.

    Args:
        path: of the file. columns: names; None: all.

    Raises:
        TooLarge: the row groups need more memory than is allowed. ValueError: the header of a page is damaged.
    """
    import pyarrow

    schema = file.metadata.schema
    leaves = [leaf for field in file.schema_arrow for leaf in _leaf_types(field.type)]
    if len(leaves) != len(schema):
        raise ValueError("the schema of Arrow's that it holds has other columns than Parquet's")
    with path.open("rb") as content:
        for group_index in groups:
            group = file.metadata.row_group(group_index)
            allowance.take(VALUE_BYTES * max(group.num_rows, 0))
            for column_index, (kind, value_bytes) in enumerate(leaves):
                chunk, column = group.column(column_index), schema.column(column_index)
                if columns is not None and not _belongs_to_any(chunk.path_in_schema, columns):
                    continue
                allowance.take(max(chunk.total_compressed_size, 0))  # Arrow reads the whole column chunk at once
                one_by_one = chunk.physical_type == "BYTE_ARRAY" and not pyarrow.types.is_dictionary(kind)
                codec = functools.partial(_find_codec, path, group_index, column_index)
                texts = None
                for page in pages(content, chunk):
                    value = value_bytes + max(column.length, 0)
                    allowance.take(PAGE_BYTES + max(page.size, page.stored) + value * page.values)
                    if page.kind == DICTIONARY and one_by_one:
                        allowance.take(STEP_BYTES * page.values)
                        texts = texts_of(content, page, codec)
                    allowance.take(text_bound(content, page, codec, column, texts))


def _find_codec(path: Path, group: int, column: int) -> int:
    """Return the number of a column's codec; few columns need it. Raise IndexError if the footer lacks it."""
    return _codecs(_read_footer(path)[0])[group][column]


def _leaf_types(kind: Any, value_bytes: int = VALUE_BYTES) -> Iterator[tuple[Any, int]]:
    """Yield the leaf types of an Arrow type, which Parquet stores as columns, in order, with the bytes that each value
    needs as Python objects, without its text. In the worst case each value has its own dicts and inner lists."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):  # such as JSON
        kind = kind.storage_type
    if not kind.num_fields:
        yield kind, value_bytes
    for index in range(kind.num_fields):
        inner = kind.field(index).type
        around = DICT_BYTES if pyarrow.types.is_struct(kind) else LIST_BYTES if inner.num_fields else 0
        yield from _leaf_types(inner, value_bytes + around)


def _belongs_to_any(leaf: str, columns: Collection[str]) -> bool:
    """Whether a leaf such as `images.list.element.bytes` belongs to one of the columns. Column names may have dots."""
    parts = leaf.split(".")
    return any(".".join(parts[:length]) in columns for length in range(1, len(parts) + 1))


def read_table(path: Path, columns: Collection[str] | None = None, allowance: Allowance | None = None) -> pyarrow.Table:
    """Read a Parquet file's table, or some of its columns.

    Args:
        allowance: one that several files share; None: one for this file.

    Raises:
        BadSample: the file cannot be read, or the table is too large.
    """
    import pyarrow

    allowance = Allowance([path]) if allowance is None else allowance
    with open_parquet(path) as file:
        refuse_large(path, file, range(file.num_row_groups), columns, allowance)
        schema = file.schema_arrow if columns is None else pyarrow.schema([file.schema_arrow.field(c) for c in columns])
        batches = []
        for group in range(file.num_row_groups):  # each has its own dictionaries; Arrow cannot join those in lists
            for batch in file.iter_batches(BATCH_ROWS, [group], None if columns is None else [*columns]):
                allowance.take(text_bytes(batch))
                batches.append(without_dictionaries(batch))
        return pyarrow.Table.from_batches(
            batches, pyarrow.schema([_field_without_dictionary(field) for field in schema])
        )


def text_bytes(batch: pyarrow.RecordBatch) -> int:
    """Return the bytes of all texts in a batch of `open_parquet`; a repeated text counts each time it occurs.

    Raises:
        ValueError: a column has a type that is not supported here.
    """
    return sum(_array_text_bytes(column) for column in batch.columns)


def _array_text_bytes(values: Any) -> int:
    import pyarrow
    import pyarrow.compute as compute

    kind, types = values.type, pyarrow.types
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _array_text_bytes(values.storage)
    if types.is_dictionary(kind):
        if not _is_text(kind.value_type):
            return len(values) * VALUE_BYTES
        lengths = compute.cast(compute.binary_length(values.dictionary), pyarrow.int64())
        return int(compute.sum(lengths.take(values.indices)).as_py() or 0)
    if types.is_map(kind):
        return _array_text_bytes(values.keys) + _array_text_bytes(values.items)
    if types.is_struct(kind):
        return sum(_array_text_bytes(field) for field in values.flatten())
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    if any(test(kind) for test in lists):
        return _array_text_bytes(values.flatten())
    if _is_text(kind) or types.is_fixed_size_binary(kind) or types.is_string_view(kind) or types.is_binary_view(kind):
        return int(values.nbytes)
    if not any(test(kind) for test in (types.is_primitive, types.is_decimal, types.is_null)):
        raise ValueError(
            f"a column has values of type {kind}, which are not read: store them as lists, texts or numbers"
        )
    return 0


def _is_text(kind: Any) -> bool:
    import pyarrow

    tests = (pyarrow.types.is_string, pyarrow.types.is_binary, pyarrow.types.is_large_string)
    return any(test(kind) for test in (*tests, pyarrow.types.is_large_binary))


def without_dictionaries(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Return the batch with texts in place of dictionary indices; `text_bytes` gives the size of the result. Indices in
    list views and in extension types stay: Arrow does not expand them."""
    import pyarrow

    fields = [_field_without_dictionary(field) for field in batch.schema]
    columns = [
        column if column.type == field.type else column.cast(field.type)
        for column, field in zip(batch.columns, fields, strict=True)
    ]
    return pyarrow.RecordBatch.from_arrays(columns, schema=pyarrow.schema(fields))


def _field_without_dictionary(field: pyarrow.Field) -> pyarrow.Field:
    return field.with_type(_type_without_dictionary(field.type))


def _type_without_dictionary(kind: Any) -> Any:
    """Return the type with values in place of dictionaries, at any depth."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        return kind.value_type
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([_field_without_dictionary(field) for field in kind])
    if pyarrow.types.is_map(kind):
        return pyarrow.map_(_field_without_dictionary(kind.key_field), _field_without_dictionary(kind.item_field))
    if pyarrow.types.is_fixed_size_list(kind):
        return pyarrow.list_(_field_without_dictionary(kind.value_field), kind.list_size)
    if pyarrow.types.is_large_list(kind):
        return pyarrow.large_list(_field_without_dictionary(kind.value_field))
    return pyarrow.list_(_field_without_dictionary(kind.value_field)) if pyarrow.types.is_list(kind) else kind


def rows_of(path: Path, group: int, columns: Collection[str], batch_rows: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a row group, decoded `batch_rows` at a time.

    Raises:
        BadSample: the row group cannot be read, or a batch of rows is too large.
    """
    with open_parquet(path) as file:
        refuse_large(path, file, [group], columns, Allowance([path]))
        for batch in file.iter_batches(batch_rows, [group], [*columns]):
            Allowance([path]).take(text_bytes(batch))  # each batch is freed before the next one
            yield from without_dictionaries(batch).to_pylist()
