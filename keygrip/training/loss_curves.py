"""Plot losses and accuracy of a sweep's jobs against their cost, from the logs of the runs, in one image."""

from __future__ import annotations

import csv
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

STEP_TFLOP = "compute/step_tflop"  # logged by keygrip.training.compute
LOSSES = {"train/loss": "training loss", "val/loss": "validation loss"}
ACCURACY = "val/accuracy"  # share of correct answers, if a run has it
PANELS = LOSSES | {ACCURACY: "validation accuracy"}
SMOOTHED = 0.2  # half width of the averaging window, as a share of the points so far
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
LEAST = 2  # points added to the half width
SHOWN_NOISE = 6  # up to this number of jobs, single losses are plotted in addition to the averages
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Curves:
    """Logged values of one run, by name; arrays of equal length, in the order of the steps.

    Attributes:
        steps: optimizer steps at which a value was logged. values: the values.
        seconds: seconds since the first value of the run; None if the logger does not store the time.
    """

    steps: Mapping[str, np.ndarray]
    values: Mapping[str, np.ndarray]
    seconds: Mapping[str, np.ndarray] | None

    def tflop(self, name: str) -> np.ndarray | None:
        """Return the cumulative training compute at the points of a curve; None if it was not counted.

        Each count applies until the next one; the first one applies from the beginning.
        """
        if STEP_TFLOP not in self.values:
            return None
        counted, cost = self.steps[STEP_TFLOP], self.values[STEP_TFLOP]
        starts = np.concatenate([[0.0], counted[1:]])
        spent = np.concatenate([[0.0], np.cumsum(np.diff(starts) * cost[:-1])])
        steps = self._done(name)
        indices = np.searchsorted(starts, steps, side="right") - 1
        return spent[indices] + (steps - starts[indices]) * cost[indices]

    def minutes(self, name: str, wall_s: float | None) -> np.ndarray | None:
        """Return the wall time at the points of a curve: that of the logger, or the run's total time times the share of
        the steps."""
        if self.seconds is not None:
            return self.seconds[name] / 60
        last = max((float(self._done(other)[-1]) for other in self.steps if len(self.steps[other])), default=1.0)
        return None if wall_s is None else self._done(name) / last * wall_s / 60

    def _done(self, name: str) -> np.ndarray:
        """Return the steps done at each point: n + 1 for a training value of step n, n for a validation value."""
        return self.steps[name] + (0.0 if name.startswith("val/") else 1.0)


def read_curves(folder: Path) -> Curves | None:
    """Read the values of `PANELS` and the compute from a run's TensorBoard log, else its CSV; None without a loss."""
    wanted = {*PANELS, STEP_TFLOP}
    found = _read_tensorboard(folder / "tensorboard", wanted) or _read_csv(folder / "csv" / "metrics.csv", wanted)
    return found if found is not None and any(name in found.values for name in LOSSES) else None


def _read_tensorboard(folder: Path, names: set[str]) -> Curves | None:
    if not any(folder.glob("events.*")):
        return None
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it logs "No path found after" for every folder
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
    board.Reload()
    events = {name: board.Scalars(name) for name in board.Tags()["scalars"] if name in names}
    begin = min((event.wall_time for scalars in events.values() for event in scalars), default=0.0)
    return Curves(
        {name: np.array([event.step for event in scalars]) for name, scalars in events.items()},
        {name: np.array([event.value for event in scalars]) for name, scalars in events.items()},
        {name: np.array([event.wall_time - begin for event in scalars]) for name, scalars in events.items()},
    )


def _read_csv(file: Path, metrics: set[str]) -> Curves | None:
    if not file.is_file():
        return None
    points: dict[str, dict[int, float]] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            for name in metrics & row.keys():
                if row[name] and row["step"]:
                    points.setdefault(name, {})[int(row["step"])] = float(row[name])
    ordered = {name: sorted(curve.items()) for name, curve in points.items()}
    return Curves(
        {name: np.array([step for step, _ in curve]) for name, curve in ordered.items()},
        {name: np.array([value for _, value in curve]) for name, curve in ordered.items()},
        None,
    )


@dataclass(frozen=True)
class Job:
    """A job of a sweep in the figure: the overrides that differ between jobs, its curves and its wall time."""

    overrides: Mapping[str, str]
    curves: Curves
    wall_s: float | None = None

    @property
    def label(self) -> str:
        """The overrides, with deep names shortened to their last two parts."""
        short = {name: ".".join(name.split(".")[-2 if name.count(".") > 1 else -1 :]) for name in self.overrides}
        return ", ".join(f"{short[name]}={value}" for name, value in self.overrides.items())


def draw(jobs: Sequence[Job]) -> Figure | None:
    """Plot training and validation loss, and accuracy if there is one, against compute, with one curve per job; return
    None if no job has a curve.

    The axis is wall time if any job did not count its compute, so that all jobs can be compared.
    """
    names = [name for name in PANELS if any(len(job.curves.values.get(name, ())) for job in jobs)]
    if not names:
        return None
    from matplotlib.figure import Figure

    counted = all(STEP_TFLOP in job.curves.values for job in jobs)
    styles = _styles(jobs)
    legend = 0.9 + 0.07 * max(len(job.label) for job in jobs)  # inches
    size = (4.6 * len(names) + legend, max(4.2, 0.2 * len(jobs) + 1.2))
    figure = Figure(figsize=size, layout="constrained", dpi=130)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        for job, style in zip(jobs, styles, strict=True):
            if name not in job.curves.values:
                continue
            x = job.curves.tflop(name) if counted else job.curves.minutes(name, job.wall_s)
            if x is not None:
                _draw_curve(axis, x, job.curves.values[name], style, name.startswith("train"), len(jobs) <= SHOWN_NOISE)
        axis.set_title(PANELS[name], fontsize=10)
        axis.set_xlabel("training compute (TFLOP)" if counted else "wall time (minutes)")
        axis.set_xscale("log")
        if name == ACCURACY:
            axis.set_ylim(0, 1.02)
        elif all(values.min() > 0 for values in (job.curves.values.get(name, np.ones(1)) for job in jobs)):
            axis.set_yscale("log")
        axis.grid(which="major", color="0.85", linewidth=0.8)
        axis.grid(which="minor", color="0.93", linewidth=0.5)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for scale in (axis.xaxis, axis.yaxis):
            _plain_ticks(scale)
    handles = [_legend_handle(job.label, style) for job, style in zip(jobs, styles, strict=True)]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False, handlelength=3.2)
    return figure


def _styles(jobs: Sequence[Job]) -> list[dict[str, str]]:
    """Return one line style per job: the first override sets the colour, the second the dashes, the third the markers,
    if they have few enough values; else each job has a unique style."""
    names = list(dict.fromkeys(name for job in jobs for name in job.overrides))
    values = [list(dict.fromkeys(job.overrides.get(name, "") for job in jobs)) for name in names]
    looks = (("color", COLOURS), ("linestyle", DASHES), ("marker", MARKERS))
    if len(names) <= len(looks) and all(
        len(choices) <= len(look) for choices, (_, look) in zip(values, looks, strict=False)
    ):
        return [
            {
                kind: look[choices.index(job.overrides.get(name, ""))]
                for name, choices, (kind, look) in zip(names, values, looks, strict=False)
            }
            for job in jobs
        ]
    style_cycle = itertools.cycle((colour, dash) for dash in DASHES for colour in COLOURS)
    return [{"color": colour, "linestyle": dash} for _, (colour, dash) in zip(jobs, style_cycle, strict=False)]


def _draw_curve(axis: Axes, x: np.ndarray, y: np.ndarray, style: Mapping[str, str], noisy: bool, raw: bool) -> None:
    colour, dash = style.get("color", COLOURS[0]), style.get("linestyle", DASHES[0])
    finite = np.isfinite(y) & (x > 0)
    x, y = x[finite], y[finite]
    if not len(x):
        return
    plotted = smoothed(y) if noisy else y
    if noisy and raw and len(x) > 20:
        axis.plot(x, y, color=colour, linewidth=0.5, alpha=0.18)
    axis.plot(x, plotted, linewidth=1.6, color=colour, linestyle=dash)
    # Mark the end of a run, the result for its budget. If there are few points, mark all of them.
    few = len(x) <= 20
    axis.plot(
        x if few else x[-1:],
        plotted if few else plotted[-1:],
        linestyle="none",
        marker=style.get("marker", "o"),
        markersize=3.5 if few else 5,
        color=colour,
    )


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the running mean [N] of values [N]. The window grows with the index: its width is equal on a log axis."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    indices = np.arange(len(values))
    half_widths = np.minimum((indices * SMOOTHED).astype(int) + LEAST, indices)
    starts, ends = indices - half_widths, np.minimum(indices + half_widths + 1, len(values))
    return (sums[ends] - sums[starts]) / (ends - starts)


def _legend_handle(label: str, style: Mapping[str, str]) -> object:
    from matplotlib.lines import Line2D

    look = {"color": COLOURS[0], "marker": "o"} | dict(style)
    return Line2D([], [], label=label or "the job", markersize=4, linewidth=1.6, **look)  # type: ignore[arg-type]


def _plain_ticks(axis: Axis) -> None:
    """Use round numbers as ticks if the range has less than two powers of ten, which would be too few ticks."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

    low, high = axis.get_view_interval()
    if axis.get_scale() != "log":
        return
    axis.set_minor_formatter(NullFormatter())
    if high / low < 30:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axis.set_minor_locator(NullLocator())
