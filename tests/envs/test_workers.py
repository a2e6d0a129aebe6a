"""A worker process that dies is restarted and its job repeated once; if that fails too, the job is named."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from keygrip.envs.workers import run_jobs

ROOT = Path(__file__).parents[2]


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests' / 'support'}")
    found: list[dict[str, Any]] = []
    try:
        for number, report in run_jobs(sys.executable, "mortal_worker", {"folder": str(folder)}, jobs, 1):
            assert report["number"] == number
            found.append(report)
    except ValueError as error:
        found.append({"error": str(error)})
    return found


def test_a_worker_that_dies_is_started_again_and_its_job_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [{"number": 0}, {"number": 1, "dies": "once"}, {"number": 2, "dies": "fails"}, {"number": 3}]
    found = run(tmp_path, monkeypatch, jobs)
    assert [report["first"] for report in found] == [True, False, False, True]
    assert "exit code 9" in caplog.text
    assert "the simulator became unstable" in caplog.text


@pytest.mark.parametrize("processes", [0, -1])
def test_jobs_without_a_worker_are_refused(processes: int) -> None:
    with pytest.raises(ValueError, match=f"processes={processes}: at least 1 worker is needed"):
        next(run_jobs(sys.executable, "mortal_worker", {}, [{"number": 0}], processes))


@pytest.mark.parametrize(
    ("dies", "said"),
    [
        ("always", r'exit code 9 .*twice at the job \{"number": 1, "dies": "always"\}'),
        ("after a report", "exit code 9"),  # a repeated job would send its first report again
        ("refuses", "no such task"),
    ],
)
def test_a_job_that_cannot_be_done_is_named_after_what_was_done(
    dies: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, *reported, failed = run(tmp_path, monkeypatch, [{"number": 0}, {"number": 1, "dies": dies}, {"number": 2}])
    assert done == {"number": 0, "first": True}
    assert len(reported) == (dies == "after a report")
    assert re.search(said, failed["error"])
