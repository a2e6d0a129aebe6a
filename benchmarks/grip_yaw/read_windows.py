"""How well the turn of a grip can be read from a window of the image around it, by the window's resolution.

Trains the window reader of the volume query's second look (the small backbone from random weights, one linear layer, a
code of the window's place) alone, on windows around the grip of recorded `pick` demonstrations, and scores held-out
demonstrations. Three images: "sharp" (384 px, windows of 64), "coarse" (192 px, the policy's own, windows of 32: the
same 8 cm), "enlarged" (the coarse image resampled to 384 px, windows of 64: as many patches as sharp, no more detail).

    python -m keygrip.prepare step=record root=DEMOS task.name=pick +task.steady_grip=true image_size=448 demos=200
    python benchmarks/grip_yaw/read_windows.py DEMOS --record benchmarks/grip_yaw.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keygrip.data.batches import normalised
from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.schema import Demo
from keygrip.models.backbone import DinoBackbone
from keygrip.models.geometry.cameras import project
from keygrip.models.volume_query.second_look import FREQUENCIES, REDUCED, place_code, windows
from keygrip.robots.inverse_kinematics import yaw_of
from keygrip.robots.kinematics import matrix_from_quaternion

IMAGES = {"sharp": (384, 64), "coarse": (192, 32), "enlarged": (384, 64)}  # side of the image and of a window, pixels
FIELD = 384 / 448  # the share of the recorded image that the policy sees
CLASSES, WIDTH, BATCH = 32, 96, 64
QUARTER = np.pi / 2


def grip_of(demo: Demo) -> tuple[int, float, float]:
    """Frame at which the gripper is told to close, the yaw of that grip, and its error against the cube, radians."""
    commanded = demo.arms["right"].commanded
    assert commanded is not None
    frame = int(np.argmax(commanded.gripper < 0.5))
    yaw = yaw_of(matrix_from_quaternion(commanded.quaternion[frame]))
    error = (yaw - demo.source["objects"][0]["yaw_rad"] + QUARTER / 2) % QUARTER - QUARTER / 2
    return frame, yaw, float(error)


def samples(demo: Demo, image: str) -> tuple[Tensor, Tensor]:
    """Windows uint8 [N, 3, L, L] with room to shift in, of every third frame before the grip, and their place [2]."""
    side, window = IMAGES[image]
    frame, _, _ = grip_of(demo)
    track, commanded = demo.cameras["over"], demo.arms["right"].commanded
    assert commanded is not None
    point, camera = (
        torch.from_numpy(commanded.position[frame].copy()),
        torch.from_numpy(track.world_to_camera[0].copy()),
    )
    pixel, _ = project(point, torch.from_numpy(track.intrinsics[0].copy()), camera)
    margin = (1 - FIELD) / 2 * track.width
    centre = ((pixel - margin) * side / (FIELD * track.width)).float()
    found = []
    for number in range(0, frame - 2, 3):
        seen = torch.from_numpy(track.frames.read(number)).permute(2, 0, 1)[None].float()
        edge = round(margin)
        seen = seen[..., edge : track.height - edge, edge : track.width - edge]
        if image != "sharp":
            seen = F.interpolate(seen, size=(192, 192), mode="bilinear", antialias=True)
        if seen.shape[-1] != side:
            seen = F.interpolate(seen, size=(side, side), mode="bilinear")
        found.append(windows(seen.round().clamp(0, 255).byte(), centre[None, None], window + window // 4)[0, 0])
    return torch.stack(found), centre / side * 2 - 1


class Reader(nn.Module):
    """The second look without the policy around it."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.backbone = DinoBackbone(variant="tiny", image_size=192, weights="random")
        self.reduce = nn.Linear(self.backbone.embed_dim, REDUCED)
        self.read = nn.Sequential(nn.GELU(), nn.Linear((side // self.backbone.patch_size) ** 2 * REDUCED, WIDTH))
        self.place = nn.Linear(2 + 4 * FREQUENCIES, WIDTH)
        self.head = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, CLASSES)
        )

    def forward(self, seen: Tensor, places: Tensor) -> Tensor:
        patches = self.backbone(seen).patches
        return self.head(self.read(self.reduce(patches).flatten(1)) + self.place(place_code(places)))


def measure(demos: list[Demo], held_out: int, image: str, steps: int) -> dict[str, float]:
    """Errors of a reader that was trained on all but the last `held_out` demonstrations."""
    torch.manual_seed(0)
    draws = np.random.default_rng(0)
    side = IMAGES[image][1]
    parts = [samples(demo, image) for demo in demos]
    seen, places = torch.cat([part[0] for part in parts]), torch.cat([p.expand(len(x), 2) for x, p in parts])
    owner = np.repeat(np.arange(len(demos)), [len(part[0]) for part in parts])
    yaw = torch.tensor([grip_of(demo)[1] for demo in demos], dtype=torch.float32)[torch.from_numpy(owner)]
    train, test = np.flatnonzero(owner < len(demos) - held_out), np.flatnonzero(owner >= len(demos) - held_out)
    low, high = float(yaw[train].min()) - 0.01, float(yaw[train].max()) + 0.01
    width = (high - low) / CLASSES
    reader = Reader(side)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1.5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    room, mean, std = seen.shape[-1] - side, reader.backbone.mean, reader.backbone.std
    started = time.process_time()
    for step in range(steps):
        chosen = draws.choice(train, BATCH)
        at = draws.integers(0, room + 1, (BATCH, 2))
        cut = [seen[k, :, y : y + side, x : x + side] for k, (y, x) in zip(chosen, at, strict=True)]
        batch = normalised(torch.stack(cut), mean, std)
        batch = batch * (1 + 0.2 * (torch.rand(BATCH, 3, 1, 1) - 0.5)) + 0.3 * (torch.rand(BATCH, 1, 1, 1) - 0.5)
        target = ((yaw[chosen] - low) / width).long().clamp(0, CLASSES - 1)
        loss = F.cross_entropy(reader(batch, places[chosen]), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"{image}: step {step + 1} of {steps}, loss {float(loss.detach()):.2f}", file=sys.stderr, flush=True)
    seconds = time.process_time() - started
    middle, found = room // 2, []
    with torch.inference_mode():
        for part in np.array_split(test, max(1, len(test) // BATCH)):
            cut_out = seen[part, :, middle : middle + side, middle : middle + side]
            found.append(reader(normalised(cut_out, mean, std), places[part]))
    logits = torch.cat(found)
    bins = torch.arange(CLASSES)
    near = (bins - logits.argmax(-1, keepdim=True)).abs() <= 3
    read = low + width * (logits.masked_fill(~near, -torch.inf).softmax(-1) * (bins + 0.5)).sum(-1)
    error = ((read - yaw[test] + QUARTER / 2) % QUARTER - QUARTER / 2).abs().rad2deg()
    return {
        "yaw_error_deg_median": round(float(error.median()), 2),
        "yaw_error_deg_mean": round(float(error.mean()), 2),
        "train_windows": len(train),
        "held_out_windows": len(test),
        "cpu_s": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demos", type=Path)
    parser.add_argument("--images", nargs="+", default=list(IMAGES), choices=list(IMAGES))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--held-out", type=int, default=30)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    demos = [reference.read(cameras=("over",)) for reference in find_demos(options.demos, "native", None)]
    errors = np.rad2deg([grip_of(demo)[2] for demo in demos])
    result = {
        "what": "yaw of the grip read from one window, modulo 90 degrees; chance is 22.5",
        "command": "python benchmarks/grip_yaw/read_windows.py DEMOS",
        "machine": "2 cores",
        "training_seeds": 1,
        "steps": options.steps,
        "demos": len(demos),
        "held_out_demos": options.held_out,
        "expert_against_cube_deg_std": round(float(errors.std()), 2),
        "expert_against_cube_deg_max": round(float(np.abs(errors).max()), 2),
    }
    for image in options.images:
        result[image] = measure(demos, options.held_out, image, options.steps)
        print(json.dumps({image: result[image]}), flush=True)
        if options.record is not None:
            options.record.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
