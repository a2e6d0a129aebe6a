"""Serves a trained LeRobot policy by keygrip's protocol, so that the same evaluation covers both.

Runs in LeRobot's environment: ``.venv-lerobot/bin/python benchmarks/peers/serve.py --checkpoint
runs/act/checkpoints/last/pretrained_model --hz 10``. Each plan is the one action that LeRobot's `select_action` gives,
with its own queues and histories, so a client asks at every control period. Prints one line of JSON when it listens.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.processor import TokenizerProcessorStep

from keygrip.data.robot.lerobot_export.layout import IMAGES
from keygrip.models.policy import Needs, Observation, Plan, views_of
from keygrip.runtime.plausibility import Bounds
from keygrip.runtime.server import PolicyServer


class PeerPolicy:
    """A LeRobot policy trained on a data set of `step=export_lerobot`, as keygrip's `Policy`.

    Args:
        checkpoint: folder `pretrained_model`. hz: control periods per second, as in the data set. arms: their names.
    """

    def __init__(self, checkpoint: Path, hz: float, arms: tuple[str, ...]) -> None:
        config = PreTrainedConfig.from_pretrained(checkpoint)
        config.device = "cpu"
        self.policy: Any = get_policy_class(config.type).from_pretrained(checkpoint, config=config).eval()
        self.before, self.after = make_pre_post_processors(
            config, pretrained_path=str(checkpoint), preprocessor_overrides={"device_processor": {"device": "cpu"}}
        )
        self.name, self.hz = config.type, hz
        cameras = tuple(key.removeprefix(IMAGES) for key in config.image_features)
        reads = any(isinstance(step, TokenizerProcessorStep) for step in self.before.steps)
        self.needs = Needs(arms=arms, cameras=cameras, instruction=reads, calibration=False)
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Starts an episode: queues and histories are empty, and what is drawn depends on the seed alone."""
        self.policy.reset()
        self._last: np.ndarray | None = None
        self._random = torch.Generator().manual_seed(seed).get_state()

    def session(self) -> PeerPolicy:
        """The same network with queues of its own."""
        other = copy.copy(self)
        other.policy = copy.copy(self.policy)
        other.reset(0)
        return other

    def plan(self, observation: Observation) -> Plan:
        """One step: the action that LeRobot gives for this control period."""
        batch: dict[str, Any] = {"observation.state": torch.from_numpy(self._state(observation))}
        for camera, view in zip(self.needs.cameras, views_of(observation, self.needs.cameras), strict=True):
            image = torch.from_numpy(np.array(view["image"]))
            batch[f"{IMAGES}{camera}"] = image.permute(2, 0, 1).float() / 255
        batch["task"] = str(observation.get("instruction", ""))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random)
            action = self.after(self.policy.select_action(self.before(batch)))
            self._random = torch.get_rng_state()
        poses = action.numpy().astype(np.float64).reshape(len(self.needs.arms), 1, 8)
        turns = poses[..., 3:7]
        return Plan(
            position=poses[..., :3],
            quaternion=turns / np.linalg.norm(turns, axis=-1, keepdims=True),
            gripper=poses[..., 7].clip(0, 1),
            step_seconds=1 / self.hz,
        )

    def _state(self, observation: Observation) -> np.ndarray:
        """[8 A] float32, with the exporter's signs: w of the first quaternion not negative, then continuous."""
        turns = np.asarray(observation["quaternion"], np.float64).reshape(-1, 4)
        reference = np.array([1.0, 0, 0, 0]) if self._last is None else self._last
        turns = np.where((turns * reference).sum(axis=1, keepdims=True) < 0, -turns, turns)
        self._last = turns
        position = np.asarray(observation["position"], np.float64).reshape(-1, 3)
        gripper = np.asarray(observation["gripper"], np.float64).reshape(-1, 1)
        return np.concatenate([position, turns, gripper], axis=1).reshape(-1).astype(np.float32)


async def _serve(server: PolicyServer, port: int) -> None:
    stop = asyncio.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(each, stop.set)
    await server.serve("127.0.0.1", port, stop, lambda url: print(json.dumps({"url": url}), flush=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--hz", type=float, default=10.0, help="control periods per second, the data set's fps")
    parser.add_argument("--arms", nargs="+", default=["right"], help="in the order of the data set")
    parser.add_argument("--port", type=int, default=8422)
    arguments = parser.parse_args()
    policy = PeerPolicy(arguments.checkpoint, arguments.hz, tuple(arguments.arms))
    about = {"model": policy.name, "checkpoint": str(arguments.checkpoint), "device": "cpu"}
    bounds = Bounds(speed_m_s=1e6)  # for simulators alone: LeRobot sends every action, however fast
    asyncio.run(_serve(PolicyServer(policy, policy.needs, about, bounds=bounds), arguments.port))


if __name__ == "__main__":
    main()
