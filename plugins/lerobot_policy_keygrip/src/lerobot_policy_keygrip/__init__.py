"""keygrip's robot policies as a LeRobot policy, `policy.type=keygrip`."""

from __future__ import annotations

from lerobot_policy_keygrip.configuration_keygrip import ArmLayout, CameraCalibration, KeygripConfig
from lerobot_policy_keygrip.modeling_keygrip import KeygripPolicy, save_policy
from lerobot_policy_keygrip.processor_keygrip import make_keygrip_pre_post_processors

__all__ = [
    "ArmLayout",
    "CameraCalibration",
    "KeygripConfig",
    "KeygripPolicy",
    "make_keygrip_pre_post_processors",
    "save_policy",
]
