"""Find, check and read the parquet tables of published data sets, one row group at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet

from keygrip.data.bad_samples import BadSample, convert_errors, reason_of
from keygrip.data.parquet_tables import is_too_large, rows_of
from keygrip.data.shards.keys import file_keys
from keygrip.data.source_files import files_in
from keygrip.data.untrusted_files import regular_file

BATCH_ROWS = 64  # rows read at once


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file. `name` identifies the file in the data set and does not change when the folder is
    moved; keys of samples begin with it (`keygrip.data.shards.keys.file_keys`)."""

    path: Path
    group: int
    first_row: int
    name: str

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the number in the file and the values of each row. Raise ValueError if the table is damaged, or too
        large when decompressed."""
        with _table_errors_as_value_error(self.path):
            yield from enumerate(rows_of(self.path, self.group, columns, BATCH_ROWS), self.first_row)


@contextlib.contextmanager
def _table_errors_as_value_error(path: Path) -> Iterator[None]:
    """Convert the errors of a damaged table to ValueError."""
    try:
        with convert_errors(path):
            yield
    except (BadSample, arrow.ArrowException) as error:
        reason = error.what if isinstance(error, BadSample) else reason_of(error)
        # a table that is too large would be too large after another download
        raise ValueError(
            f"{path} cannot be read ({reason})" + ("" if is_too_large(error) else ": download it again")
        ) from error


def row_groups(source: Path | str, pattern: str, columns: Sequence[str], what: str) -> list[RowGroup]:
    """Return all row groups of the tables below a folder. Linked folders are read, each once; hidden ones are not.

    Raises:
        FileNotFoundError: there are no tables. ValueError: a table cannot be read or lacks a column; `what` names the
            data set for messages.
    """
    source = Path(source)
    paths = [path for path in files_in(source, ".parquet", below=True) if fnmatchcase(path.name, pattern)]
    if not paths:
        raise FileNotFoundError(
            f"no {pattern} in {source}: download {what} there as its makers ship it (parquet files)"
        )
    groups = []
    for path, name in zip(paths, file_keys(source, paths), strict=True):
        regular_file(path)
        with _table_errors_as_value_error(path), parquet.ParquetFile(path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}: is it a table of {what}?")
        start = 0
        for group, size in enumerate(sizes):
            groups.append(RowGroup(path, group, start, name))
            start += size
    return groups
