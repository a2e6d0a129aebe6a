"""Forward kinematics of arms from an MJCF or URDF file, against poses known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
from five_joint_arm import JOINTS, MJCF, URDF, poses_in_closed_form
from scipy.spatial.transform import Rotation

from keygrip.robots.model_kinematics import ToolKinematics


@pytest.mark.parametrize("text", [MJCF, URDF], ids=["mjcf", "urdf"])
def test_poses_are_those_in_closed_form(text: str) -> None:
    """This also holds for joints in another order, and without masses and meshes."""
    joints = np.random.default_rng(0).uniform(-1.5, 1.5, (20, 5))
    expected = poses_in_closed_form(joints)
    arm = ToolKinematics(text.encode(), "arm", "tip", JOINTS)
    np.testing.assert_allclose(arm.poses(joints), expected, atol=1e-9)
    turned = ToolKinematics(text.encode(), "arm", "tip", JOINTS[::-1])
    np.testing.assert_allclose(turned.poses(joints[:, ::-1]), expected, atol=1e-9)
    assert arm.hinges.all()
    np.testing.assert_allclose(arm.limits, np.tile([-2.0, 2.0], (5, 1)), atol=1e-9)


def test_frames_defaults_and_slides_of_mjcf_count() -> None:
    text = """<mujoco><compiler angle="radian"/>
      <default><default class="lift">
        <joint type="slide" axis="0 0 1" range="0 0.5"/><site pos="0 0 0.1"/>
      </default></default>
      <worldbody><frame euler="0 0 1.5707963267948966"><body name="rail" pos="1 0 0" childclass="lift">
        <joint name="up"/><site name="tip" material="red"/><geom type="mesh" mesh="secret"/>
      </body></frame></worldbody></mujoco>"""
    arm = ToolKinematics(text.encode(), "rail.xml", "tip", ["up"])
    (pose,) = arm.poses(np.array([[0.3]]))
    np.testing.assert_allclose(pose[:3, 3], [0, 1, 0.4], atol=1e-9)
    np.testing.assert_allclose(pose[:3, :3], Rotation.from_euler("z", np.pi / 2).as_matrix(), atol=1e-9)
    assert not arm.hinges.any()
    np.testing.assert_allclose(arm.limits, [[0, 0.5]])


@pytest.mark.parametrize(
    ("text", "tool", "joints", "message"),
    [
        (MJCF, "tipp", JOINTS, r"arm has no body, link or site 'tipp'; did you mean 'tip'\? It has .*forearm"),
        (URDF, "hand", JOINTS, r"arm has no body, link or site 'hand'"),
        (MJCF, "tip", ["pan", "lift", "elbo", "flex", "roll"], r"no joint 'elbo'; did you mean 'elbow'\? It has .*jaw"),
        (URDF, "tip", ["pan", "lift", "flex", "roll"], r"the joint 'elbow' moves the tool 'tip' and is not named"),
        (MJCF, "tip", [*JOINTS, "pan"], r"must be named, each once"),
        (MJCF.replace("<worldbody>", '<include file="other.xml"/><worldbody>'), "tip", JOINTS, "element <include>"),
        ("<mujoco/>", "tip", JOINTS, r"no joint 'pan'\. It has none"),
        (URDF.replace('xyz="0 0 0.1"', 'xyz="0 0 NaN"'), "tip", JOINTS, "arm: xyz of an element <origin> holds NaN"),
        ("<html/>", "tip", JOINTS, "begins with <html>"),
        ("arm", "tip", JOINTS, "is not XML"),
        (
            MJCF.replace('<joint name="pan" axis="0 0 1"/>', '<freejoint name="pan"/>'),
            "tip",
            JOINTS,
            "'pan' .* floats free",
        ),
        (URDF.replace('<child link="upper"/>', '<child link="nowhere"/>'), "tip", JOINTS, "not read by MuJoCo"),
    ],
)
def test_what_is_not_there_is_one_clear_line(text: str, tool: str, joints: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ToolKinematics(text.encode(), "arm", tool, joints)
    assert "\n" not in str(caught.value)
