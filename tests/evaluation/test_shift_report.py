"""The report of a comparison sweep: numbers, several seeds, jobs that failed, and files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image

from keygrip.artifacts import WRITING
from keygrip.evaluation.shift_report import ShiftReport, make_report, plot, read_cells
from keygrip.evaluation.statistics import pooled_interval
from keygrip.training.results import write_result
from keygrip.training.run_folder import PLAN


def job(folder: Path, number: int, overrides: list[str], status: str, conditions: dict[str, tuple[int, int]]) -> None:
    """A job's folder as training and its closed-loop evaluation leave it."""
    write_result(folder / str(number), {"status": status, "overrides": overrides, "metrics": {}})
    if conditions:
        figures: dict[str, Any] = {
            name: {"success_rate": won / of, "successes": won, "episodes": of, "failures": {"missed": of - won}}
            for name, (won, of) in conditions.items()
        }
        episodes = {
            name: [{"seed": 1000 + index, "success": index < won} for index in range(of)]
            for name, (won, of) in conditions.items()
        }
        write_result(folder / str(number) / "closed_loop", {"conditions": figures, "episodes": episodes})


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two models and two shifts; two seeds of one of them; one job failed, one was never started, one was killed."""
    jobs = [
        (["shift=left_right", "model=pixels", "seed=0"], "finished", {"left": (90, 100), "left_to_right": (50, 100)}),
        (["shift=left_right", "model=pixels", "seed=1"], "finished", {"left": (80, 100), "left_to_right": (70, 100)}),
        (["shift=left_right", "model=numbers", "seed=0"], "finished", {"left": (85, 100), "left_to_right": (1, 100)}),
        (["shift=left_right", "model=numbers", "seed=1"], "failed", {}),
        (["shift=bar", "model=pixels", "seed=0"], "finished", {"bar": (10, 40)}),
        (["shift=bar", "model=pixels", "seed=1"], "running", {}),
        (["shift=bar", "model=numbers", "seed=0"], "missing", {}),
        (["shift=bar", "model=numbers", "seed=1"], "finished", {}),
    ]
    for number, (overrides, status, conditions) in enumerate(jobs):
        if status != "missing":
            job(tmp_path, number, overrides, status, conditions)
    (tmp_path / PLAN).write_text(json.dumps({"jobs": [overrides for overrides, _, _ in jobs], "started": 0.0}))
    return tmp_path


def test_seeds_are_pooled_and_their_spread_is_given(sweep: Path) -> None:
    cells = {(cell.condition, cell.model): cell for cell in read_cells(sweep)}
    cell = cells["left", "pixels"]
    assert (sum(cell.successes), sum(cell.episodes)) == (170, 200)
    assert cell.rate == pytest.approx(0.85)
    # both seeds fail in 10 of the 100 episodes, one more in 10 others: 200 episodes are worth 123
    assert cell.interval == pytest.approx((0.7764, 0.9024), abs=1e-4)
    assert cell.rates == [0.9, 0.8]
    assert cell.text() == "85.0% (78% to 90%) of 200; 2 seeds, 80% to 90%"
    assert cells["left_to_right", "numbers"].rate == pytest.approx(0.01)


def test_a_result_of_another_form_is_refused_by_its_folder(sweep: Path) -> None:
    write_result(sweep / "0" / "closed_loop", {"conditions": ["left"]})
    with pytest.raises(ValueError, match=r"0/closed_loop holds no conditions by name"):
        read_cells(sweep)


def test_episodes_that_are_not_those_of_the_figures_are_refused(sweep: Path) -> None:
    figures = {"success_rate": 0.5, "successes": 1, "episodes": 2}
    write_result(sweep / "0" / "closed_loop", {"conditions": {"left": figures}, "episodes": {}})
    with pytest.raises(ValueError, match=r"0/closed_loop counts 1 of 2 successes of left, its episodes 0 of 0: evalua"):
        read_cells(sweep)


def test_jobs_with_the_same_overrides_keep_results_of_their_own(tmp_path: Path) -> None:
    overrides = ["shift=bar", "model=pixels", "seed=0"]
    for number, won in enumerate((90, 80)):
        job(tmp_path, number, overrides, "finished", {"bar": (won, 100)})
    (tmp_path / PLAN).write_text(json.dumps({"jobs": [overrides] * 2, "started": 0.0}))
    (cell,) = read_cells(tmp_path)
    assert cell.successes == [90, 80]
    write_result(tmp_path / "1", {"status": "failed", "overrides": overrides, "metrics": {}})
    (cell,) = read_cells(tmp_path)
    assert (cell.successes, cell.status) == ([90], "1 failed")


def test_jobs_that_did_not_finish_stand_in_the_table(sweep: Path) -> None:
    cells = {(cell.condition, cell.model): cell for cell in read_cells(sweep)}
    # The other jobs of the shift show under which conditions the failed one would have been tested.
    assert cells["left", "numbers"].status == "1 failed"
    assert cells["left_to_right", "numbers"].status == "1 failed"
    assert cells["left", "numbers"].text().endswith("of 100; 1 failed")
    assert cells["bar", "pixels"].status == "1 killed"
    assert cells["bar", "numbers"].rate is None
    assert cells["bar", "numbers"].text() == "1 missing, 1 not evaluated"


def test_a_shift_of_which_nothing_is_known_is_named_by_itself(tmp_path: Path) -> None:
    job(tmp_path, 0, ["shift=stack", "model=pixels"], "failed", {})
    (tmp_path / PLAN).write_text(json.dumps({"jobs": [["shift=stack", "model=pixels"]], "started": 0.0}))
    (cell,) = read_cells(tmp_path)
    assert (cell.condition, cell.model, cell.status) == ("stack", "pixels", "1 failed")


def test_what_else_was_varied_makes_columns(tmp_path: Path) -> None:
    jobs = [["model=pixels", f"data.horizon={horizon}", f"seed={seed}"] for horizon in (8, 50) for seed in (0, 1)]
    for number, overrides in enumerate(jobs):
        job(tmp_path, number, overrides, "finished", {"in_distribution": (number, 10)})
    (tmp_path / PLAN).write_text(json.dumps({"jobs": jobs, "started": 0.0}))
    cells = read_cells(tmp_path)
    assert [(cell.model, cell.successes) for cell in cells] == [
        ("pixels, data.horizon=8", [0, 1]),
        ("pixels, data.horizon=50", [2, 3]),
    ]


def test_a_condition_of_two_shifts_is_two_rows(tmp_path: Path) -> None:
    jobs = [["shift=none", "model=pixels"], ["shift=views", "model=pixels"]]
    for number, overrides in enumerate(jobs):
        job(tmp_path, number, overrides, "finished", {"in_distribution": (number, 10)})
    (tmp_path / PLAN).write_text(json.dumps({"jobs": jobs, "started": 0.0}))
    make_report(tmp_path)
    text = (tmp_path / "shifts.md").read_text()
    assert "| in_distribution (none) " in text
    assert "| in_distribution (views) " in text


def test_files(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Hydra calls it with the whole config at the end of the sweep.
    ShiftReport().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}}))
    with (sweep / "shifts.csv").open(newline="") as file:
        rows = {(row["condition"], row["model"]): row for row in csv.DictReader(file)}
    assert len(rows) == 6
    row = rows["left", "pixels"]
    assert [row[name] for name in ("successes", "episodes", "seeds", "status")] == ["170", "200", "2", "finished"]
    assert [float(row[name]) for name in ("success_rate", "lowest_seed_rate", "highest_seed_rate")] == [0.85, 0.8, 0.9]
    assert row["failures"] == "missed:30"
    assert rows["bar", "numbers"]["success_rate"] == ""
    text = (sweep / "shifts.md").read_text()
    header = [cell.strip() for cell in text.splitlines()[0].strip("|").split("|")]
    assert header == ["condition", "pixels", "numbers"]
    assert "95 % Wilson interval" in text
    assert "not the spread between trainings" in text
    captured = capsys.readouterr()
    assert captured.out == ""  # standard output is reserved for figures
    assert "left_to_right" in captured.err
    assert not list(sweep.glob(f".*{WRITING}*"))


def test_plot_shows_rates_intervals_and_what_is_missing(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", Figure.savefig.__wrapped__)  # type: ignore[attr-defined]
    cells = read_cells(sweep)
    (axes,) = plot(cells).axes
    heights = [
        [bar.get_height() for bar in container.patches]
        for container in axes.containers
        if hasattr(container, "patches")
    ]
    assert heights == [[0.85, 0.6, 0.25], [0.85, 0.01]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["left", "left_to_right", "bar"]
    assert sorted(text.get_text() for text in axes.texts) == [
        "1 failed",
        "1 failed",
        "1 killed",
        "1 missing, 1 not evaluated",
    ]
    low, high = pooled_interval(cells[0].outcomes)
    segments = [
        line for container in axes.containers if hasattr(container, "errorbar") for line in [container.errorbar]
    ]
    ends = segments[0].lines[2][0].get_segments()[0][:, 1]
    assert ends == pytest.approx([low, high])
    make_report(sweep)
    picture = np.asarray(Image.open(sweep / "shifts.png"))
    assert picture.shape[1] > picture.shape[0] > 300
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 50


def test_a_folder_without_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"not the folder of a sweep: it holds no sweep\.json"):
        make_report(tmp_path)
    (tmp_path / PLAN).write_text(json.dumps({"jobs": [], "started": 0.0}))
    with pytest.raises(ValueError, match="no jobs to report on"):
        make_report(tmp_path)
