"""Episodes in other processes than the policy: this process serves the policy, and workers, which may run in another
Python environment, request plans from it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keygrip.envs.workers import run_jobs
from keygrip.evaluation.rollout_worker import plan_timeout_s
from keygrip.evaluation.rollouts import EpisodeResult
from keygrip.models.policy import Needs
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.runtime.client import ServerError
from keygrip.runtime.plausibility import Bounds

if TYPE_CHECKING:
    from keygrip.runtime.server import Limits, PolicyServer

TOO_LATE = 504  # status of the server's answer when a plan has taken too long
WORKER = "keygrip.evaluation.rollout_worker"
# A simulator accepts plans that no robot should receive. Refusals would cause failures that local rollouts do not have.
EVERYTHING = Bounds(start_m=1e9, plan_m=1e9, speed_m_s=1e9, image_levels=0, centre_share=1e9)
ADVICE = "`make metaworld-install` makes Meta-World's; or give env.python=PATH of an environment with the simulator."


@dataclass(frozen=True)
class RemoteSettings:
    """Settings of a worker, without the episode.

    Args:
        python: interpreter with the simulator. task_class: dotted name. image_size, hz, cameras: as in
            `open_environment`. control: a partial call of `RecedingHorizon`, or the class.
    """

    python: str
    task_class: str
    image_size: int
    hz: float
    cameras: Sequence[str] | None
    control: Callable[..., RecedingHorizon]

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values.

        Raises:
            ValueError: The controller cannot be sent to another process.
        """
        options: dict[str, Any] = {}
        if isinstance(self.control, partial) and self.control.func is RecedingHorizon and not self.control.args:
            options = dict(self.control.keywords)
        elif self.control is not RecedingHorizon:
            raise ValueError(f"rollouts in {self.python} take RecedingHorizon with settings, not {self.control!r}")
        content = asdict(self) | {"control": options}
        return content | {"cameras": None if self.cameras is None else list(self.cameras)}


def run_remote(
    policy: Any, settings: RemoteSettings, episodes: Sequence[tuple[Any, int, Path | None]], processes: int
) -> Iterator[tuple[int, EpisodeResult]]:
    """Run (task, seed, video) episodes; yield (index, result) as they end.

    The policy plans in this process, one observation after another; its random samples are determined by the seed.

    Raises:
        ValueError: The interpreter is missing, or a worker fails. ModuleNotFoundError: Serving needs a package.
    """
    plain = settings.as_dict()
    jobs = [
        {"task": asdict(task), "seed": seed, "video": None if video is None else str(video.resolve())}
        for task, seed, video in episodes
    ]
    with served(policy, processes, len(jobs)) as url:
        setup = plain | {"url": url, "processes": processes}
        for index, report in run_jobs(settings.python, WORKER, setup, jobs, processes, ADVICE):
            yield index, EpisodeResult(**report)


def check_remote(settings: RemoteSettings, task: Any, seed: int, needs: Needs | None) -> None:
    """Check as `keygrip.evaluation.rollouts.check_environment`, in the other environment.

    Raises:
        ValueError: also if the interpreter is missing.
    """
    job = {"task": asdict(task), "seed": seed, "needs": None if needs is None else asdict(needs)}
    for _ in run_jobs(settings.python, WORKER, settings.as_dict() | {"url": None}, [job], 1, ADVICE):
        pass


def server_classes(alternative: str = "") -> tuple[type[Limits], type[PolicyServer]]:
    """Return the classes that serve the policy. Raises ModuleNotFoundError if a package is missing; its message ends
    with `alternative`."""
    try:
        from keygrip.runtime.server import Limits, PolicyServer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"serving needs {error.name}: pip install 'keygrip[serve]'{alternative}") from error
    return Limits, PolicyServer


@contextlib.contextmanager
def served(policy: Any, processes: int, restarts: int) -> Iterator[str]:
    """Yield the address of a server of a policy for that many workers, running until the block ends. A worker that dies
    leaves its session open; the limit of sessions allows for `restarts` of them.

    Raises:
        ValueError: A plan of a worker in the block took longer than `plan_timeout_s`.
    """
    limits_class, server_class = server_classes()
    plan_s = plan_timeout_s(processes)
    limits = limits_class(
        request_mb=1000.0,  # only these workers send requests; their images have any size, as those of local rollouts
        read_s=60.0,
        requests=processes + 4,
        waiting=processes + 1,
        sessions=processes + restarts,
        session_s=plan_s + 300.0,  # a session is not used while its client waits for a plan
        plan_s=plan_s,
        stuck_s=plan_s + 300.0,
        idle_s=600.0,
    )
    server = server_class(policy, policy.needs, {"model": type(policy).__name__}, limits, EVERYTHING)
    address: list[str] = []
    started, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()
    errors: list[BaseException] = []

    def ready(url: str) -> None:
        address.append(url)
        started.set()

    def serve() -> None:
        try:
            loop.run_until_complete(server.serve("127.0.0.1", 0, stop, ready))
        except BaseException as error:
            errors.append(error)
            started.set()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    started.wait()
    if errors:
        raise errors[0]
    try:
        yield address[0]
    except (ServerError, ValueError) as error:  # ValueError: reported by a worker
        if f"the policy server answers {TOO_LATE}:" not in str(error):
            raise
        raise ValueError(
            f"{error}; this includes the wait for the plans of {processes} processes: give fewer processes=N (in "
            "training callbacks.closed_loop.closed_loop.processes=N)"
        ) from error
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
