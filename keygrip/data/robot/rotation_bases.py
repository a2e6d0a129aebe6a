"""Rotation bases of a data set, fitted as in training."""

from __future__ import annotations

import copy
from typing import Any

import torch

from keygrip.data.robot.datamodule import RobotDemos
from keygrip.models.geometry.rotation_codecs import RotationCodec, fit_or_load


def fit_rotation(data: RobotDemos, rotation: RotationCodec) -> dict[str, Any]:
    """Run the step `rotation`: fit one basis per arm on the training split and store it in the data set's cache folder.

    Returns:
        The report of each arm's fit, and the folder.
    """
    data.prepare_data()
    data.setup("fit")
    statistics = data.statistics
    reports: dict[str, Any] = {}
    for arm, quaternions in statistics.quaternions.items():
        codec = copy.deepcopy(rotation)
        reports[arm] = fit_or_load(codec, torch.from_numpy(quaternions), statistics.cache_dir, statistics.fingerprint)
    return reports | {"folder": str(statistics.cache_dir)}
