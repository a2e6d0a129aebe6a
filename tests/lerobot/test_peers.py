"""LeRobot's own policies behind keygrip's protocol (benchmarks/peers/serve.py)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keygrip.data.robot.discovery import find_demos

pytestmark = pytest.mark.lerobot
SERVE = Path(__file__).resolve().parents[2] / "benchmarks" / "peers" / "serve.py"


@pytest.fixture(scope="module")
def peers() -> Any:
    spec = importlib.util.spec_from_file_location("peers_serve", SERVE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = {
    "act": {"chunk_size": 4, "n_action_steps": 2, "dim_model": 32, "n_heads": 2, "dim_feedforward": 32},
    "diffusion": {"down_dims": (32, 64), "num_inference_steps": 2, "n_action_steps": 2},
}


@pytest.mark.parametrize("kind", SMALL)
def test_a_served_peer_acts_as_lerobot_does(made: Any, peers: Any, tmp_path: Path, kind: str) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.policies.factory import make_policy, make_policy_config, make_pre_post_processors

    dataset = LeRobotDataset("local/demos", root=made.dataset, video_backend="pyav")
    torch.manual_seed(0)
    config = make_policy_config(kind, device="cpu", push_to_hub=False, pretrained_backbone_weights=None, **SMALL[kind])
    policy = make_policy(config, ds_meta=dataset.meta).eval()
    before, after = make_pre_post_processors(config, dataset_stats=dataset.meta.stats)
    policy.save_pretrained(tmp_path)
    before.save_pretrained(tmp_path)
    after.save_pretrained(tmp_path)
    peer = peers.PeerPolicy(tmp_path, 10.0, ("right",))
    assert peer.needs.cameras == ("over", "front")
    other = peer.session()
    peer.reset(3)
    other.reset(4)
    arm = find_demos(made.dataset)[0].read().arms["right"]
    torch.manual_seed(3)
    policy.reset()
    for frame in range(4):
        item = dataset[frame]
        observation = {
            "position": arm.position[frame][None],
            "quaternion": -arm.quaternion[frame][None],  # the same turn
            "gripper": arm.gripper[frame][None],
            "cameras": {
                name: {"image": (item[f"observation.images.{name}"] * 255).round().byte().permute(1, 2, 0).numpy()}
                for name in ("over", "front")
            },
        }
        plan = peer.plan(observation)
        other.plan(observation)  # a session beside it changes nothing
        inputs = {key: item[key] for key in item if key.startswith("observation.")}
        with torch.no_grad():
            action = after(policy.select_action(before(inputs)))[0].numpy().astype(np.float64)
        assert (plan.position.shape, plan.step_seconds) == ((1, 1, 3), 0.1)
        np.testing.assert_allclose(plan.position[0, 0], action[:3], atol=1e-4)
        np.testing.assert_allclose(plan.quaternion[0, 0], action[3:7] / np.linalg.norm(action[3:7]), atol=1e-4)
        np.testing.assert_allclose(plan.gripper[0, 0], np.clip(action[7], 0, 1), atol=1e-4)
