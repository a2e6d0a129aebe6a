"""One thread computes the plans of all sessions. Waiting requests form a batch; a stuck policy is replaced.

A waiting request is computed together with the other waiting requests (at most `batch` of them); no request waits for a
batch to fill. A computation that takes longer than `stuck_s` is abandoned in its thread, because Python cannot end a
thread, and the policy is created again in another thread. Everything except the computation runs on the event loop, so
only the queue needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from keygrip.models.policy import Observation, Plan, Policy, UnderWay
from keygrip.runtime.planners import as_exception, await_end, checked_plan, plan_of

log = logging.getLogger(__name__)


class UnavailableError(RuntimeError):
    """The policy is stuck, is being replaced, or was replaced while a request waited; the text states which."""


@dataclass(eq=False)
class _Job:
    policy: Policy  # of the session
    observation: Observation
    under_way: UnderWay | None
    answer: asyncio.Future[Plan]


@dataclass(eq=False)
class _Worker:
    """A thread and the policy that it uses."""

    jobs: deque[_Job] = field(default_factory=deque)
    awake: threading.Condition = field(default_factory=threading.Condition)
    computing: list[_Job] = field(default_factory=list)
    since: float | None = None  # when the current computation began (monotonic)
    abandoned: bool = False
    thread: threading.Thread | None = None


class BatchPlanner:
    """The policy's thread, used from the event loop.

    Args:
        policy: computes plans. make: creates an equal policy to replace a stuck one; None: the server ends instead.
        batch: number of requests computed together, if the policy has `plan_batch`.
        plan_s: a longer computation is overdue. stuck_s: a longer computation is stuck.
        replacements: how often a stuck policy is replaced; after that `failed` is set.
        observe: called with the duration of a computation in seconds and its number of plans.
    """

    def __init__(
        self,
        policy: Policy,
        make: Callable[[], Policy] | None,
        *,
        batch: int,
        plan_s: float,
        stuck_s: float,
        replacements: int,
        observe: Callable[[float, int], None],
    ) -> None:
        self.policy: Policy | None = policy
        self.replaced = 0
        self.pending = 0  # requests that wait or are computed, also those whose clients have given up
        self.failed = asyncio.Event()
        self._make, self._batch, self._plan_s, self._stuck_s = make, batch, plan_s, stuck_s
        self._replacements, self._observe = replacements, observe
        self._worker = self._start()

    # ---- on the event loop -----------------------------------------------------------------------------------------

    def trouble(self) -> str | None:
        """Return why no plan can be expected, or None."""
        if self.failed.is_set():
            return f"the policy was stuck {self.replaced + 1} times: the server ends"
        if self.policy is None:
            return "the policy was stuck and is being loaded again"
        since = self._worker.since
        if since is not None and time.monotonic() - since > self._plan_s:
            return f"the policy has computed one plan for {time.monotonic() - since:.1f} s and may be stuck"
        return None

    async def plan(self, policy: Policy, observation: Observation, under_way: UnderWay | None = None) -> Plan:
        """Return the plan of a session's policy, which is `self.policy` or was created by its `session()`.

        Args:
            under_way: the plan to continue, for policies that support it.

        Raises:
            UnavailableError: There is no policy, or it was replaced in the meantime. Also any error of the policy.
        """
        if self.policy is None or self.failed.is_set():
            raise UnavailableError(self.trouble())
        answer: asyncio.Future[Plan] = asyncio.get_running_loop().create_future()
        worker, job = self._worker, _Job(policy, observation, under_way, answer)
        self.pending += 1
        with worker.awake:
            worker.jobs.append(job)
            worker.awake.notify()
        return await job.answer

    async def watch(self) -> None:
        """Replace the policy whenever it is stuck. Runs until cancelled."""
        while True:
            await asyncio.sleep(min(0.5, self._stuck_s / 10))
            worker = self._worker
            since = worker.since
            if since is None or time.monotonic() - since <= self._stuck_s:
                continue
            with worker.awake:
                worker.abandoned = True
                lost = [*worker.computing, *worker.jobs]
                worker.jobs.clear()
                worker.awake.notify()
            self.pending = 0
            for job in lost:
                _settle(job.answer, UnavailableError("the policy was stuck and is being loaded again"))
            log.error("the policy has computed one plan for more than %g s", self._stuck_s)
            if self._make is None or self.replaced >= self._replacements:
                self.failed.set()
                return
            self.policy = None
            try:
                self.policy = await _in_daemon_thread(self._make)
            except Exception:
                log.exception("the policy could not be loaded again")
                self.failed.set()
                return
            self.replaced += 1
            self._worker = self._start()
            log.warning("the policy was replaced (%d of at most %d times)", self.replaced, self._replacements)

    def close(self) -> None:
        """End the thread after its current computation, and wait for it unless it is stuck. Waiting requests are not
        computed."""
        worker = self._worker
        with worker.awake:
            stuck, worker.abandoned = worker.abandoned, True
            worker.awake.notify()
        if not stuck and worker.thread is not None:
            await_end(worker.thread)

    def _start(self) -> _Worker:
        worker = _Worker()
        # A daemon thread, so that a stuck computation does not keep the process running.
        worker.thread = threading.Thread(target=self._work, args=(worker,), name="policy", daemon=True)
        worker.thread.start()
        return worker

    def _finish(self, worker: _Worker, jobs: Sequence[_Job], results: Sequence[Plan | BaseException]) -> None:
        if worker is not self._worker or worker.abandoned:
            return  # the jobs were answered when the worker was found to be stuck
        self.pending -= len(jobs)
        for job, result in zip(jobs, results, strict=True):
            _settle(job.answer, result)

    # ---- in the worker's thread ------------------------------------------------------------------------------------

    def _work(self, worker: _Worker) -> None:
        while True:
            with worker.awake:
                worker.awake.wait_for(lambda: worker.jobs or worker.abandoned)
                if worker.abandoned:
                    return
                jobs = [worker.jobs.popleft() for _ in range(min(self._batch, len(worker.jobs)))]
                worker.computing, worker.since = jobs, time.monotonic()
            pending = [job for job in jobs if not job.answer.done()]  # the clients of the others have given up
            started = time.perf_counter()
            results: dict[_Job, Plan | BaseException] = dict.fromkeys(jobs, asyncio.CancelledError())
            results |= zip(pending, plans_of(pending), strict=True)
            if pending and not worker.abandoned:
                self._observe(time.perf_counter() - started, len(pending))
            with worker.awake:
                worker.computing, worker.since = [], None
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                jobs[0].answer.get_loop().call_soon_threadsafe(self._finish, worker, jobs, list(results.values()))


def plans_of(jobs: Sequence[_Job]) -> list[Plan | BaseException]:
    """Return a plan or an error for each job. A failing job does not affect the others.

    Jobs that continue a plan are computed one by one, because each continues a different plan.
    """
    batchable = [job for job in jobs if job.under_way is None and hasattr(job.policy, "plan_batch")]
    outcomes: dict[_Job, Plan | BaseException] = {}
    if len(batchable) > 1:
        policy: Any = batchable[0].policy
        try:
            plans = policy.plan_batch([job.observation for job in batchable], [job.policy for job in batchable])
            outcomes = {job: checked_plan(plan, job.policy) for job, plan in zip(batchable, plans, strict=True)}
        except ValueError:
            pass  # caused by one of the observations; the loop below finds which
        except BaseException:  # also a panic of a Rust extension, because all sessions share the thread
            log.exception("a batch of %d failed; planning one by one", len(batchable))
    for job in jobs:
        if job in outcomes:
            continue
        try:
            outcomes[job] = plan_of(job.policy, job.observation, job.under_way)
        except BaseException as error:
            outcomes[job] = as_exception(error)
    return [outcomes[job] for job in jobs]


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    """Set a future's result, or its exception if `result` is an error. A finished or cancelled future is unchanged."""
    if future.done():
        return
    if isinstance(result, asyncio.CancelledError):
        future.cancel()
    elif isinstance(result, BaseException):
        future.set_exception(result)
        future.exception()  # mark it as retrieved, because the client may have gone
    else:
        future.set_result(result)


async def _in_daemon_thread(call: Callable[[], Any]) -> Any:
    """Return the result of a call that may never return, run in a daemon thread."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:
            result = as_exception(error)
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_settle, future, result)

    threading.Thread(target=run, name="policy-loading", daemon=True).start()
    return await future
