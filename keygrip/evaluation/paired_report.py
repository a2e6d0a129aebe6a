"""Compare policies of a sweep with a reference on the same episodes: `paired.md` and `paired.json` in its folder.

The jobs of an arm differ only in the training seed. Jobs that differ in anything else (`shift=flat`, `max_steps=...`)
form another setting. Their tasks may differ even with the same names and episode seeds, so they are never paired with
these. All comparisons of the report count in Holm's correction.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from keygrip.artifacts import write_json, write_text
from keygrip.evaluation.statistics import holm, paired_difference, pooled_interval
from keygrip.training.results import FINISHED, RESULT, read_result
from keygrip.training.sweeps import errors_at_sweep_end, markdown

log = logging.getLogger(__name__)

NAME = "paired"
CLOSED_LOOP = "closed_loop"
NOTE = (
    "Difference of success rates in points with its 95 % interval over episodes (bootstrap); p: exact test by "
    "sign flips of each episode's difference over all training seeds, McNemar's with one; adjusted: Holm, for all "
    "comparisons of this table. Neither knows of the spread between training seeds, which stands beside."
)
SUCCESS_NOTE = (
    "No comparison: it needs a finished reference and a finished arm that is compared with it, with a common training "
    "seed and common episodes. Success over all training seeds, with its 95 % interval over episodes (Wilson)."
)

# Overrides that determine where or how a job runs, without an effect on episodes.
WITHOUT_EFFECT = frozenset(
    ("run_dir", "resume", "logger", "debug", "callbacks.closed_loop.closed_loop.processes")
    + ("callbacks.closed_loop.closed_loop.videos",)
)
# Success by condition and index of the episode, for each training seed of each arm.
Episodes = dict[tuple[str, int], bool]
Arms = dict[str, dict[str, Episodes]]
# Arms with which all others are compared, or for each of them the arms that are compared with it.
References = Sequence[str] | Mapping[str, Sequence[str]]


class PairedReport(Callback):
    """Hydra callback: write the report when the sweep has ended.

    Args:
        references: values of `by` with which all others are compared, or for each of them the values that are compared
            with it. by: the override that distinguishes arms.
    """

    def __init__(self, references: References, by: str = "ablation") -> None:
        self.references: References = dict(references) if isinstance(references, Mapping) else list(references)
        self.by = by

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        with errors_at_sweep_end(f"no paired report of {config.hydra.sweep.dir}"):
            make_report(Path(config.hydra.sweep.dir), self.references, self.by, needs_reference=False)


def make_report(
    folder: str | Path, references: References, by: str = "ablation", needs_reference: bool = True
) -> dict[str, Any]:
    """Write ``paired.md`` and ``paired.json`` into a sweep's folder, print the table, return the content of the latter.

    Arms without a reference's seeds and episodes are left out and named in both files; references without a finished
    job are left out and logged. If no arms are compared, the table has the success of each arm.

    Args:
        needs_reference: false: a folder without a reference is no error, as that of a sweep of one arm.

    Raises:
        FileNotFoundError: There is no finished job with a closed-loop evaluation. ValueError: No reference is among
            them, and one is needed.
    """
    folder = Path(folder)
    settings = read_arms(folder, by)
    if not settings:
        raise FileNotFoundError(f"{folder} holds no finished job with episodes ({CLOSED_LOOP}/{RESULT}) and {by}=...")
    arm_names = {name: None for arms in settings.values() for name in arms}
    if needs_reference and not any(name in arm_names for name in references):
        raise ValueError(f"no finished job of the reference {', '.join(references)}; there are {', '.join(arm_names)}")
    all_arms: Arms = {}
    pairs: list[tuple[str, str]] = []
    for setting, arms in settings.items():
        names = {name: name if len(settings) == 1 else f"{name} ({setting or 'nothing else set'})" for name in arms}
        all_arms |= {names[name]: seeds for name, seeds in arms.items()}
        pairs += [(names[arm], names[reference]) for arm, reference in pairs_of(arms, references)]
    comparison = compare(all_arms, pairs)
    write_json(folder / f"{NAME}.json", comparison)
    if comparison["comparisons"]:
        text = f"{markdown(*table(comparison))}\n\n{NOTE}\n"
    else:
        log.warning("%s: no arm is compared with another: the report has the success of each", folder)
        text = f"{markdown(*success_table(comparison))}\n\n{SUCCESS_NOTE}\n"
    if comparison["not_compared"]:
        not_compared = ", ".join(f"{pair['arm']} with {pair['reference']}" for pair in comparison["not_compared"])
        text += f"\nNot compared, since they share no training seed and episode: {not_compared}.\n"
    write_text(folder / f"{NAME}.md", text)
    sys.stderr.write(f"\n{text}{folder / NAME}.md, .json\n")
    return comparison


def read_arms(folder: Path, by: str) -> dict[str, Arms]:
    """Read the episodes of the finished jobs below a folder, by setting (the overrides except arm and training seed),
    arm and training seed.

    Raises:
        ValueError: Two jobs of one arm have the same training seed.
    """
    settings: dict[str, Arms] = {}
    for path in sorted(folder.glob(f"**/{RESULT}")):
        result = read_result(path.parent)
        if result.get("status") != FINISHED:
            continue
        values = dict(str(override).lstrip("+~").partition("=")[::2] for override in result.get("overrides", []))
        episodes = read_result(path.parent / CLOSED_LOOP).get("episodes")
        if by not in values or not episodes:
            continue
        other_settings = sorted(set(values) - {by, "seed"} - WITHOUT_EFFECT)
        setting = " ".join(f"{name}={values[name]}" for name in other_settings)
        seeds = settings.setdefault(setting, {}).setdefault(values[by], {})
        if (seed := values.get("seed", "0")) in seeds:
            raise ValueError(
                f"{folder} holds two finished jobs of {by}={values[by]} and training seed {seed}: which one counts is "
                "not known"
            )
        seeds[seed] = {
            (condition, int(episode["seed"])): bool(episode["success"])
            for condition, condition_episodes in episodes.items()
            for episode in condition_episodes
        }
    return settings


def pairs_of(arms: Mapping[str, Any], references: References) -> list[tuple[str, str]]:
    """Return arm and reference of each comparison among finished arms; two arms are compared once."""
    pairs: list[tuple[str, str]] = []
    for reference in references:
        arm_names = references[reference] if isinstance(references, Mapping) else None
        if unfinished := [name for name in (reference, *(arm_names or ())) if name not in arms]:
            log.warning("no finished job of %s: not compared", ", ".join(unfinished))
        if reference in arms:
            finished = [name for name in (arms if arm_names is None else arm_names) if name in arms]
            pairs += [(name, reference) for name in finished if name != reference and (reference, name) not in pairs]
    return pairs


def compare(arms: Mapping[str, Mapping[str, Episodes]], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the success of all arms (interval: see `pooled_interval`), and of each arm compared with its reference on
    the training seeds and episodes that both have. Pairs without common ones are listed under `not_compared`."""
    rows = []
    not_compared: list[dict[str, str]] = []
    for name, reference in pairs:
        seeds = arms[name]
        shared = [seed for seed in seeds if seed in arms[reference]]
        sets = [set(each[seed]) for seed in shared for each in (seeds, arms[reference])]
        keys = set.intersection(*sets) if sets else set()
        if not keys:
            log.warning("%s and %s share no training seed and episode: not compared", name, reference)
            not_compared.append({"arm": name, "reference": reference})
            continue
        order = sorted(keys)
        first, second = ([[each[seed][key] for key in order] for seed in shared] for each in (seeds, arms[reference]))
        difference = paired_difference(first, second)
        counts = {"successes": sum(map(sum, first)), "reference_successes": sum(map(sum, second))}
        rows.append({"arm": name, "reference": reference, "training_seeds": shared, **counts, **vars(difference)})
    for row, adjusted in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
    rates = {}
    for name, seeds in arms.items():
        wins = [success for episodes in seeds.values() for success in episodes.values()]
        low, high = pooled_interval(list(seeds.values()))
        rates[name] = {"successes": sum(wins), "episodes": len(wins), "low": low, "high": high, "seeds": len(seeds)}
    return {"arms": rates, "comparisons": rows, "number_of_comparisons": len(rows), "not_compared": not_compared}


def table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return one line per comparison. Successes are counted on the training seeds and episodes that both arms have."""
    header = [
        "arm",
        "success",
        "against",
        "its success",
        "difference",
        "alone: arm, reference",
        "p",
        "adjusted",
        "by training seed",
    ]
    lines = []
    for row in found["comparisons"]:
        lines.append(
            [
                row["arm"],
                f"{row['successes']} of {row['pairs']}",
                row["reference"],
                f"{row['reference_successes']} of {row['pairs']}",
                f"{100 * row['difference']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})",
                f"{row['only_first']}, {row['only_second']}",
                *("< 0.0001" if row[p] < 1e-4 else f"{row[p]:.4f}" for p in ("p_value", "p_holm")),
                ", ".join(f"{100 * value:+.0f}" for value in row["by_seed"]),
            ]
        )
    return header, lines


def success_table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return one line per arm with its success, for reports without a comparison."""
    lines = [
        [
            name,
            f"{arm['successes']} of {arm['episodes']}",
            f"{100 * arm['low']:.1f} to {100 * arm['high']:.1f} %",
            str(arm["seeds"]),
        ]
        for name, arm in found["arms"].items()
    ]
    return ["arm", "success", "interval", "training seeds"], lines
