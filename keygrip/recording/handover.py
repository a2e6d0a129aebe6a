"""Record one episode of the two-arm handover; `keygrip.recording.demonstrations.record` does the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keygrip.data.robot.native_writer import ArmPose, CameraPose, DemoWriter
from keygrip.data.robot.signs import SignKeeper
from keygrip.envs.yam.handover import ARMS, handover_actions
from keygrip.envs.yam.two_arms import HandoverCell


def record_handover(
    cell: HandoverCell,
    folder: Path,
    seed: int,
    robot: str,
    cameras: tuple[str, ...],
    *,
    video: bool,
    jpeg_quality: int,
) -> bool:
    """Record the episode of a seed; return whether the expert succeeded (a failed episode leaves no folder).

    Args:
        folder: of the demo; must not exist. robot: its name in the metadata. cameras: recorded cameras.
        video, jpeg_quality: as in `DemoWriter`.
    """
    cell.reset(seed=seed)
    assert cell.layout is not None
    layout, task = cell.layout, cell.task
    with DemoWriter(
        folder,
        robot=robot,
        task=task.name,
        instruction=layout.instruction,
        fps=cell.hz,
        video=video,
        jpeg_quality=jpeg_quality,
    ) as writer:
        signs = {(arm, what): SignKeeper() for arm in ARMS for what in ("reached", "commanded")}

        def poses(
            what: str, position: np.ndarray, turn: np.ndarray, gripper: np.ndarray, joints: np.ndarray | None
        ) -> dict[str, ArmPose]:
            return {
                arm: ArmPose(
                    position[i],
                    signs[arm, what](turn[i]),
                    float(np.clip(gripper[i], 0.0, 1.0)),
                    None if joints is None else joints[i],
                )
                for i, arm in enumerate(ARMS)
            }

        for i, action in enumerate(handover_actions(layout, seed, cell.hz)):
            images = {name: cell.frame(name) for name in cameras}
            views = {name: CameraPose(cell.lenses[name].intrinsics, cell.world_to_camera(name)) for name in cameras}
            reached = poses("reached", *cell.tool_poses, cell.gripper_openings, cell.joints)
            cell.advance(action)
            commanded = poses("commanded", *cell.commanded_poses, cell.commanded_gripper, None)
            writer.add(round(i * 1e9 / cell.hz), images, views, reached, commanded)
        success = cell.progress.success
        if not success:
            writer.discard()
        writer.source = {
            "simulator": "keygrip.envs.yam",
            "task": task.as_dict(),
            "seed": seed,
            "success": success,
            "objects": [{"name": "object", "shape": "bar", "position_m": layout.bar.tolist(), "yaw_rad": layout.yaw}],
        }
    return success
