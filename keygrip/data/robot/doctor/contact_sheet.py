"""Contact sheet: frames of a few demonstrations with the projected gripper."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from keygrip.data.robot.doctor.examination import Examination, tensor
from keygrip.data.robot.doctor.views import readable_frames
from keygrip.data.robot.schema import ArmTrajectory, CameraTrack, Demo
from keygrip.data.spacing import evenly
from keygrip.models.geometry.cameras import project
from keygrip.robots.kinematics import matrix_from_quaternion

_TILE_WIDTH, _HEADER, _ROWS, _COLUMNS = 280, 18, 6, 6
_FONT = 12  # pixels: in a smaller font the spaces between words disappear
_ARM_COLOURS = {"right": (255, 210, 0), "left": (0, 220, 255)}
_AXIS_M = 0.05


def contact_sheet(exam: Examination, camera: str) -> Image.Image:
    """Return rows of frames of a few demos with the projected gripper, its path, and its axes (x red, y green, z blue,
    5 cm)."""
    demos = exam.with_camera(camera)
    demos = [demos[index] for index in evenly(len(demos), _ROWS)]
    rows = [_sheet_row(demo, camera) for demo in demos]
    width = max(row.width for row in rows)
    sheet = Image.new("RGB", (width, sum(row.height for row in rows) + _HEADER), (24, 24, 24))
    shares = {arm: exam.measures.get(f"camera/{camera}/arm/{arm}/on_screen") for demo in demos for arm in demo.arms}
    share_text = ", ".join(f"{arm} in the image {value:.0%}" for arm, value in shares.items() if value is not None)
    title = (
        f"{camera}{': ' + share_text if share_text else ''}.  Axes of the gripper: x red, y green, z (approach) blue, "
        "5 cm each"
    )
    ImageDraw.Draw(sheet).text((4, 1), title, fill=(255, 255, 255), font=ImageFont.load_default(_FONT))
    top = _HEADER
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _sheet_row(demo: Demo, camera: str) -> Image.Image:
    track = demo.cameras[camera]
    scale = _TILE_WIDTH / track.width
    size = (_TILE_WIDTH, max(1, round(track.height * scale)))
    readable = readable_frames(demo)
    frame_indices = readable[evenly(len(readable), _COLUMNS)].tolist()
    row = Image.new("RGB", ((_TILE_WIDTH + 2) * len(frame_indices), size[1] + _HEADER + 2), (24, 24, 24))
    for column, index in enumerate(frame_indices):
        tile = Image.fromarray(track.frames.read(index)).resize(size)
        draw = ImageDraw.Draw(tile)
        arm_captions = []
        for arm, trajectory in demo.arms.items():
            colour = _ARM_COLOURS.get(arm, (255, 255, 255))
            arm_captions.append(_draw_arm(draw, track, trajectory, index, scale, colour))
        left = column * (_TILE_WIDTH + 2)
        row.paste(tile, (left, _HEADER))
        name = f"{demo.name[-18:]} " if column == 0 else ""
        caption = f"{name}#{index} {'; '.join(arm_captions)}"
        font = ImageFont.load_default(_FONT)
        ImageDraw.Draw(row).text((left + 2, 1), caption, fill=(220, 220, 220), font=font)
    return row


def _draw_arm(
    draw: ImageDraw.ImageDraw,
    track: CameraTrack,
    trajectory: ArmTrajectory,
    index: int,
    scale: float,
    colour: tuple[int, int, int],
) -> str:
    """Draw path, axes and marker of one arm, if the camera is calibrated; return its caption."""
    height = f"z {trajectory.position[index, 2]:.3f} m, open {trajectory.gripper[index]:.2f}"
    if track.uncalibrated:
        return f"not calibrated, {height}"
    axes = matrix_from_quaternion(trajectory.quaternion[index : index + 1])[0].T * _AXIS_M
    points = np.concatenate([trajectory.position, trajectory.position[index] + axes])
    pixels, _ = project(tensor(points), tensor(track.intrinsics[index]), tensor(track.world_to_camera[index]))
    scaled = [tuple(float(value) for value in pixel * scale) for pixel in pixels.numpy()]
    path, tips = scaled[:-3], scaled[-3:]
    for start, end in pairwise(path[: index + 1]):
        if np.isfinite([*start, *end]).all():
            draw.line([start, end], fill=colour, width=1)
    gripper_pixel = path[index]
    inside = (
        np.isfinite(gripper_pixel).all()
        and 0 <= gripper_pixel[0] < track.width * scale
        and 0 <= gripper_pixel[1] < track.height * scale
    )
    if not inside:
        draw.rectangle([1, 1, _TILE_WIDTH - 2, round(track.height * scale) - 2], outline=(255, 40, 40), width=3)
        return f"off screen, {height}"
    for tip, tint in zip(tips, ((255, 60, 60), (60, 220, 60), (90, 140, 255)), strict=True):
        if np.isfinite(tip).all():
            draw.line([gripper_pixel, tip], fill=tint, width=2)
    x, y = gripper_pixel
    draw.ellipse([x - 4, y - 4, x + 4, y + 4], outline=colour, width=2)
    return height
