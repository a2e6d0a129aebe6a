"""The common part of both protocols of the policy server: from an encoded observation to a plan or a refusal.

Decoding runs in separate threads, so that the event loop can answer `/health` meanwhile. The policy runs in another
thread (`batch_planner`). Observations and plans are checked against the training data (`plausibility`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import numpy as np

from keygrip.models.policy import Needs, Observation, Plan, Policy, UnderWay, can_continue
from keygrip.runtime.batch_planner import BatchPlanner, UnavailableError
from keygrip.runtime.metrics import Metrics
from keygrip.runtime.plausibility import Bounds, ImplausibleError, masks_views
from keygrip.runtime.refusal import Refusal
from keygrip.runtime.sessions import Sessions, seeded, stochastic
from keygrip.runtime.wire import Entry, WireError, entries_of, under_way_entries

log = logging.getLogger(__name__)

DECODERS = 2  # decoding threads
Decoded = TypeVar("Decoded")


@dataclass(frozen=True)
class Limits:
    """Limits of a server: sizes, counts, times.

    Args:
        request_mb: size of a request's body. requests: number in progress at once, including those still arriving.
        waiting: number of plans that are decoded, wait or are computed at once; further requests are refused with 503.
        batch: number of waiting requests computed together, at most `waiting`; None: 1.
        sessions: open at once, websocket connections included. session_s: an unused session is closed after this time.
        read_s: time limit for receiving a body. idle_s: time limit for receiving a request's header.
        plan_s: time limit for a plan, waiting included; then the answer is 504.
        stuck_s: a longer computation is stuck, and the policy is replaced. replacements: how often; the next time the
            server ends.
    """

    request_mb: float = 16.0
    requests: int = 32
    waiting: int = 4
    batch: int | None = None
    sessions: int = 64
    session_s: float = 600.0
    read_s: float = 5.0
    idle_s: float = 15.0
    plan_s: float = 30.0
    stuck_s: float = 60.0
    replacements: int = 3

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            least = 0 if limit.name == "replacements" else None
            if value is not None and (value < 0 if least == 0 else not value > 0):
                raise ValueError(f"limits.{limit.name} must be above 0, not {value}")
        if self.stuck_s < self.plan_s:
            raise ValueError(f"limits.stuck_s={self.stuck_s:g} must not be below limits.plan_s={self.plan_s:g}")
        if self.batch is not None and self.batch > self.waiting:
            raise ValueError(
                f"limits.batch={self.batch} is above limits.waiting={self.waiting}, the number of plans in progress at "
                "once, and would never be reached: raise limits.waiting too (to twice limits.batch, so that a batch "
                "can fill while another is computed)"
            )

    @property
    def request_bytes(self) -> int:
        """`request_mb` in bytes."""
        return int(self.request_mb * 1e6)


class PolicyService:
    """A policy and the requests for it, over any protocol. Used from one event loop.

    Args:
        policy: computes plans; called from one thread. needs: its inputs. about: model information in `/health`.
        make: creates an equal policy to replace a stuck one; None: the server ends instead.

    Raises:
        ValueError: The policy is stochastic and cannot be shared by sessions.
    """

    def __init__(
        self,
        policy: Policy,
        needs: Needs,
        about: dict[str, Any],
        limits: Limits,
        bounds: Bounds,
        make: Callable[[], Policy] | None,
    ) -> None:
        self.needs, self.about, self.limits, self.bounds = needs, about, limits, bounds
        self.stochastic, self.continues = stochastic(policy), can_continue(policy)
        self.workspace: np.ndarray | None = getattr(policy, "workspace", None)
        self.masks = masks_views(policy)
        self.metrics, self.sessions = Metrics(), Sessions(limits.session_s)
        self.conversations = 0  # open websocket connections
        self.ending = asyncio.Event()  # they close after their current answer
        self._decoding = 0
        self._decoders = ThreadPoolExecutor(DECODERS, "decode")
        self._make = make
        self.planner = BatchPlanner(
            policy,
            None if make is None else self._make_policy_again,
            batch=limits.batch or 1,
            plan_s=limits.plan_s,
            stuck_s=limits.stuck_s,
            replacements=limits.replacements,
            observe=self.metrics.computed,
        )

    def close(self) -> None:
        """End the threads after their current work."""
        self.planner.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    @property
    def waiting(self) -> int:
        """Number of plans in progress: decoded, waiting or computed."""
        return self._decoding + self.planner.pending

    def refuse_another_session(self) -> None:
        """Raise Refusal if as many sessions and websocket connections are open as `limits.sessions` allows."""
        if len(self.sessions) + self.conversations >= self.limits.sessions:
            raise Refusal(
                503,
                f"{self.limits.sessions} sessions are open, websocket connections included: close one (DELETE "
                "/session, or the connection), or ask again later",
                again=True,
            )

    def policy(self, seed: int | None = None) -> Policy:
        """Return the policy, or with a seed a policy with its own generator.

        Raises:
            Refusal: The policy is stuck.
        """
        if self.planner.policy is None:
            raise Refusal(503, self.planner.trouble() or "there is no policy", again=True)
        return self.planner.policy if seed is None else seeded(self.planner.policy, seed)

    async def read(self, decode: Callable[[], Decoded]) -> Decoded:
        """Return the result of `decode`, computed outside the event loop. If it is an observation, `plan` must follow
        immediately.

        Raises:
            Refusal: Too many plans wait, or the input is invalid.
        """
        if self.waiting >= self.limits.waiting:
            trouble = self.planner.trouble()
            raise Refusal(503, trouble or f"busy with {self.waiting} plans: ask again in a moment", again=True)
        self._decoding += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._decoders, decode)
        except WireError as error:
            raise Refusal(400, str(error)) from error
        finally:
            self._decoding -= 1

    async def plan(self, observation: Observation, policy: Policy, under_way: UnderWay | None = None) -> Plan:
        """Return the plan of a session's policy.

        Args:
            under_way: the plan to continue, for policies that support it.

        Raises:
            Refusal: with the status that identifies the cause.
        """
        try:
            async with asyncio.timeout(self.limits.plan_s):
                self.bounds.refuse_start(observation, self.workspace)
                self.bounds.refuse_images(observation, self.needs, self.masks)
                if under_way is not None:
                    self.bounds.refuse_under_way(under_way.plan, self.workspace)
                plan = await self.planner.plan(policy, observation, under_way)
                self.bounds.refuse_plan(plan, observation, self.workspace)
                return plan
        except TimeoutError:
            raise Refusal(504, f"the plan took longer than {self.limits.plan_s:g} s") from None
        except UnavailableError as error:
            raise Refusal(503, str(error), again=True) from error
        except ValueError as error:  # implausible input, or the policy finds no plan: a ray that meets no plane, ...
            if isinstance(error, ImplausibleError):
                log.warning("refused: %s", error)
            raise Refusal(422, str(error)) from error
        except Exception as error:
            log.error("the policy failed", exc_info=error)
            raise Refusal(500, f"the policy failed: {type(error).__name__}: {error}") from error

    def health(self) -> dict[str, Any]:
        """Return state, model, expected observation, limits, counts, times."""
        trouble = self.planner.trouble()
        workspace = None if self.workspace is None else np.asarray(self.workspace, float).tolist()
        return {
            **self.about,
            "state": "ready" if trouble is None else trouble,
            "needs": asdict(self.needs),
            "observation": _describe_entries(entries_of(self.needs)),
            "stochastic": self.stochastic,
            "continues": self.continues,
            **({"under_way": _describe_entries(under_way_entries(self.needs))} if self.continues else {}),
            "limits": asdict(self.limits),
            "bounds": {**asdict(self.bounds), "training_box_m": workspace},
            "answers": self.metrics.statuses(),
            "replaced": self.planner.replaced,
            **self.metrics.quantiles(),
        }

    def metrics_text(self) -> str:
        """Return the metrics in Prometheus' text format."""
        return self.metrics.text(
            {
                "up": ("1 while plans can be expected.", float(self.planner.trouble() is None)),
                "plans_waiting": ("Plans that are decoded, wait or are computed.", self.waiting),
                "sessions": ("Open sessions.", len(self.sessions)),
                "websockets": ("Open websocket connections.", self.conversations),
                "replacements": ("Times that a stuck policy was replaced.", self.planner.replaced),
            }
        )

    def _make_policy_again(self) -> Policy:
        assert self._make is not None
        policy = self._make()
        self.sessions.clear()  # their policies use the network that is stuck
        return policy


def _describe_entries(entries: Mapping[str, Entry]) -> dict[str, Any]:
    return {name: entry.describe() for name, entry in entries.items()}
