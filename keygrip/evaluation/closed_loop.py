"""Closed-loop evaluation: a trained policy drives a robot in an environment over held-out seeds.

Episodes are distributed over processes. On the CPU each process loads the checkpoint; on a GPU, or with `python`, this
process holds the only copy, and the others request plans from it. An episode depends only on (checkpoint, task, seed,
control) and the device, so the number of processes does not change the result.
"""

from __future__ import annotations

import atexit
import logging
import math
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keygrip.artifacts import json_text, write_text
from keygrip.cores import usable_cores
from keygrip.envs.environment import Environment, Task, open_environment
from keygrip.evaluation.kinds import changed
from keygrip.evaluation.remote_rollouts import RemoteSettings, check_remote, run_remote, served, server_classes
from keygrip.evaluation.rollout_worker import policy_at
from keygrip.evaluation.rollouts import EpisodeResult, check_environment, run_episode
from keygrip.evaluation.statistics import wilson_interval
from keygrip.evaluation.trained_policy import advise_on_memory, load_policy
from keygrip.models.policy import Needs
from keygrip.progress import Progress
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.runtime.client import ServerError
from keygrip.training.signals import ignore_terminal_signals
from keygrip.training.task_metrics import MOST_TASKS
from keygrip.training.torch_files import refuse_missing_device

log = logging.getLogger(__name__)

EPISODES_FILE = "episodes.jsonl"
# Seeds from this one on are never used for recording, training or choosing settings (those start at 500000).
HELD_OUT_SEED = 1_000_000
HEIGHT_STEP_CM = 2  # height step of the breakdown by height
NO_INSTRUCTION = "no instruction"  # name of the episodes without one in the breakdown by instruction
DIED = (  # possible causes of the end of a process
    "died (out of memory, no working GL library, or a script without an `if __name__ == '__main__'` guard?)"
)


@dataclass(frozen=True)
class ConditionResult:
    """All episodes under one condition."""

    name: str
    overrides: dict[str, Any]
    episodes: list[EpisodeResult] = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Return the figures of the condition: success rate with its 95 % Wilson interval, failure counts, times.

        If the object's colour or height varies, `by_colour` and `by_height` hold the rates of each value; if there are
        2 to 200 instructions, `by_instruction` those of each. If plans were followed by their joints, `joint_plans` is
        the fraction of such plans. For a policy that clamps its plans to the positions seen in training, see `clamped`.
        """
        yaw = [episode.yaw_error_deg for episode in self.episodes if episode.yaw_error_deg is not None]
        kinds: dict[str, Any] = {}
        if len({episode.colour for episode in self.episodes}) > 1:
            kinds["by_colour"] = _rates_by_kind(self.episodes, lambda episode: episode.colour)
        if len({episode.height_cm for episode in self.episodes}) > 1:
            kinds["by_height"] = _rates_by_kind(self.episodes, lambda episode: _height_range(episode.height_cm))
        if 2 <= len({episode.instruction for episode in self.episodes}) <= MOST_TASKS:
            kinds["by_instruction"] = _rates_by_kind(
                self.episodes, lambda episode: episode.instruction or NO_INSTRUCTION
            )
        if joint_plans := sum(episode.joint_plans for episode in self.episodes):
            kinds["joint_plans"] = joint_plans / sum(episode.plans for episode in self.episodes)
        return success_rates(self.episodes) | {
            "failures": dict(Counter(episode.failure for episode in self.episodes if episode.failure)),
            "episode_s_median": float(np.median([episode.seconds for episode in self.episodes])),
            "plan_ms_median": float(np.median([episode.plan_ms for episode in self.episodes])),
            "grip_yaw_error_deg_median": float(np.median(yaw)) if yaw else None,
            **clamped(self.episodes),
            **kinds,
        }


def success_rates(episodes: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Return the success rate with its 95 % Wilson interval, and the counts."""
    won = sum(episode.success for episode in episodes)
    low, high = wilson_interval(won, len(episodes))
    rates = {"success_rate": won / len(episodes), "success_low": low, "success_high": high}
    return rates | {"episodes": len(episodes), "successes": won}


def clamped(episodes: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Return `clamped_plans`: how many of the `plans` were clamped to the positions seen in training;
    `clamped_episodes`: how many episodes had such a plan; `clamped_most_m`: the largest distance along an axis. Empty
    for a policy without clamping."""
    counts = [episode.clamped_plans for episode in episodes if episode.clamped_plans is not None]
    if not counts:
        return {}
    return {
        "plans": sum(episode.plans for episode in episodes),
        "clamped_plans": sum(counts),
        "clamped_episodes": sum(count > 0 for count in counts),
        "clamped_most_m": max(episode.clamped_most_m or 0.0 for episode in episodes),
    }


def _rates_by_kind(
    episodes: Sequence[EpisodeResult], kind: Callable[[EpisodeResult], str]
) -> dict[str, dict[str, Any]]:
    """Return the rates of each kind of episode, by its name."""
    groups: dict[str, list[EpisodeResult]] = {}
    for episode in episodes:
        groups.setdefault(kind(episode), []).append(episode)
    return {name: success_rates(groups[name]) for name in sorted(groups)}


def _height_range(height_cm: float) -> str:
    low = int(height_cm // HEIGHT_STEP_CM) * HEIGHT_STEP_CM
    return f"{low}-{low + HEIGHT_STEP_CM} cm"


@dataclass(frozen=True)
class ClosedLoop:
    """What to evaluate in an environment.

    Args:
        task: the task, usually as in the recordings; its class determines the environment.
        conditions: name -> list of option overrides; a name with several entries is a grid whose episodes are pooled;
            None removes a condition that another config has set.
        episodes: per condition (distributed over its grid; if there are fewer than entries, the last entries are left
            out with a warning).
        first_seed: episodes use first_seed, first_seed + 1, ...
        image_size: side of the rendered image, as recorded. hz: control periods per second.
        cameras: inputs of the policy, the main one first; None: the task's own camera.
        control: the controller with its settings, without policy and rate (a partial call in the configs).
        processes: None uses one per core.
        videos: number of episodes recorded as videos, per condition.
        policy: changes to the model's own policy, by the names of its fields.
        trust: packages besides keygrip whose parts the checkpoint may name.
        external: files that the model needs and the checkpoint does not hold, by dotted setting.
        python: interpreter of another Python environment with the simulator: episodes run there, the policy here.
            None: both run in this one.
        of_tasks: the conditions are the tasks of a benchmark, and their mean is reported too.
        device: where the policy plans; None: the CPU.

    Raises:
        ValueError: A setting is out of range, or this machine does not have the device.
    """

    task: Task
    conditions: Mapping[str, Sequence[Mapping[str, Any]] | None]
    episodes: int = 100
    first_seed: int = HELD_OUT_SEED
    image_size: int = 224
    hz: float = 10.0
    control: Callable[..., RecedingHorizon] = RecedingHorizon
    processes: int | None = None
    videos: int = 2
    cameras: Sequence[str] | None = None
    policy: Mapping[str, Any] = field(default_factory=dict)
    trust: Sequence[str] = ()
    external: Mapping[str, Any] = field(default_factory=dict)
    python: str | None = None
    of_tasks: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"closed_loop.episodes is at least 1, got {self.episodes}.")
        if self.first_seed < 0:
            raise ValueError(f"closed_loop.first_seed is at least 0, got {self.first_seed}.")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"closed_loop.processes is at least 1 (null: one for each core), got {self.processes}.")
        if self.videos < 0 or self.image_size < 1 or not 0 < self.hz < math.inf:
            raise ValueError(
                f"closed_loop.videos is at least 0, image_size at least 1 and hz above 0, got {self.videos}, "
                f"{self.image_size} and {self.hz}."
            )
        refuse_missing_device(self.device or "cpu")
        self.control(policy=None, control_hz=self.hz)  # refuses invalid settings now, not in a worker
        if not self.grids:
            raise ValueError("closed_loop.conditions is empty: name at least one, e.g. {in_distribution: [{}]}.")
        for name, grid in self.grids.items():
            if not grid:
                raise ValueError(f"closed_loop.conditions.{name} is an empty list: [{{}}] is the task as it is.")
            for overrides in grid:
                changed(self.task, overrides)

    @property
    def grids(self) -> dict[str, Sequence[Mapping[str, Any]]]:
        """The conditions that are not switched off."""
        return {name: grid for name, grid in self.conditions.items() if grid is not None}

    def check(self, needs: Needs | None) -> None:
        """Open the environment of the first episode and check its observation, in a separate process, because rendering
        would leave a GL context in this process, which the processes of data loaders must not inherit.

        Args:
            needs: inputs of the policy; None: unknown.

        Raises:
            ValueError: The environment cannot be opened, or does not provide the policy's inputs.
            ModuleNotFoundError: as `refuse_missing_packages`.
        """
        self.refuse_missing_packages()
        jobs = self._jobs(None)
        job, task = jobs[0], changed(self.task, jobs[0].overrides)
        if self.python is not None:
            check_remote(self._remote_settings(), task, job.seed, needs)
            return
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            cameras = None if self.cameras is None else tuple(self.cameras)
            follow = self.control(policy=None, control_hz=self.hz).follow
            future = pool.submit(check_environment, task, self.image_size, self.hz, cameras, job.seed, needs, follow)
            try:
                future.result()
            except BrokenProcessPool as error:
                raise ValueError(f"the process that opens {type(task).__name__} {DIED}") from error

    def refuse_missing_packages(self) -> None:
        """Raise ModuleNotFoundError if the policy is served to other processes and a package for it is missing."""
        if self.python is not None:
            server_classes()
        elif not self._on_cpu and self._count_processes(self._jobs(None)) > 1:
            server_classes(
                "; or give processes=1 (in training callbacks.closed_loop.closed_loop.processes=1), which plans on "
                f"device={self.device} without a server"
            )

    def run(self, checkpoint: Path, output: Path | None = None) -> list[ConditionResult]:
        """Run every episode with the policy in ``checkpoint``. Videos are written to ``output`` / videos, and each
        episode's result to ``output`` / episodes.jsonl as soon as it has ended. If a process dies, its episode is run
        again.

        Raises:
            FileNotFoundError, ValueError: The checkpoint cannot be loaded, a process died twice at an episode, or the
                GPU's memory does not suffice.
        """
        for name, grid in self.grids.items():
            if len(grid) > self.episodes:
                log.warning(
                    "closed_loop.episodes=%d: %d of the %d entries of condition %s are left out",
                    self.episodes,
                    len(grid) - self.episodes,
                    len(grid),
                    name,
                )
        jobs = self._jobs(output)
        processes = self._count_processes(jobs)
        file = None if output is None else output / EPISODES_FILE
        with _Results(self.grids, len(jobs), file) as results, advise_on_memory(self.device):
            if self.python is not None:
                self._run_remotely(checkpoint, jobs, processes, results)
            elif processes == 1:
                worker = _Worker(checkpoint, self)
                try:
                    for job in jobs:
                        results.add(job, worker.episode(job))
                finally:
                    worker.close()
            elif self._on_cpu:
                self._run_parallel(checkpoint, jobs, processes, results)
            else:
                self._run_served(checkpoint, jobs, processes, results)
        ordered = {name: sorted(found, key=lambda episode: episode.seed) for name, found in results.episodes.items()}
        return [
            ConditionResult(name, {"grid": [dict(entry) for entry in self.grids[name][: self.episodes]]}, episodes)
            for name, episodes in ordered.items()
        ]

    def _run_served(self, checkpoint: Path, jobs: list[_Job], processes: int, results: _Results) -> None:
        """Run the jobs in several processes, for which one policy plans in this process.

        Raises:
            ValueError: as `_run_parallel`; also if the policy fails.
        """
        log.info("closed loop: one policy on %s plans for %d processes", self.device, processes)
        # After a death, at which up to `processes` episodes ran, these are run alone, where each may have one more.
        restarts = 3 * len(jobs)
        with served(self.policy_in(checkpoint), processes, restarts) as url:
            try:
                self._run_parallel(_Server(url, processes), jobs, processes, results)
            except (ServerError, ConnectionError) as error:
                raise ValueError(f"closed loop with device={self.device}: {error}") from error

    def _run_parallel(self, source: Path | _Server, jobs: list[_Job], processes: int, results: _Results) -> None:
        """Run the jobs in several processes; if one dies, run those left again in new ones.

        Raises:
            ValueError: as `_run_one_by_one`.
        """
        remaining = jobs
        while remaining:
            try:
                self._run_in_pool(source, remaining, processes, results)
                return
            except BrokenProcessPool:
                remaining = [job for job in jobs if job not in results.done]
            running, remaining = remaining[:processes], remaining[processes:]  # jobs are begun in their order
            log.warning(
                "a process of the closed-loop evaluation %s; which one is not known: the %d episodes that ran then are "
                "run again, one after another",
                *(DIED, len(running)),
            )
            self._run_one_by_one(source, running, results)

    def _run_one_by_one(self, source: Path | _Server, jobs: list[_Job], results: _Results) -> None:
        """Run the jobs in one process; one at which it dies is repeated once. Raises ValueError if it dies again."""
        died = None
        while jobs:
            try:
                self._run_in_pool(source, jobs, 1, results)
                return
            except BrokenProcessPool as error:
                jobs = [job for job in jobs if job not in results.done]
                if jobs[0] == died:
                    raise ValueError(
                        f"a process of the closed-loop evaluation {DIED}, twice at an episode (condition "
                        f"{died.condition}, seed {died.seed}): run with processes=1 (in training "
                        "callbacks.closed_loop.closed_loop.processes=1) to see why"
                    ) from error
                died = jobs[0]
                log.warning("a process died at seed %d of %s, which is run again", died.seed, died.condition)

    def _run_in_pool(self, source: Path | _Server, jobs: list[_Job], processes: int, results: _Results) -> None:
        # Spawned, not forked: a GL context and torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        earlier_processes = multiprocessing.active_children()
        with ProcessPoolExecutor(processes, context, _start_worker, (source, self)) as pool:
            with ignore_terminal_signals():  # this process ends them, so that each does not print a traceback
                waiting: dict[Future[EpisodeResult], _Job] = {pool.submit(_work, job): job for job in jobs}
            try:
                for future in as_completed(waiting):
                    results.add(waiting[future], future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():  # their results are no longer needed
                    if process not in earlier_processes:
                        process.terminate()
                raise

    def _run_remotely(self, checkpoint: Path, jobs: list[_Job], processes: int, results: _Results) -> None:
        settings = self._remote_settings()
        episodes = [(changed(self.task, job.overrides), job.seed, job.video) for job in jobs]
        for number, result in run_remote(self.policy_in(checkpoint), settings, episodes, processes):
            results.add(jobs[number], result)

    def _remote_settings(self) -> RemoteSettings:
        kind = type(self.task)
        name = f"{kind.__module__}.{kind.__qualname__}"
        return RemoteSettings(str(self.python), name, self.image_size, self.hz, self.cameras, self.control)

    def policy_in(self, checkpoint: Path) -> Any:
        """Load the policy of a checkpoint on the device, with the changes in the settings.

        Raises:
            FileNotFoundError, ValueError: as in `load_policy`; also if it does not fit into the GPU's memory.
        """
        if not self._on_cpu:
            torch.cuda.empty_cache()  # what training or the open loop no longer uses; without effect without a GPU
        with advise_on_memory(self.device):
            return load_policy(checkpoint, self.policy, self.device or "cpu", self.trust, self.external)

    @property
    def _on_cpu(self) -> bool:
        return torch.device(self.device or "cpu").type == "cpu"

    def _count_processes(self, jobs: Sequence[_Job]) -> int:
        return min(self.processes or usable_cores(), len(jobs))

    def _jobs(self, output: Path | None) -> list[_Job]:
        jobs = []
        for name, grid in self.grids.items():
            for index in sorted(range(self.episodes), key=lambda index: index % len(grid)):
                seed = self.first_seed + index
                video = None
                if output is not None and index < self.videos:
                    video = output / "videos" / f"{name}-{seed}.mp4"
                jobs.append(_Job(name, dict(grid[index % len(grid)]), seed, video))
        # Each task with other options needs its own scene; sorting by it avoids building scenes repeatedly.
        return sorted(jobs, key=lambda job: (job.video is None, job.condition))


def summarise(results: Sequence[ConditionResult]) -> dict[str, Any]:
    """``{condition: figures}``."""
    return {result.name: result.summary() for result in results}


# -- inside a process
# ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    condition: str
    overrides: dict[str, Any]
    seed: int
    video: Path | None


@dataclass(frozen=True)
class _Server:
    """Where another process serves the policy, and for how many."""

    url: str
    processes: int


class _Worker:
    """A policy, loaded here or served by another process, and the environment of its last episode."""

    def __init__(self, source: Path | _Server, settings: ClosedLoop) -> None:
        if isinstance(source, _Server):
            self.policy: Any = policy_at(source.url, source.processes)
        else:
            self.policy = settings.policy_in(source)
        self.settings = settings
        self._environment: tuple[tuple[tuple[str, Any], ...], Environment] | None = None

    def environment(self, overrides: dict[str, Any]) -> Environment:
        key = tuple(sorted(overrides.items()))
        if self._environment is None or self._environment[0] != key:
            self.close()
            task = changed(self.settings.task, overrides)
            cameras = None if self.settings.cameras is None else tuple(self.settings.cameras)
            self._environment = (key, open_environment(task, self.settings.image_size, self.settings.hz, cameras))
        return self._environment[1]

    def episode(self, job: _Job) -> EpisodeResult:
        environment = self.environment(job.overrides)
        return run_episode(environment, self.policy, self.settings.control, job.seed, job.video)

    def close(self) -> None:
        """Close the environment of the last episode, if there is one."""
        opened, self._environment = self._environment, None
        if opened is not None:
            opened[1].close()


_worker: _Worker | None = None
_closes_at_exit = False


def _start_worker(source: Path | _Server, settings: ClosedLoop) -> None:
    torch.set_num_threads(1)  # one process per core: more threads would slow each other down
    global _worker
    _worker = _Worker(source, settings)


def _work(job: _Job) -> EpisodeResult:
    global _closes_at_exit
    assert _worker is not None
    try:
        return _worker.episode(job)
    finally:
        if not _closes_at_exit:  # not earlier: a library that the environment imports ends its rendering at exit, too
            atexit.register(_worker.close)
            _closes_at_exit = True


class _Results:
    """Episodes by condition. Each is written to a file when it has ended, so that a failed evaluation loses none. A
    progress bar on standard error shows the running success rate."""

    def __init__(self, conditions: Iterable[str], total: int, file: Path | None) -> None:
        self.episodes: dict[str, list[EpisodeResult]] = {name: [] for name in conditions}
        self.done: list[_Job] = []
        self._total, self._file = total, file
        if file is not None:
            write_text(file, "")  # delete results of an earlier evaluation
        self._bar = Progress(total=total, desc="closed loop", unit="episode")

    def __enter__(self) -> _Results:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if kind is not None and self._file is not None and self.done:
            log.warning("%d of %d episodes had ended: %s", len(self.done), self._total, self._file)

    def add(self, job: _Job, episode: EpisodeResult) -> None:
        """Add the result of a job."""
        self.episodes[job.condition].append(episode)
        self.done.append(job)
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{json_text({'condition': job.condition, **vars(episode)}, ascii_only=True)}\n")
        successes = sum(each.success for found in self.episodes.values() for each in found)
        self._bar.set_postfix_str(f"{successes} of {len(self.done)} succeeded", refresh=False)
        self._bar.update()
