"""Statistics of the training data that a policy needs to run, in buffers, so that every checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from keygrip.data.robot.augmentation import ImageGeometry
from keygrip.training.host_copy import HostCopy

if TYPE_CHECKING:
    from keygrip.data.robot.statistics import DemoStatistics


LEAST_HEIGHTS_M = 1e-3  # between the lowest and the highest gripper position; less is rounding and noise


class PolicyStatistics(nn.Module):
    """Ranges, timing and image preparation of the training split.

    A policy without them would move a robot by arbitrary numbers, so reading them before they are set is an error.

    Attributes (buffers):
        height_range: ``[2]`` metres, lowest and highest gripper height. position_range: ``[2, 3]`` metres, per axis.
        step_seconds: time between predicted steps. geometry: how a camera's image is converted for the network.
    """

    known: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._known = HostCopy()
        self.register_buffer("known", torch.tensor(False))
        self.register_buffer("_height_range", torch.tensor([0.0, 1.0]))
        self.register_buffer("_position_range", torch.tensor([[0.0] * 3, [1.0] * 3]))
        self.register_buffer("_step_seconds", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("_image_size", torch.tensor(0))
        self.register_buffer("_image_field", torch.tensor(1.0, dtype=torch.float64))
        self.register_buffer("_image_stretch", torch.tensor(False))
        self.register_buffer("_image_mean", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("_image_std", torch.ones(3, dtype=torch.float64))

    def take(self, statistics: DemoStatistics, horizon: int) -> None:
        """Store the statistics that a data module computed from its training split.

        Args:
            horizon: steps that the network predicts; must be those of the data.
        """
        if statistics.horizon != horizon:
            raise ValueError(
                f"The data module gives {statistics.horizon} steps and the network predicts {horizon}: set "
                "data.horizon, which both read."
            )
        low, high = statistics.height_range
        if not high - low >= LEAST_HEIGHTS_M:
            raise ValueError(
                f"The training demonstrations have no range of heights (lowest {low:.4f} m, highest {high:.4f} m; at "
                f"least {LEAST_HEIGHTS_M:g} m are needed), which the height bins need. Check that the end-effector "
                "positions are in metres, z up (step=doctor)."
            )
        geometry = statistics.geometry
        values = {
            "_height_range": [low, high],
            "_position_range": statistics.position_range,
            "_step_seconds": statistics.step_seconds,
            "_image_size": geometry.image_size,
            "_image_field": geometry.field,
            "_image_stretch": geometry.fit == "stretch",
            "_image_mean": geometry.mean,
            "_image_std": geometry.std,
        }
        for name, value in values.items():
            buffer: Tensor = getattr(self, name)
            buffer.copy_(torch.as_tensor(value, dtype=buffer.dtype).reshape(buffer.shape))
        self.known.fill_(True)

    def keep_view(self, datamodule: Any, checkpoint: Mapping[str, Any]) -> None:
        """Let the data of a resumed run show the part of the image that the checkpoint was trained on, where it was
        chosen from the data (`data.fit=auto`): other demonstrations could lead to another choice.

        Args:
            checkpoint: of a policy that has its statistics as `statistics`.
        """
        if not getattr(datamodule, "fit_to_workspace", False):
            return
        stored = PolicyStatistics()
        weights = checkpoint["state_dict"]
        stored.load_state_dict({name: weights[f"statistics.{name}"] for name in stored.state_dict()})
        datamodule.fit_to_workspace, datamodule.geometry = False, stored.geometry

    def _read(self, name: str) -> Tensor:
        if not self._known(self.known):
            raise ValueError(
                "The policy has no statistics of its training data (height range, image preparation): train it, or "
                "load a checkpoint written by keygrip.train."
            )
        value: Tensor = getattr(self, name)
        return value

    @property
    def height_range(self) -> Tensor:
        """[2] lowest and highest target height of the training split, metres."""
        return self._read("_height_range")

    @property
    def position_range(self) -> Tensor:
        """[2, 3] lowest and highest target position of the training split, metres."""
        return self._read("_position_range")

    @property
    def step_seconds(self) -> float:
        """Seconds between two predicted steps."""
        return float(self._read("_step_seconds"))

    @property
    def geometry(self) -> ImageGeometry:
        """How images are cut, resized and normalised."""
        mean, std = self._read("_image_mean").tolist(), self._read("_image_std").tolist()
        return ImageGeometry(
            image_size=int(self._read("_image_size")),
            mean=(mean[0], mean[1], mean[2]),
            std=(std[0], std[1], std[2]),
            field=float(self._read("_image_field")),
            fit="stretch" if bool(self._read("_image_stretch")) else "crop",
        )
