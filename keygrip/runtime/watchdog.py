"""The watchdog of a control loop: a fault holds the arm; a fault that lasts stops it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np


class State(Enum):
    """State of a control loop."""

    RUNNING = "running"
    HOLDING = "holding"
    STOPPED = "stopped"


@dataclass(frozen=True)
class WatchdogSettings:
    """Conditions under which the arm is held or stopped.

    Args:
        stale_seconds: an older observation holds the arm (a frozen camera, a driver that hangs).
        stuck_seconds: a plan that takes longer holds the arm.
        hold_seconds: a fault that lasts this long stops the arm permanently; after a shorter one the arm continues.
        most_holds: after this many holds, the next fault stops the arm.
    """

    stale_seconds: float = 0.5
    stuck_seconds: float = 2.0
    hold_seconds: float = 2.0
    most_holds: int = 10

    def __post_init__(self) -> None:
        for name in ("stale_seconds", "stuck_seconds", "hold_seconds"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"watchdog.{name} must be finite and above 0, got {getattr(self, name)}")
        if self.most_holds < 0:
            raise ValueError(f"watchdog.most_holds must be at least 0, got {self.most_holds}")


class Watchdog:
    """Track the faults of a run.

    Args:
        settings: see `WatchdogSettings`.
    """

    def __init__(self, settings: WatchdogSettings | None = None) -> None:
        self.settings = settings or WatchdogSettings()
        self.state = State.RUNNING
        self.reason: str | None = None
        self.events: list[tuple[float, State, str]] = []
        self._since = 0.0
        self._holds = 0

    def update(self, now: float, fault: str | None) -> State:
        """Return the state after a control period.

        Args:
            now: seconds on the robot's clock. fault: the current fault, or None.
        """
        if self.state is State.STOPPED:
            return self.state
        if fault is None:
            if self.state is State.HOLDING:
                self._enter(State.RUNNING, now, "the fault is over")
                self.reason = None
            return self.state
        if self.state is State.RUNNING:
            self._holds, self._since = self._holds + 1, now
            self._enter(State.HOLDING, now, fault)
        if self._holds > self.settings.most_holds:
            self._enter(State.STOPPED, now, f"{fault} (after {self.settings.most_holds} holds)")
        elif now - self._since >= self.settings.hold_seconds:
            self._enter(State.STOPPED, now, f"{fault} (for {now - self._since:.1f} s)")
        return self.state

    def _enter(self, state: State, now: float, reason: str) -> None:
        self.state, self.reason = state, reason
        self.events.append((now, state, reason))
