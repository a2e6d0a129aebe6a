"""The policy plugin, found and run by LeRobot's own factory."""

from __future__ import annotations

import shutil
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
    """LeRobot's batch of an environment each, which shows this frame of the first demonstration."""
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
            chunks = policy.predict_action_chunk(seen(made, *[0] * environments))  # draws as well
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


def test_how_it_plans_and_what_it_needs_beside_the_checkpoint_are_told_and_kept(made: Any, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("latch", "effort"), [(1.0, 0.6), (0.0, -1.0)])  # always closed, always open
def test_a_step_of_the_hand_goes_to_the_plan(made: Any, latch: float, effort: float) -> None:
    from lerobot_policy_keygrip import ArmLayout, CameraCalibration, KeygripConfig, KeygripPolicy

    demo = find_demos(made.demos)[0].read()
    track, arm = demo.cameras["over"], demo.arms["right"]
    camera = CameraCalibration(track.intrinsics[0].tolist(), track.world_to_camera[0].tolist(), name="over")
    config = KeygripConfig(
        checkpoint=str(made.run), device="cpu", cameras={"observation.image": camera}, action="position_step",
        arms=[ArmLayout([0, 1, 2], 3, fixed_quaternion=arm.quaternion[0].tolist(), offset=[0.0, 0.0, -0.045])],
        step_gain=3.0, control={"grip_below": latch, "release_above": latch},
    )  # fmt: skip
    policy = KeygripPolicy(config)
    state = np.concatenate([arm.position[0] + [0.0, 0.0, 0.045], arm.gripper[:1]])
    image = torch.tensor(track.frames.read(0)).permute(2, 0, 1)[None].float() / 255
    observation = {"observation.state": torch.tensor(state)[None].float(), "observation.image": image}
    actions = torch.cat([policy.select_action(observation) for _ in range(8)]).numpy()  # [8, 4], of one plan
    plan = policy.controllers[0].last_plan
    ticks = round(plan.step_seconds * 10.0)
    reached = np.clip(3.0 * (plan.position[0, 0] - arm.position[0]), -1, 1)
    np.testing.assert_allclose(actions[ticks - 1, :3], reached, atol=1e-5)
    assert np.abs(reached).max() > 0.02
    np.testing.assert_allclose(actions[: ticks - 1, 3], -1.0, atol=1e-6)  # open, until the first pose is reached
    np.testing.assert_allclose(actions[ticks - 1 :, 3], effort, atol=1e-6)
