"""Benchmarks measure what they claim to measure, and the command prints it as one line of JSON."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

import keygrip.bench  # noqa: F401  (registers its schema)
from keygrip.benchmarks import inference, phases, server, training, volume_loss
from keygrip.benchmarks.cpu_precision import CpuPrecision
from keygrip.benchmarks.deadline import QUICK_S, deadline
from keygrip.benchmarks.demos import repeated_demos
from keygrip.benchmarks.inference import Inference
from keygrip.benchmarks.loader import Loader
from keygrip.benchmarks.measuring import MIN_REPETITIONS, interleaved_seconds, peak_extra_bytes
from keygrip.benchmarks.phases import PhaseTimes
from keygrip.benchmarks.training import Training
from keygrip.benchmarks.volume_loss import Problem, VolumeLoss
from keygrip.config import compose
from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.native_writer import ArmPose, CameraPose, DemoWriter
from keygrip.models.volume_query.volume import volume_cross_entropy
from keygrip.training.strategies import cpu_is_faster_in_bf16

CPU = torch.device("cpu")
FRAMES = 12
SMALL_VOLUME = VolumeLoss([2, 4], 2, 8, 4, 6, 8, repetitions=3, quick_repetitions=1, limit_s=60, quick_limit_s=60)
# A policy that takes milliseconds, on demos of a dozen frames.
SMALL_POLICY = [
    *("experiment=demo", "~closed_loop", "backbone.image_size=64", "model.network.pred_size=16"),
    *("data.horizon=2", "data.frame_stride=1", "data.batch_size=4", "data.num_workers=0"),
]


def write_demos(root: Path, count: int, size: int) -> None:
    """Write demos of an arm that moves and rotates under a camera that looks straight down."""
    generator = np.random.default_rng(0)
    world_to_camera = np.diag([1.0, -1.0, -1.0, 1.0])
    world_to_camera[2, 3] = 1.0
    camera = CameraPose(np.array([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1.0]]), world_to_camera)
    for demo in range(count):
        with DemoWriter(root / f"demo_{demo}", robot="yam", task="pick_place", instruction="", fps=10.0) as writer:
            for frame in range(FRAMES):
                angle = 0.1 * frame
                pose = ArmPose(
                    np.array([0.01 * frame, 0.01 * demo, 0.1 + 0.01 * frame]),
                    np.array([np.cos(angle / 2), 0.0, 0.0, np.sin(angle / 2)]),
                    frame % 2,
                )
                picture = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                writer.add(frame * 10**8, {"over": picture}, {"over": camera}, {"right": pose}, {"right": pose})


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Write demos at once, without the simulator; return the requested counts."""
    asked: list[int] = []

    def record(task: Any, root: Path, demos: int, image_size: int, **options: Any) -> None:
        asked.append(demos)
        write_demos(root, demos, image_size)

    monkeypatch.setattr("keygrip.recording.demonstrations.record", record)
    return asked


class TestMeasuring:
    def test_sides_take_turns_and_warm_up_does_not_count(self) -> None:
        calls: list[str] = []
        sides = {name: lambda name=name: calls.append(name) for name in "ab"}
        seconds = interleaved_seconds(sides, 4, CPU, limit_s=60, warm_up=2)
        assert calls == list("ab" * 6)
        assert [len(values) for values in seconds.values()] == [4, 4]

    def test_seconds_are_those_of_the_clock_that_is_given(self) -> None:
        ticks = itertools.count()
        seconds = interleaved_seconds({"only": lambda: next(ticks)}, 3, CPU, limit_s=60, clock=lambda: next(ticks))
        assert seconds["only"].tolist() == [2, 2, 2]  # one tick of the work, and one until the clock is read again

    def test_a_slow_machine_does_fewer_repetitions(self) -> None:
        calls: list[int] = []
        seconds = interleaved_seconds({"only": lambda: calls.append(0)}, 100, CPU, limit_s=0, warm_up=10)
        assert len(seconds["only"]) == MIN_REPETITIONS
        assert len(calls) == MIN_REPETITIONS + 1

    def test_measurements_after_the_deadline_have_the_least_number_of_repetitions(self) -> None:
        with deadline(-1.0):
            late = [len(interleaved_seconds({"only": lambda: None}, 9, CPU, limit_s=60)["only"]) for _ in range(2)]
        assert late == [MIN_REPETITIONS] * 2
        with deadline(60.0):
            assert len(interleaved_seconds({"only": lambda: None}, 9, CPU, limit_s=60)["only"]) == 9
        assert len(interleaved_seconds({"only": lambda: None}, 9, CPU, limit_s=60)["only"]) == 9  # it ends there

    def test_peak_counts_what_is_alive_at_once(self) -> None:
        def work() -> None:
            first = torch.empty(1_000_000)
            del first
            second = torch.empty(2_000_000)
            third = torch.empty(500_000)
            del second, third

        assert peak_extra_bytes(work, CPU) == 10_000_000

    def test_peak_knows_what_is_replaced(self) -> None:
        """Where parts are copied one after the other, there is one additional copy at a time."""
        parts = [torch.zeros(250_000) for _ in range(8)]

        def work() -> None:
            for number, part in enumerate(parts):
                parts[number] = part.clone()

        assert peak_extra_bytes(work, CPU) == 1_000_000

    def test_peak_sees_buffers_inside_of_operators(self) -> None:
        values = torch.randn(100, 1000)
        assert peak_extra_bytes(lambda: values.sort(), CPU) >= 100 * 1000 * (4 + 8)
        assert peak_extra_bytes(lambda: values.logsumexp(-1), CPU) >= 100 * 1000 * 4


class TestVolumeLoss:
    @pytest.mark.parametrize("two_views", [False, True])
    def test_both_sides_give_the_same_gradients(self, two_views: bool) -> None:
        problem = Problem.random(SMALL_VOLUME, 3, CPU, two_views)
        assert len(problem.dense()) == 3 + two_views
        if problem.further is not None:
            assert float(problem.further[1].seen.mean()) > 0.3  # the two cameras do see the same table
        for factorised, dense in zip(problem.factorised(), problem.dense(), strict=True):
            assert float(dense.abs().max()) > 0
            torch.testing.assert_close(factorised, dense, atol=1e-6, rtol=1e-4)

    def test_sides_that_do_different_work_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(logits: Any, target: Any) -> torch.Tensor:
            return 2 * volume_cross_entropy(logits, target)

        monkeypatch.setattr(volume_loss, "volume_cross_entropy", wrong)
        with pytest.raises(RuntimeError, match="gradients that differ"):
            SMALL_VOLUME.run(quick=True)

    @pytest.mark.slow
    def test_figures(self) -> None:
        figures = SMALL_VOLUME.run(quick=True)
        assert figures["time_ratio"] == figures["time_ratio_t4"]
        assert figures["memory_ratio"] == figures["memory_ratio_t4"]
        expected = figures["dense_t2_extra_mb"] / figures["factorised_t2_extra_mb"]
        assert figures["memory_ratio_t2"] == pytest.approx(expected, rel=0.2)  # the megabytes are rounded
        assert figures["dense_t4_extra_mb"] >= 2 * 2 * 4 * 4 * 8 * 8 * 4 / 1e6  # two whole volumes at least
        assert figures["two_views_time_ratio"] == figures["two_views_time_ratio_t4"]
        assert figures["two_views_dense_t4_extra_mb"] >= figures["dense_t4_extra_mb"]
        assert all(figures[f"{side}_t{horizon}_ms"] > 0 for side in ("factorised", "dense") for horizon in (2, 4))

    @pytest.mark.slow
    def test_memory_at_the_size_of_the_production_recipe(self) -> None:
        sizes = instantiate(compose("bench").cases.volume_loss)
        problem = Problem.random(sizes, 50, CPU)
        assert peak_extra_bytes(problem.dense, CPU) > 40 * peak_extra_bytes(problem.factorised, CPU)


class TestPhases:
    def test_shares_of_a_step(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter([0.0, 1.0, 2.0, 3.0, *(10.0, 14.0, 22.0, 23.0), *(24.0, 27.0, 33.0, 35.0)])
        monkeypatch.setattr(phases.time, "perf_counter", lambda: next(clock))
        callback = PhaseTimes(str(tmp_path / "phases.json"), skip_steps=1)
        trainer: Any = None
        module: Any = torch.nn.Linear(1, 1)
        module.device = CPU
        callback.on_train_start(trainer, module)
        for step in range(3):
            batch = range(8)
            callback.on_train_batch_start(trainer, module, batch, step)
            callback.on_before_backward(trainer, module, torch.zeros(()))
            callback.on_after_backward(trainer, module)
            callback.on_train_batch_end(trainer, module, None, batch, step)
        callback.on_train_end(trainer, module)
        assert json.loads((tmp_path / "phases.json").read_text()) == {
            "seconds": {"data_wait": 7.0 + 1.0, "forward": 4.0 + 3.0, "backward": 8.0 + 6.0, "optimizer": 1.0 + 2.0},
            "steps": 2,
            "samples": 16,
        }

    def test_the_first_step_cannot_count(self) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            PhaseTimes("phases.json", skip_steps=0)


class TestDemos:
    def test_repeated_until_there_are_enough_frames(self, tmp_path: Path, recorder: list[int]) -> None:
        root = repeated_demos(compose("train", SMALL_POLICY), tmp_path, demos=2, samples=5 * FRAMES)
        demos = [reference.read() for reference in find_demos(root, "native")]
        assert recorder == [2]
        assert len(demos) == 6
        assert sum(len(demo) for demo in demos) == 6 * FRAMES


class TestCases:
    @pytest.mark.slow
    def test_inference(self) -> None:
        figures = Inference(SMALL_POLICY, 1, repetitions=5, quick_repetitions=4, limit_s=60, quick_limit_s=60).run(
            quick=True
        )
        assert figures["threads"] == torch.get_num_threads()
        for prefix in ("", "one_thread_"):
            assert 0 < figures[f"{prefix}p50_ms"] <= figures[f"{prefix}p95_ms"]
            assert figures[f"{prefix}network_p50_ms"] > 0

    def test_the_exported_network_is_timed_with_one_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        images: dict[str, list[int]] = {}

        def recorded(name: str) -> Callable[..., None]:
            return lambda *values: images.update({name: [len(value) for value in values]})

        class Session:
            def __init__(self, file: str, providers: list[str]) -> None:
                pass

            def get_inputs(self) -> list[SimpleNamespace]:
                return [SimpleNamespace(name=name) for name in graph.inputs]

            def run(self, outputs: None, feed: dict[str, np.ndarray]) -> None:
                recorded("onnx")(*feed.values())

        def once(sides: dict[str, Callable[[], object]], *_: Any) -> dict[str, list[float]]:
            for side in sides.values():
                side()
            return {name: [0.001] for name in sides}

        graph = SimpleNamespace(
            inputs={"image": torch.zeros(2, 3, 4, 4), "start_pixel": torch.zeros(2, 1, 2)}, network=recorded("eager")
        )
        monkeypatch.setattr(inference, "export_program", lambda _: SimpleNamespace(module=lambda: recorded("program")))
        monkeypatch.setattr(inference, "write_onnx", lambda graph, file: None)
        monkeypatch.setattr(inference, "find_spec", lambda name: True)
        monkeypatch.setattr(inference, "interleaved_seconds", once)
        monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
        case = Inference(SMALL_POLICY, 1, repetitions=5, quick_repetitions=4, limit_s=60, quick_limit_s=60)
        module: Any = SimpleNamespace(export_graph=lambda: graph)
        figures = case._time_exported(module, quick=False)
        assert images == {"eager": [1, 1], "program": [1, 1], "onnx": [1, 1]}
        assert figures == dict.fromkeys(("graph_eager_p50_ms", "graph_torch_export_p50_ms", "graph_onnx_p50_ms"), 1.0)
        assert set(case._time_exported(module, quick=True)) == set(figures) - {"graph_onnx_p50_ms"}

    def test_inference_refuses_another_model(self) -> None:
        case = Inference(
            ["experiment=demo", "model=coordinate_regression"],
            warm_up=0,
            **dict.fromkeys(("repetitions", "quick_repetitions"), 1),
            **dict.fromkeys(("limit_s", "quick_limit_s"), 1.0),
        )
        with pytest.raises(ValueError, match="measures a VolumeQueryModule"):
            case.run(quick=True)

    def test_cpu_precision(self) -> None:
        threads = torch.get_num_threads()
        case = CpuPrecision(
            widths=[8, 16],
            tokens=4,
            positions=[5],
            wide_positions=[6],
            uncausal_positions=[7],
            quick_widths=[8],
            quick_positions=[3, 4],
            rows=2,
            batch_positions=6,
            **dict.fromkeys(("repetitions", "quick_repetitions"), 3),
            **dict.fromkeys(("limit_s", "quick_limit_s"), 5.0),
        )
        figures = case.run(quick=False)
        assert torch.get_num_threads() == threads
        assert figures["chosen_bf16"] == float(cpu_is_faster_in_bf16())
        ratios = [figures[f"bf16_ms_{width}"] / figures[f"float32_ms_{width}"] for width in (8, 16)]
        assert figures["bf16_over_float32_time"] == pytest.approx(sum(ratios) / 2, abs=6e-4)
        for way in ("bf16", "float32", "plain"):
            assert all(figures[f"attention_ms_{way}_{kind}"] > 0 for kind in ("5", "6_wide", "7_uncausal"))
        ways = ("bf16", "float32", "plain")
        assert set(case.run(quick=True)) == {
            *("bf16_over_float32_time", "chosen_bf16", "bf16_ms_8", "float32_ms_8"),
            *(f"attention_ms_{way}_{kind}" for way in ways for kind in ("3", "4", "4_wide", "4_uncausal")),
        }

    def test_loader(self, recorder: list[int]) -> None:
        figures = Loader(SMALL_POLICY, 3, 2, batches=4, quick_batches=2, skip_batches=1).run(quick=True)
        assert recorder == [2]
        assert figures.pop("workers") == 0
        assert figures.pop("batch_size") == compose("train", SMALL_POLICY).data.batch_size
        assert set(figures) == {
            f"{prefix}samples_per_s" for prefix in ("", "uncached_", "one_process_", "one_process_uncached_")
        }
        assert min(figures.values()) > 0

    @pytest.mark.slow
    def test_training_runs_the_real_command(self, recorder: list[int]) -> None:
        figures = Training([*SMALL_POLICY, "strategy=cpu"], 3, 2, steps=4, quick_steps=2, skip_steps=1).run(quick=True)
        assert recorder == [2]
        assert figures["steps"] == 2
        shares = [figures[f"{phase}_share"] for phase in ("data_wait", "forward", "backward", "optimizer")]
        assert min(shares) >= 0
        assert sum(shares) == pytest.approx(1.0, abs=1e-3)
        assert figures["samples_per_s"] == pytest.approx(4 / figures["step_ms"] * 1e3, rel=1e-2)

    def test_training_says_its_batch_size(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        measured = {"seconds": dict.fromkeys(training.PHASES, 0.5), "samples": 10, "steps": 2}
        monkeypatch.setattr(training, "repeated_demos", lambda *_, **__: tmp_path)
        monkeypatch.setattr(Training, "_train", lambda *_: measured)
        overrides = [*SMALL_POLICY, "data.batch_size=5"]
        figures = Training(overrides, 3, 2, steps=4, quick_steps=2, skip_steps=1).run(quick=True)
        assert (figures["batch_size"], figures["samples_per_s"]) == (5, 5.0)

    def test_training_that_fails_is_said(self, recorder: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(training.sys, "executable", "/bin/false")
        with pytest.raises(ChildProcessError, match="exit code 1; see its output above"):
            Training(SMALL_POLICY, 2, 2, steps=1, quick_steps=1, skip_steps=1).run(quick=True)


class TestServer:
    def test_requests_after_the_deadline_are_the_least_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Robot:
            def __init__(self, url: str, timeout_s: float = 10.0) -> None:
                self.url = url

            def __enter__(self) -> Robot:
                return self

            def __exit__(self, *_: object) -> None: ...

            def plan(self, observation: Any) -> None:
                asked.append(self.url)

            def health(self) -> dict[str, float]:
                return {"plan_p50_ms": 1.0}

        monkeypatch.setattr(server, "RemotePolicy", Robot)
        monkeypatch.setattr(server, "compose", MagicMock())
        monkeypatch.setattr(server, "looking_down", lambda size: {})
        case = server.Server([], 2, requests=20, quick_requests=12, warm_up=1, limit_s=60, quick_limit_s=60)

        def count(case: server.Server) -> tuple[int, int]:
            asked.clear()
            case._measure("one", "batches", quick=True)
            return asked.count("one"), asked.count("batches")

        asked: list[str] = []
        assert count(case) == (13 + 2 * 7, 2 * 7)
        least = 1 + MIN_REPETITIONS
        with deadline(-1.0):
            assert count(case) == (3 * least, 2 * least)
        assert count(replace(case, quick_limit_s=0)) == (3 * least, 2 * least)


class TestCommand:
    SMALL = (
        *("case=cpu_precision", "quick=true", "cases.cpu_precision.quick_widths=[8]", "cases.cpu_precision.tokens=4"),
        *("cases.cpu_precision.quick_positions=[5]", "cases.cpu_precision.rows=2"),
        "cases.cpu_precision.quick_repetitions=1",
    )

    @pytest.mark.slow
    def test_one_line_of_json_on_standard_output(
        self, command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
    ) -> None:
        ended = command("keygrip.bench", *self.SMALL, "record=true")
        assert ended.returncode == 0, ended.stderr
        (line,) = ended.stdout.splitlines()
        result = json.loads(line)
        assert result["case"] == "cpu_precision"
        assert result["bf16_over_float32_time"] > 0
        assert result["machine"]["cores"] >= 1
        assert result["machine"]["torch"] == torch.__version__
        recorded = json.loads((tmp_path / "benchmarks" / "cpu_precision.json").read_text())
        assert recorded["command"].startswith("python -m keygrip.bench case=cpu_precision quick=true")
        assert len(recorded["date"].split("-")) == 3
        assert {name: value for name, value in recorded.items() if name not in ("command", "date")} == result

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            (["case=volumeloss"], "there is no case 'volumeloss': the nearest is volume_loss;"),
            (["case=volume_loss", "quik=true"], "'quick'"),
            (["case=server", "tf32=true"], "tf32=true has no effect on server, measured in other processes: leave it"),
            (["case=training", "tf32=true"], "tf32=true has no effect on training, measured in other processes"),
            (["tf32=true"], "tf32=true has no effect on training, server, server_load, measured in other processes: g"),
            (["case=volume_loss", "cases.volume_loss.repetition=3"], "'cases.volume_loss.repetitions'"),
        ],
    )
    def test_errors_take_one_line(self, cli: Callable[..., Any], tmp_path: Path, wrong: list[str], says: str) -> None:
        code, out, err = cli(*wrong, of="bench")
        assert code in (1, 2)
        assert out == ""
        assert says in err
        assert len(err.splitlines()) == 1
        assert not (tmp_path / "benchmarks").exists()

    @pytest.mark.parametrize(("given", "seconds"), [("quick=true", QUICK_S), ("quick=false", math.inf)])
    def test_a_quick_case_has_one_deadline(
        self, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, given: str, seconds: float
    ) -> None:
        given_s: list[float] = []

        @contextmanager
        def recorded(limit_s: float) -> Iterator[None]:
            given_s.append(limit_s)
            yield

        monkeypatch.setattr("keygrip.bench.deadline", recorded)
        assert cli("case=vla_params", given, of="bench")[0] == 0
        assert given_s == [seconds]

    @pytest.mark.parametrize(
        ("run_dir", "says"),
        [
            ("log.txt", "run_dir=log.txt is a file: give a folder"),
            ("log.txt/below", "run_dir=log.txt/below: HERE/log.txt is a file: give a folder"),
            ("null", "run_dir=null: the log needs a folder: leave run_dir out, or give a folder"),
        ],
    )
    def test_a_run_dir_that_is_no_folder_is_refused_by_its_name(
        self, cli: Callable[..., Any], tmp_path: Path, run_dir: str, says: str
    ) -> None:
        (tmp_path / "log.txt").write_text("mine")
        code, out, err = cli("case=vla_params", f"run_dir={run_dir}", of="bench")
        assert (code, out, err) == (1, "", f"keygrip: {says.replace('HERE', str(tmp_path))}\n")
        assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
