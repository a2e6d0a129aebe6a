"""Plans beside the control loop: in a thread on a real clock, or after a set latency on a simulated one."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from keygrip.models.policy import Observation, Plan, Policy, UnderWay

log = logging.getLogger(__name__)

ENDING_S = 5.0  # that the end of the process waits for a computation


class PolicyPanicError(RuntimeError):
    """A policy ended with something that is no error of Python's: a panic of a Rust extension, an exit. The text says
    with what."""


class ContinuingPolicy(Policy, Protocol):
    """A policy whose plans can continue the one that is being executed (real-time chunking)."""

    def plan_continuing(self, observation: Observation, executing: Plan, delay_s: float) -> Plan:
        """A plan whose first `delay_s` seconds agree with `executing`, a plan with its `time_s`."""
        ...


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is asked for with.

    Attributes:
        observation: with `time_s`. time_s: when it was asked for, on the robot's clock.
        under_way: the plan that is executed meanwhile, for policies that continue it.
    """

    observation: Observation
    time_s: float
    under_way: UnderWay | None = None


@dataclass(frozen=True)
class PlanOutcome:
    """The end of a request: a plan, or the error that the policy ended with."""

    request: PlanRequest
    plan: Plan | None = None
    error: Exception | None = None


class Planner(Protocol):
    """Computes one plan at a time while the arm moves."""

    def request(self, request: PlanRequest) -> None:
        """Begins a plan; none may be under way."""
        ...

    def poll(self, now: float) -> PlanOutcome | None:
        """The plan that is ready by now, once."""
        ...

    @property
    def busy_since(self) -> float | None:
        """When the plan under way was asked for, or None."""
        ...

    def close(self) -> None:
        """Ends it, at the end of the process; a plan that is under way is lost."""
        ...


class ThreadPlanner:
    """Plans in a thread of its own. A policy that never returns blocks nothing but its thread.

    Args:
        policy: called from that thread alone.
        awaited: `close` waits for the plan under way. False for a policy on a server: nothing here computes then, and
            the answer may be long in coming.
    """

    def __init__(self, policy: Policy, awaited: bool = True) -> None:
        self._policy, self._awaited = policy, awaited
        self._asked: queue.Queue[PlanRequest | None] = queue.Queue(1)  # None: the end
        self._done: queue.Queue[PlanOutcome] = queue.Queue(1)
        self._busy_since: float | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="planner", daemon=True)
        self._thread.start()

    @property
    def busy_since(self) -> float | None:
        return self._busy_since

    def request(self, request: PlanRequest) -> None:
        assert self._busy_since is None
        self._busy_since = request.time_s
        self._asked.put(request)

    def poll(self, now: float) -> PlanOutcome | None:
        try:
            outcome = self._done.get_nowait()
        except queue.Empty:
            return None
        self._busy_since = None
        return outcome

    def close(self) -> None:
        """Ends the thread after its present plan, and waits for that if `awaited`."""
        self._closed = True
        with contextlib.suppress(queue.Full):  # a request that the thread has not taken up wakes it, too
            self._asked.put_nowait(None)
        if self._awaited:
            await_end(self._thread)

    def _work(self) -> None:
        while True:
            request = self._asked.get()
            if request is None or self._closed:
                return
            try:
                outcome = PlanOutcome(request, planned(self._policy, request.observation, request.under_way))
            except BaseException as error:
                outcome = PlanOutcome(request, error=ordinary(error))
            self._done.put(outcome)


class SimulatedPlanner:
    """Plans at once and hands the plan over after a latency on the robot's clock, so that a run can be repeated.

    Args:
        policy: plans. latency_s: gives the latency of the next plan; infinite: it never comes.
    """

    def __init__(self, policy: Policy, latency_s: Callable[[], float]) -> None:
        self._policy, self._latency_s = policy, latency_s
        self._outcome: PlanOutcome | None = None
        self._ready = 0.0

    @property
    def busy_since(self) -> float | None:
        return None if self._outcome is None else self._outcome.request.time_s

    def request(self, request: PlanRequest) -> None:
        assert self._outcome is None
        try:
            self._outcome = PlanOutcome(request, planned(self._policy, request.observation, request.under_way))
        except Exception as error:
            self._outcome = PlanOutcome(request, error=error)
        self._ready = request.time_s + self._latency_s()

    def poll(self, now: float) -> PlanOutcome | None:
        if self._outcome is None or now < self._ready - 1e-9:
            return None
        outcome, self._outcome = self._outcome, None
        return outcome

    def close(self) -> None: ...


def await_end(thread: threading.Thread) -> None:
    """Waits for a thread of a policy, `ENDING_S` at most: one that is inside torch when Python ends aborts the
    process."""
    thread.join(ENDING_S)
    if thread.is_alive():
        log.warning("the policy still computes after %g s: the process ends without it and may be aborted", ENDING_S)


def planned(policy: Policy, observation: Observation, under_way: UnderWay | None) -> Plan:
    """The policy's plan, which continues the one under way where there is one.

    Raises:
        TypeError: it gives no `Plan`. Whatever the policy raises.
    """
    if under_way is None:
        return checked_plan(policy.plan(observation), policy)
    continuing: ContinuingPolicy = policy  # type: ignore[assignment]
    return checked_plan(continuing.plan_continuing(observation, under_way.plan, under_way.delay_s), policy)


def checked_plan(plan: object, policy: Policy) -> Plan:
    """What a policy gave. Raises TypeError: it is no `Plan`."""
    if not isinstance(plan, Plan):
        raise TypeError(f"{type(policy).__name__} gave {type(plan).__name__} in place of a Plan")
    return plan


def ordinary(error: BaseException) -> Exception:
    """What a policy ended with, as an error that can be handed to another thread: what is no `Exception` would end the
    thread, or the event loop, that takes it up, and a future takes no StopIteration."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    panic = PolicyPanicError(f"{type(error).__name__}: {error}")
    panic.__cause__ = error
    return panic
