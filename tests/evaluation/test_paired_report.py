"""Paired comparisons: McNemar, several seeds, Holm's correction, and the report of a sweep."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from scipy.stats import binom, bootstrap

from keygrip.config import config_folder
from keygrip.evaluation.paired_report import NAME, PairedReport, make_report
from keygrip.evaluation.statistics import holm, paired_difference, pooled_interval, wilson_interval
from keygrip.training.results import write_result
from keygrip.training.sweeps import close_sweeps


def outcomes(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    kinds = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second + [(False, False)] * neither
    return [kind[0] for kind in kinds], [kind[1] for kind in kinds]


def test_one_seed_is_mcnemars_exact_test() -> None:
    first, second = outcomes(60, 12, 3, 25)
    found = paired_difference([first], [second])
    assert (found.only_first, found.only_second, found.pairs) == (12, 3, 100)
    assert found.difference == pytest.approx(0.09)
    assert found.p_value == pytest.approx(2 * binom.cdf(3, 15, 0.5))
    assert found.low < 0.09 < found.high
    assert found.low > 0
    # a comparison of two independent rates of 72 and 63 of 100 would not detect this
    assert found.p_value < 0.05
    assert paired_difference([second], [first]).difference == pytest.approx(-0.09)
    assert paired_difference([first], [first]).p_value == 1.0


def test_seeds_on_the_same_episodes_are_no_independent_draws() -> None:
    first, second = outcomes(60, 8, 2, 30)
    one = paired_difference([first], [second])
    copied = paired_difference([first] * 5, [second] * 5)
    assert copied.by_seed == pytest.approx([0.06] * 5)
    assert copied.p_value == pytest.approx(one.p_value), "five copies are no five times the evidence"
    assert (copied.low, copied.high) == pytest.approx((one.low, one.high), abs=0.02)
    generator = np.random.default_rng(0)
    rates = np.array([[0.5], [0.5]])
    alike = [generator.random((3, 200)) < 0.5 for _ in rates]
    assert paired_difference(alike[0].tolist(), alike[1].tolist()).p_value > 0.05
    better = generator.random((3, 200)) < 0.65
    assert paired_difference(better.tolist(), alike[1].tolist()).p_value < 0.01


def test_several_seeds_are_tested_by_all_signs() -> None:
    """The result is compared with every assignment of signs to the episodes' differences, counted one by one."""
    generator = np.random.default_rng(3)
    for seeds in (2, 3):
        first, second = (generator.random((seeds, 9)) < rate for rate in (0.7, 0.4))
        differences = (first.astype(int) - second.astype(int)).sum(axis=0)
        sums = [int(np.dot(signs, differences)) for signs in product((-1, 1), repeat=9)]
        expected = np.mean([abs(each) >= abs(differences.sum()) for each in sums])
        assert paired_difference(first.tolist(), second.tolist()).p_value == pytest.approx(float(expected))
    # far smaller than randomly sampled signs can resolve
    assert 0 < paired_difference([[True] * 200] * 2, [[False] * 200] * 2).p_value < 1e-50


def test_the_interval_is_scipys_bootstrap_over_episodes_and_takes_no_memory_for_many() -> None:
    generator = np.random.default_rng(5)
    first, second = (generator.random((3, 80)) < rate for rate in (0.6, 0.45))
    found = paired_difference(first.tolist(), second.tolist())
    by_episode = (first.astype(float) - second).mean(axis=0)
    drawn = bootstrap((by_episode,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1))
    expected = drawn.confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.006)
    many = [[True] * 6_000 + [False] * 4_000]
    tracemalloc.start()
    paired_difference(many, [[False] * 10_000])
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_comparisons_need_the_same_episodes() -> None:
    for first, second in (([[True]], [[True, False]]), ([[True]], [[True], [True]]), ([[]], [[]])):
        with pytest.raises(ValueError, match="same seeds and episodes"):
            paired_difference(first, second)


def by_number(outcomes: Any) -> list[dict[Any, bool]]:
    return [dict(enumerate(map(bool, training))) for training in outcomes]


def test_the_interval_of_one_training_is_that_of_its_successes() -> None:
    """One is computed for a number of trials that need not be whole, the other by scipy."""
    for trials in (1, 7, 40):
        for successes in range(trials + 1):
            one = {number: number < successes for number in range(trials)}
            for confidence in (0.8, 0.95):
                wanted = wilson_interval(successes, trials, confidence)
                assert pooled_interval([one], confidence) == pytest.approx(wanted, abs=1e-12)


def test_interval_of_several_trainings_counts_episodes_not_their_repetitions() -> None:
    first, second = outcomes(60, 12, 3, 25)
    one = wilson_interval(72, 100)
    assert pooled_interval(by_number([first])) == pytest.approx(one)
    assert pooled_interval(by_number([first] * 5)) == pytest.approx(one), "five copies are no five times the evidence"
    apart = [dict(enumerate(first)), {100 + number: success for number, success in enumerate(second)}]
    assert pooled_interval(apart) == pytest.approx(wilson_interval(72 + 63, 200)), "different episodes are independent"
    # the trainings succeed in opposite episodes: no more is counted than all episodes
    opposite = pooled_interval(by_number([first, [not success for success in first]]))
    assert opposite == pytest.approx(wilson_interval(100, 200))
    for success in (True, False):
        same = pooled_interval(by_number([[success] * 40] * 5))
        assert same == pytest.approx(wilson_interval(40 * success, 40))
    with pytest.raises(ValueError, match="needs episodes, got none"):
        pooled_interval([{}, {}])


def test_interval_of_several_trainings_is_near_the_bootstrap_over_episodes() -> None:
    generator = np.random.default_rng(2)
    difficulty = generator.beta(1.0, 0.6, 200)  # the same episodes are difficult for all trainings
    won = generator.random((5, 200)) < difficulty
    low, high = pooled_interval(by_number(won))
    rates = won.mean(axis=0)
    drawn = bootstrap((rates,), np.mean, n_resamples=5_000, method="percentile", rng=np.random.default_rng(1))
    assert (low, high) == pytest.approx(tuple(drawn.confidence_interval), abs=0.008)
    alone = wilson_interval(int(won.sum()), won.size)
    assert high - low > 1.4 * (alone[1] - alone[0])


def test_holm_adjusts_in_the_given_order() -> None:
    # computed by hand: 3 x 0.01, 2 x 0.02, and never less than the previous value
    assert holm([0.02, 0.04, 0.01]) == pytest.approx([0.04, 0.04, 0.03])
    assert holm([0.9, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def job(
    folder: Path, arm: str, seed: int, won: list[bool], *more: str, status: str = "finished", first: int = 1000
) -> None:
    path = folder / f"{arm.replace('/', '_')}_{seed}"
    write_result(path, {"status": status, "overrides": [f"ablation={arm}", f"seed={seed}", *more], "metrics": {}})
    episodes = [{"seed": first + number, "success": success} for number, success in enumerate(won)]
    write_result(path / "closed_loop", {"conditions": {}, "episodes": {"in_distribution": episodes}})


def test_a_sweep_is_compared_by_episode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = outcomes(20, 14, 1, 15)
    for seed in (0, 1):
        job(tmp_path, "vla/with", seed, first)
        job(tmp_path, "vla/without", seed, second)
    job(tmp_path, "vla/with", 2, second)  # the reference has no such seed: not compared
    job(tmp_path, "vla/same", 0, second)
    job(tmp_path, "vla/broken", 0, first, status="failed")
    job(tmp_path, "vla/other_episodes", 0, first, first=5000)
    job(tmp_path, "vla/other_seed", 3, first)
    found = make_report(tmp_path, ["vla/without"])
    rows = {row["arm"]: row for row in found["comparisons"]}
    assert set(rows) == {"vla/with", "vla/same"}
    assert rows["vla/with"]["difference"] == pytest.approx(0.26)
    assert rows["vla/with"]["training_seeds"] == ["0", "1"]
    assert rows["vla/with"]["p_holm"] == pytest.approx(2 * rows["vla/with"]["p_value"])
    assert rows["vla/same"]["p_value"] == 1.0
    assert found["arms"]["vla/with"]["successes"] == 89
    arm = found["arms"]["vla/without"]  # two seeds with the same outcomes: 21 of 50 episodes
    assert (arm["low"], arm["high"], arm["episodes"]) == (*(pytest.approx(end) for end in wilson_interval(21, 50)), 100)
    assert (rows["vla/with"]["successes"], rows["vla/with"]["reference_successes"]) == (68, 42)
    assert json.loads((tmp_path / f"{NAME}.json").read_text())["number_of_comparisons"] == 2
    apart = [{"arm": name, "reference": "vla/without"} for name in ("vla/other_episodes", "vla/other_seed")]
    assert json.loads((tmp_path / f"{NAME}.json").read_text())["not_compared"] == apart
    said = " ".join((tmp_path / f"{NAME}.md").read_text().split())
    missing = "vla/other_episodes with vla/without, vla/other_seed with vla/without"
    assert f"Not compared, since they share no training seed and episode: {missing}." in said
    assert "| vla/with | 68 of 100 | vla/without | 42 of 100 | +26.0" in said
    assert "vla/with" in capsys.readouterr().err
    assert PairedReport(["vla/without"]).by == "ablation"


def test_each_reference_may_have_arms_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = outcomes(20, 14, 1, 15)
    for arm, won in {"none": second, "mean": second, "pool": first}.items():
        job(tmp_path, arm, 0, won)
    wanted = {"none": ["mean", "pool", "qformer"], "mean": ["pool", "none"], "lost": ["pool"]}
    report = PairedReport(OmegaConf.create(wanted))
    report.on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    found = json.loads((tmp_path / f"{NAME}.json").read_text())
    pairs = [(row["arm"], row["reference"]) for row in found["comparisons"]]
    assert pairs == [("mean", "none"), ("pool", "none"), ("pool", "mean")], "none and mean are compared once"
    assert found["number_of_comparisons"] == 3
    assert found["comparisons"][1]["p_holm"] == pytest.approx(3 * found["comparisons"][1]["p_value"])
    assert "no finished job of qformer" in caplog.text
    assert "no finished job of lost" in caplog.text


def test_a_sweep_of_one_arm_reports_its_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows of a comparison may be run one by one; they are compared once the reference is there too."""
    close_sweeps()
    won, lost = [True] * 15 + [False] * 5, [False] * 20
    job(tmp_path, "qformer", 0, won)
    report, config = PairedReport({"none": ["qformer"]}), OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    report.on_multirun_end(config)
    assert close_sweeps() == [], "else the command would end with exit code 1"
    found = json.loads((tmp_path / f"{NAME}.json").read_text())
    assert (found["comparisons"], found["not_compared"]) == ([], [])
    assert found["arms"]["qformer"] == {
        **{"successes": 15, "episodes": 20, "seeds": 1},
        **dict(zip(("low", "high"), map(pytest.approx, wilson_interval(15, 20)), strict=True)),
    }
    text = (tmp_path / f"{NAME}.md").read_text()
    assert "| qformer | 15 of 20 | 53.1 to 88.8 % | 1 " in text
    assert text in capsys.readouterr().err
    job(tmp_path, "none", 0, lost)
    report.on_multirun_end(config)
    assert json.loads((tmp_path / f"{NAME}.json").read_text())["number_of_comparisons"] == 1
    assert "| qformer | 15 of 20 | none " in (tmp_path / f"{NAME}.md").read_text()
    job(tmp_path / "again", "none", 0, lost)
    report.on_multirun_end(config)
    (line,) = close_sweeps()
    assert "two finished jobs of ablation=none and training seed 0" in line


def test_jobs_that_differ_in_more_than_the_seed_are_not_paired(tmp_path: Path) -> None:
    first, second = outcomes(20, 14, 1, 15)
    pedestals, flat_table = tmp_path / "pedestals", tmp_path / "flat"
    for arm, won in {"none": second, "pool": first}.items():
        job(pedestals, arm, 0, won, "sweep=geometry", f"run_dir=runs/{arm}", "+logger=csv")
    job(flat_table, "none", 0, first, "sweep=geometry", "shift=flat")
    job(flat_table, "pool", 0, first, "sweep=geometry", "shift=flat", "resume=true")
    job(tmp_path / "long", "pool", 0, first, "sweep=geometry", "max_steps=2400")
    found = make_report(tmp_path, ["none"])
    assert [(row["arm"], row["reference"], row["difference"]) for row in found["comparisons"]] == [
        ("pool (shift=flat sweep=geometry)", "none (shift=flat sweep=geometry)", 0.0),
        ("pool (sweep=geometry)", "none (sweep=geometry)", pytest.approx(0.26)),
    ]
    assert found["arms"]["pool (max_steps=2400 sweep=geometry)"]["seeds"] == 1
    assert found["comparisons"][1]["p_holm"] == pytest.approx(2 * found["comparisons"][1]["p_value"])
    (alone,) = make_report(pedestals, ["none"])["comparisons"]
    assert (alone["arm"], alone["reference"]) == ("pool", "none")


def test_two_compared_arms_of_the_sweep_differ_in_one_thing() -> None:
    """These are the arms of the geometry comparison; wider MLPs compensate for the parameters of an absent encoder."""
    conf = config_folder()
    arms = OmegaConf.load(conf / "ablation" / "geometry_vla" / "options.yaml")
    sweep = OmegaConf.load(conf / "sweep" / "geometry_comparison.yaml").hydra
    default = flat(OmegaConf.load(conf / "model" / "geometry_vla.yaml"))
    geometry = ("inject_to_dit", "inject_to_vlm", "dit_tokens", "compression_type", "standardised", "places")
    thing = {f"model.network.geom_{name}": "geometry" for name in geometry} | {"model.network.expansion": "encoder"}
    thing["optimizer.lr_multipliers.compressor"] = "geometry"  # without geometry there is no such parameter
    thing |= dict.fromkeys(("model.network.pointing_cells", "model.network.pointing_keyframe"), "maps")
    planned = {name.strip() for name in sweep.sweeper.params.ablation.split(",")}
    compared = set()
    for reference, several in sweep.callbacks.paired_report.references.items():
        for arm in several:
            first, second = (whole(arms, name) for name in (arm, reference))
            keys = [
                key
                for key in {**first, **second}
                if first.get(key, default.get(key)) != second.get(key, default.get(key))
            ]
            assert len({thing.get(key, key) for key in keys} - {"encoder"}) == 1, (arm, reference, keys)
            injected = [
                each.get("model.network.geom_inject_to_dit", True) or each.get("model.network.geom_inject_to_vlm")
                for each in (first, second)
            ]
            assert ("model.network.expansion" in keys) == (injected[0] != injected[1])
            compared |= {arm, reference}
    assert compared == planned


def whole(arms: Any, name: str) -> dict[str, Any]:
    """Return the values of an arm by dotted path, including those of the arms that it is based on."""
    settings = flat(arms[name.removeprefix("geometry_vla/")])
    bases = [base for base in settings.pop("defaults", []) if base != "_self_"]
    return {key: value for base in bases for key, value in whole(arms, base).items()} | settings


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """Return values by dotted path."""
    if not isinstance(node, Mapping):
        return {path: node}
    parts = [flat(value, f"{path}.{key}" if path else str(key)) for key, value in node.items_ex(resolve=False)]  # type: ignore[attr-defined]
    return {name: value for part in parts for name, value in part.items()}


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished job"):
        make_report(tmp_path, ["a"])
    job(tmp_path, "a", 0, [True])
    with pytest.raises(ValueError, match="no finished job of the reference b; there are a"):
        make_report(tmp_path, ["b"])
    job(tmp_path / "again", "a", 0, [True])
    with pytest.raises(ValueError, match="two finished jobs of ablation=a and training seed 0"):
        make_report(tmp_path, ["a"])
