"""Actions that are not poses: joints of the YAM arm, controller inputs; and robots with statistics of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from vla_parts import INSTRUCTIONS, T, poses, small_batch, small_module, small_statistics

from keygrip.data.batches import PolicyTargets
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.evaluation.closed_loop import ClosedLoop
from keygrip.evaluation.trained_policy import policy_of
from keygrip.models.geometry.rotations import geodesic_angle
from keygrip.models.geometry_vla.action_spaces import ControllerSpace
from keygrip.models.geometry_vla.actions import PoseActions
from keygrip.models.geometry_vla.diagnostics import exchanged_geometry
from keygrip.models.geometry_vla.policy import GeometryVLAPolicy
from keygrip.robots.kinematics import arm_chain, forward_kinematics
from keygrip.runtime.wire import decode_plan, encode_plan

BASE = np.array([0.1, -0.2, 0.05])
TURN = Rotation.from_euler("z", 0.7)


def joint_chunks(count: int = 32, seed: int = 0) -> PolicyTargets:
    """Targets of a YAM whose base is rotated and shifted with respect to the world's origin."""
    generator = np.random.default_rng(seed)
    limits = arm_chain().limits
    joints = generator.uniform(limits[:, 0], limits[:, 1], (count, 1, T + 1, 6))
    position, quaternion = forward_kinematics(joints)
    flat = (TURN * Rotation.from_quat(quaternion.reshape(-1, 4), scalar_first=True)).as_quat(scalar_first=True)
    position = TURN.apply(position.reshape(-1, 3)).reshape(position.shape) + BASE
    values = {
        "start_position": position[:, :, 0],
        "start_quaternion": flat.reshape(quaternion.shape)[:, :, 0],
        "position": position[:, :, 1:],
        "quaternion": flat.reshape(quaternion.shape)[:, :, 1:],
        "start_joints": joints[:, :, 0],
        "joints": joints[:, :, 1:],
    }
    tensors = {name: torch.from_numpy(np.asarray(value, dtype=np.float32)) for name, value in values.items()}
    return PolicyTargets(**(poses(count, seed) | tensors), instruction=["go"] * count)


def test_poses_of_joints_are_those_of_float32_under_autocast() -> None:
    """In bf16 the poses would be wrong by millimetres."""
    chunks = joint_chunks()
    actions = PoseActions(["right"], "joint")
    actions.take(chunks)
    encoded = actions.encode(chunks)
    plain = actions.decode(encoded, chunks.start_position, chunks.start_quaternion)
    with torch.autocast("cpu", torch.bfloat16):
        found = actions.decode(encoded, chunks.start_position, chunks.start_quaternion)
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


def test_joints_become_the_recorded_poses_wherever_the_base_stands() -> None:
    chunks = joint_chunks()
    actions = PoseActions(["right"], "joint")
    actions.take(chunks)
    assert actions.reads == ("joints",)
    encoded = actions.encode(chunks)
    assert encoded.shape == (32, T, 7)
    assert (encoded.abs() <= 1.0 + 1e-5).float().mean() > 0.96
    torch.testing.assert_close(actions.numbers(encoded)[..., :6], chunks.joints, atol=1e-5, rtol=0)
    position, quaternion, gripper = actions.decode(encoded, chunks.start_position, chunks.start_quaternion)
    torch.testing.assert_close(position, chunks.position, atol=1e-4, rtol=0)
    assert geodesic_angle(quaternion, chunks.quaternion).max() < 1e-3
    torch.testing.assert_close(gripper, chunks.gripper, atol=1e-5, rtol=0)
    again = PoseActions(["right"], "joint")
    again.load_state_dict(actions.state_dict())  # including the pose of the base
    assert torch.equal(again.decode(encoded, chunks.start_position, chunks.start_quaternion)[0], position)


def test_errors_of_joints_are_those_of_the_reached_poses(tmp_path: Path) -> None:
    """Regression: with `data.targets=commanded` plans of the recorded joints had the arm's lag as their error."""
    module, chunks = trained(tmp_path, "joint", joint_chunks(64)), joint_chunks(4, seed=1)
    lag = torch.tensor([0.01, 0.02, 0.03])
    commanded = {"position": chunks.position + lag, "quaternion": chunks.quaternion.roll(1, dims=2)}
    batch = replace(small_batch([INSTRUCTIONS[0]] * 4), **vars(chunks) | commanded)
    batch.start_gripper, batch.gripper = torch.ones(4, 1), torch.zeros(4, 1, T)  # each closes at the first step
    planned = module.actions.encode(batch)
    values = module.metrics(module(batch), batch, planned)
    assert values["position_cm"] < 0.01
    assert values["height_m"] < 1e-4
    assert values["rotation_deg"] < 0.1
    assert values["gripper_acc"] == 1
    grips = module.grip_errors(batch, planned)
    assert [len(grips[name]) for name in ("grip_side_cm", "grip_height_cm")] == [4, 4]
    assert max(float(errors.max()) for errors in grips.values()) < 0.01
    figures = exchanged_geometry(module, module(batch), batch, planned)
    assert figures["geometry_worth_cm"] == pytest.approx(float(figures["geometry_moves_cm"]), abs=0.01)
    off = chunks.joints.clone()
    off[..., 0] += 0.1
    (position, _, _), (shifted, _, _) = (
        module.actions.target_poses(replace(batch, joints=joints)) for joints in (chunks.joints, off)
    )
    torch.testing.assert_close(position, chunks.position, atol=1e-4, rtol=0)
    error = module.metrics(module(batch), batch, module.actions.encode(replace(batch, joints=off)))["position_cm"]
    assert float(error) == pytest.approx(100 * float((shifted - position).norm(dim=-1).mean()), rel=1e-3)
    poses_alone = PoseActions(("right",), "delta").target_poses(batch)
    assert all(map(torch.equal, poses_alone, (batch.position, batch.quaternion, batch.gripper)))


def test_joints_of_another_arm_are_refused() -> None:
    chunks = joint_chunks()
    with pytest.raises(ValueError, match="cm from those of a YAM"):
        PoseActions(["right"], "joint").take(replace(chunks, start_position=2 * chunks.start_position))
    with pytest.raises(ValueError, match="hold no joints"):
        PoseActions(["right"], "joint").take(replace(chunks, start_joints=None))
    with pytest.raises(ValueError, match="6 joints, the demonstrations have 7"):
        seven = replace(chunks, joints=torch.zeros(32, 1, T, 7))
        PoseActions(["right"], "joint").take(seven)


def test_a_controllers_inputs_are_ways_and_turns_one_after_the_other() -> None:
    generator = np.random.default_rng(1)
    numbers = generator.uniform(-1, 1, (3, 1, T, 7))
    start, turn = generator.normal(size=(3, 1, 3)), Rotation.from_rotvec(generator.normal(size=(3, 3)))
    quaternion = turn.as_quat(scalar_first=True)[:, None]
    arguments = (torch.from_numpy(values).float() for values in (numbers, start, quaternion))
    position, turned, gripper = ControllerSpace(0.05, 0.5).poses(*arguments)
    where, held = start[:, 0].copy(), turn
    for step in range(T):
        where += 0.05 * numbers[:, 0, step, :3]
        held = Rotation.from_rotvec(0.5 * numbers[:, 0, step, 3:6]) * held
        np.testing.assert_allclose(position[:, 0, step], where, atol=1e-5)
        expected = torch.from_numpy(held.as_quat(scalar_first=True)).float()
        assert geodesic_angle(turned[:, 0, step], expected).max() < 1e-3
    np.testing.assert_allclose(gripper[:, 0], (1 - numbers[:, 0, :, 6]) / 2, atol=1e-6)


def lagging(count: int = 200, seed: int = 0) -> PolicyTargets:
    """Chunks of an arm under an operational-space controller: each input sets a goal relative to the pose reached so
    far, and a critically damped spring pulls the arm towards it for a twentieth of a second."""
    generator = np.random.default_rng(seed)
    stiffness, step = 150.0, 0.002
    damping, chunks = 2 * stiffness**0.5, poses(count, seed)
    reached, inputs = np.zeros((count, T + 1, 3)), np.zeros((count, T, 7))
    place, speed = generator.uniform(-0.1, 0.1, (count, 3)), np.zeros((count, 3))
    turn, turns = [Rotation.identity()] * count, np.zeros((count, T + 1, 4))
    wish = generator.uniform(-0.6, 0.6, (count, 3))
    for frame in range(-4, T + 1):  # the arm is already moving when the chunk begins
        if frame >= 0:
            reached[:, frame], turns[:, frame] = place, [each.as_quat(scalar_first=True) for each in turn]
        if frame == T:
            break
        wish = 0.8 * wish + generator.uniform(-0.2, 0.2, (count, 3))
        turning = generator.uniform(-0.3, 0.3, (count, 3))
        if frame >= 0:
            inputs[:, frame, :3], inputs[:, frame, 3:6], inputs[:, frame, 6] = wish, turning, 1.0
        goal = place + 0.05 * wish
        for _ in range(25):
            speed = speed + step * (stiffness * (goal - place) - damping * speed)
            place = place + step * speed
        turn = [Rotation.from_rotvec(0.3 * 0.5 * each) * held for each, held in zip(turning, turn, strict=True)]
    values = {
        "start_position": reached[:, None, 0],
        "position": reached[:, None, 1:],
        "start_quaternion": turns[:, None, 0],
        "quaternion": turns[:, None, 1:],
        "controller": inputs[:, None],
    }
    tensors = {name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()}
    return PolicyTargets(**(chunks | tensors), instruction=["go"] * count)


def test_poses_of_a_controllers_inputs_go_as_far_as_the_arm_does() -> None:
    chunks = lagging()
    actions = PoseActions(["right"], "osc")
    actions.take(chunks)
    position, quaternion, _ = actions.decode(actions.encode(chunks), chunks.start_position, chunks.start_quaternion)
    assert actions.space.shares[0] == pytest.approx(0.25, abs=0.08)
    assert actions.space.shares[1] == pytest.approx(0.3, abs=0.01)
    assert geodesic_angle(quaternion, chunks.quaternion).max() < 0.02
    way = (chunks.position[:, 0, -1] - chunks.start_position[:, 0]).norm(dim=-1).mean()
    goals = 0.05 * chunks.controller[:, 0, :, :3].sum(dim=1).norm(dim=-1).mean()  # type: ignore[index]
    error = (position - chunks.position)[:, 0, -1].norm(dim=-1).mean()
    assert goals > 2.5 * way, "as if each goal were reached"
    assert error < 0.6 * way
    again = PoseActions(["right"], "osc")
    again.load_state_dict(actions.state_dict())
    torch.testing.assert_close(again.space.shares, actions.space.shares)


def test_each_robot_covers_its_own_share_of_a_controllers_inputs() -> None:
    """One comes 0.8 of the way, the other 0.3: with one share for both, both would move by a wrong factor."""
    generator = torch.Generator().manual_seed(2)
    robot = torch.arange(60) % 2
    chunks = PolicyTargets(**poses(60, 3), instruction=["go"] * 60, embodiment=robot)
    chunks.controller = torch.rand(60, 1, T, 7, generator=generator) * 2 - 1
    truth = ControllerSpace(0.05, 0.5, robots=2)
    truth.shares.copy_(torch.tensor([[0.8, 0.5], [0.3, 0.9]]))
    start = chunks.start_position, chunks.start_quaternion
    chunks.position, chunks.quaternion, chunks.gripper = truth.poses(chunks.controller, *start, robot)
    actions = PoseActions(["right"], "osc", embodiments=["yam", "panda"])
    actions.take(chunks, RANGES)
    assert isinstance(actions.space, ControllerSpace)
    torch.testing.assert_close(actions.space.shares, truth.shares, atol=1e-3, rtol=0)
    decoded = actions.decode(actions.encode(chunks), *start, robot)
    torch.testing.assert_close(decoded[0], chunks.position, atol=1e-4, rtol=0)
    assert geodesic_angle(decoded[1], chunks.quaternion).max() < 0.01
    again = PoseActions(["right"], "osc", embodiments=["yam", "panda"])
    again.load_state_dict(actions.state_dict())
    torch.testing.assert_close(again.decode(actions.encode(chunks), *start, robot)[0], decoded[0])
    for number, name in enumerate(("yam", "panda")):  # a robot alone, whose statistics have the shape they always had
        rows = robot == number
        own = {key: value[rows] for key, value in vars(chunks).items() if isinstance(value, torch.Tensor)}
        alone = PoseActions(["right"], "osc")
        alone.take(PolicyTargets(**own | {"embodiment": None}, instruction=["go"] * 30))
        assert alone.state_dict()["space.shares"].shape == (2,), name
        torch.testing.assert_close(alone.space.shares, actions.space.shares[number])
    with pytest.raises(ValueError, match="name that of each sample"):
        actions.space.poses(chunks.controller, *start)
    backwards = replace(chunks, controller=chunks.controller * (1 - 2 * robot)[:, None, None, None])
    with pytest.raises(ValueError, match=r"recorded positions of 'panda' move by -0\.30 times"):
        PoseActions(["right"], "osc", embodiments=["yam", "panda"]).take(backwards, RANGES)


def test_earlier_checkpoints_of_several_robots_have_one_pair_of_shares_for_all() -> None:
    options = {"kind": "osc", "embodiments": ["yam", "panda", "sawyer"]}
    stored = PoseActions(["right"], **options).state_dict()
    stored["space.shares"] = torch.tensor([0.8, 0.5])
    actions = PoseActions(["right"], **options)
    actions.load_state_dict(stored)
    assert actions.space.shares.tolist() == [pytest.approx([0.8, 0.5])] * 3
    assert stored["space.shares"].shape == (2,), "the caller's weights are unchanged"
    again = PoseActions(["right"], **options)
    again.load_state_dict(actions.state_dict())
    torch.testing.assert_close(again.space.shares, actions.space.shares)
    with pytest.raises(RuntimeError, match=r"size mismatch for space\.shares"):
        actions.load_state_dict(stored | {"space.shares": torch.ones(2, 2)})


def test_inputs_that_the_arm_does_not_follow_are_said(caplog: pytest.LogCaptureFixture) -> None:
    chunks = lagging()
    with pytest.raises(ValueError, match="recorded positions move by -0"):
        PoseActions(["right"], "osc").take(replace(chunks, controller=-chunks.controller))
    with pytest.raises(ValueError, match=r"positions move by 2.*osc_position_m"):
        PoseActions(["right"], "osc", osc_position_m=0.005).take(chunks)
    noise = torch.randn(chunks.controller.shape, generator=torch.Generator().manual_seed(0))
    PoseActions(["right"], "osc").take(replace(chunks, controller=noise))
    assert "hardly follow the controller's inputs" in caplog.text
    still = PoseActions(["right"], "osc")
    still.take(replace(chunks, controller=0 * chunks.controller))
    assert still.space.shares.tolist() == [1.0, 1.0]


def trained(folder: Path, kind: str, chunks: PolicyTargets, **options: object):
    module = small_module(kind=kind, action_kind=kind)  # type: ignore[arg-type]
    if options:
        module.actions = PoseActions(("right",), kind, **options)  # type: ignore[arg-type]
    module.set_statistics(replace(small_statistics(folder), chunks=chunks, robot_ranges=RANGES))
    return module


@pytest.mark.parametrize("kind", ["delta", "joint", "osc"])
def test_such_actions_train_plan_and_travel(tmp_path: Path, kind: str) -> None:
    chunks = joint_chunks(64)
    chunks.controller = 0.1 * torch.randn(64, 1, T, 7, generator=torch.Generator().manual_seed(0))
    module = trained(tmp_path, kind, chunks)
    assert module.may_keep_apart == (kind != "joint")  # joints belong to one arm model
    module.statistics._position_range.copy_(torch.tensor([[-9.0] * 3, [9.0] * 3]))  # moves nothing into it
    batch = small_batch()
    for name in ("start_joints", "joints", "controller"):
        setattr(batch, name, getattr(chunks, name)[: len(batch)])
    losses = module.losses(module(batch), batch)
    losses["total"].backward()
    assert torch.isfinite(losses["total"])
    assert module.metrics(module(batch), batch, module.sample(module(batch), batch))["position_cm"] > 0
    view = {"image": np.zeros((40, 40, 3), np.uint8), "intrinsics": np.eye(3), "world_to_camera": np.eye(4)}
    observation = {
        "cameras": dict.fromkeys(module.views, view),
        "instruction": "pick up the red cube",
        "position": np.array([[0.3, 0.0, 0.1]]),
        "quaternion": np.array([[0.0, 1.0, 0.0, 0.0]]),
        "gripper": np.array([1.0]),
    }
    plan = GeometryVLAPolicy(module).plan(observation)
    name = {"delta": "position", "joint": "joints", "osc": "controller"}[kind]
    assert module.extra_targets == (() if kind == "delta" else (name,))
    numbers = getattr(plan, name)
    assert numbers.shape == (1, T, {"delta": 3, "joint": 6, "osc": 7}[kind])
    if kind == "joint":
        position, _ = forward_kinematics(numbers[0])
        np.testing.assert_allclose(plan.position[0], TURN.apply(position) + BASE, atol=1e-4)
    received = decode_plan(encode_plan(plan))
    np.testing.assert_array_equal(getattr(received, name), numbers)
    policy, timed = GeometryVLAPolicy(module, seed=1), {**observation, "time_s": 10.0}
    policy.reset(0)
    shifted = replace(plan, time_s=10.0, **{name: getattr(policy.plan(observation), name) + 0.1})
    policy.reset(0)
    led = policy.plan_continuing(timed, shifted, delay_s=2 * plan.step_seconds)
    off = np.abs(getattr(led, name) - getattr(shifted, name))[:, :2].mean()
    assert off < 0.5 * 0.1, "without guidance it would be all of the shift"
    if kind != "delta":  # plans of delta are poses, as all plans are
        with pytest.raises(ValueError, match=f"has 4 {name} per step, those of this policy have"):
            policy.plan_continuing(timed, replace(shifted, **{name: numbers[..., :4]}), delay_s=0.1)
        policy.reset(0)
        free = policy.plan(observation)
        policy.reset(0)
        anew = policy.plan_continuing(timed, replace(shifted, **{name: None}), delay_s=0.1)
        np.testing.assert_array_equal(anew.position, free.position)
    module.statistics._position_range.copy_(torch.zeros(2, 3))
    left = getattr(GeometryVLAPolicy(module).plan(observation), name)
    if kind == "joint":
        assert left is None  # its poses were moved, so the joints no longer match
    else:  # poses are moved into the range seen in training; poses of controller inputs are estimates, so these stay
        assert np.abs(left).max() <= {"delta": 0.0101, "osc": 1}[kind]


RANGES = {"yam": ((-9.0, -9.0, -9.0), (9.0, 9.0, 9.0)), "panda": ((-6.0, -9.0, -9.0), (9.0, 9.0, 30.0))}


def test_each_robot_is_normalised_by_its_own_statistics(tmp_path: Path) -> None:
    first, second = poses(40, 1), poses(40, 2)
    second["position"] = second["position"] * 3 + 1
    second["start_position"] = second["start_position"] * 3 + 1
    both = {name: torch.cat([first[name], second[name]]) for name in first}
    chunks = PolicyTargets(**both, instruction=["go"] * 80, embodiment=torch.tensor([0] * 40 + [1] * 40))
    actions = PoseActions(["right"], embodiments=["yam", "panda"])
    actions.take(chunks, RANGES)
    for rows, part in ((slice(0, 40), first), (slice(40, 80), second)):
        alone = PoseActions(["right"])
        alone.take(PolicyTargets(**part, instruction=["go"] * 40))
        own = alone.encode(PolicyTargets(**part, instruction=["go"] * 40))
        torch.testing.assert_close(actions.encode(chunks)[rows], own)
        points = actions.places(chunks.position, chunks.embodiment)
        torch.testing.assert_close(points[rows], alone.places(part["position"]))
    decoded = actions.decode(actions.encode(chunks), chunks.start_position, chunks.start_quaternion, chunks.embodiment)
    torch.testing.assert_close(decoded[0], chunks.position, atol=1e-4, rtol=0)
    assert actions.position_range.tolist() == [[list(end) for end in RANGES[name]] for name in ("yam", "panda")]
    with pytest.raises(ValueError, match="no range of the positions of 'panda'"):
        PoseActions(["right"], embodiments=["yam", "panda"]).take(chunks, {"yam": RANGES["yam"]})
    with pytest.raises(ValueError, match="name the robot"):
        actions.encode(replace(chunks, embodiment=None))
    with pytest.raises(ValueError, match="'panda', of which there is no training"):
        PoseActions(["right"], embodiments=["yam", "panda"]).take(
            replace(chunks, embodiment=torch.zeros(80).long()), RANGES
        )
    module = trained(tmp_path, "absolute", chunks, embodiments=["yam", "panda"])
    assert module.embodiments == ("yam", "panda")
    with pytest.raises(ValueError, match="the model was trained for yam, panda: choose one"):
        _ = module.policy().workspace
    assert (
        GeometryVLAPolicy(module, embodiment="panda").workspace[0, 0]
        > GeometryVLAPolicy(module, embodiment="yam").workspace[0, 0]
    )
    with pytest.raises(ValueError, match="the model was trained for yam, panda"):
        GeometryVLAPolicy(module, embodiment="robot")


def test_which_robot_it_drives_is_asked_before_an_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = PolicyTargets(**poses(64, 1), instruction=["go"] * 64, embodiment=torch.arange(64) % 2)
    module = trained(tmp_path, "absolute", chunks, embodiments=["yam", "panda"])
    monkeypatch.setattr("keygrip.evaluation.trained_policy.load_module", lambda path, **options: module)
    loop = ClosedLoop(TaskOptions(name="reach"), {"as_trained": [{}]}, episodes=1, processes=1)
    for use in (
        lambda: loop.run(tmp_path),  # and it does not count as a failed episode
        lambda: policy_of(module, "run", {"seed": 1}),
    ):
        with pytest.raises(ValueError, match=r"was trained for yam, panda: choose one .*policy.embodiment=NAME"):
            use()
    assert policy_of(module, "run", {"embodiment": "panda"}).embodiment == "panda"
    with pytest.raises(ValueError, match="the model was trained for yam, panda"):
        policy_of(module, "run", {"embodiment": "ur5"})
