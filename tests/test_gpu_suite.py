"""`bench suite=gpu` and the parity script: parts run at toy size, records are stored, skipped and complete; differences
between two runs are found."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from pretended_gpu import pretended_gpu

import keygrip.bench  # noqa: F401  (registers its schema)
from keygrip.benchmarks.gpu import Figures
from keygrip.benchmarks.gpu.suite import Suite, refuse_without_gpu
from keygrip.benchmarks.gpu.training_steps import TrainingSteps, peak_tflops
from keygrip.config import compose
from keygrip.training.metadata import git_revision

ROOT = Path(__file__).resolve().parents[1]
PARTS = list(compose("bench").gpu)
# The others run the same code on the same toy network.
DISTINCT = [
    name
    for name in PARTS
    if name not in ("train_vlm_360m", "train_vlm_1700m", "vlm_loss_kernels", "volume_loss", "dit_sampler")
]
LONGEST = (
    "server",
    "train_dit",
    "train_vla",
    "train_vlm_135m",
    "train_volume_query",
    "vlm_memory",
    "vlm_step",
    "vlm_stream",
)


class TestParts:
    @pytest.mark.parametrize(
        "name",
        [pytest.param(name, marks=pytest.mark.slow if name in LONGEST else ()) for name in DISTINCT],
    )
    def test_runs_at_toy_size(self, name: str) -> None:
        figures: Figures = {}
        instantiate(compose("bench").gpu[name], _convert_="all").run(True, figures)
        if name == "vlm_memory":
            assert figures["stage1_135m_1_frames_gib"] == figures["stage1_135m_worst_gib"] > 0
            assert figures["stage1_135m_weights_gib"] > 0
            return
        times = [value for figure, value in figures.items() if "_ms" in figure or figure.startswith("ms_")]
        assert times
        assert min(times) > 0
        if name.startswith("plan_"):
            precisions = {figure.partition("_")[0] for figure in figures}
            assert precisions == {"float32", "bf16"} | ({"tf32"} if torch.cuda.is_available() else set())
        if name.startswith("train_"):
            flop = [value for figure, value in figures.items() if figure.endswith("_step_tflop")]
            assert min(flop) > 0

    @pytest.mark.slow
    @pytest.mark.parametrize("name", DISTINCT)
    def test_runs_on_a_pretended_gpu(self, name: str) -> None:
        """All tensors of the computation are on the GPU."""
        figures: Figures = {}
        with pretended_gpu(bf16=True):
            instantiate(compose("bench").gpu[name], _convert_="all").run(True, figures)
        assert figures

    @pytest.mark.parametrize(
        ("name", "tflops"),
        [
            ("NVIDIA H100 80GB HBM3", 989.5),
            ("NVIDIA H100 PCIe", 756.5),
            ("NVIDIA H100 NVL", None),
            ("NVIDIA A100-SXM4-80GB", 312.0),
            ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
            ("NVIDIA RTX A1000", None),
            ("NVIDIA A10", 125.0),
            ("NVIDIA A10G", None),
            ("NVIDIA L4", 121.0),
            ("NVIDIA L40", 181.05),
            ("NVIDIA L40S", 362.0),
            ("NVIDIA GeForce RTX 4090", 165.2),
            ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
            ("NVIDIA GB200", 2500.0),
            ("NVIDIA GH200 480GB", 989.5),
            ("NVIDIA A100X", 312.0),
        ],
    )
    def test_a_peak_is_that_of_the_whole_name(
        self, name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        assert peak_tflops() == tflops

    @pytest.mark.slow
    def test_real_sizes_compose(self) -> None:
        """Otherwise a misspelt setting would only be found on a GPU."""
        parts = compose("bench").gpu
        for name in PARTS:
            part = instantiate(parts[name], _convert_="all")
            if isinstance(part, TrainingSteps):
                for variant, more in part.variants.items():
                    config = compose("train", [*part.overrides, *more])
                    assert config.model._target_
                    assert ("lora" in variant) == bool(config.get("vlm", {}).get("lora"))
                    assert ("tf32" in variant) == config.strategy.tf32
                    assert part.system != "foveated_vlm" or (part.frames or {})[variant] > 0
                    if part.system in ("foveated_vlm", "patch_dit"):
                        with torch.device("meta"):  # without weights: only tests that it can be built
                            module, _ = part._module([*part.overrides, *more], variant, False)
                        assert list(module.parameters())
            elif hasattr(part, "overrides"):
                compose("train", part.overrides)

    @pytest.mark.slow
    def test_memory_that_is_too_small_ends_the_search(self, monkeypatch: pytest.MonkeyPatch) -> None:
        part = instantiate(compose("bench").gpu.train_volume_query, _convert_="all")
        part = replace(part, overrides=part.toy_overrides, batch=2, max_batch=64, compiled=False)
        tried = []

        def steps(self: Any, config: Any, module: Any, batch: Any, toy: bool, counted: bool = True) -> dict[str, float]:
            tried.append(len(batch))
            if len(batch) > 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return {"step_s": 1.0 + 0.01 * len(batch), "tflop": 0.1 * len(batch), "peak_bytes": 10**9}

        monkeypatch.setattr(TrainingSteps, "_steps", steps)
        monkeypatch.setattr("keygrip.benchmarks.gpu.training_steps.matmul_tflops", lambda size: 500.0)
        monkeypatch.setattr("keygrip.benchmarks.gpu.training_steps.peak_tflops", lambda: 1000.0)
        figures: Figures = {}
        part.run(False, figures)
        assert tried == [2, 4, 8, 16]
        assert figures["recipe_out_of_memory_batch"] == 16
        assert figures["recipe_batch"] == 8
        assert figures["recipe_mfu"] == pytest.approx(0.8 / 1.08 / 1000, abs=1e-4)


@dataclass(frozen=True)
class Fine:
    def run(self, toy: bool, figures: Figures) -> None:
        figures["step_ms"] = 2.0


@dataclass(frozen=True)
class Broken:
    def run(self, toy: bool, figures: Figures) -> None:
        figures["first_ms"] = 1.0
        raise torch.OutOfMemoryError("CUDA out of memory")


class TestSuite:
    def command(self, calls: list[str], code: str = "pass") -> Callable[[str], Sequence[str]]:
        def of(name: str) -> list[str]:
            calls.append(name)
            return [sys.executable, "-c", code]

        return of

    def test_recorded_parts_are_skipped_and_failed_ones_are_not(self, tmp_path: Path) -> None:
        suite = Suite(tmp_path, "abc", toy=True)
        assert suite.measure("fine", Fine())["figures"] == {"step_ms": 2.0}
        broken = suite.measure("broken", Broken())
        assert broken["figures"] == {"first_ms": 1.0}
        assert broken["error"] == "OutOfMemoryError: CUDA out of memory"
        calls: list[str] = []
        records = suite.run(["fine", "broken"], self.command(calls))
        assert calls == ["broken"]
        assert records["fine"]["figures"] == {"step_ms": 2.0}
        assert "without a record" in records["broken"]["error"]
        for other in (replace(suite, commit="def"), replace(suite, toy=False), replace(suite, commit=None)):
            assert other.kept("fine") is None
        changed = replace(suite, commit="abc+changes")
        changed.measure("fine", Fine())
        assert changed.kept("fine") is None

    def test_a_part_that_takes_too_long_is_stopped_and_the_next_one_runs(self, tmp_path: Path) -> None:
        calls: list[str] = []
        suite = Suite(tmp_path, "abc", toy=True, limit_s=0.5, grace_s=0.5)
        records = suite.run(["one", "two"], self.command(calls, "import time; time.sleep(60)"))
        assert calls == ["one", "two"]
        assert [record["error"] for record in records.values()] == ["stopped after 0.5 s"] * 2

    def test_what_changes_a_part_is_recorded_and_measured_anew(self, tmp_path: Path) -> None:
        suite = Suite(tmp_path, "abc", toy=True, arguments=("gpu.fine.limit_s=5", "gpu.other.limit_s=9"))
        command = suite.measure("fine", Fine())["command"]
        assert command == "python -m keygrip.bench suite=gpu part=fine toy=true gpu.fine.limit_s=5"
        assert suite.kept("fine") is not None
        assert replace(suite, arguments=("gpu.other.limit_s=9",)).kept("fine") is None

    def test_no_part_is_begun_after_the_minutes(self, tmp_path: Path) -> None:
        calls: list[str] = []
        assert Suite(tmp_path, "abc", toy=True).run(["one", "two"], self.command(calls), minutes=0.0) == {}
        assert calls == []

    def test_toy_figures_do_not_take_the_place_of_measured_ones(
        self, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folders: list[Path] = []

        def run(suite: Suite, *_: Any) -> dict[str, Any]:
            folders.append(suite.folder)
            return {}

        monkeypatch.setattr(Suite, "run", run)
        monkeypatch.setattr("keygrip.benchmarks.gpu.suite.refuse_without_gpu", lambda toy: None)
        for given in (["toy=true"], ["toy=true", "output=mine"], []):
            assert cli("suite=gpu", "part=plan_vla", *given, of="bench")[0] == 0
        assert folders == [Path("runs/bench/gpu_toy"), Path("mine"), Path("benchmarks/gpu")]

    def test_the_commit_is_not_that_of_a_repository_around_an_installed_package(self, tmp_path: Path) -> None:
        git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
        for package in ("checkout", ".venv/site-packages/keygrip"):
            (tmp_path / package).mkdir(parents=True)
        revision = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
        assert git_revision(tmp_path / "checkout") == revision.strip()
        assert git_revision(tmp_path / ".venv/site-packages/keygrip") is None

    @pytest.mark.parametrize(("changed", "counts"), [("benchmarks/gpu.json", False), ("checkout/code.py", True)])
    def test_a_changed_record_is_no_change_of_the_code(self, tmp_path: Path, changed: str, counts: bool) -> None:
        git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*git, "init", "-q"], check=True)
        for name in ("benchmarks/gpu.json", "checkout/code.py"):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_text("before")
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
        revision = git_revision(tmp_path / "checkout")
        (tmp_path / changed).write_text("after")
        assert git_revision(tmp_path / "checkout") == f"{revision}+changes"
        end = "+changes" if counts else ""
        assert git_revision(tmp_path / "checkout", records_count=False) == f"{revision}{end}"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu(self, cli: Callable[..., Any]) -> None:
        refuse_without_gpu(toy=True)
        code, out, err = cli("suite=gpu", of="bench")
        assert (code, out) == (1, "")
        (line,) = err.splitlines()
        assert "suite=gpu measures a GPU and this machine has none" in line


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parity", ROOT / "benchmarks" / "parity" / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestParity:
    def test_the_baseline_equals_itself(self, parity: ModuleType) -> None:
        baseline = json.loads((ROOT / "benchmarks" / "parity" / "baseline.json").read_text())
        assert set(baseline["cases"]) == set(parity.CASES)
        assert {name: len(case["losses"]) for name, case in baseline["cases"].items()} == {
            name: steps for name, (steps, _) in parity.CASES.items()
        }
        assert parity.differences(baseline, baseline) == []

    def test_the_last_bit_counts(self, parity: ModuleType) -> None:
        def figures(loss: float, **other: Any) -> dict[str, Any]:
            case = {
                "losses": [(1.0).hex(), loss.hex()],
                "val_metrics": {"val/loss": loss.hex(), "val/x": (3.0).hex()},
                "weights_sha256": "a",
                "plan": [loss.hex()],
            }
            return {"torch": "2", "cpu": "c", "cpu_capability": "AVX2", "cases": {"demo": case | other}}

        before = figures(0.5)
        lines = parity.differences(before, figures(0.5 + 2**-53))
        assert [line.split(": ")[0] for line in lines] == ["demo"] * 3
        assert "the loss of step 1" in lines[0]
        assert "the plan differs" in lines[2]
        assert parity.differences(before, figures(0.5, weights_sha256="b")) == ["demo: the trained weights differ"]
        renamed = {"val/loss": (0.5).hex()}
        assert parity.differences(before, figures(0.5, val_metrics=renamed)) == []
        assert parity.differences(before, {**before, "cpu": "d"})[0].startswith("cpu differs")

    def test_settings_of_today(self, parity: ModuleType) -> None:
        """The script composes with the current names of settings."""
        for _, settings in parity.CASES.values():
            compose("train", [*(setting.replace("{data}", "data") for setting in settings), *parity.SMALL_RUN])
