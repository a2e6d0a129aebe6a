from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from keygrip.training import strategies
from keygrip.training.distributed import global_mean
from keygrip.training.sharding import local, local_like, reshard
from keygrip.training.strategies import Strategy, named_precision


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "LOCAL_WORLD_SIZE",
        "WORLD_SIZE",
        "SLURM_NTASKS",
        "SLURM_NTASKS_PER_NODE",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_STEP_NUM_NODES",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_NNODES",
        "TORCHELASTIC_RUN_ID",
        "SLURM_JOB_NUM_NODES",
        "SLURM_JOB_NAME",
        "SLURM_PROCID",
        "LOCAL_RANK",
    ):
        monkeypatch.delenv(name, raising=False)


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int, bf16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)


@pytest.mark.parametrize(("bf16", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_takes_the_cpu_where_there_is_no_gpu(bf16: bool, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    monkeypatch.setattr(strategies, "cpu_is_faster_in_bf16", lambda: bf16)
    arguments = Strategy().trainer_arguments()
    assert (arguments["accelerator"], arguments["devices"], arguments["precision"]) == ("cpu", 1, precision)
    assert arguments["use_distributed_sampler"] is False


@pytest.mark.parametrize(("bf16", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_takes_one_gpu_where_there_are_some(bf16: bool, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 4, bf16)
    arguments = Strategy().trainer_arguments()
    assert (arguments["accelerator"], arguments["devices"], arguments["precision"]) == ("cuda", 1, precision)
    assert Strategy(accelerator="cpu").trainer_arguments()["accelerator"] == "cpu"


def test_ddp_takes_all_gpus_or_what_the_scheduler_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 4)
    ddp = Strategy(accelerator="gpu", devices="auto", num_nodes="auto", kind="ddp", precision="bf16-mixed")
    assert ddp.processes == 4
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    arguments = ddp.trainer_arguments()
    assert (arguments["devices"], arguments["num_nodes"], ddp.processes) == (2, 3, 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="devices=6 but this machine has 4 GPUs"):
        ddp.trainer_arguments()


def test_slurm_says_how_many_tasks_and_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 8)
    for name, value in (("STEP_NUM_TASKS", "16"), ("NTASKS_PER_NODE", "8"), ("JOB_NUM_NODES", "2")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert Strategy(accelerator="gpu", devices="auto", num_nodes="auto", kind="ddp").processes == 16


def test_srun_that_shows_each_process_its_own_gpu_is_told_how_to_show_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --gpus-per-task=1. Fewer devices, which Lightning refuses, are not a solution."""
    with_gpus(monkeypatch, 1)
    for name, value in (("STEP_NUM_TASKS", "16"), ("NTASKS_PER_NODE", "8"), ("JOB_NUM_NODES", "2")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    ddp = Strategy(accelerator="gpu", devices="auto", num_nodes="auto", kind="ddp")
    with pytest.raises(ValueError, match=r"each process 1 GPU of a node's 8: give --gpus-per-node=8 .*--gpu-bind=none"):
        ddp.trainer_arguments()
    with pytest.raises(ValueError, match=r"each process 1 GPU of a node's 8: give --gpus-per-node=8 .*--gpu-bind=none"):
        Strategy(accelerator="gpu", devices=8, num_nodes=2, kind="ddp").trainer_arguments()
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")  # not set by --ntasks alone
    with pytest.raises(ValueError, match=r"each process 1 GPU of a node's 8: give --gpus-per-node=8 .*--gpu-bind=none"):
        ddp.trainer_arguments()
    monkeypatch.setenv("WORLD_SIZE", "16")  # torchrun inside a step of a job
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match=r"strategy\.devices=8 but this machine has 1 GPUs: lower it"):
        ddp.trainer_arguments()


@pytest.mark.parametrize(
    ("step", "processes"),
    [
        ({"STEP_NUM_TASKS": "16"}, (8, 2)),  # --ntasks=16, without --ntasks-per-node
        ({"STEP_NUM_TASKS": "8", "STEP_NUM_NODES": "1", "NTASKS_PER_NODE": "8"}, (8, 1)),  # on one of the job's nodes
        ({"STEP_NUM_TASKS": "2", "STEP_NUM_NODES": "1", "NTASKS_PER_NODE": "8"}, (2, 1)),
        ({"STEP_NUM_TASKS": "2", "NNODES": "1", "NTASKS_PER_NODE": "8"}, (2, 1)),
    ],
)
def test_a_step_has_the_tasks_and_nodes_of_its_own(
    step: dict[str, str], processes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, 8)
    for name, value in ({"JOB_NUM_NODES": "2"} | step).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    ddp = Strategy(accelerator="gpu", devices="auto", num_nodes="auto", kind="ddp")
    arguments = ddp.trainer_arguments()
    assert (arguments["devices"], arguments["num_nodes"]) == processes
    assert ddp.processes == int(step["STEP_NUM_TASKS"])


@pytest.mark.parametrize(
    ("tasks", "strategy", "said"),
    [
        ("2", Strategy(), r"srun started 2 processes on 2 nodes, and strategy\.kind=single is one: add strategy=ddp"),
        (
            "3",
            Strategy(devices="auto", num_nodes="auto", kind="ddp"),
            "3 processes on 2 nodes, which are not equally many",
        ),
        ("16", Strategy(devices=4, num_nodes=2, kind="ddp"), "devices=4 of each of num_nodes=2: leave both at auto"),
        ("16", Strategy(devices=8, num_nodes=1, kind="ddp"), "devices=8 of each of num_nodes=1: leave both at auto"),
    ],
)
def test_other_processes_than_srun_started_are_refused(
    tasks: str, strategy: Strategy, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, 8)
    for name, value in (("STEP_NUM_TASKS", tasks), ("JOB_NUM_NODES", "2"), ("NTASKS_PER_NODE", "8")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(ValueError, match=said):
        strategy.trainer_arguments()


@pytest.mark.parametrize(
    ("told", "tasks", "uneven"),
    [
        ("3,1", "4", True),
        ("2(x3),1,1", "8", True),
        ("3,2(x2),1", "8", True),
        ("2(x4)", "8", False),
        ("2,2(x2),2", "8", False),
        ("", "8", False),  # SLURM does not set it
    ],
)
def test_nodes_of_unlike_numbers_of_tasks_are_refused(
    told: str, tasks: str, uneven: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This also holds where the tasks are divisible by the nodes: no number of devices fits every node."""
    nodes = {"4": "2", "8": "4"}[tasks]
    with_gpus(monkeypatch, 8)
    for name, value in (("NUM_TASKS", tasks), ("NUM_NODES", nodes), ("TASKS_PER_NODE", told)):
        monkeypatch.setenv(f"SLURM_STEP_{name}", value)
    ddp = Strategy(accelerator="gpu", devices="auto", num_nodes="auto", kind="ddp")
    if uneven:
        with pytest.raises(ValueError, match=f"{tasks} processes on {nodes} nodes, which are not equally many on each"):
            ddp.trainer_arguments()
    else:
        arguments = ddp.trainer_arguments()
        assert (arguments["devices"], arguments["num_nodes"]) == (int(tasks) // int(nodes), int(nodes))


def test_numbers_of_tasks_in_an_unknown_form_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NUM_TASKS", "4"), ("NUM_NODES", "2"), ("TASKS_PER_NODE", "2*2")):
        monkeypatch.setenv(f"SLURM_STEP_{name}", value)
    with pytest.raises(ValueError, match=r"SLURM_STEP_TASKS_PER_NODE='2\*2' is no list of numbers of tasks"):
        Strategy(accelerator="cpu", devices="auto", num_nodes="auto", kind="ddp").trainer_arguments()


def test_a_task_in_a_job_that_is_named_as_a_shell_is_not_taken_to_be_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """salloc names its jobs like this; a command that a user types in such a shell is in the first task, or in none."""
    with_gpus(monkeypatch, 8)
    ddp = Strategy(accelerator="gpu", devices="auto", num_nodes="auto", kind="ddp")
    for name, value in (("JOB_NAME", "interactive"), ("STEP_NUM_TASKS", "8"), ("PROCID", "3")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(
        ValueError, match=r"8 tasks, of which this is number 3, in a job named 'interactive'.*--job-name"
    ):
        ddp.trainer_arguments()
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert ddp.trainer_arguments()["devices"] == 8
    assert "taken to be alone of 8 tasks" in caplog.text
    caplog.clear()
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    ddp.trainer_arguments()
    assert "alone" not in caplog.text


@pytest.mark.parametrize(("tasks", "in_step", "nodes"), [("1", "1", "1"), ("1", None, "1"), ("16", None, "2")])
def test_all_gpus_of_a_node_where_srun_started_one_process_or_none(
    tasks: str, in_step: str | None, nodes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other numbers of nodes and tasks are those of the batch script."""
    with_gpus(monkeypatch, 4)
    for name, value in (("NTASKS", tasks), ("NTASKS_PER_NODE", tasks), ("JOB_NUM_NODES", nodes)):
        monkeypatch.setenv(f"SLURM_{name}", value)
    if in_step is not None:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", in_step)
    arguments = Strategy(accelerator="gpu", devices="auto", num_nodes="auto", kind="ddp").trainer_arguments()
    assert (arguments["devices"], arguments["num_nodes"]) == (4, 1)


def test_other_processes_than_torchrun_started_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would all train the same on the first GPU and write into one folder."""
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"torchrun started 4 processes, .*kind=single .* is 1: add strategy=ddp"):
        Strategy("cpu").trainer_arguments()
    with pytest.raises(ValueError, match=r"torchrun started 4 processes, .*devices=2 .* is 2"):
        Strategy("cpu", devices=2, kind="ddp").trainer_arguments()
    assert Strategy("cpu", devices="auto", num_nodes="auto", kind="ddp").trainer_arguments()["devices"] == 4


def test_combinations_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="computes on one device"):
        Strategy(kind="single", devices=2)
    with pytest.raises(ValueError, match="accelerator='tpu'"):
        Strategy(accelerator="tpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"strategy\.devices=-1: must be at least 1, or auto"):
        Strategy(kind="ddp", devices=-1)
    with pytest.raises(ValueError, match=r"strategy\.num_nodes=0: must be at least 1, or auto"):
        Strategy(kind="ddp", num_nodes=0)
    with pytest.raises(ValueError, match=r"strategy\.precision='fp8': must be one of auto, 32-true, "):
        Strategy(precision="fp8")
    for casting in ("bf16-true", "16-true", "64-true", "64"):  # the policies cannot be trained in them
        with pytest.raises(ValueError, match=f"strategy.precision='{casting}': .*statistics stay in float32"):
            Strategy(precision=casting)
    with pytest.raises(ValueError, match=r"strategy\.precision=16-mixed: .* choose bf16-mixed or 32-true"):
        Strategy(kind="fsdp", devices=2, precision="16-mixed")
    assert Strategy(precision="bf16").precision == named_precision("cpu", "bf16") == "bf16-mixed"
    assert Strategy(precision="32").precision == "32-true"


def test_the_cpus_own_description_decides_about_bf16(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    for text, expected in (
        ("processor: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("processor: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16\n", True),
        ("processor: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16\n", False),  # slower than float32
        ("flags\t\t: fpu avx2\n", False),
        ("Features\t: fp asimd bf16\n", True),
        ("", False),
    ):
        monkeypatch.setattr(Path, "read_text", lambda self, text=text, **_: text)
        assert strategies.cpu_is_faster_in_bf16() is expected


class Line(LightningModule):
    """Fits a line; notes its loss and the types of what is computed and of the gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 1)
        self.losses: list[float] = []
        self.types: list[torch.dtype] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        output = self.layer(batch)
        loss = (output.float() ** 2).mean()
        self.losses.append(float(loss.detach()))
        self.types.append(output.dtype)
        return loss

    def on_after_backward(self) -> None:
        assert self.layer.weight.grad is not None
        self.types.append(self.layer.weight.grad.dtype)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trained_line(precision: str) -> Line:
    line = Line()
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(**Strategy("cpu", precision=precision).trainer_arguments(), max_steps=3, **quiet)
    trainer.fit(line, DataLoader(torch.randn(192, 8, generator=torch.Generator().manual_seed(1)), batch_size=64))  # type: ignore[arg-type]
    return line


def test_bf16_trains_on_this_cpu() -> None:
    """The products are in bf16, gradients and weights in float32, and the losses close to those in float32."""
    mixed, reference = trained_line("bf16-mixed"), trained_line("32-true")
    assert mixed.types == [torch.bfloat16, torch.float32] * 3
    assert reference.types == [torch.float32] * 6
    assert mixed.layer.weight.dtype == torch.float32
    assert mixed.losses == pytest.approx(reference.losses, rel=0.02, abs=1e-3)
    assert mixed.losses[-1] < mixed.losses[0]


def test_global_mean_in_one_process_is_the_mean() -> None:
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    mask = torch.tensor([1.0, 0.0, 1.0])
    mean = global_mean((values * mask).sum(), mask.sum())
    assert mean.item() == 2.0
    mean.backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0.0, 0.5]


def test_global_mean_of_nothing_is_zero_with_zero_gradient() -> None:
    values = torch.tensor([1.0], requires_grad=True)
    mean = global_mean((values * 0).sum(), torch.tensor(0.0))
    mean.backward()
    assert mean.item() == 0.0
    assert values.grad is not None
    assert values.grad.item() == 0.0


def test_tensors_that_are_not_sharded_stay_as_they_are() -> None:
    tensor = torch.arange(3.0)
    assert local(tensor) is tensor
    copy = local_like(tensor, tensor)
    assert torch.equal(copy, tensor)
    assert copy.data_ptr() != tensor.data_ptr()
    reshard(nn.Linear(1, 1))


def test_tf32_is_for_gpus_and_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        with_gpus(monkeypatch, 1)
        Strategy(tf32=True).trainer_arguments()
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
        Strategy().trainer_arguments()
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32, "convolutions too"
        with_gpus(monkeypatch, 0)
        with pytest.raises(ValueError, match=r"strategy\.tf32=true is for GPUs, and this process computes on the CPU"):
            Strategy(tf32=True).trainer_arguments()
        with pytest.raises(ValueError, match="strategy=cpu"):
            Strategy(accelerator="cpu", tf32=True)
        with pytest.raises(ValueError, match="reshard_after_forward is for kind=fsdp, and this one is ddp"):
            Strategy(kind="ddp", reshard_after_forward=False)
        kept = Strategy(accelerator="cpu", devices=2, kind="fsdp", reshard_after_forward=False)
        assert kept.trainer_arguments()["strategy"].reshard_after_forward is False
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
