"""The policy plugin, found and run by LeRobot's own factory."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import keygrip
from keygrip.data.robot.discovery import find_demos
from keygrip.runtime.chunk_execution import RecedingHorizon

pytestmark = pytest.mark.lerobot


@pytest.fixture(scope="module")
def saved(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lerobot_policy_keygrip import CameraCalibration, KeygripConfig, save_policy

    track = find_demos(made.demos)[0].read().cameras["over"]
    camera = CameraCalibration(
        track.intrinsics[0].tolist(), track.world_to_camera[0].tolist(), width=track.width, height=track.height
    )
    config = KeygripConfig(
        checkpoint=str(made.run), device="cpu", cameras={"observation.images.over": camera}, control_hz=10.0
    )
    return save_policy(config, tmp_path_factory.mktemp("policy") / "saved")


def test_lerobots_factory_finds_it_and_it_acts_as_at_home(made: Any, saved: Path) -> None:
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.policies.factory import make_policy, make_pre_post_processors
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    config = PreTrainedConfig.from_pretrained(saved)
    assert (config.type, config.checkpoint) == ("keygrip", None)
    config.pretrained_path = saved
    dataset = LeRobotDataset("local/demos", root=made.dataset, video_backend="pyav")
    policy = make_policy(config, ds_meta=dataset.meta)
    before, after = make_pre_post_processors(config, pretrained_path=str(saved))
    local = RecedingHorizon(keygrip.load_policy(made.run), 10.0)
    demo = find_demos(made.demos)[0].read()
    arm, track = demo.arms["right"], demo.cameras["over"]
    for frame in range(6):
        item = dataset[frame]
        action = after(policy.select_action(before(item)))
        image = (item["observation.images.over"] * 255).round().byte().permute(1, 2, 0).numpy()
        expected = local.act(
            {
                "image": image,
                "intrinsics": track.intrinsics[0],
                "world_to_camera": track.world_to_camera[0],
                "position": arm.position[frame][None],
                "quaternion": arm.quaternion[frame][None],
                "gripper": arm.gripper[frame][None],
            }
        )
        assert action.shape == (1, 8)
        np.testing.assert_allclose(action[0].numpy()[[0, 1, 2, 7]], expected[0][[0, 1, 2, 7]], atol=1e-5)
        turn = np.sign(action[0, 3:7].numpy() @ expected[0, 3:7])
        np.testing.assert_allclose(action[0].numpy()[3:7], turn * expected[0, 3:7], atol=1e-4)
    policy.reset()
    assert policy.predict_action_chunk(before(dataset[0])).shape[::2] == (1, 8)


def seen(made: Any, *numbers: int) -> dict[str, Any]:
    """Return LeRobot's batch: each environment shows one of these frames of the first demonstration."""
    demo = find_demos(made.demos)[0].read()
    arm, frames = demo.arms["right"], demo.cameras["over"].frames
    poses = np.concatenate([arm.position, arm.quaternion, arm.gripper[:, None]], axis=1)
    images = np.stack([frames.read(number) for number in numbers])
    return {
        "observation.state": torch.tensor(poses[list(numbers)], dtype=torch.float32),
        "observation.images.over": torch.tensor(images).permute(0, 3, 1, 2).float() / 255,
    }


def test_each_environment_of_a_batch_has_its_own_plan(made: Any, saved: Path) -> None:
    from lerobot_policy_keygrip import KeygripPolicy

    policy = KeygripPolicy.from_pretrained(saved)
    both = policy.select_action(seen(made, 0, 9))
    policy.reset()
    one = policy.select_action(seen(made, 9))
    torch.testing.assert_close(both[1:], one)
    assert not torch.allclose(both[0], both[1])


def test_what_is_drawn_by_chance_follows_from_the_number_of_the_episode(made: Any, saved: Path) -> None:
    from lerobot_policy_keygrip import KeygripPolicy

    def episodes(environments: int, count: int) -> list[torch.Tensor]:
        """[8] the first and a later action of each episode, all from one frame."""
        policy = KeygripPolicy.from_pretrained(saved)
        policy.policy.decoder = "sample"
        found: list[torch.Tensor] = []
        for _ in range(count // environments):
            policy.reset()
            chunks = policy.predict_action_chunk(seen(made, *[0] * environments))  # this samples too
            for controller in policy.controllers:
                controller.reset()
            again = [policy.select_action(seen(made, *[0] * environments)) for _ in range(20)][-1]
            found += [torch.cat([chunk.flatten(), action]) for chunk, action in zip(chunks, again, strict=True)]
        return found

    alone, together = episodes(1, 4), episodes(2, 4)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other)
    assert len({tuple(one.tolist()) for one in alone}) == 4


def test_a_policy_saved_where_it_was_loaded_from_can_be_moved(saved: Path, tmp_path: Path) -> None:
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot_policy_keygrip import KeygripPolicy

    folder, moved = tmp_path / "saved", tmp_path / "moved"
    shutil.copytree(saved, folder)
    KeygripPolicy.from_pretrained(folder).save_pretrained(folder)
    assert PreTrainedConfig.from_pretrained(folder).checkpoint is None
    folder.rename(moved)
    assert KeygripPolicy.from_pretrained(moved).needs.arms == ("right",)


def test_how_it_plans_is_kept_and_what_it_needs_beside_the_checkpoint_is_told(made: Any, tmp_path: Path) -> None:
    from lerobot_policy_keygrip import CameraCalibration, KeygripConfig, KeygripPolicy, save_policy

    camera = {"observation.images.over": CameraCalibration(np.eye(3).tolist(), np.eye(4).tolist())}

    def config(**changes: Any) -> KeygripConfig:
        return KeygripConfig(**{"checkpoint": str(made.run), "device": "cpu", "cameras": camera} | changes)

    save_policy(config(planning={"decoder": "viterbi"}), tmp_path / "saved")
    assert KeygripPolicy.from_pretrained(tmp_path / "saved").policy.decoder == "viterbi"
    with pytest.raises(ValueError, match="haste"):
        KeygripPolicy(config(planning={"haste": 1.0}))
    with pytest.raises(ValueError, match=r"network\.instruction\.source"):
        KeygripPolicy(config(external={"network.instruction.source": "/somewhere"}))
    with pytest.raises(ValueError, match="planning has no effect with server"):
        config(checkpoint=None, server="http://127.0.0.1:8421", planning={"decoder": "viterbi"})


def test_a_folder_does_not_decide_what_its_checkpoint_may_do(saved: Path, tmp_path: Path) -> None:
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot_policy_keygrip import KeygripPolicy

    shutil.copytree(saved, tmp_path / "sent")
    path = tmp_path / "sent" / "config.json"
    clean = json.loads(path.read_text())
    granted = {"trust": ["json"], "external": {"network.instruction.source": "https://example.org/t5"}}
    for name, value in granted.items():
        path.write_text(json.dumps(clean | {name: value}))
        advice = re.escape(f"--policy.{name}='{json.dumps(value)}'")
        for options in ([], [f"--{name}={json.dumps(value)}"]):  # also where the command line has the same value
            config = PreTrainedConfig.from_pretrained(path.parent, cli_overrides=options)
            with pytest.raises(ValueError, match=rf"^config\.json of .* has {name}=.*{advice}"):
                KeygripPolicy.from_pretrained(path.parent, config=config)
        with pytest.raises(ValueError, match=rf"^config\.json of .* has {name}="):
            KeygripPolicy.from_pretrained(path.parent)
    path.write_text(json.dumps(clean))
    config = PreTrainedConfig.from_pretrained(path.parent, cli_overrides=['--trust=["json"]'])
    policy = KeygripPolicy.from_pretrained(path.parent, config=config)
    assert policy.config.trust == ["json"]
    policy.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (written["trust"], written["external"]) == ([], {})
    config = PreTrainedConfig.from_pretrained(path.parent)
    config.use_peft = True
    with pytest.raises(ValueError, match=r"^use_peft=true: "):
        KeygripPolicy.from_pretrained(path.parent, config=config)


def test_a_server_is_sent_the_token_of_who_loads_the_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lerobot_policy_keygrip import CameraCalibration, KeygripConfig, KeygripPolicy, modeling_keygrip

    asked: list[Any] = []

    def refused(url: str, **options: Any) -> None:
        asked.append((url, options))
        raise ConnectionError("no server here")

    monkeypatch.setattr(modeling_keygrip, "RemotePolicy", refused)
    cameras = {"observation.image": CameraCalibration(np.eye(3).tolist(), np.eye(4).tolist())}
    config = KeygripConfig(
        server="https://gpu:8421", token="correct-horse", ca="own.pem", device="cpu", cameras=cameras
    )
    with pytest.raises(ConnectionError):
        KeygripPolicy(config)
    assert asked == [("https://gpu:8421", {"token": "correct-horse", "ca": "own.pem"})]
    with pytest.raises(ValueError, match="token has no effect without server"):
        KeygripConfig(checkpoint="run", token="correct-horse", device="cpu", cameras=cameras)
    config._save_pretrained(tmp_path)  # as by hand
    with pytest.raises(ValueError, match=r"^config\.json of .* has token=\.\.\.: ") as shown:
        KeygripPolicy.from_pretrained(tmp_path)
    assert "correct-horse" not in str(shown.value)
    dataclasses.replace(config, token=None, ca=None)._save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has server=https://gpu:8421, which would be sent the token: remove server"):
        KeygripPolicy.from_pretrained(tmp_path, config=config)


def test_a_policy_of_a_server_needs_neither_omegaconf_nor_hydra() -> None:
    """They come with keygrip's requirements only, and LeRobot's discovery imports the whole package."""
    code = """
import sys
sys.modules["omegaconf"] = sys.modules["hydra"] = None  # importing them fails
from lerobot_policy_keygrip import CameraCalibration, KeygripConfig, KeygripPolicy
eye = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
camera = CameraCalibration(eye, [[1.0, 0.0, 0.0, 0.0]] * 4)
try:
    KeygripPolicy(KeygripConfig(server="http://127.0.0.1:1", device="cpu", cameras={"observation.image": camera}))
except ConnectionError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("no policy server answers at http://127.0.0.1:1 ")


def test_a_configuration_that_does_not_fit_is_refused(made: Any) -> None:
    from lerobot_policy_keygrip import ArmLayout, CameraCalibration, KeygripConfig, KeygripPolicy

    camera = {"observation.image": CameraCalibration(np.eye(3).tolist(), np.eye(4).tolist())}
    with pytest.raises(ValueError, match="cameras is empty"):
        KeygripPolicy(KeygripConfig(checkpoint=str(made.run), device="cpu"))
    with pytest.raises(ValueError, match="needs checkpoint"):
        KeygripPolicy(KeygripConfig(device="cpu", cameras=camera))
    two = [ArmLayout([0, 1, 2], 3), ArmLayout([4, 5, 6], 7)]
    with pytest.raises(ValueError, match="describes 2, the policy moves 1: right"):
        KeygripPolicy(KeygripConfig(checkpoint=str(made.run), device="cpu", cameras=camera, arms=two))
    with pytest.raises(ValueError, match="action must be one of pose, position_step"):
        KeygripConfig(action="joints", device="cpu")
    for name, value in (("step_m", 0.02), ("body_offset", [0.0, 0.0, 0.1]), ("closed_effort", 0.1)):
        with pytest.raises(ValueError, match=f"{name} has an effect only with action=position_step"):
            KeygripConfig(device="cpu", cameras=camera, **{name: value}).validate_features()
    KeygripConfig(device="cpu", cameras=camera, body_offset=(0.0, 0.0, 0.0), body_low=()).validate_features()


def test_a_saved_policy_with_a_setting_of_no_effect_says_which(saved: Path, tmp_path: Path) -> None:
    """LeRobot hides exceptions that are raised while the file is read."""
    from lerobot_policy_keygrip import KeygripPolicy

    shutil.copytree(saved, tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"closed_effort": 0.1}))
    with pytest.raises(ValueError, match=r"^closed_effort has an effect only with action=position_step"):
        KeygripPolicy.from_pretrained(tmp_path / "old")


def test_of_a_policy_saved_with_step_gain_poses_are_run_and_steps_refused(saved: Path, tmp_path: Path) -> None:
    from lerobot_policy_keygrip import KeygripPolicy

    shutil.copytree(saved, tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    now = json.loads(path.read_text())
    before = {key: value for key, value in now.items() if not key.startswith(("step_m", "body_"))}
    path.write_text(json.dumps(before | {"step_gain": 10.0}))
    assert KeygripPolicy.from_pretrained(tmp_path / "old").config.step_gain is None
    path.write_text(json.dumps(before | {"step_gain": 10.0, "action": "position_step"}))
    with pytest.raises(ValueError, match=r"^step_gain is no longer read: .* by step_m metres"):
        KeygripPolicy.from_pretrained(tmp_path / "old")


def test_of_several_cameras_the_one_that_it_was_trained_on_is_seen(made: Any, saved: Path) -> None:
    from lerobot_policy_keygrip import CameraCalibration, KeygripConfig, KeygripPolicy

    tracks = find_demos(made.demos)[0].read().cameras
    assert set(tracks) == {"over", "front"}

    def policy(**names: str) -> KeygripPolicy:
        cameras = {
            f"observation.images.{theirs}": CameraCalibration(
                track.intrinsics[0].tolist(), track.world_to_camera[0].tolist(), track.width, track.height, ours
            )
            for (theirs, ours), track in ((each, tracks[each[0]]) for each in names.items())
        }
        return KeygripPolicy(KeygripConfig(checkpoint=str(made.run), device="cpu", cameras=cameras))

    alone = KeygripPolicy.from_pretrained(saved)
    assert alone.needs.camera == "over"
    batch = seen(made, 4)
    expected = alone.select_action(batch)
    front = torch.tensor(tracks["front"].frames.read(4)).permute(2, 0, 1)[None].float() / 255
    both = policy(front="", over="").select_action(batch | {"observation.images.front": front})
    torch.testing.assert_close(both, expected)
    other = policy(over="front", front="over").select_action(batch | {"observation.images.front": front})
    assert not torch.allclose(other, expected)  # the names decide
    with pytest.raises(ValueError, match="trained on camera 'over'; cameras calibrates front, side"):
        policy(front="", over="side")


class Followed:
    """A body that moves by steps, as with Meta-World's `set_xyz_action`, and a hand that follows it."""

    def __init__(self, hand: np.ndarray, step_m: float, low: np.ndarray, high: np.ndarray) -> None:
        self.hand, self.body, self.step_m, self.low, self.high = hand, hand + BESIDE, step_m, low, high

    def step(self, action: np.ndarray) -> None:
        self.body = np.clip(self.body + self.step_m * np.clip(action[:3], -1, 1), self.low, self.high)
        self.hand = self.hand + 0.2 * (self.body - self.hand)


OFFSET = np.array([0.0, 0.0, -0.045])
BESIDE = np.array([-0.002, 0.0, 0.001])  # from the hand to the body at the start of an episode


def stepping(made: Any, changes: dict[str, Any], reach_m: float) -> tuple[Any, Followed, Any]:
    """Return a policy of position_step, the body that it moves within `reach_m` of its start, and a function that acts
    once."""
    from lerobot_policy_keygrip import ArmLayout, CameraCalibration, KeygripConfig, KeygripPolicy

    demo = find_demos(made.demos)[0].read()
    track, arm = demo.cameras["over"], demo.arms["right"]
    camera = CameraCalibration(track.intrinsics[0].tolist(), track.world_to_camera[0].tolist(), name="over")
    hand = arm.position[0] - OFFSET
    low, high = hand - reach_m, hand + reach_m
    policy = KeygripPolicy(
        KeygripConfig(
            checkpoint=str(made.run), device="cpu", cameras={"observation.image": camera}, action="position_step",
            arms=[ArmLayout([0, 1, 2], 3, fixed_quaternion=arm.quaternion[0].tolist(), offset=OFFSET.tolist())],
            body_low=low.tolist(), body_high=high.tolist(), body_offset=BESIDE.tolist(),
            **changes,
        )
    )  # fmt: skip
    robot = Followed(hand, policy.config.step_m, low, high)
    image = torch.tensor(track.frames.read(0)).permute(2, 0, 1)[None].float() / 255

    def act() -> np.ndarray:
        state = torch.tensor(np.append(robot.hand, arm.gripper[0]))[None].float()
        action = policy.select_action({"observation.state": state, "observation.image": image})[0].numpy()
        robot.step(action)
        return action

    return policy, robot, act


@pytest.mark.parametrize(("latch", "effort"), [(1.0, 0.6), (0.0, -1.0)])  # always closed, always open
def test_steps_bring_the_body_that_the_hand_follows_to_the_plan(made: Any, latch: float, effort: float) -> None:
    changes = {"step_m": 1.0, "control": {"grip_below": latch, "release_above": latch}}
    policy, robot, act = stepping(made, changes, reach_m=2.0)
    actions, bodies = [], []
    for _ in range(8):
        actions.append(act())
        bodies.append(robot.body + OFFSET)
        if len(actions) == 1:
            plan = policy.controllers[0].last_plan
    assert policy.controllers[0].last_plan is plan
    ticks = round(plan.step_seconds * 10.0)
    reached = np.stack(bodies[ticks - 1 :: ticks])
    np.testing.assert_allclose(reached, plan.position[0, : len(reached)], atol=1e-5)
    assert np.abs(robot.body - robot.hand).max() > 0.005  # and the hand trails it
    efforts = np.array([action[3] for action in actions])
    np.testing.assert_allclose(efforts[: ticks - 1], -1.0, atol=1e-6)  # open, until the first pose is reached
    np.testing.assert_allclose(efforts[ticks - 1 :], effort, atol=1e-6)


def test_where_the_body_is_stays_known_at_its_bounds_and_begins_anew_with_an_episode(made: Any) -> None:
    policy, robot, act = stepping(made, {}, reach_m=0.003)
    for _ in range(12):
        action = act()
        np.testing.assert_allclose(policy.bodies[0].position, robot.body + OFFSET, atol=1e-6)
    assert np.abs(action[:3]).max() < 0.01  # at its bounds it is not pushed further
    assert np.isclose(np.abs(robot.body - 0.5 * (robot.low + robot.high)).max(), 0.003)
    policy.reset()
    begun = robot.hand.copy()
    action = act()
    np.testing.assert_allclose(policy.bodies[0].position, begun + OFFSET + BESIDE + 0.01 * action[:3], atol=1e-6)


def test_the_controller_has_the_settings_of_control_also_those_that_are_none(made: Any) -> None:
    """Both None sends the predicted opening unchanged, as in keygrip's commands."""
    control = {"grip_below": None, "release_above": None, "ensemble": 1.0, "follow": "poses", "execute_seconds": 1}
    policy, _, act = stepping(made, {"control": control}, reach_m=2.0)
    act()
    controller = policy.controllers[0]
    assert {name: getattr(controller, name) for name in control} == control
    assert controller.ensemble is True
    for name, value in (("execute_seconds", None), ("ensemble", "false")):
        _, _, act = stepping(made, {"control": {name: value}}, reach_m=2.0)
        with pytest.raises(ValueError, match=rf"^control\.{name}={value!r}: give a value of type "):
            act()
