"""A server in a thread of the test, with a policy whose behaviour the test defines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from keygrip.models.policy import Needs, Observation, Plan, arm_axis
from keygrip.runtime.server import PolicyServer
from keygrip.runtime.service import Limits

LOOKING = Needs(arms=("right",), cameras=("over", "front"), instruction=True)


@dataclass
class Toy:
    """Plans to stay at the current pose, after calling `before`."""

    before: Callable[[], object] = lambda: None
    seen: list[Observation] = field(default_factory=list)

    def plan(self, observation: Observation) -> Plan:
        self.seen.append(observation)
        self.before()
        sizes = {"position": 1, "quaternion": 1, "gripper": 0}
        there = {name: arm_axis(observation[name], size)[:, None] for name, size in sizes.items()}
        return Plan(**{name: value.repeat(3, axis=1) for name, value in there.items()}, step_seconds=0.3)


@dataclass
class Dice(Toy):
    """Samples its plan; each session has a generator of its own."""

    seed: int = 0
    workspace: np.ndarray | None = None
    batches: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset(0)

    def reset(self, seed: int) -> None:
        self.generator = np.random.default_rng(self.seed + seed)

    def session(self) -> Dice:
        return replace(self)

    def plan(self, observation: Observation) -> Plan:
        return self.plan_batch([observation], [self])[0]

    def plan_batch(self, observations: Sequence[Observation], sessions: Sequence[Dice]) -> list[Plan]:
        self.batches.append(len(observations))
        plans = [super(Dice, session).plan(seen) for session, seen in zip(sessions, observations, strict=True)]
        return [
            replace(plan, position=plan.position + 0.1 * session.generator.random(plan.position.shape))
            for session, plan in zip(sessions, plans, strict=True)
        ]


def view(seed: int, height: int = 48, width: int = 64) -> dict[str, np.ndarray]:
    """Return the data of one camera."""
    world_to_camera = np.diag([1.0, -1.0, -1.0, 1.0])
    world_to_camera[2, 3] = 1.0
    return {
        "image": np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8),
        "intrinsics": np.array([[60.0, 0, width / 2], [0, 60.0, height / 2], [0, 0, 1]]),
        "world_to_camera": world_to_camera,
    }


def observe(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Return an observation of two cameras and one arm."""
    pose = {"position": np.array([0.3, 0.01 * seed, 0.1]), "quaternion": np.array([0.0, 1.0, 0.0, 0.0])}
    cameras = {"over": view(seed), "front": view(seed + 1)}
    words = {"gripper": np.array(0.5), "joints": np.zeros(6), "instruction": "put the red cube into the bowl"}
    return {**cameras["over"], **pose, **words, "cameras": cameras, **changes}


class Running:
    """A server that listens until `stop()`."""

    def __init__(
        self, policy: Any, needs: Needs, limits: Limits, host: str = "127.0.0.1", more: dict[str, Any] | None = None
    ) -> None:
        self.server = PolicyServer(policy, needs, {"model": "Toy"}, limits, **more or {})
        self.url, self._ready = "", threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(host,))
        self._thread.start()
        assert self._ready.wait(120)
        if self._error is not None:
            self._thread.join()
            raise self._error

    def _run(self, host: str) -> None:
        try:
            asyncio.run(self._serve(host))
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    async def _serve(self, host: str) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await self.server.serve(host, 0, self._stop, self._listening)

    def _listening(self, url: str) -> None:
        self.url = url
        self._ready.set()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ended(self) -> BaseException | None:
        """Return the exception that ended the server, if any."""
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self._error

    def stop(self) -> None:
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(120)
        assert not self._thread.is_alive()


@pytest.fixture
def observation() -> Callable[..., dict[str, Any]]:
    return observe


@pytest.fixture
def toy() -> type[Toy]:
    return Toy


@pytest.fixture
def dice() -> type[Dice]:
    return Dice


@pytest.fixture
def needs() -> Needs:
    return LOOKING


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    """Start servers that are stopped when the test ends."""
    started: list[Running] = []

    def start(
        policy: Any = None,
        needs: Needs = LOOKING,
        host: str = "127.0.0.1",
        more: dict[str, Any] | None = None,
        **limits: float,
    ) -> Running:
        started.append(Running(policy or Toy(), needs, Limits(**limits), host, more))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for server in started:
        server.stop()
