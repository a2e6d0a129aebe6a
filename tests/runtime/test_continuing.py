"""Real-time chunking with a policy on a server: the plan in execution is sent with the observation."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save
from vla_parts import T, ready_module

import keygrip.run
from keygrip.config import compose
from keygrip.inference import driving
from keygrip.models.geometry_vla.policy import GeometryVLAPolicy
from keygrip.models.policy import Needs, Plan, Policy, UnderWay, can_continue
from keygrip.runtime import openpi, planners
from keygrip.runtime.asynchronous import ChunkExecution
from keygrip.runtime.batch_planner import BatchPlanner, UnavailableError
from keygrip.runtime.client import RemotePolicy
from keygrip.runtime.control_loop import ControlLoop
from keygrip.runtime.messagepack import pack
from keygrip.runtime.planners import SimulatedPlanner
from keygrip.runtime.plausibility import Bounds, PlausiblePolicy
from keygrip.runtime.wire import CONTENT_TYPE, WireError, decode_request, encode_observation

Observe = Callable[..., dict[str, Any]]
Start = Callable[..., Any]
PATIENT = {"plan_s": 120.0, "stuck_s": 240.0, "read_s": 120.0}  # a busy machine must not fail the test
BOUNDS = Bounds(speed_m_s=50.0)  # the policy is untrained, its plans are jumps


def under_way(delay_s: float = 0.3, **changes: Any) -> UnderWay:
    """Return a plan with the size of the small policy's plans, made 0.6 s before the observation."""
    generator = np.random.default_rng(7)
    plan = Plan(
        position=np.array([0.3, 0.0, 0.1]) + 0.02 * generator.random((1, T, 3)),
        quaternion=np.tile([0.0, 1.0, 0.0, 0.0], (1, T, 1)),
        gripper=generator.random((1, T)),
        step_seconds=0.3,
        time_s=1000.1,
    )
    return UnderWay(replace(plan, **changes), delay_s)


class StillArm:
    """A robot on a simulated clock with a new observation every period; the tool stays in the middle of the box."""

    control_hz = 10.0

    def __init__(self, observe: Observe) -> None:
        self.observation, self.ticks = observe, 0

    def now(self) -> float:
        return 5000.0 + self.ticks / self.control_hz

    def wait_until(self, moment: float) -> None:
        self.ticks = round((moment - 5000.0) * self.control_hz)

    def observe(self, images: bool = True) -> dict[str, Any]:
        seen = self.observation(seed=self.ticks % 4)
        return {name: np.atleast_1d(seen[name])[None] for name in ("position", "quaternion")} | {
            **({"cameras": seen["cameras"], "instruction": seen["instruction"]} if images else {}),
            "gripper": np.array([0.5]),
            "time_s": self.now() - 0.02,
        }

    def command(self, poses: np.ndarray) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


def plans_with(policy: Policy, observe: Observe, continue_chunks: bool = True) -> list[Plan]:
    """Return all plans of three seconds in the control loop, each of which arrives 0.3 s after its observation."""
    robot, plans = StillArm(observe), list[Plan]()
    execution = ChunkExecution(
        SimulatedPlanner(policy, lambda: 0.3), robot.control_hz, execute_seconds=0.6, continue_chunks=continue_chunks
    )

    def note(tick: Any) -> None:
        plan = execution.last_plan
        if plan is not None and (not plans or plans[-1] is not plan):
            plans.append(plan)

    report = ControlLoop(robot, execution, None, on_tick=note).run(3.0)  # type: ignore[arg-type]
    assert not report.events
    return plans


def test_a_policy_on_a_server_continues_its_plans_as_one_in_process(
    running: Start, observation: Observe, tmp_path: Path
) -> None:
    module = ready_module(tmp_path)

    def policy() -> GeometryVLAPolicy:
        return GeometryVLAPolicy(module, temperature=1.0)

    here = policy()
    here.reset(3)
    local = plans_with(PlausiblePolicy(here, BOUNDS), observation)
    with RemotePolicy(running(policy(), here.needs, more={"bounds": BOUNDS}, **PATIENT).url, 120.0) as there:
        assert can_continue(there)
        there.reset(3)
        remote = plans_with(there, observation)
    assert len(local) == len(remote) >= 6
    for one, other in zip(local, remote, strict=True):
        assert one.time_s == other.time_s
        for name in ("position", "quaternion", "gripper"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    here.reset(3)
    apart = plans_with(PlausiblePolicy(here, BOUNDS), observation, continue_chunks=False)
    np.testing.assert_array_equal(apart[0].position, local[0].position)
    assert not np.allclose(apart[1].position, local[1].position, atol=1e-4)

    def break_m(plans: list[Plan]) -> float:
        """Return the mean distance between the current step of a plan and that of the plan that it replaces after 0.3
        s."""
        ways = [new.position[0, 0] - old.position[0, 1] for old, new in pairwise(plans)]
        return float(np.mean(np.linalg.norm(ways, axis=1)))

    assert break_m(remote) < 0.7 * break_m(apart)


def test_those_that_continue_a_plan_wait_with_those_that_do_not(observation: Observe, tmp_path: Path) -> None:
    policy = GeometryVLAPolicy(ready_module(tmp_path), temperature=0.0)  # a plan is a function of its request
    asked = [(observation(seed=seed, time_s=1000.7), under_way() if seed == 2 else None) for seed in range(5)]
    counts: list[int] = []

    async def together() -> list[Plan]:
        limits = {"batch": 4, "plan_s": 120.0, "stuck_s": 240.0, "replacements": 0}
        planner = BatchPlanner(policy, None, observe=lambda seconds, count: counts.append(count), **limits)  # type: ignore[arg-type]
        try:
            return list(await asyncio.gather(*(planner.plan(policy, *one) for one in asked)))
        finally:
            planner.close()

    plans = asyncio.run(together())
    assert sum(counts) == 5
    for (seen, executing), plan in zip(asked, plans, strict=True):
        alone = policy.plan(seen) if executing is None else policy.plan_continuing(seen, executing.plan, 0.3)
        np.testing.assert_allclose(plan.position, alone.position, atol=1e-5)


def test_the_end_waits_for_the_thread_that_computes(observation: Observe) -> None:
    """A thread that is inside torch when Python ends would abort the process."""
    inside, ended = threading.Event(), threading.Event()

    class Slow:
        def plan(self, seen: dict[str, Any]) -> Plan:
            inside.set()
            time.sleep(0.3)
            ended.set()
            raise ValueError("no plan")

    async def given_up() -> None:
        limits = {"batch": 1, "plan_s": 120.0, "stuck_s": 240.0, "replacements": 0}
        policy: Any = Slow()
        planner = BatchPlanner(policy, None, observe=lambda seconds, count: None, **limits)  # type: ignore[arg-type]
        asked = asyncio.create_task(planner.plan(policy, observation()))
        await asyncio.to_thread(inside.wait)
        asked.cancel()
        planner.close()
        assert ended.is_set()

    asyncio.run(given_up())


def test_the_end_does_not_wait_for_a_stuck_policy_that_is_being_replaced(
    observation: Observe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    over = threading.Event()
    monkeypatch.setattr(planners, "ENDING_S", 0.05)

    class Stuck:
        def plan(self, seen: dict[str, Any]) -> Plan:
            over.wait(20)
            raise ValueError("no plan")

    def make() -> Any:
        over.wait(20)
        return Stuck()

    async def ended(stuck_s: float) -> None:
        limits = {"batch": 1, "plan_s": 0.1, "stuck_s": stuck_s, "replacements": 1}
        policy: Any = Stuck()
        planner = BatchPlanner(policy, make, observe=lambda seconds, count: None, **limits)  # type: ignore[arg-type]
        watching = asyncio.create_task(planner.watch())
        asked = asyncio.create_task(planner.plan(policy, observation()))
        if stuck_s < 1:
            with pytest.raises(UnavailableError, match="is being loaded again"):
                await asked
        else:
            while planner.trouble() is None:
                await asyncio.sleep(0.01)
        planner.close()
        watching.cancel()
        asked.cancel()

    asyncio.run(ended(0.1))
    assert "still computes" not in caplog.text
    asyncio.run(ended(240.0))
    assert "still computes after 0.05 s" in caplog.text
    over.set()


def test_a_plan_under_way_arrives_as_it_was(observation: Observe, needs: Needs) -> None:
    for extra in ({}, {"joints": np.full((1, T, 6), 0.1)}, {"controller": np.full((1, T, 7), -0.1)}):
        sent = under_way(0.25, **extra)
        body = encode_observation(observation(time_s=1000.7), needs, sent)
        seen, received = decode_request(body, needs, continues=True)
        assert received is not None
        assert (seen["time_s"], received.delay_s, received.plan.time_s) == (1000.7, 0.25, 1000.1)
        assert received.plan.step_seconds == 0.3
        for name in ("position", "quaternion", "gripper", "joints", "controller"):
            value, there = getattr(sent.plan, name), getattr(received.plan, name)
            assert (value is None and there is None) or np.array_equal(value, there)
    with pytest.raises(ValueError, match="the observation and the plan need time_s"):
        encode_observation(observation(), needs, under_way())
    with pytest.raises(ValueError, match="the observation and the plan need time_s"):
        encode_observation(observation(time_s=1.0), needs, under_way(time_s=None))


ATTACKS: list[tuple[dict[str, Any], str]] = [
    ({"executing/position": np.zeros((1, T, 4))}, "'executing/position' must be 1 x T x 3, not 1 x 4 x 4"),
    ({"executing/position": np.zeros((T, 3))}, "'executing/position' must be 1 x T x 3, not 4 x 3"),
    ({"executing/position": np.zeros((2, T, 3))}, "'executing/position' must be 1 x T x 3, not 2 x 4 x 3"),
    ({"executing/position": np.zeros((1, T + 1, 3))}, "'executing/position' has 5 steps, 'executing/gripper' 4"),
    ({"executing/position": np.full((1, T, 3), np.nan)}, "'executing/position' holds numbers that are not finite"),
    ({"executing/position": np.zeros((1, T, 3), np.int64)}, "'executing/position' must be float32 or float64"),
    ({"executing/position": np.zeros((1, T, 3), np.uint8)}, "'executing/position' must be float32 or float64"),
    ({"executing/position": None}, "a plan under way lacks 'executing/position'"),
    ({"executing/quaternion": np.zeros((1, T, 4))}, "'executing/quaternion' is no unit quaternion"),
    ({"executing/gripper": np.full((1, T), 3.0)}, r"'executing/gripper' must lie in 0 \(closed\) to 1"),
    ({"executing/gripper": np.zeros((1, 0))}, "'executing/gripper' has 0 steps, outside 1 to 1000"),
    ({"executing/gripper": np.zeros((1, 1001))}, "'executing/gripper' has 1001 steps, outside 1 to 1000"),
    ({"executing/step_seconds": np.array(0.0)}, "'executing/step_seconds' must be above 0"),
    ({"executing/step_seconds": np.array(np.nan)}, "'executing/step_seconds' holds numbers that are not finite"),
    ({"executing/step_seconds": np.full(1, 0.3)}, "'executing/step_seconds' must be a single number, not 1"),
    ({"executing/time_s": None}, "a plan under way lacks 'executing/time_s'"),
    ({"executing/time_s": np.array(5e8)}, "outside -1 to 600: 'time_s' and 'executing/time_s' are seconds of one"),
    ({"executing/time_s": np.array(-1.7e308), "time_s": np.array(1.7e308)}, "was taken inf s after"),
    ({"time_s": np.array(np.inf)}, "'time_s' holds numbers that are not finite"),
    ({"time_s": None}, "a plan under way lacks 'time_s'"),
    ({"delay_s": None}, "a plan under way lacks 'delay_s'"),
    ({"delay_s": np.array(-0.1)}, "'delay_s' must lie in 0 to 60 seconds"),
    ({"delay_s": np.array(1e300)}, "'delay_s' must lie in 0 to 60 seconds"),
    ({"executing/joints": np.zeros((1, T, 0))}, "'executing/joints' has 0 numbers per step, outside 1 to 64"),
    ({"executing/joints": np.zeros((1, T, 65))}, "'executing/joints' has 65 numbers per step, outside 1 to 64"),
    ({"executing/joints": np.zeros((1, 2, 6))}, "'executing/joints' has 2 steps, 'executing/gripper' 4"),
    ({"executing/joints": np.full((1, T, 6), -1e30)}, r"'executing/joints' holds numbers above 1e\+06"),
    ({"executing/controller": np.full((1, T, 7), np.inf)}, "'executing/controller' holds numbers that are not finite"),
    ({"executing/velocity": np.zeros((1, T, 3))}, "unknown array 'executing/velocity'"),
]


def attacked(body: bytes, changes: dict[str, np.ndarray | None]) -> bytes:
    arrays = {name: value for name, value in (load(body) | changes).items() if value is not None}
    return bytes(save(arrays))


def post(port: int, body: bytes) -> tuple[int, str]:
    """Post a body; return the status and the message of a refusal."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/plan", body, {"Content-Type": CONTENT_TYPE})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, "" if answer.status == 200 else str(json.loads(content)["error"])


def test_a_plan_under_way_that_makes_no_sense_is_refused_in_a_sentence(
    running: Start, observation: Observe, tmp_path: Path
) -> None:
    policy = GeometryVLAPolicy(ready_module(tmp_path))
    server = running(policy, policy.needs, more={"bounds": BOUNDS}, **PATIENT)
    body = encode_observation(observation(time_s=1000.7), policy.needs, under_way())
    assert post(server.port, body) == (200, "")
    for changes, message in ATTACKS:
        with pytest.raises(WireError, match=message):
            decode_request(attacked(body, changes), policy.needs, continues=True)
        status, said = post(server.port, attacked(body, changes))
        assert status == 400, (changes, said)
        assert len(said) < 500
        assert "\n" not in said
    far = {"executing/position": np.full((1, T, 3), 40.0)}
    assert post(server.port, attacked(body, far))[0] == 422
    assert "'executing/position' (40, 40, 40) lies" in post(server.port, attacked(body, far))[1]
    steps = {"executing/step_seconds": np.array(0.1)}
    assert post(server.port, attacked(body, steps)) == (
        422,
        "the plan under way has steps of 0.1 s, those of this policy are 0.3 s: it continues its own plans",
    )
    assert post(server.port, body) == (200, "")  # the server still works


def test_who_cannot_continue_a_plan_says_so(
    running: Start, toy: Any, observation: Observe, monkeypatch: pytest.MonkeyPatch, needs: Needs
) -> None:
    seen = observation(time_s=1000.7)
    server = running(toy(), **PATIENT)
    with RemotePolicy(server.url, 120.0) as policy:
        assert not can_continue(policy)
        assert "under_way" not in policy.health()
        policy.plan(seen)  # its time is not sent
        with pytest.raises(ValueError, match="'delay_s' is of a plan under way, which this policy does not continue"):
            policy.plan_continuing(seen, under_way().plan, 0.1)
        assert policy.health()["answers"]["400"] == 1
    remote = ["robot.real_time=false", "robot.image_size=32", f"server={server.url}", "execution.continue_chunks=true"]
    monkeypatch.setattr(driving, "_refuse_mismatch", lambda policy, robot, arms_are_set: None)
    with pytest.raises(ValueError, match=rf"continues a plan \(geometry_vla\); that of {server.url} does not"):
        keygrip.run.run(compose("run", remote))
    arrays = load(encode_observation(seen, needs, under_way()))
    message = {name: value for name, value in arrays.items() if name != "instruction"} | {"prompt": "pick it up"}
    with pytest.raises(WireError, match="of a plan under way, which this protocol does not carry: use POST /plan"):
        openpi.decode_message(pack(message), needs)
