"""Show the progress of work that takes more than two seconds: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0


class Progress(tqdm):
    """A tqdm bar on standard error if that is a terminal. If it is a file or a pipe, where a bar would leave thousands
    of copies, a line every 15 seconds and one at the end.

    Args:
        iterable: items to count, or None with `update`. desc: description of the work. unit: unit of the count. total:
            number of items, if the iterable has no length. delay: seconds before anything is shown. leave: whether the
            bar stays on the terminal when it ends. shown: False for no output at all.
    """

    disable: bool

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        desc: str | None = None,
        unit: str = "it",
        total: float | None = None,
        delay: float = 2.0,
        leave: bool = True,
        shown: bool = True,
    ) -> None:
        self._on_terminal = sys.stderr.isatty()
        self._written: float | None = None  # count of the last line
        super().__init__(
            iterable,
            desc=desc,
            unit=unit,
            total=total,
            delay=delay,
            leave=leave,
            disable=not shown,
            file=sys.stderr,
            mininterval=0.5 if self._on_terminal else SECONDS_BETWEEN_LINES,
            dynamic_ncols=self._on_terminal,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draw the bar, or write a line."""
        if self._on_terminal:
            return super().display(msg, pos)
        if self.n != self._written:  # tqdm also redraws a bar when the count has not changed
            self._written = self.n
            self.fp.write(f"{line(self.desc, self.format_dict, self.postfix)}\n")
            self.fp.flush()
        return True

    def close(self) -> None:
        """Write a last line, or leave the bar as tqdm does."""
        if not self.disable and not self._on_terminal:
            if self.leave and self.format_dict["elapsed"] >= self.delay:
                self.display()
            self.fp = io.StringIO()  # discards what tqdm writes to clear a bar
        super().close()


def line(what: str | None, values: dict[str, Any], postfix: str | None = None) -> str:
    """Return one line of progress: ``record pick: 40 of 150 demos, 3.1 per second, 35 s left``."""
    count, total, elapsed = values["n"], values["total"], values["elapsed"]
    unit = values["unit"]
    plural = "es" if unit.endswith(("ch", "sh", "s", "x")) else "s"
    parts = [f"{count:g}{'' if total is None else f' of {total:g}'} {unit}{'' if count == 1 and not total else plural}"]
    rate = values["rate"] or (count / elapsed if elapsed else None)
    if rate:
        parts.append(f"{rate:.3g} per second")
        if total is not None and total > count:
            parts.append(f"{(total - count) / rate:.0f} s left")
    if total is None or count >= total:
        parts.append(f"{elapsed:.0f} s")
    if postfix:
        parts.append(postfix)
    return f"{(what or 'progress').removesuffix(': ')}: {', '.join(parts)}"
