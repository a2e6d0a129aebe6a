"""The jobs of a sweep as processes: which one this is, and by whom its processes must be started."""

from __future__ import annotations

import sys

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from keygrip.launch import started_together

JOB_NUMBER = "hydra.job.num"  # the setting by which ``hydra/launcher=processes`` numbers its jobs


def in_sweep() -> bool:
    """Return whether this command is a job of a sweep, of any launcher."""
    return HydraConfig.initialized() and not OmegaConf.is_missing(HydraConfig.get().job, "num")


def is_launcher_process() -> bool:
    """Return whether ``hydra/launcher=processes`` started this command as a job of a sweep: by its arguments, which are
    known before Hydra has begun and after it has ended."""
    return any(argument.startswith(f"{JOB_NUMBER}=") for argument in sys.argv[1:])


def refuse_several_processes() -> None:
    """Raise ValueError if torchrun or srun started several processes: each would start the whole sweep."""
    if (count := started_together()) > 1:
        raise ValueError(
            f"a sweep starts the processes of its jobs itself, and {count} processes were started together for this "
            "command: start it without torchrun or srun, with hydra/launcher=processes or hydra/launcher=slurm"
        )


def refuse_several_devices(cfg: DictConfig, launcher: str) -> None:
    """Reject a job on several devices whose launcher started a single process. Lightning would start the other
    processes with the command of this process, which in a sweep is that of the whole sweep or of the launcher.

    Raises:
        ValueError: the job uses more than one device, and its launcher started one process for it.
    """
    in_one_process = launcher.endswith(("BasicLauncher", "JoblibLauncher"))
    if (not in_one_process and started_together() > 1) or cfg.get("strategy") is None:
        return
    processes = instantiate(cfg.strategy).processes
    if processes > 1 and launcher.endswith("SlurmLauncher"):
        raise ValueError(
            f"this job uses {processes} devices and SLURM started one process for it: add "
            f"hydra.launcher.tasks_per_node={processes} (divided by hydra.launcher.nodes, where those are several)"
        )
    if processes > 1:
        raise ValueError(
            "a sweep job that uses several devices must be a process of its own: add hydra/launcher=processes (or, on "
            f"a cluster, hydra/launcher=slurm hydra.launcher.tasks_per_node={processes})"
        )
