"""Detect how this process was launched: by torchrun, by srun or sbatch (SLURM), by Lightning, or alone."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from datetime import datetime

log = logging.getLogger(__name__)


def is_first_process() -> bool:
    """Return whether this is the only process of its run, or the first one started by torchrun, SLURM or Lightning.

    Under srun, torchrun numbers the processes itself; its rendezvous determines the node of the first process.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ
    names = ("RANK",) if by_torchrun else ("LOCAL_RANK", "RANK", "SLURM_PROCID")
    return not any(int(os.environ.get(name) or 0) > 0 for name in names)


def started_together() -> int:
    """Return how many processes torchrun, srun or Lightning started for this run; 1 without them."""
    return int(os.environ.get("WORLD_SIZE") or tasks_of_srun())


def tasks_of_srun() -> int:
    """Return how many processes srun started for this run; 1 without srun, and in a shell that srun started."""
    return 1 if is_slurm_shell() else int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def nodes_of_srun() -> int:
    """Return on how many nodes srun started the processes of this run (the job may have more); 1 without srun."""
    names = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    told = [os.environ[name] for name in names if os.environ.get(name, "").isdigit()]
    return int(told[0]) if told and tasks_of_srun() > 1 else 1


def tasks_of_nodes_of_srun() -> list[int]:
    """Return how many processes srun started on each node of this run's step; empty if SLURM does not report it.

    Raises:
        ValueError: SLURM reports it in an unknown format.
    """
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts: list[int] = []
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(
                f"SLURM_STEP_TASKS_PER_NODE={text!r} is no list of numbers of tasks, as '8(x2)' or '3,1': unset it, if "
                "srun has not set it"
            )
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    return counts


def set_rendezvous_of_step() -> None:
    """Set MASTER_ADDR and MASTER_PORT, unless they are set, to the first node of the srun step and to a port of this
    step, 15000 to 24999, as the rendezvous of the step's processes.

    Lightning would use those of the job, but the job's first node may have no process of this step, and simultaneous
    steps would connect to each other. The port of a job's first step is that of Lightning. The ports of later steps,
    and of steps of jobs with similar ids, are far from it. If SLURM does not report a value, Lightning chooses it.
    """
    from lightning.fabric.plugins.environments import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if nodes:
        os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    job, step = (os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    if job.isdigit() and step.isdigit():
        os.environ.setdefault("MASTER_PORT", str(15_000 + (int(job) + 3_819 * int(step)) % 10_000))


def refuse_task_named_as_a_shell() -> None:
    """Raise ValueError if this is one of several tasks of a step whose job name denotes an interactive shell.

    `salloc` gives its jobs such a name. In a shell with several tasks (`srun -n4 --pty bash`) the user types in task 0.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if not is_slurm_shell() or tasks == 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    name, rank = os.environ["SLURM_JOB_NAME"], int(os.environ.get("SLURM_PROCID") or 0)
    remedy = "salloc --job-name=train, or srun ... env SLURM_JOB_NAME=train python -m keygrip.train ..."
    if rank:
        raise ValueError(
            f"srun started {tasks} tasks, of which this is number {rank}, in a job named {name!r}, by which commands "
            f"are taken for ones that are typed in a shell, each alone: {remedy}"
        )
    log.warning("as the job is named %r, this process is taken to be alone of %d tasks: else %s", name, tasks, remedy)


def refuse_several_processes(command: str) -> None:
    """Raise ValueError if several processes were started for a command whose work they do not divide."""
    count = started_together()
    if count == 1:
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        remedy = "start it without torchrun"
    elif os.environ.get("WORLD_SIZE"):
        remedy = f"unset WORLD_SIZE, which is {count} here"
    else:
        remedy = "srun --ntasks=1 for each command (with settings of its own, also several at once)"
    raise ValueError(
        f"{command} is one process, and {count} were started together, each of which would do all its work: {remedy}"
    )


def name_of_start() -> str:
    """Return a name that is the same for all processes of this start by torchrun or srun, and different for other
    starts; empty without a launcher, or if the launcher provides no such name."""
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if started_together() == 1 or not (by_torchrun or tasks_of_srun() > 1):  # by hand: the usual port is no name
        return ""
    # the processes of an srun step may set MASTER_PORT themselves, each at its own time
    names = ["TORCHELASTIC_RUN_ID", "MASTER_PORT"] if by_torchrun else []
    names += ["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"]
    parts = [os.environ.get(name, "") for name in names]
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun on one machine is the parent of all processes
        parts.append(str(os.getppid()))
    elif os.environ.get("TORCHELASTIC_RUN_ID") == "none":  # several machines with the default id and port: not unique
        return ""
    return ":".join(parts)


def id_of_start() -> str:
    """Return a text that all processes of this start have in common and other starts do not. Exception: where the
    launcher provides no such name (torchrun with its default id on several machines), each process has its own."""
    if is_helper_process():
        return f"process {os.getppid()}"
    by_launcher = "TORCHELASTIC_RUN_ID" in os.environ or tasks_of_srun() > 1
    return (name_of_start() if by_launcher else "") or f"process {os.getpid()}"


def is_helper_process() -> bool:
    """Return whether Lightning started this process from the user's process. False for torchrun, and for srun, which
    gives both variables the same value; a SLURM shell or batch script may have exported its own values."""
    local = os.environ.get("LOCAL_RANK", "0")
    return local not in ("0", os.environ.get("SLURM_LOCALID")) and "TORCHELASTIC_RUN_ID" not in os.environ


def is_slurm_shell() -> bool:
    """Return whether a user types commands in an interactive SLURM job, by the job names that Lightning also checks:
    such a command is not part of the job's step."""
    return os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")


def scheduler_job() -> str:
    """Return a name of the SLURM job that started this process, else of its start by torchrun. It stays the same when
    the job is restarted, and other jobs have other names. Empty without either, and for torchrun on several machines.

    SLURM's id has precedence, since torchrun is started anew for a job that is queued again. torchrun's run id alone
    is not suitable: it may be a constant of the command, or "none". On one machine torchrun's process identifies the
    start; on several, each has its own.
    """
    job = "" if is_slurm_shell() else os.environ.get("SLURM_JOB_ID", "")
    if job or "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return job
    return f"of torchrun, process {os.getppid()}, started {parent_start_time()}"


def parent_start_time() -> str:
    """Return the start time of the parent process, which torchrun gives all processes of a machine in common."""
    import psutil

    started = psutil.Process(os.getppid()).create_time()
    return datetime.fromtimestamp(started).strftime("%Y-%m-%d_%H-%M-%S")


def restarted_by_scheduler() -> bool:
    """Return whether torchrun or SLURM restarted this run, after a failure or a requeue."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def requeue_job() -> None:
    """Ask SLURM to queue this job again. Does nothing outside SLURM; a refusal is logged."""
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
