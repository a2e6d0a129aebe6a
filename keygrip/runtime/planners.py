"""Planners parallel to the control loop: in a thread on a real clock, or with a set latency on a simulated clock."""

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

ENDING_S = 5.0  # how long the end of the process waits for a computation


class PolicyPanicError(RuntimeError):
    """A policy ended with an exception that is no Python Exception: a panic of a Rust extension, an exit. The text
    contains it."""


class ContinuingPolicy(Policy, Protocol):
    """A policy whose plans can continue the currently executed plan (real-time chunking)."""

    def plan_continuing(self, observation: Observation, executing: Plan, delay_s: float) -> Plan:
        """Return a plan whose first `delay_s` seconds agree with `executing`, a plan with `time_s`."""
        ...


@dataclass(frozen=True)
class PlanRequest:
    """The input of a plan.

    Attributes:
        observation: with `time_s`. time_s: time of the request, on the robot's clock.
        under_way: the plan that is executed meanwhile, for policies that continue it.
    """

    observation: Observation
    time_s: float
    under_way: UnderWay | None = None


@dataclass(frozen=True)
class PlanOutcome:
    """The result of a request: a plan, or the policy's error."""

    request: PlanRequest
    plan: Plan | None = None
    error: Exception | None = None


class Planner(Protocol):
    """Compute one plan at a time while the arm moves."""

    def request(self, request: PlanRequest) -> None:
        """Start a plan; no other plan may be in progress."""
        ...

    def poll(self, now: float) -> PlanOutcome | None:
        """Return the plan if it is ready by now. It is returned only once."""
        ...

    @property
    def busy_since(self) -> float | None:
        """When the plan in progress was requested, or None."""
        ...

    def close(self) -> None:
        """End the planner, at the end of the process. A plan in progress is lost."""
        ...


class ThreadPlanner:
    """Plan in a separate thread. A policy that never returns blocks only this thread.

    Args:
        policy: called from that thread only.
        awaited: `close` waits for the plan in progress. Use False for a policy on a server: nothing is computed in
            this process then, and the answer may take long.
    """

    def __init__(self, policy: Policy, awaited: bool = True) -> None:
        self._policy, self._awaited = policy, awaited
        self._request_queue: queue.Queue[PlanRequest | None] = queue.Queue(1)  # None: end of the thread
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
        self._request_queue.put(request)

    def poll(self, now: float) -> PlanOutcome | None:
        try:
            outcome = self._done.get_nowait()
        except queue.Empty:
            return None
        self._busy_since = None
        return outcome

    def close(self) -> None:
        """End the thread after its current plan, and wait for it if `awaited`."""
        self._closed = True
        with contextlib.suppress(queue.Full):  # a pending request wakes the thread too
            self._request_queue.put_nowait(None)
        if self._awaited:
            await_end(self._thread)

    def _work(self) -> None:
        while True:
            request = self._request_queue.get()
            if request is None or self._closed:
                return
            try:
                outcome = PlanOutcome(request, plan_of(self._policy, request.observation, request.under_way))
            except BaseException as error:
                outcome = PlanOutcome(request, error=as_exception(error))
            self._done.put(outcome)


class SimulatedPlanner:
    """Plan immediately and return the plan after a latency on the robot's clock, so that a run can be repeated.

    Args:
        policy: computes plans. latency_s: returns the latency of the next plan; infinite: it never arrives.
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
            self._outcome = PlanOutcome(request, plan_of(self._policy, request.observation, request.under_way))
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
    """Wait for a policy's thread, at most `ENDING_S`. A thread that is inside torch when Python ends aborts the
    process."""
    thread.join(ENDING_S)
    if thread.is_alive():
        log.warning("the policy still computes after %g s: the process ends without it and may be aborted", ENDING_S)


def plan_of(policy: Policy, observation: Observation, under_way: UnderWay | None) -> Plan:
    """Return the policy's plan, which continues the current plan if one is given.

    Raises:
        TypeError: The policy does not return a `Plan`. Also any error of the policy.
    """
    if under_way is None:
        return checked_plan(policy.plan(observation), policy)
    continuing: ContinuingPolicy = policy  # type: ignore[assignment]
    return checked_plan(continuing.plan_continuing(observation, under_way.plan, under_way.delay_s), policy)


def checked_plan(plan: object, policy: Policy) -> Plan:
    """Return the result of a policy. Raises TypeError if it is not a `Plan`."""
    if not isinstance(plan, Plan):
        raise TypeError(f"{type(policy).__name__} gave {type(plan).__name__} in place of a Plan")
    return plan


def as_exception(error: BaseException) -> Exception:
    """Convert an exception of a policy to one that can be passed to another thread. An exception that is no `Exception`
    would end the receiving thread or event loop, and a future does not accept StopIteration."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    panic = PolicyPanicError(f"{type(error).__name__}: {error}")
    panic.__cause__ = error
    return panic
