"""Videos of closed-loop episodes with the plan drawn into the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from keygrip.artifacts import atomic_path
from keygrip.data.video import write_video
from keygrip.models.policy import Observation, Plan, arm_axis

SCALE = 2  # images of 224 px are enlarged for viewing
PALETTE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis, near to far in time


class RolloutVideo:
    """Write an H.264 video, or an animation if the path ends in .gif. If it is not closed, no file is written.

    Args:
        path: the file to write. fps: frames per second. caption: written at the bottom of every frame, e.g. the
            instruction.
    """

    def __init__(self, path: Path, fps: float, caption: str = "") -> None:
        self.path, self.fps, self.caption = path, fps, caption
        self._frames: list[np.ndarray] = []

    def add(self, observation: Observation, plan: Plan | None) -> None:
        """Append the image of an observation with the current plan projected into it."""
        frame = draw_plan(observation, plan)
        self._frames.append(captioned(frame, self.caption) if self.caption else frame)

    def close(self) -> None:
        """Write the file."""
        with atomic_path(self.path) as path:
            if self.path.suffix.lower() == ".gif":
                first, *rest = [Image.fromarray(frame).quantize(128) for frame in self._frames]
                first.save(
                    path, format="GIF", save_all=True, append_images=rest, duration=round(1000 / self.fps), loop=0
                )
            else:
                write_video(path, np.stack(self._frames), self.fps)


def draw_plan(observation: Observation, plan: Plan | None) -> np.ndarray:
    """Draw the plan's poses into the enlarged image of an observation, as dots coloured by time (dark: soon, light:
    late).

    A ring is an open gripper, a filled dot a closed one. Returns ``[2H, 2W, 3]`` uint8.
    """
    image = Image.fromarray(np.asarray(observation["image"]))
    image = image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.BICUBIC)
    if plan is None:
        return np.asarray(image)
    draw = ImageDraw.Draw(image)
    current = arm_axis(observation["position"], 1)
    k, camera = np.asarray(observation["intrinsics"]), np.asarray(observation["world_to_camera"])
    for arm in range(plan.position.shape[0]):
        points = np.concatenate([current[arm : arm + 1], plan.position[arm]])
        in_camera = points @ camera[:3, :3].T + camera[:3, 3]
        if not np.isfinite(in_camera).all() or (in_camera[:, 2] <= 0).any():
            continue
        homogeneous = in_camera @ k.T
        pixels = homogeneous[:, :2] / homogeneous[:, 2:] * SCALE
        draw.line([tuple(p) for p in pixels], fill=(255, 255, 255), width=2)
        for step, (x, y) in enumerate(pixels[1:]):
            colour = _interpolate_palette(step / max(plan.position.shape[1] - 1, 1))
            box = (x - 4, y - 4, x + 4, y + 4)
            if plan.gripper[arm, step] < 0.5:
                draw.ellipse(box, fill=colour, outline=(255, 255, 255))
            else:
                draw.ellipse(box, outline=colour, width=2)
    return np.asarray(image)


def captioned(frame: np.ndarray, caption: str, *, top: bool = False) -> np.ndarray:
    """Return the frame with a caption at the bottom, or at the top, on a dark background."""
    image = Image.fromarray(frame)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=max(10, image.height // 28))
    position, anchor = ((image.width / 2, 4.0), "mt") if top else ((image.width / 2, image.height - 4.0), "mb")
    box = draw.textbbox(position, caption, font=font, anchor=anchor)
    ground = (box[0] - 5, 0, box[2] + 5, box[3] + 3) if top else (box[0] - 5, box[1] - 3, box[2] + 5, image.height)
    draw.rectangle(ground, fill=(20, 20, 24))
    draw.text(position, caption, font=font, anchor=anchor, fill=(255, 255, 255))
    return np.asarray(image)


def _interpolate_palette(share: float) -> tuple[int, int, int]:
    position = share * (len(PALETTE) - 1)
    low = min(int(position), len(PALETTE) - 2)
    mixed = np.array(PALETTE[low]) * (1 - position + low) + np.array(PALETTE[low + 1]) * (position - low)
    r, g, b = (int(value) for value in mixed)
    return r, g, b
