"""Several processes with the same global batch train the same weights as one."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import on_two_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import keygrip
from keygrip.training.checkpoints import read_checkpoint
from keygrip.training.distributed import (
    _device_of_reductions,
    global_mean,
    maximum_over_processes,
    mean_over_processes,
    weighted_means,
)
from keygrip.training.monitors import gradient_norm
from keygrip.training.optimizers import AdamW
from keygrip.training.sharding import load_optimizer, named_state

CONF = str(Path(__file__).parents[1] / "support" / "conf")
TOY = [
    *("--config-dir", CONF, "model=toy", "data=toy", "logger=none", "max_steps=13", "val_every_n_steps=4"),
    *("model.dropout=0", "strategy.precision=32-true"),
]
HERE = (f"hydra.searchpath=[file://{CONF}]", *TOY[2:])  # in this process
FSDP = ("strategy=fsdp", "strategy.accelerator=cpu", "strategy.devices=2")


def assert_same_weights(left: Path, right: Path) -> None:
    one, two = read_checkpoint(left), read_checkpoint(right)
    assert one["global_step"] == two["global_step"] == 13
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=0, atol=1e-5)
    for name, average in one["ema"]["parameters"].items():
        torch.testing.assert_close(two["ema"]["parameters"][name], average, rtol=0, atol=1e-5)


def assert_same_training(left: Path, right: Path) -> None:
    """Assert that the weights and the reported figures are the same."""
    assert_same_weights(left, right)
    one, two = (json.loads((run / "result.json").read_text())["metrics"] for run in (left, right))
    for name in ("val/loss", "val/error"):
        assert one[name] == pytest.approx(two[name], abs=1e-5), name
    assert one["tflop"] == pytest.approx(two["tflop"])


@pytest.fixture
def first_of_several(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the train command in this process start others, as if it were `python -m keygrip.train`, which saves one slow
    import. The others must end without an error and leave nothing behind: no process group, and no variable set by
    Lightning."""
    before, started, popen = dict(os.environ), list[Any](), subprocess.Popen

    def start(command: Any, *arguments: Any, **options: Any) -> Any:
        process = popen(command, *arguments, **options)
        started.extend([process] if "keygrip.train" in command else [])
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", importlib.util.find_spec("keygrip.train"), raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(keygrip.__file__).parents[1]), str(Path(CONF).parent)]))
    try:
        yield
        assert [process.wait(600) for process in started] == [0]
    finally:
        for process in started:
            process.kill()
            process.wait()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


def test_two_processes_train_the_weights_of_one(
    cli: Callable[..., Any], first_of_several: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each batch of five, one process has three samples, the other two."""
    uneven = "data.batch_size=5"
    assert keygrip.train([*HERE, uneven, "strategy=cpu", f"run_dir={tmp_path / 'one'}"])["status"] == "finished"
    # In a batch script of SLURM, without srun: the variables are those of the script, not of the two processes.
    slurm = {"SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}
    slurm |= {f"SLURM_{name}": "0" for name in ("PROCID", "LOCALID", "NODEID")}
    for name, value in {"TOY_RANKS": str(tmp_path), **slurm}.items():
        monkeypatch.setenv(name, value)
    done = cli(*TOY, uneven, "strategy=ddp_cpu", "run_dir=two")
    assert done.code == 0, done.err
    assert len(list(tmp_path.glob("rank_*"))) == 2
    assert_same_training(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_two_tasks_of_srun_train_the_weights_of_one(command: Callable[..., Any], tmp_path: Path) -> None:
    """The step runs on one of four nodes, with eight tasks per node: its variables hold the numbers of the job next to
    its own."""
    uneven = "data.batch_size=5"
    assert keygrip.train([*HERE, uneven, "strategy=cpu", f"run_dir={tmp_path / 'one'}"])["status"] == "finished"
    step = {"JOB_ID": "42", "JOB_NAME": "train", "STEP_ID": "1", "NTASKS": "2", "STEP_NUM_TASKS": "2", "NNODES": "1"}
    step |= {"JOB_NUM_NODES": "4", "NTASKS_PER_NODE": "8", "NODEID": "0"}
    step |= {"NODELIST": "first.invalid,127.0.0.1", "STEP_NODELIST": "127.0.0.1", "STEP_TASKS_PER_NODE": "2"}

    def task(number: str) -> Any:
        told = {f"SLURM_{name}": value for name, value in (step | {"PROCID": number, "LOCALID": number}).items()}
        ddp = ("strategy=ddp", "strategy.accelerator=cpu", "run_dir=two")
        return command("keygrip.train", *TOY, uneven, *ddp, TOY_RANKS=str(tmp_path), **told)

    with ThreadPoolExecutor(2) as srun:
        for done in srun.map(task, ("0", "1")):
            assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("rank_*"))) == 2
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_in_a_batch_script_of_several_tasks_a_command_without_srun_trains_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = {"SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"}
    slurm |= {f"SLURM_{name}": "0" for name in ("PROCID", "LOCALID", "NODEID")}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    assert keygrip.train([*HERE, "strategy=cpu", "max_steps=2", f"run_dir={tmp_path}"])["status"] == "finished"


@pytest.mark.slow
def test_jobs_of_a_sweep_that_use_several_devices_run_side_by_side(command: Callable[..., Any], tmp_path: Path) -> None:
    launcher = ("hydra/launcher=processes", "hydra.launcher.jobs_at_once=2", "hydra.sweep.dir=sweep")
    done = command("keygrip.train", "-m", *TOY, *launcher, "strategy=cpu,ddp_cpu")
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "sweep" / "0", tmp_path / "sweep" / "1")


@pytest.mark.slow
def test_sharded_training_gives_the_weights_of_one_process_and_resumes(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    assert command("keygrip.train", *TOY, "strategy=cpu", "run_dir=one").returncode == 0
    stop = {"TOY_STOP_AT": "7", "TOY_SIGNAL": "SIGTERM"}
    done = command("keygrip.train", *TOY, *FSDP, "run_dir=sharded", **stop)
    assert done.returncode == 143, done.stderr
    assert "stopped by SIGTERM at step 8: saved" in done.stderr.splitlines()[-1]
    done = command("keygrip.train", *TOY, *FSDP, "run_dir=sharded", "resume=true")
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "one", tmp_path / "sharded")


@pytest.mark.slow
@pytest.mark.parametrize("several", [("strategy=ddp_cpu",), FSDP], ids=["ddp", "fsdp"])
def test_a_run_goes_on_from_one_process_to_several_and_back(
    command: Callable[..., Any], tmp_path: Path, several: tuple[str, ...]
) -> None:
    """A part of the model is frozen, and the optimizer does not have it."""
    toy = (*TOY, "model.frozen=true")
    assert command("keygrip.train", *toy, "strategy=cpu", "run_dir=one").returncode == 0
    for number, strategy in enumerate((("strategy=cpu",), several)):
        stop = {"TOY_STOP_AT": str(4 * number + 3), "TOY_SIGNAL": "SIGTERM"}
        resume = () if number == 0 else ("resume=true",)
        done = command("keygrip.train", *toy, *strategy, "run_dir=changing", *resume, **stop)
        assert done.returncode == 143, done.stderr
    done = command("keygrip.train", *toy, "strategy=cpu", "run_dir=changing", "resume=true")
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "one", tmp_path / "changing")


@pytest.mark.parametrize("numbered_by", ["groups", "module"])
def test_stored_moments_get_the_names_of_their_parameters(numbered_by: str) -> None:
    """They are numbered in the order of the groups, as without FSDP, or of all parameters, including frozen ones, as
    with FSDP."""
    module = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.AdamW(AdamW(lr=1e-3).parameter_groups(module))
    module(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    moments = {name: optimizer.state[p]["exp_avg"] for name, p in module.named_parameters() if p.requires_grad}
    saved = optimizer.state_dict()
    if numbered_by == "module":
        places = {id(p): place for place, p in enumerate(module.parameters())}
        new = [places[id(p)] for group in optimizer.param_groups for p in group["params"]]
        saved["state"] = {new[number]: state for number, state in saved["state"].items()}
        for group in saved["param_groups"]:
            group["params"] = [new[number] for number in group["params"]]
    named = named_state(saved, optimizer, module)
    assert [group["params"] for group in named["param_groups"]] == [["1.weight", "2.weight"], ["1.bias", "2.bias"]]
    assert {name: id(state["exp_avg"]) for name, state in named["state"].items()} == {
        name: id(value) for name, value in moments.items()
    }


def test_a_parameter_that_had_no_gradient_yet_has_no_moments_when_sharded(tmp_path: Path) -> None:
    def built() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = nn.ModuleDict({"used": nn.Linear(3, 2), "late": nn.Linear(3, 2)})
        return module, torch.optim.AdamW(module.parameters(), lr=0.1)

    def train(module: nn.Module, optimizer: torch.optim.Optimizer, *parts: str) -> None:
        optimizer.zero_grad()
        sum(module[part](torch.ones(1, 3)).square().sum() for part in parts).backward()
        optimizer.step()

    module, optimizer = built()
    train(module, optimizer, "used")
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(module.state_dict())
    train(module, optimizer, "used", "late")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded, _ = built()
        sharded.load_state_dict(weights)
        for part in sharded.values():
            fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
        of_sharded = torch.optim.AdamW(sharded.parameters(), lr=0.1)
        load_optimizer(saved, of_sharded, sharded)
        train(sharded, of_sharded, "used", "late")
        for name, value in module.state_dict().items():
            torch.testing.assert_close(sharded.state_dict()[name].full_tensor(), value)
    finally:
        torch.distributed.destroy_process_group()


def test_processes_agree_in_one_reduction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reduced, all_reduce = list[str](), torch.distributed.all_reduce

    def reduce(value: Tensor, op: Any) -> None:
        reduced.append(value.device.type)
        all_reduce(value, op=op)

    monkeypatch.setattr("keygrip.training.distributed.world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    monkeypatch.setattr(torch.distributed, "barrier", lambda **_: pytest.fail("a second wait"))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert (maximum_over_processes(10), maximum_over_processes(0.1)) == (10, 0.1)
    finally:
        torch.distributed.destroy_process_group()
    assert reduced == ["cpu", "cpu"]


@pytest.mark.parametrize(("backend", "device"), [("gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cpu"), ("nccl", "cuda:1")])
def test_numbers_are_reduced_on_a_device_of_the_backend(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert _device_of_reductions() == torch.device(device)


def test_a_number_of_terms_is_not_copied_to_the_device() -> None:
    """The copy of a number of Python would wait for all that a GPU still has to do."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    called: list[str] = []
    total = torch.tensor(6.0, requires_grad=True)
    with Names():
        mean = global_mean(total, 4)
    assert float(mean.detach()) == 1.5
    assert "aten.full.default" in called
    assert not [name for name in called if name.startswith(("aten.lift_fresh", "aten._to_copy"))]


def test_the_norm_of_sharded_gradients_is_one_number(tmp_path: Path) -> None:
    """It is the whole norm, not the share of this process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = nn.Linear(2, 1, bias=False)
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        module(torch.tensor([[3.0, 4.0]])).sum().backward()
        assert isinstance(module.weight.grad, DTensor)
        norm = gradient_norm(module.parameters())
        assert not isinstance(norm, DTensor)
        assert float(norm) == pytest.approx(5.0)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_torchrun_agrees_on_a_folder_and_resumes_after_a_signal(command: Callable[..., Any], tmp_path: Path) -> None:
    assert command("keygrip.train", *TOY, "strategy=cpu", "run_dir=one").returncode == 0
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "keygrip.train")
    ranks = (*TOY, "strategy=ddp", "strategy.accelerator=cpu")
    stopped = command(*torchrun, *ranks, "callbacks.checkpoint.every_n_steps=3", TOY_STOP_AT="7", TOY_SIGNAL="SIGKILL")
    assert stopped.returncode != 0
    (folder,) = (tmp_path / "runs" / "toy_toy").iterdir()
    assert read_checkpoint(folder)["global_step"] == 6
    done = command(*torchrun, *ranks, "resume=true")
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "one", folder)


def test_a_logged_loss_is_the_mean_over_the_elements_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process has 10 elements, the other 90, of another loss."""
    values, weights = (1.0, 3.0), {"a": 1.0, "b": 0.5}

    def losses(rank: int) -> dict[str, Tensor]:
        counted = torch.zeros(100, dtype=torch.bool)
        counted[: (10, 90)[rank]] = True
        loss = torch.full((100,), values[rank], requires_grad=True)
        return weighted_means({"a": loss, "b": 2 * loss}, counted, weights)

    for logged in on_two_ranks(monkeypatch, lambda rank: mean_over_processes(losses(rank))):
        assert not any(value.requires_grad for value in logged.values())
        found = {name: float(value) for name, value in logged.items()}
        assert found == pytest.approx({"a": 2.8, "b": 5.6, "total": 5.6})
    alone = {name: float(value) for name, value in mean_over_processes(losses(1)).items()}
    assert alone == pytest.approx({"a": 3.0, "b": 6.0, "total": 6.0})
