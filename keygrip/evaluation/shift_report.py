"""The result of a comparison sweep (``sweep=shifts``): success by condition and model, as a table and a plot.

``shifts.csv`` has one line per condition and model, ``shifts.md`` the same as a table of conditions by models,
``shifts.png`` a bar chart. They are in the sweep's folder next to its ``summary.csv``. :func:`make_report` can write
them again from there.
"""

from __future__ import annotations

import csv
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from keygrip.artifacts import atomic_write, write_text
from keygrip.evaluation.statistics import pooled_interval
from keygrip.training.results import FINISHED, read_result
from keygrip.training.run_folder import PLAN
from keygrip.training.sweeps import collect, errors_at_sweep_end, find_jobs, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

CLOSED_LOOP = "closed_loop"
NAME = "shifts"
NOT_EVALUATED = "not evaluated"
# Overrides without a column of their own: shifts are rows, and runs that differ only in the seed are pooled.
SHIFT, SEED = "shift", "seed"
NO_MODEL = "policy"
NOTE = (
    "Success rate (95 % Wilson interval) of episodes. Several training seeds are pooled, with the lowest and the "
    "highest given: the interval is then Wilson's for the effective number of episodes, since the same episode is not "
    "independent for each seed. It covers the choice of episodes for these trainings, not the spread between trainings."
)


@dataclass
class Cell:
    """All runs of one model under one condition.

    Attributes:
        shift: condition of the training data. condition: of the evaluation. model: a column's name.
        successes, episodes: of each finished run. outcomes: success by the episode's seed of each finished run.
        failures: reasons of its failed episodes.
        unfinished: the status of the other runs: failed, missing, killed, interrupted, not evaluated.
    """

    shift: str
    condition: str
    model: str
    successes: list[int] = field(default_factory=list)
    episodes: list[int] = field(default_factory=list)
    outcomes: list[dict[int, bool]] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    unfinished: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float | None:
        """Success rate over all episodes of all runs; None if there are none."""
        return sum(self.successes) / sum(self.episodes) if self.episodes else None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the pooled episodes. It does not include the spread between training seeds."""
        return pooled_interval(self.outcomes)

    @property
    def rates(self) -> list[float]:
        """Success rate of each run."""
        return [won / of for won, of in zip(self.successes, self.episodes, strict=True)]

    @property
    def status(self) -> str:
        """``finished``, or the status of the runs that did not finish."""
        counts = Counter(self.unfinished)
        return ", ".join(f"{number} {status}" for status, number in counts.items()) or FINISHED

    def text(self) -> str:
        """Return the text of the cell in the Markdown table."""
        if self.rate is None:
            return self.status
        low, high = self.interval
        text = f"{self.rate:.1%} ({low:.0%} to {high:.0%}) of {sum(self.episodes)}"
        if len(self.rates) > 1:
            text += f"; {len(self.rates)} seeds, {min(self.rates):.0%} to {max(self.rates):.0%}"
        return f"{text}; {self.status}" if self.unfinished else text


class ShiftReport(Callback):
    """Hydra callback: write the report when the sweep has ended."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        with errors_at_sweep_end(f"no report of the shifts in {config.hydra.sweep.dir}"):
            make_report(Path(config.hydra.sweep.dir))


def make_report(sweep_dir: str | Path) -> list[Cell]:
    """Write ``shifts.csv``, ``.md`` and ``.png`` into a sweep's folder, print the table, return its cells.

    Jobs that did not finish are in the table with their status.

    Raises:
        FileNotFoundError: The folder holds no sweep. ValueError: The sweep has no jobs.
    """
    folder = Path(sweep_dir)
    if not (folder / PLAN).is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a sweep: it holds no {PLAN}")
    cells = read_cells(folder)
    if not cells:
        raise ValueError(f"the sweep in {folder} has no jobs to report on")
    header, lines = long_table(cells)
    with atomic_write(folder / f"{NAME}.csv", "w") as file:
        csv.writer(file).writerows([header, *lines])
    text = markdown(*wide_table(cells))
    write_text(folder / f"{NAME}.md", f"{text}\n\n{NOTE}\n")
    with atomic_write(folder / f"{NAME}.png") as file:
        plot(cells).savefig(file, dpi=150, format="png")
    sys.stderr.write(f"\n{text}\n\n{NOTE}\n{folder / NAME}.md, .csv, .png\n")
    return cells


def read_cells(folder: Path) -> list[Cell]:
    """Read the results of a sweep's jobs, in the order of the jobs and of their conditions."""
    rows = collect(folder)
    folders = [path for _, path in find_jobs(folder)]  # in the order of the rows
    columns = _columns([row["overrides"] for row in rows])
    measured: list[dict[str, Any]] = []
    condition_names: dict[str, list[str]] = defaultdict(list)  # conditions by shift, collected from all jobs
    for row, job in zip(rows, folders, strict=True):
        conditions = _read_conditions(job) if row["status"] == FINISHED else {}
        measured.append(conditions)
        shift = row["overrides"].get(SHIFT, "")
        condition_names[shift] += [name for name in conditions if name not in condition_names[shift]]
    cells: dict[tuple[str, str, str], Cell] = {}
    for row, column, conditions in zip(rows, columns, measured, strict=True):
        shift = row["overrides"].get(SHIFT, "")
        for name in condition_names[shift] or [shift or "in_distribution"]:
            cell = cells.setdefault((shift, name, column), Cell(shift, name, column))
            if name in conditions:
                cell.successes.append(conditions[name]["successes"])
                cell.episodes.append(conditions[name]["episodes"])
                cell.outcomes.append(conditions[name]["outcomes"])
                cell.failures.update(conditions[name].get("failures", {}))
            else:
                cell.unfinished.append(NOT_EVALUATED if row["status"] == FINISHED else row["status"])
    return list(cells.values())


def long_table(cells: Sequence[Cell]) -> tuple[list[str], list[list[Any]]]:
    """Return one line per cell, for programs."""
    header = ["shift", "condition", "model", "status", "success_rate", "success_low", "success_high"]
    header += ["successes", "episodes", "seeds", "lowest_seed_rate", "highest_seed_rate", "failures"]
    lines = []
    for cell in cells:
        line: list[Any] = [cell.shift, cell.condition, cell.model, cell.status]
        if cell.rate is None:
            lines.append([*line, "", "", "", 0, 0, 0, "", "", ""])
            continue
        low, high = cell.interval
        line += [round(cell.rate, 4), round(low, 4), round(high, 4), sum(cell.successes), sum(cell.episodes)]
        line += [len(cell.rates), round(min(cell.rates), 4), round(max(cell.rates), 4)]
        lines.append([*line, " ".join(f"{reason}:{count}" for reason, count in cell.failures.most_common())])
    return header, lines


def wide_table(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return one line per condition and one column per model, for Markdown."""
    models = _list_models(cells)
    by_place = {(cell.shift, cell.condition, cell.model): cell.text() for cell in cells}
    lines = [
        [label, *(by_place.get((shift, condition, model), "") for model in models)]
        for (shift, condition), label in _label_conditions(cells).items()
    ]
    return ["condition", *models], lines


def plot(cells: Sequence[Cell]) -> Figure:
    """Plot bars of the success rate, grouped by condition, with 95 % intervals.

    Dots are single seeds; text marks runs that did not finish.
    """
    import numpy as np
    from matplotlib.figure import Figure

    models, labels = _list_models(cells), _label_conditions(cells)
    positions = {place: index for index, place in enumerate(labels)}
    width = 0.8 / len(models)
    figure = Figure(figsize=(max(6.0, 1.1 + 0.45 * len(labels) * max(2, len(models))), 4.2), layout="constrained")
    axes = figure.subplots()
    for index, model in enumerate(models):
        model_cells = [cell for cell in cells if cell.model == model]
        offset = (index - (len(models) - 1) / 2) * width
        evaluated = [cell for cell in model_cells if cell.rate is not None]
        x = np.array([positions[cell.shift, cell.condition] + offset for cell in evaluated])
        rates = np.array([cell.rate for cell in evaluated], dtype=float)
        ends = np.array([cell.interval for cell in evaluated], dtype=float).reshape(-1, 2)
        errors = np.clip(np.stack([rates - ends[:, 0], ends[:, 1] - rates]), 0, None)
        axes.bar(x, rates, width * 0.92, yerr=errors, capsize=3, label=model, error_kw={"linewidth": 1})
        for place, cell in zip(x, evaluated, strict=True):
            if len(cell.rates) > 1:
                axes.plot([place] * len(cell.rates), cell.rates, "o", color="black", markersize=3, alpha=0.6)
        for cell in model_cells:
            if cell.unfinished:
                place = positions[cell.shift, cell.condition] + offset
                label = axes.text(place, 0.02, cell.status, rotation=90, ha="center", va="bottom", fontsize=8)
                label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1})
    axes.set_xticks(range(len(labels)), labels.values(), rotation=30, ha="right")
    axes.set(ylim=(0, 1.05), ylabel="success rate")
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(ncols=len(models), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def _read_conditions(job: Path | None) -> dict[str, Any]:
    """Return ``{condition: figures}`` of a job's closed-loop evaluation; empty if there was none. Among the figures,
    ``outcomes`` is success by the episode's seed.

    Raises:
        ValueError: The stored conditions are no object, or the stored episodes are not those of the conditions.
    """
    if job is None:
        return {}
    result = read_result(job / CLOSED_LOOP)
    conditions = result.get("conditions", {})
    if not isinstance(conditions, dict):
        raise ValueError(f"the result in {job / CLOSED_LOOP} holds no conditions by name: evaluate the job again")
    read = {}
    for name, figures in conditions.items():
        episodes = result.get("episodes", {}).get(name, [])
        outcomes = {int(episode["seed"]): bool(episode["success"]) for episode in episodes}
        if (len(outcomes), sum(outcomes.values())) != (figures["episodes"], figures["successes"]):
            raise ValueError(
                f"the result in {job / CLOSED_LOOP} counts {figures['successes']} of {figures['episodes']} successes "
                f"of {name}, its episodes {sum(outcomes.values())} of {len(outcomes)}: evaluate the job again"
            )
        read[name] = {**figures, "outcomes": outcomes}
    return read


def _columns(overrides: Sequence[dict[str, str]]) -> list[str]:
    """Return a name for each job's column: the model, and all other varied settings except shift and seed."""
    names = dict.fromkeys(name for each in overrides for name in each if name not in (SHIFT, SEED, "resume"))
    varied = [name for name in names if len({each.get(name) for each in overrides}) > 1]
    others = [name for name in varied if name != "model"]
    return [
        ", ".join([each.get("model", NO_MODEL), *(f"{name}={each.get(name, 'default')}" for name in others)])
        for each in overrides
    ]


def _list_models(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.model for cell in cells))


def _label_conditions(cells: Sequence[Cell]) -> dict[tuple[str, str], str]:
    """Return a label for each shift and condition; it includes the shift if the condition occurs under several."""
    places = dict.fromkeys((cell.shift, cell.condition) for cell in cells)
    count = Counter(condition for _, condition in places)
    return {
        (shift, condition): f"{condition} ({shift})" if count[condition] > 1 else condition
        for shift, condition in places
    }
