"""``python -m keygrip.serve`` with trained checkpoints of every robot policy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from keygrip import serve, train
from keygrip.config import compose
from keygrip.envs.yam.environment import YamCell
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.models import policy_tensors
from keygrip.runtime.client import RemotePolicy
from keygrip.runtime.service import Limits
from keygrip.runtime.sessions import seeded
from keygrip.training.checkpoints import load_module

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "data=yam_language", "data.record.demos=2", "data.record.image_size=72", "data.record.processes=1",
    "data.batch_size=4", "data.num_workers=0", "data.cache_gb=0", "backbone.image_size=48", "backbone.width=32",
    "backbone.depth=1", "backbone.heads=2", "strategy=cpu", "strategy.precision=32-true", "logger=none", "max_steps=1",
    "val_every_n_steps=1", "limit_val_batches=1",
]  # fmt: skip
MODELS = {
    "volume_query": ["model=volume_query", "model.network.pred_size=12", "model.log_images_every_n_steps=0"],
    "volume_query_of_two_views": [
        "model=volume_query", "model.network.pred_size=12", "model.log_images_every_n_steps=0",
        "model.network.world_views=true", "model.network.second_look=64", "model.network.look_size=32",
    ],
    "coordinate_regression": ["model=coordinate_regression", "model.network.width=32"],
    "geometry_vla": [
        "model=geometry_vla", "model.network.blocks=1", "model.network.future_tokens=2", "vlm.vision.patch_size=8",
    ],
}  # fmt: skip
EACH = [
    pytest.param(name, marks=[] if name in ("volume_query", "geometry_vla") else [pytest.mark.slow]) for name in MODELS
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of one step of each model on the same two demonstrations of named cubes."""
    folder = tmp_path_factory.mktemp("serve")
    runs: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in runs:
            places = [f"data.record.folder={folder / 'data'}", f"run_dir={folder / name}"]
            metrics = train.run(compose("train", [*SMALL, *MODELS[name], *places]))
            assert all(np.isfinite(value) for value in metrics.values())
            runs[name] = folder / name
        return runs[name]

    return run


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    cell = YamCell(
        TaskOptions(name="named_place", distractors=2, pedestal_m=0.06), image_size=72, cameras=("over", "front")
    )
    observation, _ = cell.reset(seed=500_000)
    cell.close()
    return observation


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "volume_query" else [pytest.mark.slow]) for name in MODELS]
)
def test_the_plan_over_the_wire_is_the_plan_at_home(
    trained: Callable[[str], Path], running: Callable[..., Any], seen: dict[str, Any], name: str
) -> None:
    run = trained(name)
    local, served = (load_module(run).policy() for _ in range(2))  # type: ignore[operator]
    server = running(served, served.needs)
    with RemotePolicy(server.url) as policy:
        assert policy.needs.arms == ("right",)
        several = name in ("geometry_vla", "volume_query_of_two_views")
        assert policy.needs.cameras == (("over", "front") if several else ())
        assert policy.needs.instruction == (name == "geometry_vla")
        for _ in range(2):
            ours, theirs = policy.plan(seen), local.plan(seen)
            for part in ("position", "quaternion", "gripper"):
                np.testing.assert_array_equal(getattr(ours, part), getattr(theirs, part))
            assert ours.step_seconds == theirs.step_seconds
            assert (ours.uncertainty is None) == (theirs.uncertainty is None)


@pytest.mark.parametrize("name", EACH)
def test_plans_of_a_batch_are_those_of_each_alone(
    trained: Callable[[str], Path], seen: dict[str, Any], name: str
) -> None:
    policy = load_module(trained(name)).policy()  # type: ignore[operator]
    others = [seen, seen | {"instruction": "put the small green cube into the bowl"}]
    others.append(seen | {"position": seen["position"] + 0.05, "image": seen["image"][::-1].copy()})
    together, apart = ([seeded(policy, seed) for seed in range(3)] for _ in range(2))
    for _ in range(2):  # the second call continues the random numbers of the first
        plans = policy.plan_batch(others, together)
        for plan, one, observation in zip(plans, apart, others, strict=True):
            expected = one.plan(observation)
            for part in ("position", "quaternion", "gripper"):
                np.testing.assert_allclose(getattr(plan, part), getattr(expected, part), atol=2e-5)
    box = policy.workspace
    assert box.shape == (2, 3)
    assert (box[0] <= box[1]).all()


@pytest.mark.parametrize(
    ("name", "options"), [("volume_query", {"decoder": "sample"}), ("geometry_vla", {"temperature": 1.0})]
)
def test_a_batch_that_fails_draws_nothing(
    trained: Callable[[str], Path],
    seen: dict[str, Any],
    name: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = replace(load_module(trained(name)).policy(), **options)  # type: ignore[operator]
    sessions, anew = [seeded(policy, seed) for seed in (3, 4)], [seeded(policy, seed) for seed in (3, 4)]
    before = sessions[0]._generator.get_state()  # type: ignore[attr-defined]

    def failing(plan: Any) -> None:
        assert not torch.equal(sessions[0]._generator.get_state(), before)  # type: ignore[attr-defined]
        raise ValueError("a number is not finite")

    with monkeypatch.context() as broken, pytest.raises(ValueError, match="a number is not finite"):
        broken.setattr(policy_tensors, "refuse_not_finite", failing)
        policy.plan_batch([seen, seen], sessions)
    for session, fresh in zip(sessions, anew, strict=True):
        np.testing.assert_array_equal(session.plan(seen).position, fresh.plan(seen).position)


def test_the_command_serves_until_it_is_told_to_stop(
    trained: Callable[[str], Path], seen: dict[str, Any], cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command runs in this process and receives its signals; its client runs in a thread."""
    run, lines, served = trained("volume_query"), Queue[str](), list[Any]()
    ended = threading.Event()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=lines.put, flush=lambda: None))

    def use_and_stop() -> None:
        served.append(json.loads(lines.get()))
        with RemotePolicy(served[0]["url"], timeout_s=60) as policy:
            try:
                served.append(policy.plan(seen))
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                if not ended.wait(100):
                    os.kill(os.getpid(), signal.SIGINT)

    client = threading.Thread(target=use_and_stop)
    client.start()
    try:
        outcome = cli(f"checkpoint={run}", "port=0", "device=cpu", of="serve")
    finally:
        ended.set()
        lines.put("null")  # for a client that still waits for the address because no server started
        client.join()
    assert outcome.code == 0, outcome.err
    about, plan = served
    assert about["model"] == "VolumeQueryModule"
    assert about["url"].startswith("http://127.0.0.1:")
    assert plan.position.shape == (1, 8, 3)
    assert [lines.get(), lines.get(), lines.empty()] == ["\n", "null", True]
    assert "stopped" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.slow
def test_a_process_of_its_own_serves_until_it_is_told_to_stop(
    trained: Callable[[str], Path], seen: dict[str, Any]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "keygrip.serve", f"checkpoint={trained('volume_query')}", "port=0", "device=cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.stderr.read() if process.stderr else ""
        with RemotePolicy(json.loads(line)["url"], timeout_s=60) as policy:
            assert policy.plan(seen).position.shape == (1, 8, 3)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=100)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (0, "")
    assert "stopped" in err
    assert "Traceback" not in err


def test_a_model_that_drives_no_robot_is_refused(toy_overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    train.run(compose("train", toy_overrides("run", "max_steps=1")))
    with pytest.raises(ValueError, match="holds a ToyModule, which drives no robot: give a run"):
        serve.run(compose("serve", [f"checkpoint={tmp_path / 'run'}", "trust=[toy_parts]"]))


def test_settings_are_checked(trained: Callable[[str], Path]) -> None:
    run = trained("volume_query")
    for override in ("limits.waiting=0", "limits.read_s=-1"):
        with pytest.raises(Exception, match="must be above 0"):
            serve.run(compose("serve", [f"checkpoint={run}", override]))
    with pytest.raises(ValueError, match="VolumeQueryPolicy has no setting 'temperature'; it has decoder, margin_m"):
        serve.run(compose("serve", [f"checkpoint={run}", "policy.temperature=0"]))
    with pytest.raises(OSError, match=r"cannot listen at 192\.0\.2\.1"):
        serve.run(compose("serve", [f"checkpoint={run}", "host=192.0.2.1", "port=0", "insecure=true"]))
    for override, message in (
        ("host=0.0.0.0", "can be reached from other machines.*token=.*insecure=true"),
        ("limits.batch=16", "limits.batch=16 is above limits.waiting=4"),
        ("tf32=true device=cpu", "tf32=true is for GPUs, and this process computes on the CPU"),
        ("token=short", "token must have at least 16 ASCII characters"),
        ("tls.cert=cert.pem", "tls.cert and tls.key are given together"),
        ("bounds=null", r"bounds=null: these settings cannot be left out; .* bounds\.NAME=VALUE"),
        ("limits=null", r"limits=null: these settings cannot be left out; .* limits\.NAME=VALUE"),
        ("bounds.start_m=-1", "bounds.start_m must be finite and above 0"),
    ):
        with pytest.raises(Exception, match=message):
            serve.run(compose("serve", [f"checkpoint={run}", *override.split()]))


@pytest.mark.parametrize(
    ("limits", "device", "batch"),
    [
        (Limits(), "cpu", 1),
        (Limits(), "cuda", 4),
        (Limits(waiting=16), "cuda:1", 8),
        (Limits(waiting=16, batch=12), "cuda", 12),
        (Limits(batch=2), "cpu", 2),
    ],
)
def test_batches_on_a_gpu_are_as_large_as_the_plans_in_progress_allow(limits: Limits, device: str, batch: int) -> None:
    assert serve._with_batch(limits, device).batch == batch


def test_addresses_of_this_machine_alone_are_told_from_others() -> None:
    reachable = {"127.0.0.1": False, "::1": False, "localhost": False, "0.0.0.0": True, "10.0.0.3": True, "robot": True}
    assert {host: serve._reachable_from_elsewhere(host) for host in reachable} == reachable
