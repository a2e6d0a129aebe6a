"""Sessions of a policy server: each client's policy has its own random generator.

A stochastic policy has `reset(seed)` and `session()`, which returns a policy on the same network with its own
generator. Deterministic policies need no session; all clients share the policy itself.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any, cast

from keygrip.models.policy import Policy
from keygrip.runtime.refusal import Refusal

LARGEST_SEED = 2**62


@dataclass(eq=False)
class Session:
    """One client's episode: the policy with its own generator, and when it was last used (monotonic seconds)."""

    policy: Policy
    used: float


def stochastic(policy: Policy) -> bool:
    """Return whether a policy is stochastic.

    Raises:
        ValueError: It is and cannot be shared, because it has `reset` but no `session`.
    """
    if not hasattr(policy, "reset"):
        return False
    if not hasattr(policy, "session"):
        raise ValueError(
            f"{type(policy).__name__} draws by chance (it has reset) and has no session(): give it one that returns "
            "a policy on the same network with a generator of its own, or clients would disturb each other"
        )
    return True


def seeded(policy: Policy, seed: int) -> Policy:
    """Return a policy on the same network with a generator from `seed`; the policy itself if it is deterministic."""
    if not stochastic(policy):
        return policy
    source: Any = policy
    session = source.session()
    session.reset(seed)
    return cast(Policy, session)


class Sessions:
    """The open sessions, by names that cannot be guessed.

    Args:
        idle_s: an unused session is closed after this time.
    """

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._open: dict[str, Session] = {}

    def __len__(self) -> int:
        self._close_idle()
        return len(self._open)

    def start(self, policy: Policy, seed: int) -> str:
        """Open a session and return its name."""
        name = secrets.token_urlsafe(16)
        self._open[name] = Session(seeded(policy, seed), time.monotonic())
        return name

    def restart(self, name: str, policy: Policy, seed: int) -> None:
        """Start an episode of a session. Raises Refusal if it is not open."""
        self.find(name).policy = seeded(policy, seed)

    def find(self, name: str) -> Session:
        """Return an open session. Raises Refusal if it is not open."""
        self._close_idle()
        session = self._open.get(name)
        if session is None:
            raise Refusal(
                404, f"no such session: it was closed, or not used for {self._idle_s:g} s, or the policy was replaced"
            )
        session.used = time.monotonic()
        return session

    def end(self, name: str) -> None:
        """Close a session. Raises Refusal if it is not open."""
        self.find(name)
        del self._open[name]

    def clear(self) -> None:
        """Close all sessions."""
        self._open.clear()

    def _close_idle(self) -> None:
        now = time.monotonic()
        for name in [name for name, session in self._open.items() if now - session.used > self._idle_s]:
            del self._open[name]


def checked_seed(value: object) -> int:
    """Return the seed of a request. Raises Refusal if it is invalid."""
    if type(value) is not int or not 0 <= value < LARGEST_SEED:
        raise Refusal(400, f"a seed is a whole number from 0 to {LARGEST_SEED - 1}, not {str(value)[:40]!r}")
    return value
