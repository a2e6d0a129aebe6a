"""How this process was launched: by torchrun, by srun or sbatch (SLURM), by Lightning, or alone."""

from __future__ import annotations

import logging
import os
import re
import subprocess

log = logging.getLogger(__name__)


def is_first_process() -> bool:
    """Whether this is the only process of its run, or the first of those that torchrun, SLURM or Lightning started.

    Under srun torchrun numbers the processes by itself: which node has the first one its rendezvous decides.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ
    names = ("RANK",) if by_torchrun else ("LOCAL_RANK", "RANK", "SLURM_PROCID")
    return not any(int(os.environ.get(name) or 0) > 0 for name in names)


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


def tasks_of_nodes_of_srun() -> list[int]:
    """How many processes srun started on each node of this run's step; empty where SLURM does not say it.

    Raises:
        ValueError: SLURM says it in a form that is not known.
    """
    told = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts: list[int] = []
    for part in told.split(",") if told else []:
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(
                f"SLURM_STEP_TASKS_PER_NODE={told!r} is no list of numbers of tasks, as '8(x2)' or '3,1': unset it, if "
                "srun has not set it"
            )
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    return counts


def meet_within_step() -> None:
    """Has the processes of a step of srun meet at the step's own first node and port, 15000 to 24999, in MASTER_ADDR
    and MASTER_PORT, unless these are set.

    Lightning takes the job's: on its first node no process of this step may run, and steps side by side would meet each
    other. The port of a job's first step is the one that Lightning takes; those of later steps, and of steps of jobs
    with near numbers, lie far from it. What SLURM does not say is left to Lightning.
    """
    from lightning.fabric.plugins.environments import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if nodes:
        os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    job, step = (os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    if job.isdigit() and step.isdigit():
        os.environ.setdefault("MASTER_PORT", str(15_000 + (int(job) + 3_819 * int(step)) % 10_000))


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
