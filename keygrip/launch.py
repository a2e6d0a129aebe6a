"""How this process was launched: by torchrun, by srun or sbatch (SLURM), by Lightning, or alone."""

from __future__ import annotations

import logging
import os
import subprocess

log = logging.getLogger(__name__)


def is_first_process() -> bool:
    """Whether this is the only process of its run, or the first of those that torchrun, SLURM or Lightning started."""
    return not any(int(os.environ.get(name) or 0) > 0 for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))


def started_together() -> int:
    """How many processes torchrun, srun or Lightning started for this run; 1 without them."""
    return int(os.environ.get("WORLD_SIZE") or tasks_of_srun())


def tasks_of_srun() -> int:
    """How many processes srun started for this run; 1 without it, and in a shell that srun started."""
    return 1 if in_a_shell_of_slurm() else int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def nodes_of_srun() -> int:
    """On how many nodes srun started the processes of this run, which may be fewer than its job has; 1 without it."""
    names = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    told = [os.environ[name] for name in names if os.environ.get(name, "").isdigit()]
    return int(told[0]) if told and tasks_of_srun() > 1 else 1


def refuse_task_named_as_a_shell() -> None:
    """Raises ValueError: this is one of several tasks of a step, and the job's name says that a user types in a shell.

    `salloc` calls its jobs so. In a shell of several tasks (`srun -n4 --pty bash`) a user types in the first.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if not in_a_shell_of_slurm() or tasks == 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    name, number = os.environ["SLURM_JOB_NAME"], int(os.environ.get("SLURM_PROCID") or 0)
    remedy = "salloc --job-name=train, or srun ... env SLURM_JOB_NAME=train python -m keygrip.train ..."
    if number:
        raise ValueError(
            f"srun started {tasks} tasks, of which this is number {number}, in a job named {name!r}, by which commands "
            f"are taken for ones that are typed in a shell, each alone: {remedy}"
        )
    log.warning("as the job is named %r, this process is taken to be alone of %d tasks: else %s", name, tasks, remedy)


def name_of_start() -> str:
    """What all processes that torchrun or srun started for this run have in common, and those of another start have
    not; empty without them, and where the launcher gives no such name."""
    if started_together() == 1:
        return ""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    told = [os.environ.get(name, "") for name in names]
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun on one machine: it is the parent of all
        told.append(str(os.getppid()))
    elif os.environ.get("TORCHELASTIC_RUN_ID") == "none":  # on several, by its usual name and port: as all others
        return ""
    return ":".join(told)


def is_helper_process() -> bool:
    """Whether Lightning started this process from the one that the user started. Not so where torchrun did, or srun,
    which gives both variables the same number; a shell or a batch script of SLURM may have passed on its own."""
    local = os.environ.get("LOCAL_RANK", "0")
    return local not in ("0", os.environ.get("SLURM_LOCALID")) and "TORCHELASTIC_RUN_ID" not in os.environ


def in_a_shell_of_slurm() -> bool:
    """Whether a user types commands in an interactive job of SLURM, by the names that Lightning looks for: such a
    command is no part of the job's step."""
    return os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")


def restarted_by_scheduler() -> bool:
    """Whether torchrun or SLURM started this run again, after a failure or a requeue."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def queue_again() -> None:
    """Asks SLURM to queue this job again; does nothing outside of SLURM, and logs a refusal."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ and "SLURM_ARRAY_TASK_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        failure = "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"
    except OSError as error:
        failure = str(error)
    if failure:
        log.warning("SLURM did not queue job %s again: %s", job, failure)
    else:
        log.info("SLURM queues job %s again", job)
