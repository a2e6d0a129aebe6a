"""An arm of five joints as MJCF and URDF, with poses in closed form: a rotation about z, three bends in one plane, a
roll; and the jaw of its gripper. Metres, rad."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

JOINTS = ("pan", "lift", "elbow", "flex", "roll")
HEIGHT, UPPER, FORE, HAND = 0.1, 0.12, 0.13, 0.08

MJCF = f"""<mujoco model="five">
  <compiler angle="radian" meshdir="/nowhere"/>
  <asset><mesh name="shell" file="missing.stl"/></asset>
  <default><joint range="-2 2"/></default>
  <worldbody>
    <body name="shoulder"><joint name="pan" axis="0 0 1"/><geom type="mesh" mesh="shell"/>
      <body name="upper" pos="0 0 {HEIGHT}"><joint name="lift" axis="0 1 0"/>
        <body name="forearm" pos="{UPPER} 0 0"><joint name="elbow" axis="0 1 0"/>
          <body name="wrist" pos="{FORE} 0 0"><joint name="flex" axis="0 1 0"/>
            <body name="palm"><joint name="roll" axis="1 0 0"/>
              <site name="tip" pos="{HAND} 0 0"/>
              <body name="finger"><joint name="jaw" axis="0 0 1" range="0 1"/></body>
            </body>
          </body>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator><position joint="jaw"/></actuator>
</mujoco>"""


def _joint(name: str, parent: str, child: str, place: str, axis: str, kind: str = "revolute") -> str:
    return (
        f'<joint name="{name}" type="{kind}"><parent link="{parent}"/><child link="{child}"/><origin xyz="{place}"/>'
        f'<axis xyz="{axis}"/><limit lower="-2" upper="2" effort="1" velocity="1"/></joint>'
    )


URDF = (
    '<robot name="five">'
    + "".join(f'<link name="{name}"/>' for name in ("base", "upper", "forearm", "wrist", "palm", "tip", "finger"))
    + '<link name="shoulder"><visual><geometry><mesh filename="package://five/shell.stl"/></geometry></visual></link>'
    + _joint("pan", "base", "shoulder", "0 0 0", "0 0 1")
    + _joint("lift", "shoulder", "upper", f"0 0 {HEIGHT}", "0 1 0")
    + _joint("elbow", "upper", "forearm", f"{UPPER} 0 0", "0 1 0")
    + _joint("flex", "forearm", "wrist", f"{FORE} 0 0", "0 1 0")
    + _joint("roll", "wrist", "palm", "0 0 0", "1 0 0")
    + _joint("hand", "palm", "tip", f"{HAND} 0 0", "1 0 0", "fixed")
    + _joint("jaw", "palm", "finger", "0 0 0", "0 0 1")
    + "</robot>"
)


def poses_in_closed_form(joints: np.ndarray) -> np.ndarray:
    """Return base_from_tip [N, 4, 4] of joints [N, 5]."""
    pan, lift, elbow, flex, roll = joints.T
    out, up = np.zeros(len(joints)), np.full(len(joints), HEIGHT)
    for length, pitch in ((UPPER, lift), (FORE, lift + elbow), (HAND, lift + elbow + flex)):
        out, up = out + length * np.cos(pitch), up - length * np.sin(pitch)
    poses = np.tile(np.eye(4), (len(joints), 1, 1))
    poses[:, :3, 3] = np.stack([out * np.cos(pan), out * np.sin(pan), up], axis=1)
    poses[:, :3, :3] = Rotation.from_euler("ZYX", np.stack([pan, lift + elbow + flex, roll], axis=1)).as_matrix()
    return poses
