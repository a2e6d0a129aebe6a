"""Motion limits hold at every control period, whatever a policy plans."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from keygrip.models.policy import Plan
from keygrip.runtime.limits import LimitedMotion, MotionLimits, UnsafePlanError, refuse_unsafe

REST = np.array([0.3, 0.0, 0.2, 1.0, 0.0, 0.0, 0.0, 1.0])
BOX = {"workspace_low": (0.1, -0.3, -0.5), "workspace_high": (0.5, 0.3, 0.4)}
HZ = 50.0


def pose(position: object, quaternion: object = (1, 0, 0, 0), gripper: float = 1.0) -> np.ndarray:
    return np.concatenate([np.asarray(position, float), np.asarray(quaternion, float), [gripper]])


def plan_of(positions: np.ndarray, step_seconds: float = 0.1, **changes: np.ndarray) -> Plan:
    steps = len(positions)
    parts = {
        "position": positions[None].astype(float),
        "quaternion": np.tile([1.0, 0, 0, 0], (1, steps, 1)),
        "gripper": np.ones((1, steps)),
    } | changes
    return Plan(**parts, step_seconds=step_seconds)


@pytest.mark.parametrize(
    ("hz", "ticks"),
    [(10.0, 1000), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((50.0, 10_000), (200.0, 3000)))],
)
def test_random_targets_never_exceed_a_limit(hz: float, ticks: int) -> None:
    generator = np.random.default_rng(0)
    limits = MotionLimits(**BOX, table_height_m=0.05)
    motion = LimitedMotion(limits, REST)
    low, high = limits.box()
    position, velocity, rotation, gripper = REST[:3], np.zeros(3), Rotation.identity(), 1.0
    turning = np.zeros(3)
    closest, until = np.inf, 0
    for tick in range(ticks):
        if tick >= until:  # kept for a while, so that full speed is reached
            until = tick + generator.integers(1, int(hz))
            target = pose(
                generator.uniform(-3, 3, 3), Rotation.random(rng=generator).as_quat(), generator.uniform(-1, 2)
            )
        held = generator.random() < 0.02
        command = motion.hold(1 / hz) if held else motion.step(target, 1 / hz)
        moved = (command[:3] - position) * hz
        turned = Rotation.from_quat(command[3:7], scalar_first=True)
        assert np.linalg.norm(moved) <= limits.speed_m_s * (1 + 1e-6)
        assert np.linalg.norm(moved - velocity) * hz <= limits.acceleration_m_s2 * (1 + 1e-6)
        assert (command[:3] >= low).all()
        assert (command[:3] <= high).all()
        turn = (turned * rotation.inv()).as_rotvec() * hz
        assert np.linalg.norm(turn) <= limits.turn_rad_s * (1 + 1e-6)
        assert np.linalg.norm(turn - turning) * hz <= limits.turn_acceleration_rad_s2 * (1 + 1e-6) + 1e-6
        assert abs(command[7] - gripper) * hz <= limits.gripper_per_s * (1 + 1e-6)
        closest = min(closest, float(np.minimum(command[:3] - low, high - command[:3]).min()))
        position, velocity, rotation, gripper, turning = command[:3], moved, turned, command[7], turn
    assert closest < 1e-3  # the limits of the box were reached


def test_a_reachable_target_is_reached_exactly_and_without_overshoot() -> None:
    motion = LimitedMotion(MotionLimits(), REST)
    goal = pose([0.5, -0.2, 0.3], Rotation.from_euler("z", 90, degrees=True).as_quat(scalar_first=True), 0.0)
    along, path = goal[:3] - REST[:3], []
    for _ in range(200):
        path.append(motion.step(goal, 1 / HZ))
    assert np.allclose(path[-1][:3], goal[:3], atol=1e-9)
    assert (Rotation.from_quat(path[-1][3:7], scalar_first=True).as_euler("zyx", degrees=True)[0]) == pytest.approx(90)
    assert path[-1][7] == 0.0
    progress = np.array([(p[:3] - REST[:3]) @ along for p in path]) / (along @ along)
    assert (np.diff(progress) >= -1e-9).all()
    assert progress.max() <= 1 + 1e-9


def test_hold_stops_within_the_braking_distance() -> None:
    limits = MotionLimits(speed_m_s=1.0, acceleration_m_s2=5.0)
    motion = LimitedMotion(limits, REST)
    for _ in range(30):
        motion.step(pose([5.0, 0.0, 0.2]), 1 / HZ)
    assert motion.velocity[0] == pytest.approx(1.0)
    start = motion.position[0]
    stopped = [motion.hold(1 / HZ)[0] for _ in range(60)]
    assert stopped[-1] == stopped[-2]
    assert stopped[-1] - start <= 1.0 / (2 * 5.0 / np.sqrt(3)) + 1.0 / HZ


def test_a_motion_that_is_held_back_goes_on_at_the_speed_that_the_arm_had() -> None:
    """The speed rises again only as the limits allow; the motion does not hurry to catch up with the command that was
    cut short."""
    limits = MotionLimits()
    motion = LimitedMotion(limits, REST)
    goal = pose([0.6, 0.0, 0.2], Rotation.from_euler("z", 2.5).as_quat(scalar_first=True))
    for _ in range(20):
        before, _ = motion.command(), motion.step(goal, 1 / HZ)
    assert motion.velocity[0] == pytest.approx(0.6)
    assert motion.turn_velocity[2] == pytest.approx(3.0)
    turns = [Rotation.from_quat(each[3:7], scalar_first=True) for each in (before, motion.command())]
    third = turns[0] * Rotation.from_rotvec((turns[0].inv() * turns[1]).as_rotvec() / 3)
    short = pose(before[:3] + (motion.position - before[:3]) / 3, third.as_quat(scalar_first=True))
    motion.held_back_at(short, 1 / HZ)
    np.testing.assert_allclose(motion.velocity, [0.2, 0.0, 0.0], atol=1e-9)
    np.testing.assert_allclose(motion.turn_velocity, [0.0, 0.0, 1.0], atol=1e-9)
    after = motion.step(goal, 1 / HZ)
    assert after[0] - short[0] == pytest.approx((0.2 + limits.axis_acceleration_m_s2 / HZ) / HZ)
    assert np.linalg.norm((Rotation.from_quat(after[3:7], scalar_first=True) * third.inv()).as_rotvec()) == (
        pytest.approx((1.0 + limits.turn_acceleration_rad_s2 / HZ) / HZ)
    )


def test_from_outside_the_workspace_the_arm_only_moves_inwards() -> None:
    motion = LimitedMotion(MotionLimits(**BOX), pose([0.6, 0.0, 0.2]))
    path = [motion.step(pose([0.9, 0.1, 0.2]), 1 / HZ)[0] for _ in range(50)]
    assert max(path) <= 0.6
    assert path[-1] == pytest.approx(0.5)


def test_a_slow_plan_inside_the_workspace_passes_and_leaves_the_motion_as_it_is() -> None:
    motion = LimitedMotion(MotionLimits(**BOX), REST)
    refuse_unsafe(plan_of(REST[:3] + np.linspace(0, 0.1, 8)[1:, None] * [1, 0, 0]), [motion], HZ)
    assert np.array_equal(motion.command(), REST)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (plan_of(np.full((3, 3), np.nan)), "position is not finite"),
        (plan_of(np.tile(REST[:3], (3, 1)), quaternion=np.full((1, 3, 4), 0.9)), "norm 1.8"),
        (plan_of(np.tile(REST[:3], (3, 1)), gripper=np.full((1, 3), 30.0)), "opening is 30"),
        (plan_of(np.array([[0.3, 0.0, 0.2], [0.3, 0.0, -0.3]])), "step 2 of the plan lies 30.0 cm outside"),
        (plan_of(np.array([[0.1, -0.3, 0.4], [0.5, 0.3, 0.1]])), "cm behind the plan"),
        (plan_of(np.tile(REST[:3], (3, 1)), step_seconds=np.inf), "step_seconds"),
        (plan_of(np.tile(REST[:3], (8, 1)), step_seconds=20.0), "8 steps of 20 s: plans of up to 60 s"),
        (plan_of(np.tile(REST[:3], (100_000, 1)), step_seconds=1e-6), "100000 steps"),
        (plan_of(np.tile(REST[:3], (3, 1)), quaternion=np.full((1, 3, 4), np.inf)), "quaternion is not finite"),
    ],
)
def test_a_plan_that_cannot_be_made_safe_is_refused(plan: Plan, sentence: str) -> None:
    with pytest.raises(UnsafePlanError, match=sentence):
        refuse_unsafe(plan, [LimitedMotion(MotionLimits(**BOX), REST)], HZ)


@pytest.mark.parametrize("steps", [40, 100, 300])  # steps of 2.3 down to 0.3 control periods
def test_a_plan_is_as_fast_as_its_steps_say(steps: int) -> None:
    limits = MotionLimits()
    path = REST[:3] + np.linspace(0, 1.0, steps + 1)[1:, None] * [1, 0, 0]
    fastest = 1.0 / steps / limits.speed_m_s
    motions = [LimitedMotion(limits, REST)]
    refuse_unsafe(plan_of(path, step_seconds=1.1 * fastest), motions, HZ)
    with pytest.raises(UnsafePlanError, match="behind the plan"):
        refuse_unsafe(plan_of(path, step_seconds=fastest / 2), motions, HZ)


@pytest.mark.parametrize(
    "settings",
    [
        {"speed_m_s": 0.0},
        {"acceleration_m_s2": float("nan")},
        {"workspace_low": (0.0, 0.0, 0.0), "workspace_high": (1.0, -1.0, 1.0)},
        {"workspace_high": (1.0, 1.0, -0.1)},
        {"table_height_m": float("inf")},
    ],
)
def test_limits_that_make_no_sense_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="limits"):
        MotionLimits(**settings)  # type: ignore[arg-type]


def test_targets_that_are_no_poses_are_refused() -> None:
    motion = LimitedMotion(MotionLimits(), REST)
    with pytest.raises(ValueError, match="8 finite numbers"):
        motion.step(np.full(8, np.nan), 0.02)
    with pytest.raises(ValueError, match="norm"):
        motion.step(pose([0.3, 0, 0.2], (2, 0, 0, 0)), 0.02)
    with pytest.raises(ValueError, match="control period"):
        motion.step(REST, 0.0)
