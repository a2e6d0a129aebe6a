"""`keygrip run`: what it refuses before anything moves, and a run of the simulated arm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keygrip.run
from keygrip.config import SettingError, compose
from keygrip.models.policy import Needs, Observation, Plan
from keygrip.run import StoppedError, run
from keygrip.runtime.planners import SimulatedPlanner
from keygrip.runtime.takeover import KeyboardTakeover


class Steady:
    """Plans to stay where the arm is; fails when told to."""

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


def test_a_run_reports_and_a_stopped_one_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    policy: Any = Steady()
    monkeypatch.setattr(keygrip.run, "_policy", lambda cfg: policy)
    monkeypatch.setattr(keygrip.run, "ThreadPlanner", immediate)
    result = run(compose("run", SMALL))
    assert result["state"] == "running"
    assert result["ticks"] == 15
    assert result["plans"] >= 1
    assert result["success"] is False
    shown = run(compose("run", [*SMALL, f"dry_run={tmp_path}/plan.png"]))
    assert shown["refused"] is None
    assert (tmp_path / "plan.png").is_file()
    policy = Steady(fails=True)
    with pytest.raises(StoppedError, match="meets no plane"):
        run(compose("run", [*SMALL, "seconds=10", "watchdog.hold_seconds=0.5"]))
    with pytest.raises(ValueError, match="continues a plan"):
        run(compose("run", [*SMALL, "execution.continue_chunks=true"]))
    policy.needs = Needs(("left", "right"))
    with pytest.raises(ValueError, match="the robot has right"):
        run(compose("run", SMALL))


def immediate(policy: Any) -> SimulatedPlanner:
    return SimulatedPlanner(policy, lambda: 0.0)


def test_a_server_is_given_the_token_and_the_certificate_to_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(keygrip.run, "RemotePolicy", lambda url, **options: asked.append((url, options)) or Steady())
    monkeypatch.setattr(keygrip.run, "ThreadPlanner", immediate)
    local = [setting for setting in SMALL if not setting.startswith("checkpoint")]
    run(compose("run", [*local, "server=https://gpu:8421", "token=correct-horse-battery", "ca=cert.pem"]))
    assert asked == [("https://gpu:8421", {"token": "correct-horse-battery", "ca": "cert.pem"})]
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
    monkeypatch.setattr(keygrip.run, "_policy", lambda cfg: Steady())
    monkeypatch.setattr(KeyboardTakeover, "__init__", lambda self, **settings: pytest.fail("the terminal was taken"))
    with pytest.raises(FileExistsError, match="exists already"):
        run(compose("run", [*SMALL, "takeover=keyboard", f"record={tmp_path}"]))


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="one of checkpoint=RUN and server"):
        run(compose("run"))
    with pytest.raises(SettingError, match="execute_seconds"):
        compose("evaluate", ["checkpoint=x", "control.execute_steps=3"])
