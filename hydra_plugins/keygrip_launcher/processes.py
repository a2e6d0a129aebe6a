"""``hydra/launcher=processes``: run jobs as separate commands, a few at a time; each job may use several devices."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from keygrip.training.run_folder import resume_setting
from keygrip.training.sweep_jobs import JOB_NUMBER
from keygrip.training.sweeps import earlier_run, forget_result, record_finished

log = logging.getLogger(__name__)

FORWARDED = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp")
OF_THE_SWEEP = ("hydra.mode", "hydra.run", "hydra.sweep", "hydra.launcher", JOB_NUMBER, "hydra.job.id")


@dataclass
class _Job:
    number: int
    overrides: list[str]
    folder: Path
    finished: bool = False
    gpus: list[str] = field(default_factory=list)
    started: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    output: IO[bytes] | None = None


class ProcessLauncher(Launcher):
    """Runs every job as ``python -m <this command> <its overrides>``. The output of a job goes to ``output.log`` in the
    folder of the job.

    A job that fails or dies does not stop the others. Ctrl-C and SIGTERM are forwarded to all jobs, so that every job
    saves. When a sweep is continued, finished jobs are not run again, and the other jobs resume from their checkpoints.

    Args:
        jobs_at_once: number of jobs that run at the same time.
        gpus_per_job: number of GPUs assigned to each job (``CUDA_VISIBLE_DEVICES``), out of the GPUs visible to the
            command; 0: every job sees all of them.
    """

    def __init__(self, jobs_at_once: int = 1, gpus_per_job: int = 0) -> None:
        if jobs_at_once < 1 or gpus_per_job < 0:
            raise ValueError("hydra.launcher: jobs_at_once must be at least 1 and gpus_per_job not negative")
        self.jobs_at_once = jobs_at_once
        self.gpus_per_job = gpus_per_job
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.hydra_context = hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        assert self.config is not None
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        jobs = [self._job(initial_job_idx + i, list(overrides)) for i, overrides in enumerate(job_overrides)]
        waiting = [job for job in jobs if not job.finished]
        free = self._shares(min(self.jobs_at_once, len(waiting)))
        running: list[_Job] = []
        returns = {job.number: _returned(job) for job in jobs if job.finished}
        if returns:
            log.info("finished before, not run again: job %s", ", ".join(map(str, returns)))
        total = len(jobs)
        log.info("%d jobs, %d at a time; each writes output.log in its folder", total, self.jobs_at_once)
        try:
            while waiting or running:
                while waiting and free:
                    running.append(self._start(waiting.pop(0), free.pop(0)))
                time.sleep(0.05)
                for job in [job for job in running if job.process and job.process.poll() is not None]:
                    running.remove(job)
                    free.append(job.gpus)
                    returns[job.number] = self._ended(job)
                    log.info("%d of %d jobs done", len(returns), total)
        except BaseException as stop:
            number = getattr(stop, "signal_number", signal.SIGINT)
            for job in running:
                assert job.process is not None
                job.process.send_signal(number)
            for job in running:
                assert job.process is not None
                job.process.wait()
            raise
        return [returns[number] for number in sorted(returns)]

    def _shares(self, at_once: int) -> list[list[str]]:
        """Return the GPUs of each of ``at_once`` simultaneous jobs, with the names from this process's
        ``CUDA_VISIBLE_DEVICES`` if it is set.

        Raises:
            ValueError: there are fewer GPUs.
        """
        if not self.gpus_per_job or not at_once:
            return [[] for _ in range(at_once)]
        import torch  # takes seconds, and Hydra imports this file for every command

        count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
        names = [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(count)]
        if at_once * self.gpus_per_job > count:
            devices_note = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible}"
            raise ValueError(
                f"hydra.launcher: {at_once} jobs at once with gpus_per_job={self.gpus_per_job}, and {count} GPUs are "
                f"seen{devices_note}: lower jobs_at_once or gpus_per_job"
            )
        return [names[s * self.gpus_per_job : (s + 1) * self.gpus_per_job] for s in range(at_once)]

    def _job(self, number: int, overrides: list[str]) -> _Job:
        assert self.hydra_context is not None
        assert self.config is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        folder = Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir
        finished, resume = earlier_run(config, folder, overrides)
        if "resume" in config and resume_setting(config.resume) != resume:
            overrides = [*overrides, f"resume={str(resume).lower()}"]
        return _Job(number, overrides, folder, finished)

    def _start(self, job: _Job, gpus: list[str]) -> _Job:
        job.gpus, job.started = gpus, time.perf_counter()
        job.folder.mkdir(parents=True, exist_ok=True)
        assert self.config is not None
        forget_result(self.config, job.folder)
        environment = dict(os.environ)
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        fixed = [f'hydra.run.dir="{job.folder}"', "hydra.mode=RUN", f"{JOB_NUMBER}={job.number}"]
        command = [*_this_command(), *_forwarded(sys.argv[1:]), *job.overrides, *fixed]
        job.output = (job.folder / "output.log").open("ab")
        # A separate session: Ctrl-C reaches a job once, from this process, and not a second time from the terminal.
        job.process = subprocess.Popen(
            command, env=environment, stdout=job.output, stderr=subprocess.STDOUT, start_new_session=True
        )
        log.info("job %d: %s", job.number, " ".join(filter_overrides(job.overrides)))
        return job

    def _ended(self, job: _Job) -> JobReturn:
        assert job.process is not None
        assert job.output is not None
        job.output.close()
        code = job.process.returncode
        if code:
            outcome = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            log.error("job %d ended with %s: see %s", job.number, outcome, job.folder / "output.log")
        else:
            record_finished(job.folder, job.overrides, None, time.perf_counter() - job.started)
        return _returned(job)


def _returned(job: _Job) -> JobReturn:
    # The outcome of a job is in its result.json. Hydra receives COMPLETED for every job, so that none stops the others.
    return JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED, working_dir=str(job.folder))


def _this_command() -> list[str]:
    import __main__

    spec = getattr(__main__, "__spec__", None)
    return [sys.executable, "-m", spec.name] if spec is not None else [sys.executable, str(Path(sys.argv[0]).resolve())]


def _forwarded(arguments: Sequence[str]) -> list[str]:
    """Return the arguments that Hydra does not pass on to jobs: flags for the location of configs, and `hydra.`
    settings except those of the sweep itself."""
    forwarded = []
    for position, argument in enumerate(arguments):
        setting = argument.lstrip("+~").replace("/", ".")
        if argument.split("=")[0] in FORWARDED:
            forwarded.append(argument)
            if "=" not in argument and position + 1 < len(arguments):
                forwarded.append(arguments[position + 1])
        elif setting.startswith("hydra.") and not setting.startswith(OF_THE_SWEEP):
            forwarded.append(argument)
    return forwarded
