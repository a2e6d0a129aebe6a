"""Closed-loop evaluation: a trained policy drives a robot in an environment over held-out seeds.

Episodes are spread over processes; each process loads the checkpoint once. An episode depends on (checkpoint, task,
seed, control) alone, so the number of processes does not change the result.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.envs.environment import Environment, Task, open_environment
from keygrip.evaluation.kinds import changed
from keygrip.evaluation.remote_rollouts import RemoteSettings, run_remote
from keygrip.evaluation.rollouts import EpisodeResult, run_episode
from keygrip.evaluation.statistics import wilson_interval
from keygrip.evaluation.trained_policy import policy_of
from keygrip.progress import Progress
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.training.checkpoints import load_module

# Seeds from here on are never used for recording, training or choosing settings (those start at 500000).
HELD_OUT_SEED = 1_000_000
HEIGHT_STEP_CM = 2  # height step of the breakdown by height


@dataclass(frozen=True)
class ConditionResult:
    """All episodes under one condition."""

    name: str
    overrides: dict[str, Any]
    episodes: list[EpisodeResult] = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Figures of the condition: success rate with its 95 % Wilson interval, failure counts, times.

        Where the object's colour or height varies, `by_colour` and `by_height` hold the rates of its kinds.
        """
        yaw = [episode.yaw_error_deg for episode in self.episodes if episode.yaw_error_deg is not None]
        kinds: dict[str, Any] = {}
        if len({episode.colour for episode in self.episodes}) > 1:
            kinds["by_colour"] = _by_kind(self.episodes, lambda episode: episode.colour)
        if len({episode.height_cm for episode in self.episodes}) > 1:
            kinds["by_height"] = _by_kind(self.episodes, lambda episode: _height_range(episode.height_cm))
        return _rates(self.episodes) | {
            "failures": dict(Counter(episode.failure for episode in self.episodes if episode.failure)),
            "episode_s_median": float(np.median([episode.seconds for episode in self.episodes])),
            "plan_ms_median": float(np.median([episode.plan_ms for episode in self.episodes])),
            "grip_yaw_error_deg_median": float(np.median(yaw)) if yaw else None,
            **kinds,
        }


def _rates(episodes: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Success rate with its 95 % Wilson interval, and the counts behind it."""
    won = sum(episode.success for episode in episodes)
    low, high = wilson_interval(won, len(episodes))
    rates = {"success_rate": won / len(episodes), "success_low": low, "success_high": high}
    return rates | {"episodes": len(episodes), "successes": won}


def _by_kind(episodes: Sequence[EpisodeResult], kind: Callable[[EpisodeResult], str]) -> dict[str, dict[str, Any]]:
    """The rates of each kind of episode, by its name."""
    groups: dict[str, list[EpisodeResult]] = {}
    for episode in episodes:
        groups.setdefault(kind(episode), []).append(episode)
    return {name: _rates(groups[name]) for name in sorted(groups)}


def _height_range(height_cm: float) -> str:
    low = int(height_cm // HEIGHT_STEP_CM) * HEIGHT_STEP_CM
    return f"{low}-{low + HEIGHT_STEP_CM} cm"


@dataclass(frozen=True)
class ClosedLoop:
    """What to evaluate in an environment.

    Args:
        task: what to do there, usually as in the recordings; its class names the environment.
        conditions: name -> list of option overrides; a name with several entries is a grid whose episodes are pooled;
            None leaves out a condition that another config has set.
        episodes: a condition (shared out over its grid).
        first_seed: episodes use first_seed, first_seed + 1, ...
        image_size: side of the rendered image, as recorded. hz: control periods per second.
        cameras: what the policy sees, the main one first; None: the task's own camera.
        control: the controller with its settings, still without policy and rate (a partial call in the configs).
        processes: None takes one for each core.
        videos: episodes recorded as videos, for each condition.
        policy: changes to the model's own policy, by the names of its fields.
        trust: packages beside keygrip whose parts the checkpoint may name.
        python: interpreter of another Python environment that has the simulator: episodes run there, the policy here.
            None: both run in this one.
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
    python: str | None = None

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"closed_loop.episodes is at least 1, got {self.episodes}.")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"closed_loop.processes is at least 1 (null: one for each core), got {self.processes}.")
        if self.videos < 0 or self.image_size < 1 or not 0 < self.hz < math.inf:
            raise ValueError(
                f"closed_loop.videos is at least 0, image_size at least 1 and hz above 0, got {self.videos}, "
                f"{self.image_size} and {self.hz}."
            )
        self.control(policy=None, control_hz=self.hz)  # what it cannot do is refused now, not in a worker
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

    def run(self, checkpoint: Path, output: Path | None = None) -> list[ConditionResult]:
        """Drive every episode with the policy in ``checkpoint``; videos go to ``output`` / videos.

        Raises:
            FileNotFoundError, ValueError: the checkpoint cannot be loaded, or a worker process died.
        """
        jobs = self._jobs(output)
        processes = min(self.processes or os.cpu_count() or 1, len(jobs))
        results: dict[str, list[EpisodeResult]] = {name: [] for name in self.grids}
        with _Progress(len(jobs)) as progress:
            if self.python is not None:
                self._run_elsewhere(checkpoint, jobs, processes, results, progress)
            elif processes == 1:
                worker = _Worker(checkpoint, self)
                for job in jobs:
                    results[job.condition].append(worker.episode(job))
                    progress.update(results)
            else:
                self._run_parallel(checkpoint, jobs, processes, results, progress)
        ordered = {name: sorted(episodes, key=lambda episode: episode.seed) for name, episodes in results.items()}
        return [
            ConditionResult(name, {"grid": [dict(entry) for entry in self.grids[name]]}, episodes)
            for name, episodes in ordered.items()
        ]

    def _run_parallel(
        self,
        checkpoint: Path,
        jobs: list[_Job],
        processes: int,
        results: dict[str, list[EpisodeResult]],
        progress: _Progress,
    ) -> None:
        # Spawned, not forked: a GL context and torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context, _start_worker, (checkpoint, self)) as pool:
            waiting: dict[Future[EpisodeResult], _Job] = {pool.submit(_work, job): job for job in jobs}
            try:
                for future in as_completed(waiting):
                    results[waiting[future].condition].append(future.result())
                    progress.update(results)
            except BrokenProcessPool as error:
                raise ValueError(
                    "A process of the closed-loop evaluation died (out of memory, no working GL library, or a script "
                    "without an `if __name__ == '__main__'` guard?): run with processes=1 (in training "
                    "closed_loop.processes=1) to see why."
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _run_elsewhere(
        self,
        checkpoint: Path,
        jobs: list[_Job],
        processes: int,
        results: dict[str, list[EpisodeResult]],
        progress: _Progress,
    ) -> None:
        kind = type(self.task)
        settings = RemoteSettings(
            str(self.python),
            f"{kind.__module__}.{kind.__qualname__}",
            self.image_size,
            self.hz,
            self.cameras,
            self.control,
        )
        episodes = [(changed(self.task, job.overrides), job.seed, job.video) for job in jobs]
        for number, result in run_remote(loaded_policy(checkpoint, self), settings, episodes, processes):
            results[jobs[number].condition].append(result)
            progress.update(results)

    def _jobs(self, output: Path | None) -> list[_Job]:
        jobs = []
        for name, grid in self.grids.items():
            for index in range(self.episodes):
                seed = self.first_seed + index
                video = None
                if output is not None and index < self.videos:
                    video = output / "videos" / f"{name}-{seed}.mp4"
                jobs.append(_Job(name, dict(grid[index % len(grid)]), seed, video))
        # Tasks that differ need their own scene: neighbours that share one save building it again.
        return sorted(jobs, key=lambda job: (job.video is None, job.condition, sorted(job.overrides.items()), job.seed))


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


def loaded_policy(checkpoint: Path, settings: ClosedLoop) -> Any:
    """The policy in a checkpoint, with the changes that the settings ask for.

    Raises:
        ValueError: as `policy_of`.
    """
    return policy_of(load_module(checkpoint, trust=settings.trust), checkpoint, settings.policy)


class _Worker:
    """One loaded policy and the environment of its last episode."""

    def __init__(self, checkpoint: Path, settings: ClosedLoop) -> None:
        self.policy = loaded_policy(checkpoint, settings)
        self.settings = settings
        self._environment: tuple[tuple[tuple[str, Any], ...], Environment] | None = None

    def environment(self, overrides: dict[str, Any]) -> Environment:
        key = tuple(sorted(overrides.items()))
        if self._environment is None or self._environment[0] != key:
            if self._environment is not None:
                self._environment[1].close()
            task = changed(self.settings.task, overrides)
            cameras = None if self.settings.cameras is None else tuple(self.settings.cameras)
            self._environment = (key, open_environment(task, self.settings.image_size, self.settings.hz, cameras))
        return self._environment[1]

    def episode(self, job: _Job) -> EpisodeResult:
        environment = self.environment(job.overrides)
        return run_episode(environment, self.policy, self.settings.control, job.seed, job.video)


_worker: _Worker | None = None


def _start_worker(checkpoint: Path, settings: ClosedLoop) -> None:
    import torch

    torch.set_num_threads(1)  # as many processes as cores: more threads would fight over them
    global _worker
    _worker = _Worker(checkpoint, settings)


def _work(job: _Job) -> EpisodeResult:
    assert _worker is not None
    return _worker.episode(job)


class _Progress:
    """A bar on standard error with the running success rate."""

    def __init__(self, total: int) -> None:
        self._bar = Progress(total=total, desc="closed loop", unit="episode")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, results: Mapping[str, list[EpisodeResult]]) -> None:
        episodes = [episode for done in results.values() for episode in done]
        won = sum(episode.success for episode in episodes)
        self._bar.set_postfix_str(f"{won} of {len(episodes)} succeeded", refresh=False)
        self._bar.update()
