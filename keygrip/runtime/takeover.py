"""Corrections by a person while a policy drives: read from a device, limited like plans, and recorded.

Corrections are recorded as native demonstrations in which the corrected frames are marked (`intervention` in
trajectory.npz). Training weights them by `data.intervention_weight` (Ross et al., "A Reduction of Imitation Learning
and Structured Prediction to No-Regret Online Learning", 2011; Kelly et al., "HG-DAgger", 2019).

Shape legend: A arms.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.data.robot.frame_rates import JUDGED_FROM, rate_of_times, rates_differ
from keygrip.data.robot.native_writer import ArmPose, CameraPose, DemoWriter
from keygrip.data.robot.signs import SignKeeper
from keygrip.models.policy import arm_axis
from keygrip.training.signals import Interrupted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Correction:
    """A person's correction in one control period.

    Attributes:
        velocity: [3] m/s of the tool, world axes. turn: [3] rad/s about world axes.
        gripper: opening 0 .. 1, None: unchanged. arm: index.
    """

    velocity: np.ndarray = field(default_factory=lambda: np.zeros(3))
    turn: np.ndarray = field(default_factory=lambda: np.zeros(3))
    gripper: float | None = None
    arm: int = 0


class TakeoverLostError(Exception):
    """The device with which a person drives the arm can no longer be read."""


class Takeover(Protocol):
    """A person at a device, or a script."""

    def read(self, now: float, command: np.ndarray) -> Correction | None:
        """Return the current correction; None: the policy drives.

        Args:
            now: seconds on the robot's clock. command: [A, 8] the current one.

        Raises:
            TakeoverLostError: The person drives the arm, and the device cannot be read: the arm must be held.
        """
        ...


def moved_by(command: np.ndarray, correction: Correction, seconds: float) -> np.ndarray:
    """Return the target [A, 8] of a correction: the current command advanced by one control period."""
    target = command.copy()
    arm = target[correction.arm]
    arm[:3] += np.asarray(correction.velocity, float) * seconds
    rotation = Rotation.from_rotvec(np.asarray(correction.turn, float) * seconds)
    arm[3:7] = (rotation * Rotation.from_quat(arm[3:7], scalar_first=True)).as_quat(scalar_first=True)
    if correction.gripper is not None:
        arm[7] = float(np.clip(correction.gripper, 0, 1))
    return target


def arm_index(arm: str | None, arms: Sequence[str]) -> int:
    """Return the index of the arm that a person moves.

    Args:
        arm: the setting `takeover.arm`; None: the only arm. arms: names, in the order of the commands.

    Raises:
        ValueError: There is no such arm, or there are several and none is named.
    """
    if arm is None and len(arms) > 1:
        choices = ", ".join(f"takeover.arm={name}" for name in arms)
        raise ValueError(f"takeover=... moves one arm, and there are {len(arms)}: choose it by one of {choices}")
    if arm is not None and arm not in arms:
        raise ValueError(f"takeover.arm={arm} is no arm of the policy, which moves {', '.join(arms)}")
    return 0 if arm is None else list(arms).index(arm)


class Device:
    """A device with which a person takes control of the arm and returns it.

    If the device is lost while a person drives the arm, this is a fault, which holds the arm and then stops it, because
    the person interrupted the policy for a reason. If it is lost while the policy drives, the policy continues, and
    nobody can take over.

    Attributes:
        active: whether the person drives the arm. opening: of the gripper, 0 to 1, last requested since the takeover;
            None: the gripper is unchanged, so that a takeover does not drop an object. arm: index of the arm that the
            person moves; meanwhile the other arms are held.
    """

    def __init__(self, arm: str | None = None) -> None:
        self.active = False
        self.arm = 0
        self._arm_name = arm
        self.opening: float | None = None
        self._closed = False

    def select_arm(self, arms: Sequence[str]) -> None:
        """Move the arm that the settings name. `arms`: names, in the order of the commands. Raises ValueError as
        `arm_index`."""
        self.arm = arm_index(self._arm_name, arms)

    def switch(self) -> None:
        """Take control, or return it."""
        self.active, self.opening = not self.active, None

    def switch_gripper(self, present: float) -> None:
        """Close an open gripper and open a closed one. `present`: opening, 0 to 1, used if none was requested yet."""
        self.opening = 0.0 if (present if self.opening is None else self.opening) > 0.5 else 1.0

    def lost(self, message: str) -> None:
        """Handle an unreadable device. Raises TakeoverLostError while a person drives the arm, else logs it once."""
        if self.active:
            raise TakeoverLostError(message)
        if not self._closed:
            log.error("%s: the policy drives on, and nobody can take over", message)
        self._closed = True


def read_unheeded(takeover: Takeover, now: float, command: np.ndarray) -> None:
    """Read a device of which no correction is used. Taking and returning control counts; an opening that is requested
    meanwhile does not. Raises TakeoverLostError as `Takeover.read`."""
    opening = takeover.opening if isinstance(takeover, Device) else None
    takeover.read(now, command)
    if isinstance(takeover, Device):
        takeover.opening = opening if takeover.active else None


class KeyboardTakeover(Device):
    """A terminal's keyboard: t takes or returns control, w s a d r f move (x, y, z), q e rotate, space the gripper.

    A terminal does not report key releases, so a motion lasts `repeat_seconds` after its last key press.

    Args:
        speed_m_s: of the tool. turn_rad_s: about the vertical. repeat_seconds: longer than the keyboard's repeat.
        arm: name of the arm that is moved; None: the only one.

    Raises:
        ValueError: Standard input is not a terminal.
    """

    MOVES: Mapping[str, tuple[int, float]] = {
        "w": (0, 1.0),
        "s": (0, -1.0),
        "a": (1, 1.0),
        "d": (1, -1.0),
        "r": (2, 1.0),
        "f": (2, -1.0),
    }
    TURNS: Mapping[str, float] = {"q": 1.0, "e": -1.0}

    def __init__(
        self, speed_m_s: float = 0.1, turn_rad_s: float = 0.6, repeat_seconds: float = 0.3, arm: str | None = None
    ) -> None:
        self.speed_m_s, self.turn_rad_s, self.repeat_seconds = speed_m_s, turn_rad_s, repeat_seconds
        super().__init__(arm)
        self._pressed: dict[str, float] = {}
        if not sys.stdin.isatty():
            raise ValueError("takeover=keyboard reads a terminal, and standard input is none: run it in one")
        import termios
        import tty

        self._stdin = sys.stdin
        self._terminal: Any = termios.tcgetattr(self._stdin)
        tty.setcbreak(self._stdin)

    def close(self) -> None:
        """Restore the terminal's settings."""
        if self._terminal is not None:
            import termios

            with contextlib.suppress(termios.error):  # the terminal is gone
                termios.tcsetattr(self._stdin, termios.TCSADRAIN, self._terminal)
            self._terminal = None

    def read(self, now: float, command: np.ndarray) -> Correction | None:
        try:
            for key in self._keys():
                self.press(key, now, float(command[self.arm, 7]))
        except EOFError:
            self.lost("lost the terminal in which a person drove the arm")
        if not self.active:
            return None
        pressed_keys = [key for key, moment in self._pressed.items() if now - moment < self.repeat_seconds]
        velocity, turn = np.zeros(3), np.zeros(3)
        for key in pressed_keys:
            if key in self.MOVES:
                axis, sign = self.MOVES[key]
                velocity[axis] += sign * self.speed_m_s
            turn[2] += self.TURNS.get(key, 0.0) * self.turn_rad_s
        return Correction(velocity, turn, self.opening, self.arm)

    def press(self, key: str, now: float, opening: float) -> None:
        """Handle a key press. `opening`: the gripper's command at this time, 0 to 1."""
        if key == "t":
            self.switch()
            self._pressed.clear()
        elif key == " " and self.active:
            self.switch_gripper(opening)
        elif key in self.MOVES or key in self.TURNS:
            self._pressed[key] = now

    def _keys(self) -> str:
        keys = ""
        while self._terminal is not None and select.select([self._stdin], [], [], 0)[0]:
            try:
                pressed = os.read(self._stdin.fileno(), 64)
            except OSError:
                pressed = b""
            if not pressed:  # a terminal without input is not ready; this one has ended and is always ready
                raise EOFError
            keys += pressed.decode(errors="ignore")
        return keys


class GamepadTakeover(Device):
    """A gamepad through Linux's joystick interface: the left stick moves in x and y, the right one in z and rotates;
    button 0 takes or returns control, button 1 closes and opens.

    Args:
        device: e.g. /dev/input/js0. speed_m_s, turn_rad_s: at full deflection. dead_band: fraction of a stick's range.
        axes: indices of the left stick's horizontal and vertical axis, then the right stick's. Defaults are those of
            the xpad driver, whose axes 2 and 5 are triggers. An axis is used only after it was seen at rest near 0; a
            trigger rests at an end of its range. arm: name of the arm that is moved; None: the only one.

    Raises:
        FileNotFoundError: The device does not exist. ValueError: There are not four axes.
    """

    EVENT = struct.Struct("<IhBB")  # time ms, value, type, number
    BUTTON, AXIS, INITIAL = 1, 2, 0x80

    def __init__(
        self,
        device: str = "/dev/input/js0",
        speed_m_s: float = 0.15,
        turn_rad_s: float = 0.8,
        dead_band: float = 0.1,
        axes: Sequence[int] = (0, 1, 3, 4),
        arm: str | None = None,
    ) -> None:
        if len(axes) != 4 or len(set(axes)) != 4:
            raise ValueError(f"takeover.axes are four different axes of the gamepad, got {list(axes)}")
        if not Path(device).exists():
            raise FileNotFoundError(f"there is no gamepad at {device}: plug one in, or name another takeover.device")
        self._file = os.open(device, os.O_RDONLY | os.O_NONBLOCK)
        self.speed_m_s, self.turn_rad_s, self.dead_band = speed_m_s, turn_rad_s, dead_band
        self.axes = tuple(axes)
        super().__init__(arm)
        self._axes: dict[int, float] = {}
        self._rested: set[int] = set()
        self._rest = b""

    def close(self) -> None:
        """Close the device."""
        os.close(self._file)

    def read(self, now: float, command: np.ndarray) -> Correction | None:
        try:
            self._rest += os.read(self._file, 4096)
        except BlockingIOError:
            pass  # no new events
        except OSError as error:
            self.lost(f"lost the gamepad with which a person drove the arm ({error})")
        whole = len(self._rest) // self.EVENT.size * self.EVENT.size
        opening = float(command[self.arm, 7])
        for _, value, kind, number in self.EVENT.iter_unpack(self._rest[:whole]):
            self._handle_event(value, kind & ~self.INITIAL, number, bool(kind & self.INITIAL), opening)
        self._rest = self._rest[whole:]
        if not self.active:
            return None
        across, along, turn, up = (self._axis_value(number) for number in self.axes)
        velocity = self.speed_m_s * np.array([-along, -across, -up])
        return Correction(velocity, np.array([0.0, 0.0, -turn * self.turn_rad_s]), self.opening, self.arm)

    def _handle_event(self, value: int, kind: int, number: int, initial: bool, opening: float) -> None:
        if kind == self.AXIS:
            self._axes[number] = value / 32767
            if abs(self._axes[number]) <= self.dead_band:
                self._rested.add(number)
        elif kind == self.BUTTON and value == 1 and not initial:
            if number == 0:
                self.switch()
            elif number == 1 and self.active:
                self.switch_gripper(opening)

    def _axis_value(self, number: int) -> float:
        value = self._axes.get(number, 0.0)
        return value if number in self._rested and abs(value) > self.dead_band else 0.0


class CorrectionRecorder:
    """Write a run as a native demonstration in which corrected frames are marked. A run without corrections is deleted.

    A run that ends by Ctrl-C, SIGTERM or a closed terminal is kept, because runs on an arm usually end this way.

    Args:
        folder: of the demonstration; must not exist. robot, task, instruction: for its metadata.
        arms: names, in the order of the observation's A axis. cameras: names of the entries of `cameras`; a single name
            refers to the observation's own image. fps: control periods per second; if fewer are reached, the rate of
            the frames is stored instead.
        models: arm and gripper of each arm by i2rt's names, for YAM arms; None: the default models.
    """

    def __init__(
        self,
        folder: Path | str,
        robot: str,
        task: str,
        instruction: str,
        arms: Sequence[str],
        cameras: Sequence[str],
        fps: float,
        models: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.arms, self.cameras, self.fps = tuple(arms), tuple(cameras), fps
        source: dict[str, Any] = {"recorder": "keygrip.run"}
        if models is not None:
            source["models"] = {arm: list(names) for arm, names in models.items()}
        self._writer = DemoWriter(folder, robot, task, instruction, fps, source=source)
        self.corrected = 0
        self._reached_signs = [SignKeeper() for _ in self.arms]
        self._commanded_signs = [SignKeeper() for _ in self.arms]
        self._times_ns: list[int] = []
        self._began: float | None = None

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt | Interrupted):
            kind = error = trace = None
        if not self.corrected or len(self._writer) < 2:
            self._writer.discard()
        elif error is None:  # after other errors nothing is stored
            self._state_reached_rate()
        self._writer.__exit__(kind, error, trace)

    def add(self, observation: Mapping[str, Any], command: np.ndarray, corrected: bool, now: float) -> None:
        """Add a frame: the observation, its command [A, 8], and its time in seconds on the robot's clock."""
        if self._began is None:
            self._began = now
        views = observation.get("cameras") or {self.cameras[0]: observation}
        position, quaternion = arm_axis(observation["position"], 1), arm_axis(observation["quaternion"], 1)
        gripper = np.clip(arm_axis(observation["gripper"], 0), 0, 1)
        joints = arm_axis(observation["joints"], 1) if "joints" in observation else [None] * len(self.arms)
        turns = [keep(quaternion[i]) for i, keep in enumerate(self._reached_signs)]
        commanded_turns = [keep(command[i, 3:7]) for i, keep in enumerate(self._commanded_signs)]
        time_ns = round((now - self._began) * 1e9)
        self._writer.add(
            time_ns,
            {name: np.asarray(views[name]["image"]) for name in self.cameras},
            {name: CameraPose(views[name]["intrinsics"], views[name]["world_to_camera"]) for name in self.cameras},
            {arm: ArmPose(position[i], turns[i], float(gripper[i]), joints[i]) for i, arm in enumerate(self.arms)},
            {arm: ArmPose(command[i, :3], commanded_turns[i], float(command[i, 7])) for i, arm in enumerate(self.arms)},
            intervention=corrected,
        )
        self._times_ns.append(time_ns)
        self.corrected += corrected

    def _state_reached_rate(self) -> None:
        """Store the rate of the frames as `fps` if the loop was slower than its rate: training leaves out
        demonstrations whose time stamps are of another rate than `fps`."""
        if len(self._times_ns) <= JUDGED_FROM:
            return
        rate = rate_of_times(np.array(self._times_ns), self.fps)
        if rates_differ(rate, self.fps):
            self._writer.fps = rate
            log.warning(
                "%s: %.4g frames per second were recorded, not %g (robot.control_hz): a control period with its images "
                "took too long. The frames are stored with fps=%.4g; for recordings of one rate, lower "
                "robot.control_hz or the size of the images",
                self._writer.folder,
                rate,
                self.fps,
                rate,
            )
