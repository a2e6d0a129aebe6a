"""Devices and processes of a run: one device, DDP or FSDP; checked before anything is loaded."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keygrip.launch import (
    nodes_of_srun,
    refuse_task_named_as_a_shell,
    started_together,
    tasks_of_nodes_of_srun,
    tasks_of_srun,
)

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Lightning's other precisions (bf16-true, 16-true, 64-true) would also cast weights and the statistics of the data. In
# bf16 a range of positions has an error of millimetres, and parts that a network keeps in float32 would not match.
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
SHORT = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}  # short names that Lightning accepts


class MissingGPUError(ValueError):
    """A GPU was requested and this machine has none."""


@dataclass(frozen=True)
class Strategy:
    """Devices, processes and precision of a run.

    Args:
        accelerator: ``auto`` uses a GPU if there is one.
        devices: processes per node; ``auto``: as many as torchrun or srun started; all GPUs if srun started one
            process, or without torchrun and srun.
        num_nodes: ``auto``: read from torchrun or SLURM, else 1.
        kind: ``single`` one process, ``ddp`` replicated, ``fsdp`` sharded.
        precision: Lightning's name (`PRECISIONS`, `SHORT`), or ``auto``: bf16 autocast if the hardware is faster with
            it, else float32.
        tf32: float32 products in TF32 (10 bits of mantissa) on a GPU's tensor cores: parts that stay in float32 under
            autocast, such as an action head, take a fraction of the time.
        reshard_after_forward: with ``fsdp``: blocks free gathered parameters between forward and backward pass;
            false: they keep them, with more memory and a third less communication.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | Literal["auto"] = 1
    num_nodes: int | Literal["auto"] = 1
    kind: Literal["single", "ddp", "fsdp"] = "single"
    precision: str | int = "auto"
    tf32: bool = False
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("accelerator", self.accelerator, ("auto", "cpu", "gpu")),
            ("kind", self.kind, ("single", "ddp", "fsdp")),
        ):
            if value not in allowed:
                raise ValueError(f"strategy.{name}={value!r}: must be one of {', '.join(allowed)}")
        for name, count in (("devices", self.devices), ("num_nodes", self.num_nodes)):
            if count != "auto" and not (isinstance(count, int) and count >= 1):
                raise ValueError(f"strategy.{name}={count}: must be at least 1, or auto")
        object.__setattr__(self, "precision", SHORT.get(str(self.precision), self.precision))
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"strategy.precision={self.precision!r}: must be one of {', '.join(PRECISIONS)}; weights and "
                "statistics stay in float32"
            )
        if self.kind == "fsdp" and self.precision == "16-mixed":
            raise ValueError(
                "strategy.precision=16-mixed: fsdp scales no losses, which float16 needs: choose bf16-mixed or 32-true"
            )
        if self.kind == "single" and (self.devices, self.num_nodes) != (1, 1):
            raise ValueError("strategy.kind=single computes on one device: for more use strategy=ddp or strategy=fsdp")
        if not self.reshard_after_forward and self.kind != "fsdp":
            raise ValueError(f"strategy.reshard_after_forward is for kind=fsdp, and this one is {self.kind}")
        if self.tf32 and self.accelerator == "cpu":
            raise ValueError("strategy.tf32=true is for GPUs: leave it out with strategy=cpu")

    @property
    def on_gpu(self) -> bool:
        """Whether this strategy computes on a GPU of this machine.

        Raises:
            MissingGPUError: a GPU was requested and there is none.
        """
        import torch

        available = torch.cuda.is_available()
        if self.accelerator == "gpu" and not available:
            raise MissingGPUError(
                "strategy asks for a GPU and this machine has none that torch can use (where you typed no strategy the "
                "recipe set it, as experiment=yam_dinov3 does): choose strategy=cpu (or auto) on the command line, or "
                "check the driver with nvidia-smi"
            )
        return available and self.accelerator != "cpu"

    @property
    def processes(self) -> int:
        """Number of processes over all nodes."""
        return self._count_devices() * self._nodes()

    def trainer_arguments(self) -> dict[str, Any]:
        """Return arguments for ``lightning.Trainer``.

        Raises:
            ValueError: the requested GPU or number of devices is not available, or the number of processes differs from
                that of srun.
        """
        import torch

        refuse_task_named_as_a_shell()
        on_gpu = self.on_gpu
        devices = self._count_devices()
        gpus = torch.cuda.device_count()
        by_srun = tasks_of_srun() > 1 and "LOCAL_WORLD_SIZE" not in os.environ
        if by_srun:
            self._refuse_other_processes_than_of_srun()
        if "TORCHELASTIC_RUN_ID" in os.environ and started_together() != self.processes:
            raise ValueError(
                f"torchrun started {started_together()} processes, and strategy.kind={self.kind} with "
                f"devices={self.devices} on num_nodes={self.num_nodes} is {self.processes}: add strategy=ddp, or give "
                "torchrun --nproc-per-node=1"
            )
        if on_gpu and devices > gpus and by_srun:
            raise ValueError(
                f"srun shows each process {gpus} GPU{'' if gpus == 1 else 's'} of a node's {devices}: give "
                f"--gpus-per-node={devices} (not --gpus-per-task), or add --gpu-bind=none; or start fewer processes"
            )
        if on_gpu and devices > gpus:
            raise ValueError(f"strategy.devices={devices} but this machine has {gpus} GPUs: lower it")
        use_tf32(self.tf32, on_gpu, "strategy.tf32")
        precision = self.precision if self.precision != "auto" else automatic_precision(on_gpu)
        log.info(
            "computing on %s, %d process%s, precision %s",
            torch.cuda.get_device_name(0) if on_gpu else f"the CPU ({torch.get_num_threads()} threads)",
            self.processes,
            "" if self.processes == 1 else "es",
            precision,
        )
        return {
            "accelerator": "cuda" if on_gpu else "cpu",
            "devices": devices,
            "num_nodes": self._nodes(),
            "strategy": self._lightning_strategy(on_gpu),
            "precision": precision,
            "use_distributed_sampler": False,  # data modules divide their own batches: order and resume stay exact
        }

    def _lightning_strategy(self, on_gpu: bool) -> Any:
        if self.kind == "ddp":
            from lightning.pytorch.strategies import DDPStrategy

            return DDPStrategy(process_group_backend="nccl" if on_gpu else "gloo", gradient_as_bucket_view=True)
        if self.kind == "fsdp":
            from keygrip.training.sharding import ShardedStrategy

            backend = "nccl" if on_gpu else "gloo"
            return ShardedStrategy(backend, reshard_after_forward=self.reshard_after_forward)
        return "auto"

    def _refuse_other_processes_than_of_srun(self) -> None:
        """Raise ValueError if srun started other processes. Lightning also checks this, but after loading the data."""
        tasks, nodes = tasks_of_srun(), nodes_of_srun()
        started = f"srun started {tasks} processes on {nodes} node{'' if nodes == 1 else 's'}"
        if self.kind == "single":
            raise ValueError(f"{started}, and strategy.kind=single is one: add strategy=ddp, or give srun --ntasks=1")
        if tasks % nodes or len(set(tasks_of_nodes_of_srun())) > 1:
            raise ValueError(f"{started}, which are not equally many on each: give --ntasks-per-node")
        if (self._count_devices(), self._nodes()) != (tasks // nodes, nodes):
            raise ValueError(
                f"{started}, and strategy has devices={self._count_devices()} of each of num_nodes={self._nodes()}: "
                "leave both at auto"
            )

    def _count_devices(self) -> int:
        if self.devices != "auto":
            return int(self.devices)
        if os.environ.get("LOCAL_WORLD_SIZE", "").isdigit():
            return int(os.environ["LOCAL_WORLD_SIZE"])
        if tasks_of_srun() > 1:  # SLURM_NTASKS_PER_NODE may be that of the whole job, or missing
            return max(tasks_of_srun() // nodes_of_srun(), 1)
        # Without srun, or with a single srun task, Lightning starts the other processes: one for each GPU.
        if self.accelerator == "cpu" or not self.on_gpu:
            return 1
        import torch

        return torch.cuda.device_count()

    def _nodes(self) -> int:
        if self.num_nodes != "auto":
            return int(self.num_nodes)
        if "LOCAL_WORLD_SIZE" in os.environ and "WORLD_SIZE" in os.environ:
            return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
        return nodes_of_srun()


def use_tf32(wanted: bool, on_gpu: bool, setting: str = "tf32") -> None:
    """Compute float32 products of this process in TF32 or in full precision.

    Args:
        wanted: whether to use TF32. on_gpu: whether this process computes on a GPU. setting: its name, for messages.

    Raises:
        ValueError: TF32 without a GPU.
    """
    import torch

    if wanted and not on_gpu:
        raise ValueError(f"{setting}=true is for GPUs, and this process computes on the CPU: leave it out")
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    torch.backends.cudnn.allow_tf32 = wanted  # by default torch computes convolutions in TF32


def automatic_precision(on_gpu: bool) -> str:
    """Return bf16 autocast if the hardware is faster with bf16, else float32."""
    return "bf16-mixed" if is_faster_in_bf16("cuda" if on_gpu else "cpu") else "32-true"


def automatic_autocast(device: torch.device) -> torch.autocast:
    """Return the autocast context of `automatic_precision` for use without a trainer, when sampling images."""
    import torch

    half = automatic_precision(device.type == "cuda") == "bf16-mixed"
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def is_faster_in_bf16(device: str) -> bool:
    """Return whether a device type is faster with bf16 on this machine; True for types other than "cuda" and "cpu"."""
    if device == "cuda":
        import torch

        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device != "cpu" or cpu_is_faster_in_bf16()


def named_precision(accelerator: str | None, precision: str) -> str:
    """Return Lightning's current name for a precision that may be a short name, or "auto" for this machine."""
    if precision != "auto":
        return SHORT.get(str(precision), precision)
    import torch

    return automatic_precision(accelerator != "cpu" and torch.cuda.is_available())


def cpu_is_faster_in_bf16() -> bool:
    """Return whether bf16 products are faster than float32 products, from the processor's flags.

    With AMX, steps of an MLP took half as long as in float32 (`benchmarks/cpu_precision_amx.json`). With Intel's
    AVX512-BF16 without AMX, common in virtual machines, they took 1.4 times as long (`benchmarks/cpu_precision.json`).
    AMD's AVX512-BF16 and Arm's instructions are assumed to be faster; this was not measured.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False  # no such file on this system: use float32, which is always possible
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "").split()
    return "amx_bf16" in flags or "bf16" in flags or ("avx512_bf16" in flags and "GenuineIntel" not in text)
