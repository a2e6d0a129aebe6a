"""Progress: a bar on a terminal, lines elsewhere, nothing where it is unwanted."""

from __future__ import annotations

import io
import sys

import pytest

from keygrip import progress
from keygrip.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(Progress(range(40), desc="read demos", unit="demo", delay=0.0)) == list(range(40))
    text = stream.getvalue()
    assert "\r" not in text
    lines = text.splitlines()
    assert all(line.startswith("read demos: ") for line in lines)
    assert lines[-1].startswith("read demos: 40 of 40 demos, ")
    assert "left" in lines[1]


def test_seconds_pass_between_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in Progress(range(1000), desc="read demos", unit="demo", delay=0.0):
        pass
    assert len(stream.getvalue().splitlines()) == 2, "the start and the end"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(total=3, desc="closed loop", unit="episode", delay=0.0) as bar:
        for won in range(3):
            bar.set_postfix_str(f"{won} succeeded", refresh=False)
            bar.update()
    text = stream.getvalue()
    for part in ("\r", "3/3", "2 succeeded"):
        assert part in text


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_nothing_where_it_is_unwanted_or_quick(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    list(Progress(range(5), desc="quick"))  # ends before the two seconds
    list(Progress(range(5), desc="unwanted", delay=0.0, shown=False))
    assert stream.getvalue() == ""


def test_a_line_without_a_total() -> None:
    values = {"n": 1, "total": None, "elapsed": 4.0, "unit": "sample", "rate": None}
    assert progress.line("write", values, "2 refused") == "write: 1 sample, 0.25 per second, 4 s, 2 refused"
