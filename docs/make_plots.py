"""Draw the plots of docs/*.md from the records in benchmarks/: ``python docs/make_plots.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
LENGTHS = (1, 2, 4, 8, 16, 32, 64)


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))


def frames_and_tokens() -> None:
    """Plot the language model's accuracy and time against the number of frames: one token per frame, or several."""
    runs = {run["run"]: run for run in read("foveated_vlm")["runs"]}
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    quality, time = figure.subplots(1, 2)
    for run, mode, label, colour in (
        ("long_0", "autoregressive", "1 chosen token per frame", "tab:blue"),
        ("pooled_long_0", "many_tokens", "16 pooled tokens per frame", "tab:orange"),
    ):
        for kind, style in (("mark", "-"), ("cue", "--")):
            accuracies = {n: runs[run][mode].get(f"accuracy_{kind}_of_{n}") for n in LENGTHS}
            plotted = [(n, value) for n, value in accuracies.items() if value is not None]
            quality.plot(*zip(*plotted, strict=True), style, marker="o", color=colour, label=f"{label}, {kind}")
    quality.axhline(1 / 8, color="grey", linewidth=0.8, linestyle=":", label="chance")
    quality.set_xscale("log", base=2)
    quality.set(xlabel="frames, up to", ylabel="accuracy", ylim=(0, 1.02), title="small model, held-out tours")
    quality.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    recorded = read("vlm_tokens")
    for tokens, colour in ((1, "tab:blue"), (4, "tab:green"), (16, "tab:orange"), (64, "tab:red")):
        points = [(n, recorded.get(f"frames_{n}_tokens_{tokens}_ms")) for n in LENGTHS]
        plotted = [(n, value / 1000) for n, value in points if value is not None]
        name = f"{tokens} token{'s' * (tokens > 1)} per frame"
        time.plot(*zip(*plotted, strict=True), marker="o", color=colour, label=name)
    time.set_xscale("log", base=2)
    time.set_yscale("log")
    time.set(xlabel="frames", ylabel="seconds to read frames and question", title="SmolLM2 135M, one processor thread")
    time.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    for axes in (quality, time):
        axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        axes.grid(alpha=0.3)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / "frames_and_tokens.png", dpi=120)


def sampler_curve() -> None:
    """Plot the distance from the exact sample against time, by solver and by the noise levels that use guidance."""
    recorded = read("dit_curve")
    figure = Figure(figsize=(8.8, 4.2), layout="constrained")
    axes = figure.subplots()
    curves: dict[str, list[tuple[float, float]]] = {}
    for name in recorded:
        if name.endswith("_distance"):
            setting = name.removesuffix("_distance")
            solver, _, interval = setting.partition("_interval_")
            solver = solver.rstrip("0123456789").strip("_").replace("_", " ")
            label = f"{solver}, guidance in {interval.replace('_', ' to ')}" if interval else solver
            curves.setdefault(label, []).append((recorded[f"{setting}_ms"], recorded[name]))
    for label, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-" if len(points) > 1 else "s", label=label)
    axes.set(xscale="log", yscale="log", xlabel="milliseconds per image", ylabel="distance from 400 Heun steps")
    axes.set_xticks((300, 500, 700, 1000), ("300", "500", "700", "1000"))
    axes.tick_params(axis="x", which="minor", labelbottom=False)
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(IMAGES / "sampler_curve.png", dpi=120)


QUESTIONS = ("mark", "cue", "glance")
CHANCE = {"mark": 1 / 8, "cue": 1 / 8, "glance": 1 / 5}  # one of 8 digits; one of the 5 cubes in view
TOKENS = (
    ("vlm_tokens_1", "1 chosen token", "tab:blue"),
    ("vlm_tokens_4", "4 pooled", "tab:green"),
    ("vlm_tokens_16", "16 pooled", "tab:orange"),
    ("vlm_tokens_64", "64 pooled", "tab:red"),
)


def token_counts() -> None:
    """Plot accuracy against training compute: one chosen token per frame, or several pooled tokens."""
    runs = read("foveated_vlm")["claims"]["token_counts"]["runs"]
    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, question in zip(panels, QUESTIONS, strict=True):
        for experiment, label, colour in TOKENS:
            curve = []
            for steps in sorted({run["steps"] for run in runs if run["experiment"] == experiment}):
                matching_runs = [run for run in runs if run["experiment"] == experiment and run["steps"] == steps]
                accuracies = [run[run["mode"]][f"accuracy_{question}"] for run in matching_runs]
                operations = sum(run["tflop"] for run in matching_runs) / len(matching_runs)
                curve.append((operations, sum(accuracies) / len(accuracies)))
                axes.plot([run["tflop"] for run in matching_runs], accuracies, "o", color=colour, markersize=4)
            axes.plot(
                *zip(*curve, strict=True), "-" if len(curve) > 1 else "o", color=colour, label=label, markersize=4
            )
        axes.axhline(CHANCE[question], color="grey", linewidth=0.8, linestyle=":", label="chance")
        axes.set_xscale("log")
        axes.set_xticks((30, 100, 300, 800), ("30", "100", "300", "800"))
        axes.minorticks_off()
        axes.set(xlabel="TFLOP of training, without the encoder", title=question, ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on test")
    panels[2].legend(fontsize=9, loc="lower right")
    figure.savefig(IMAGES / "token_counts.png", dpi=120)


def token_counts_by_step(record: str) -> None:
    """Plot validation accuracy during training, of the runs in a record of token counts."""
    runs = read("foveated_vlm")["claims"][record]["runs"]
    shortest = min(run["steps"] for run in runs)
    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, question in zip(panels, QUESTIONS, strict=True):
        for experiment, tokens, colour in TOKENS:
            for run in (run for run in runs if run["experiment"] == experiment):
                steps = [each["step"] for each in run["val"]]
                accuracies = [each[f"accuracy_{question}"] for each in run["val"]]
                label = f"{tokens}, {run['tflop']:.0f} TFLOP"
                line = "o-" if run["steps"] == shortest else "s--"
                axes.plot(steps, accuracies, line, color=colour, label=label, markersize=4)
        axes.axhline(CHANCE[question], color="grey", linewidth=0.8, linestyle=":", label="chance")
        axes.set(xlabel="steps", title=question, ylim=(0, 1.02), xlim=(0, None))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy in validation")
    panels[0].legend(fontsize=8, loc="lower right")
    figure.savefig(IMAGES / f"{record}.png", dpi=120)


def metaworld_demonstrations() -> None:
    """Plot success on MT10 against the demonstrations per task, at equal training time, also for LeRobot's policies."""
    recorded = read("metaworld_equal_time")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(run["name"] for run in recorded["runs"]))
    for name in names:
        runs = sorted((run for run in recorded["runs"] if run["name"] == name), key=lambda run: run["demos"])
        rates = [100 * run["result"]["all"]["success_rate"] for run in runs]
        low = [100 * run["result"]["all"]["success_low"] for run in runs]
        high = [100 * run["result"]["all"]["success_high"] for run in runs]
        errors = [[a - b for a, b in zip(rates, low, strict=True)], [b - a for a, b in zip(rates, high, strict=True)]]
        axes.errorbar([run["demos"] for run in runs], rates, yerr=errors, fmt="o-", capsize=3, label=name)
    ticks = sorted({run["demos"] for run in recorded["runs"]})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.set(xlabel="demonstrations of each task", ylabel="success, %", ylim=(0, 102))
    axes.set_title(f"Meta-World MT10, {recorded['minutes']} minutes of training on one core", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(IMAGES / "metaworld_demonstrations.png", dpi=120)


if __name__ == "__main__":
    metaworld_demonstrations()
    frames_and_tokens()
    sampler_curve()
    token_counts()
    token_counts_by_step("token_counts_same_encoder")
    token_counts_by_step("token_counts_label_taught")
