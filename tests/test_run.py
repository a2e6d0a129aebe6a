"""`keygrip run`: what it refuses before anything moves, and a run of the simulated arm."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import keygrip.runtime.cameras
import keygrip.runtime.i2rt_yam
from keygrip.config import SettingError, compose
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.inference import driving
from keygrip.inference.driving import StoppedError
from keygrip.models.policy import Needs, Observation, Plan, views_or_none
from keygrip.robots.kinematics import forward_kinematics
from keygrip.run import print_report, run
from keygrip.runtime.client import ServerError
from keygrip.runtime.planners import SimulatedPlanner
from keygrip.runtime.sim_yam import SimulatedYam
from keygrip.runtime.takeover import GamepadTakeover, KeyboardTakeover


class Steady:
    """Plans to stay at the current pose; fails if `fails` is set."""

    needs = Needs(("right",))

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def plan(self, observation: Observation) -> Plan:
        if self.fails:
            raise ValueError("the ray meets no plane")
        assert observation["image"].shape == (32, 32, 3)
        repeat = [np.repeat(np.atleast_2d(observation[name])[:, None], 8, 1) for name in ("position", "quaternion")]
        return Plan(*repeat, np.ones((1, 8)), 0.3)


SMALL = ("robot.real_time=false", "robot.image_size=32", "seconds=1.5", "checkpoint=here")


def test_a_run_reports_and_a_stopped_one_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy: Any = Steady()
    monkeypatch.setattr(driving, "_policy", lambda cfg: policy)
    result = run(compose("run", SMALL))
    assert result["state"] == "running"
    assert result["ticks"] == 15
    assert result["plans"] >= 1
    assert result["success"] is False
    assert run(compose("run", [*SMALL, "seconds=0.5", "execution=blocking"]))["state"] == "running"
    shown = run(compose("run", [*SMALL, f"dry_run={tmp_path}/plan.png"]))
    assert shown["refused"] is None
    assert (tmp_path / "plan.png").is_file()
    policy = Steady(fails=True)
    capsys.readouterr()
    with pytest.raises(StoppedError, match="meets no plane"):
        print_report(compose("run", [*SMALL, "seconds=10", "watchdog.hold_seconds=0.5"]))
    (line,) = capsys.readouterr().out.splitlines()
    stopped = json.loads(line)
    assert (stopped["state"], stopped["holds"], stopped["success"]) == ("stopped", 1, False)
    assert "meets no plane" in stopped["reason"]
    with pytest.raises(ValueError, match="continues a plan"):
        run(compose("run", [*SMALL, "execution.continue_chunks=true"]))
    for idle in (["execution=blocking", "execution.blend_seconds=0.2"], ["execution.asynchronous=false"]):
        with pytest.raises(ValueError, match=r"execution\.blend_seconds=0\.2 has no effect with execution\.async"):
            run(compose("run", [*SMALL, *idle]))
    policy.needs = Needs(("left", "right"))
    with pytest.raises(ValueError, match="the robot has right"):
        run(compose("run", SMALL))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("plan.txt", r"the ending \.txt is that of no known format: give a figure \(.*png.*\) or a rerun recording"),
        ("", "is a folder: name a file in it"),
    ],
)
def test_the_file_of_a_dry_run_is_checked_before_the_policy_is_loaded(
    file: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(driving, "_policy", lambda cfg: pytest.fail("the policy was loaded"))
    with pytest.raises(ValueError, match=f"^dry_run={re.escape(str(tmp_path / file))}:? {said}"):
        run(compose("run", [*SMALL, f"dry_run={tmp_path / file}"]))
    assert list(tmp_path.iterdir()) == []


def test_a_recording_for_rerun_is_refused_without_it_before_the_policy_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(driving, "_policy", lambda cfg: pytest.fail("the policy was loaded"))
    monkeypatch.setattr("keygrip.runtime.dry_run.find_spec", lambda package: None)
    with pytest.raises(ModuleNotFoundError, match=r"a \.rrd file needs rerun: pip install 'keygrip\[rerun\]'"):
        run(compose("run", [*SMALL, f"dry_run={tmp_path / 'plan.rrd'}"]))


def test_blending_without_effect_is_refused_before_the_policy_and_the_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    """An arm that is connected holds itself, and sinks when the connection is closed."""
    monkeypatch.setattr(driving, "_policy", lambda cfg: pytest.fail("the policy was loaded"))
    for idle in (["execution=blocking", "~execution.blend_seconds"], ["execution.asynchronous=false"]):
        with pytest.raises(ValueError, match=r"execution\.blend_seconds=0\.2 has no effect with execution\.async"):
            run(compose("run", [*SMALL, *idle]))


def test_a_plan_far_outside_the_training_positions_holds_the_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sideways(Steady):
        """Plans to move 16 cm along y. In training no position was more than 1 cm from the start along y."""

        workspace = np.array([[-2.0, -0.01, -2.0], [2.0, 0.01, 2.0]])

        def plan(self, observation: Observation) -> Plan:
            plan = super().plan(observation)
            plan.position[..., 1] = np.linspace(0.02, 0.16, 8)
            return plan

    monkeypatch.setattr(driving, "_policy", lambda cfg: Sideways())
    monkeypatch.setattr(driving, "ThreadPlanner", immediate)
    with pytest.raises(
        StoppedError, match=r"0\.15 m outside the box of the training data, more than bounds\.plan_m=0\.1"
    ):
        run(compose("run", [*SMALL, "seconds=10", "watchdog.hold_seconds=0.5"]))
    assert run(compose("run", [*SMALL, "bounds.plan_m=0.2"]))["state"] == "running"


def test_a_run_ends_with_its_plan_and_after_its_robot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that is inside torch when Python ends would abort the process; the arm does not wait for the plan."""
    closed, planned = threading.Event(), threading.Event()
    close = SimulatedYam.close

    class Slow(Steady):
        def plan(self, observation: Observation) -> Plan:
            closed.wait(20)
            time.sleep(0.2)
            planned.set()
            return super().plan(observation)

    def closing(robot: SimulatedYam) -> None:
        close(robot)
        closed.set()

    monkeypatch.setattr(driving, "_policy", lambda cfg: Slow())
    monkeypatch.setattr(SimulatedYam, "close", closing)
    assert run(compose("run", [*SMALL, "robot.real_time=true", "seconds=0.3"]))["plans"] == 0
    assert planned.is_set()


def test_a_slow_policy_has_no_latency_on_the_clock_of_the_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Steady):
        def plan(self, observation: Observation) -> Plan:
            time.sleep(0.15)
            return super().plan(observation)

    monkeypatch.setattr(driving, "_policy", lambda cfg: Slow())
    result = run(compose("run", SMALL))
    assert (result["state"], result["ticks"], result["holds"]) == ("running", 15, 0)
    assert result["plans"] >= 1


def immediate(policy: Any, awaited: bool = True) -> SimulatedPlanner:
    return SimulatedPlanner(policy, lambda: 0.0)


def test_a_server_is_given_the_token_and_the_certificate_to_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    waits: list[bool] = []
    monkeypatch.setattr(driving, "RemotePolicy", lambda url, **options: asked.append((url, options)) or Steady())
    monkeypatch.setattr(driving, "ThreadPlanner", lambda *given, awaited: waits.append(awaited) or immediate(*given))
    local = [setting for setting in SMALL if not setting.startswith("checkpoint")]
    served = ["robot.real_time=true", "server=https://gpu:8421", "token=correct-horse-battery", "ca=cert.pem"]
    run(compose("run", [*local, *served]))
    assert asked == [("https://gpu:8421", {"token": "correct-horse-battery", "ca": "cert.pem", "renews": True})]
    assert waits == [False]  # it does not wait for a last answer of the server
    for setting in (
        "tf32=true",
        "device=cpu",
        "policy.seed=1",
        "checkpoint_step=5",
        "trust=[theirs]",
        "external.encoders.text.source=folder",
        "bounds.start_m=0.01",
    ):
        name = setting.partition("=")[0].partition(".")[0]
        with pytest.raises(ValueError, match=f"{name} has no effect with server=.*keygrip serve"):
            run(compose("run", [*local, "server=https://gpu:8421", setting]))
    with pytest.raises(ValueError, match="tf32=true is for GPUs"):
        run(compose("run", [*SMALL, "tf32=true", "device=cpu"]))
    with pytest.raises(ValueError, match="token has no effect with checkpoint"):
        run(compose("run", [*SMALL, "token=correct-horse-battery"]))


def test_a_record_that_exists_is_refused_before_a_person_gets_the_keyboard(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(driving, "_policy", lambda cfg: Steady())
    monkeypatch.setattr(KeyboardTakeover, "__init__", lambda self, **settings: pytest.fail("the terminal was taken"))
    with pytest.raises(FileExistsError, match="exists already"):
        run(compose("run", [*SMALL, "takeover=keyboard", f"record={tmp_path}"]))


@pytest.mark.parametrize("device", ["keyboard", "gamepad"])
def test_a_takeover_of_several_arms_names_one_before_the_robot_is_connected(
    device: str, monkeypatch: pytest.MonkeyPatch, real: list[str]
) -> None:
    """Only the first arm could be moved, while the other one stood still in frames marked as corrected."""
    monkeypatch.setattr(keygrip.runtime.i2rt_yam, "connect", lambda *_: pytest.fail("the arm was connected"))
    monkeypatch.setattr(driving, "_policy", lambda cfg: Closing("left", "right"))
    two = [*real, "+robot.arms.left=can1", f"takeover={device}"]
    with pytest.raises(ValueError, match=r"there are 2: choose it by one of takeover\.arm=left, takeover\.arm=right$"):
        run(compose("run", two))
    with pytest.raises(ValueError, match=r"^takeover\.arm=third is no arm of the policy, which moves left, right$"):
        run(compose("run", [*two, "takeover.arm=third"]))


@pytest.mark.parametrize(("named", "index"), [("left", 0), ("right", 1)])
def test_a_person_moves_the_arm_that_is_named(
    named: str,
    index: int,
    monkeypatch: pytest.MonkeyPatch,
    drivers: dict[str, Driver],
    real: list[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(driving, "_policy", lambda cfg: Closing("left", "right"))
    # take over, left stick forward after it was at rest, close the gripper
    events = [(0, 0, 2, 1), (1, 1, 1, 0), (2, -32767, 2, 1), (3, 1, 1, 1)]
    pad = tmp_path / "js0"
    pad.write_bytes(b"".join(GamepadTakeover.EVENT.pack(*event) for event in events))
    settings = [*real, "+robot.arms.left=can1", "takeover=gamepad", f"takeover.device={pad}", f"takeover.arm={named}"]
    report = run(compose("run", settings))
    assert report["corrected_ticks"] == report["ticks"]
    moved, held = (drivers[channel].commands for channel in (("can1", "can0") if index == 0 else ("can0", "can1")))
    reach = [forward_kinematics(commands[-1][:6])[0][0] - forward_kinematics(HOME)[0][0] for commands in (moved, held)]
    assert reach[0] > 0.005
    assert abs(reach[1]) < 1e-6
    assert (moved[-1][6], held[-1][6]) == (0.0, 1.0)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match=r"record=kept keeps corrections.*give takeover="):
        run(compose("run", [*SMALL, "record=kept"]))
    for idle in ("takeover=keyboard", "record=kept"):
        with pytest.raises(ValueError, match=rf"{idle.partition('=')[0]}=... has no effect with dry_run=plan.png"):
            run(compose("run", [*SMALL, idle, "dry_run=plan.png"]))
    for name, value in (("bounds", "null"), ("watchdog", "null"), ("watchdog", "false")):
        with pytest.raises(SettingError, match=rf"{name}={value}: these settings cannot be left out.* {name}\.NAME="):
            run(compose("run", [*SMALL, f"{name}={value}"]))
    with pytest.raises(ValueError, match="one of checkpoint=RUN and server"):
        run(compose("run"))
    with pytest.raises(SettingError, match="execute_seconds"):
        compose("evaluate", ["checkpoint=x", "control.execute_steps=3"])


HOME = np.array([0.0, 1.05, 1.0, 0.6, 0.0, 0.0])


class Driver:
    """An arm that is at the commanded joints."""

    def __init__(self) -> None:
        self.state = np.append(HOME, 1.0)
        self.commands: list[np.ndarray] = []

    def get_joint_pos(self) -> np.ndarray:
        return self.state

    def command_joint_pos(self, joint_pos: np.ndarray) -> None:
        self.state = joint_pos.copy()
        self.commands.append(self.state)

    def close(self) -> None: ...


class Grey:
    """A camera whose images have the number of its device as brightness."""

    def __init__(self, source: str, **settings: Any) -> None:
        self.level = int(source.removeprefix("/dev/video"))

    def read(self) -> tuple[np.ndarray, float]:
        return np.full((48, 64, 3), self.level, np.uint8), time.monotonic()

    def close(self) -> None: ...


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Driver]:
    """Replace the arms of CAN channels and the cameras of video devices; return the arms by channel."""
    found = {"can0": Driver(), "can1": Driver()}
    monkeypatch.setattr(keygrip.runtime.i2rt_yam, "connect", lambda channel, *_: found[channel])
    monkeypatch.setattr(keygrip.runtime.cameras, "VideoCamera", Grey)
    monkeypatch.setattr(driving, "ThreadPlanner", immediate)
    return found


@pytest.fixture
def real(tmp_path: Path) -> list[str]:
    """Settings of a real robot at a table."""
    camera = {
        "width": 64,
        "height": 48,
        "intrinsics": {"fx": 60, "fy": 60, "cx": 31.5, "cy": 23.5},
        "world_to_camera": np.eye(4).tolist(),
    }
    beside = np.eye(4)
    beside[1, 3] = 0.6
    content = {
        "schema": "keygrip.calibration/1",
        "conventions": {"camera": "opencv", "pixel": "centre", "length": "m"},
        "cameras": {"over": camera, "front": camera},
        "arms": {"right": {"world_from_base": np.eye(4).tolist()}, "left": {"world_from_base": beside.tolist()}},
    }
    (tmp_path / "calibration.yaml").write_text(yaml.safe_dump(content))
    given = [
        "robot=yam",
        f"robot.calibration={tmp_path}/calibration.yaml",
        "limits=null",
        "bounds.image_levels=0",
    ]
    return [*given, "checkpoint=here", "seconds=0.3"]


class Closing:
    """Plans to close the gripper of the first arm; the others stay as they are."""

    def __init__(self, *arms: str, camera: str | None = None) -> None:
        self.needs = Needs(arms, camera=camera)
        self.seen: list[Observation] = []

    def plan(self, observation: Observation) -> Plan:
        self.seen.append(observation)
        repeat = [np.repeat(np.asarray(observation[name])[:, None], 8, 1) for name in ("position", "quaternion")]
        gripper = np.ones((len(self.needs.arms), 8))
        gripper[0] = 0.0
        return Plan(*repeat, gripper, 0.1)


@pytest.mark.parametrize("arms", [("left", "right"), ("right", "left")])
def test_each_of_two_arms_is_seen_and_moved_by_its_name(
    arms: tuple[str, str], monkeypatch: pytest.MonkeyPatch, drivers: dict[str, Driver], real: list[str]
) -> None:
    """The file names the right arm first, so the left arm, which is added, comes after it."""
    policy = Closing(*arms)
    monkeypatch.setattr(driving, "_policy", lambda cfg: policy)
    run(compose("run", [*real, "+robot.arms.left=can1"]))
    first, second = ("can1", "can0") if arms[0] == "left" else ("can0", "can1")
    assert min(command[6] for command in drivers[first].commands) == 0.0
    assert min(command[6] for command in drivers[second].commands) == 1.0
    across = policy.seen[0]["position"][:, 1]
    assert across[arms.index("left")] - across[arms.index("right")] == pytest.approx(0.6)


def test_arms_of_other_names_and_an_order_that_cannot_be_changed_are_refused(
    monkeypatch: pytest.MonkeyPatch, drivers: dict[str, Driver], real: list[str]
) -> None:
    monkeypatch.setattr(driving, "_policy", lambda cfg: Closing("left", "right"))
    with pytest.raises(ValueError, match="policy moves left, right, the robot has right, third"):
        driving._refuse_mismatch(Closing("left", "right"), Fixed("right", "third"))
    with pytest.raises(ValueError, match="left, right in this order, the robot gives right, left"):
        driving._refuse_mismatch(Closing("left", "right"), Fixed("right", "left"))
    driving._refuse_mismatch(Closing("left"), Fixed("right"))
    with pytest.raises(ValueError, match=r"the robot has right: give robot\.arms the policy's names"):
        run(compose("run", real))
    with pytest.raises(ValueError, match=r"the robot has right: its arms cannot be changed\. .*keygrip evaluate"):
        run(compose("run", SMALL))  # the simulated arm has no setting `arms`
    assert not any(driver.commands for driver in drivers.values())


class Lifting(Closing):
    """Plans to raise the arm farther than it reaches."""

    def plan(self, observation: Observation) -> Plan:
        plan = super().plan(observation)
        plan.position[..., 2] += np.linspace(0, 0.6, 9)[1:]
        return plan


def test_a_dry_run_sends_a_real_arm_nothing_and_knows_its_reach(
    monkeypatch: pytest.MonkeyPatch, drivers: dict[str, Driver], real: list[str], tmp_path: Path
) -> None:
    """It used to receive its current pose at the end, with the measured opening of the gripper."""
    policies: list[Any] = [Closing("right", camera="over"), Lifting("right", camera="over")]
    monkeypatch.setattr(driving, "_policy", lambda cfg: policies.pop(0))
    dry = [*real, f"dry_run={tmp_path}/plan.png"]
    assert run(compose("run", dry))["refused"] is None
    assert "the arm cannot reach" in run(compose("run", dry))["refused"]
    assert drivers["can0"].commands == []


class Fixed:
    """A robot whose arms and cameras are in the order of its wiring."""

    def __init__(self, *arms: str, cameras: tuple[str, ...] = ("over",)) -> None:
        self.arms, self.cameras = arms, cameras


FRONT = "+robot.cameras.front={_target_:keygrip.runtime.cameras.VideoCamera,source:/dev/video200}"


@pytest.mark.parametrize(("trained", "level"), [("over", 0), ("front", 200)])
def test_a_policy_of_one_camera_gets_the_one_that_it_was_trained_on(
    trained: str, level: int, monkeypatch: pytest.MonkeyPatch, drivers: dict[str, Driver], real: list[str]
) -> None:
    policy = Closing("right", camera=trained)
    monkeypatch.setattr(driving, "_policy", lambda cfg: policy)
    run(compose("run", [*real, FRONT]))
    assert policy.seen[0]["image"].mean() == level
    assert set(policy.seen[0]["cameras"]) == {"over", "front"}


def test_a_camera_of_another_name_is_refused_beside_others_and_taken_alone(
    monkeypatch: pytest.MonkeyPatch, drivers: dict[str, Driver], real: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    policy = Closing("right", camera="top")
    monkeypatch.setattr(driving, "_policy", lambda cfg: policy)
    with pytest.raises(ValueError, match="trained on camera 'top'; the robot has over, front"):
        run(compose("run", [*real, FRONT]))
    assert policy.seen == []
    run(compose("run", real))
    assert policy.seen
    with pytest.raises(ValueError, match="trained on camera 'front', the robot gives the image of 'over'"):
        driving._refuse_mismatch(Closing("right", camera="front"), Fixed("right", cameras=("over", "front")))
    driving._refuse_mismatch(Closing("right"), Fixed("right", cameras=("over", "front")))
    assert "does not say which camera" in caplog.text


def test_a_single_camera_is_used_under_any_name_by_a_policy_that_names_its_views(
    monkeypatch: pytest.MonkeyPatch, drivers: dict[str, Driver], real: list[str]
) -> None:
    policy = Closing("right")
    policy.needs = Needs(("right",), cameras=("top",))
    monkeypatch.setattr(driving, "_policy", lambda cfg: policy)
    assert run(compose("run", real))["state"] == "running"
    (view,) = views_or_none(policy.seen[0], policy.needs.cameras)
    assert view is not None
    assert view["image"].shape == (48, 64, 3)


def test_a_run_with_a_server_ends_its_session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended = []

    class Remote(Steady):
        def end_session(self) -> None:
            ended.append(True)

    monkeypatch.setattr(driving, "RemotePolicy", lambda url, **options: Remote())
    monkeypatch.setattr(driving, "ThreadPlanner", immediate)
    local = [setting for setting in SMALL if not setting.startswith("checkpoint")]
    run(compose("run", [*local, "server=http://gpu:8421"]))
    assert ended == [True]

    class Full(Remote):
        def reset(self, seed: int) -> None:
            raise ServerError(503, "64 sessions are open")

    monkeypatch.setattr(driving, "RemotePolicy", lambda url, **options: Full())
    with pytest.raises(ConnectionError, match=r"server=http://gpu:8421: .*64 sessions are open"):
        run(compose("run", [*local, "server=http://gpu:8421"]))
    assert ended == [True, True]

    class Slow(Remote):
        def plan(self, observation: Observation) -> Plan:
            raise ServerError(504, "the plan took longer than 30 s")

    monkeypatch.setattr(driving, "RemotePolicy", lambda url, **options: Slow())
    with pytest.raises(ConnectionError, match=r"server=http://gpu:8421: .*the plan took longer than 30 s"):
        run(compose("run", [*local, "server=http://gpu:8421", f"dry_run={tmp_path}/plan.png"]))
    assert not (tmp_path / "plan.png").exists()


def test_the_simulated_cell_draws_the_camera_that_the_policy_was_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    for trained in ("over", "front", "top", None):
        settings = driving._for_policy(compose("run", SMALL), Closing("right", camera=trained)).robot
        drawn[trained] = settings.cameras
    assert drawn == {"over": ["over"], "front": ["front"], "top": None, None: None}
    policy = Closing("right", camera="front")
    monkeypatch.setattr(driving, "_policy", lambda cfg: policy)
    monkeypatch.setattr(driving, "ThreadPlanner", immediate)
    run(compose("run", [*SMALL, "seconds=0.1", "bounds.image_levels=0"]))
    front, over = _seen_by_cell("front", "over")
    np.testing.assert_array_equal(policy.seen[0]["image"], front)
    assert not np.array_equal(front, over)


def _seen_by_cell(*cameras: str) -> list[np.ndarray]:
    robot = SimulatedYam(TaskOptions(name="pick_place"), image_size=32, cameras=cameras, real_time=False)
    views = robot.observe()["cameras"]
    robot.close()
    return [views[name]["image"] for name in cameras]
