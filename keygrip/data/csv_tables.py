"""Read tables of comma-separated values strictly, so that no text is cut off or lost."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

TOO_MANY = "it has more fields than the table has columns: put text that holds a comma in quotes"


def table_rows(
    text: str, needed: Sequence[str] = (), kind: str = "the right table"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield for each row the number of its last line and its values by column, None where the row is too short. Spaces
    around column names are ignored.

    Args:
        needed: required columns. kind: the expected kind of table, for the message.

    Raises:
        ValueError: the text contains a NUL byte, columns are separated by semicolons or tabs, a required column is
            missing, a column occurs twice, or a row has more fields than the header. csv.Error: quotes are not closed,
            or text follows a closing quote.
    """
    before, nul, _ = text.partition("\0")
    if nul:  # a block of zeros in a damaged file takes the place of line ends, which would join rows
        line = len(io.StringIO(before + "x", newline="").readlines())
        raise ValueError(f"line {line} contains a NUL byte: the file is damaged or not UTF-8; write it anew, as UTF-8")
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    table.fieldnames = names = [name.strip() for name in table.fieldnames or ()]
    # as spreadsheet programs write .csv in many languages; a table of one column needs no separator
    for separator, called in ((";", "semicolons"), ("\t", "tabs")):
        if len(names) == 1 and separator in names[0]:
            raise ValueError(f"line 1: {called} separate the columns ({names[0]!r:.60}): save the table with commas")
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(f"it has no column {missing[0]!r}: is it {kind}?")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"line 1: the column {twice[0]} stands there twice")
    for row in table:
        if None in row:
            raise ValueError(f"line {table.line_num}: {TOO_MANY}")
        yield table.line_num, row
