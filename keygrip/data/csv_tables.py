"""Tables of comma-separated values: read strictly, so that no text is cut off or swallowed."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

TOO_MANY = "it has more fields than the table has columns: put text that holds a comma in quotes"


def table_columns(text: str) -> list[str]:
    """The names in the first line. Raises ValueError: one stands there twice."""
    names = list(csv.DictReader(io.StringIO(text, newline=""), strict=True).fieldnames or ())
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"line 1: the column {twice[0]} stands there twice")
    return names


def table_rows(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of the last line and values of each row by column, None where the row is too short.

    Raises:
        ValueError: a column stands there twice, or a row has more fields than there are columns. csv.Error: quotes that
            are not closed or that more text follows.
    """
    table_columns(text)
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    for row in table:
        if None in row:
            raise ValueError(f"line {table.line_num}: {TOO_MANY}")
        yield table.line_num, row
