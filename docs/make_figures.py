"""Make the images of README.md from a trained run: ``python docs/make_figures.py runs/demo``.

Writes into docs/images: ``episode.gif`` (a held-out closed-loop episode with the plan drawn in) and ``prediction.png``
(heatmap, trajectories, height, gripper and rotation of a validation frame).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from keygrip.data.batches import PolicyBatch
from keygrip.data.video import read_video
from keygrip.evaluation.closed_loop import HELD_OUT_SEED, ClosedLoop
from keygrip.models.volume_query.module import VolumeQueryModule
from keygrip.training.checkpoints import load_module, read_checkpoint
from keygrip.training.parts import build_stored

IMAGES = Path(__file__).parent / "images"


def main(run: Path) -> None:
    config = read_checkpoint(run)["keygrip"]["config"]
    module = load_module(run, expected=VolumeQueryModule)
    assert isinstance(module, VolumeQueryModule)
    data = build_stored(config["data"], "data")
    data.prepare_data()
    data.setup("validate")
    IMAGES.mkdir(exist_ok=True)
    prediction(data, module)
    episode(config["data"]["record"], run)


def prediction(data: object, module: VolumeQueryModule) -> None:
    """Plot the prediction for a validation frame in which the gripper moves towards the object."""
    samples = data.val_samples  # type: ignore[attr-defined]
    batch = PolicyBatch.collate([samples[12]])
    with torch.no_grad():
        targets = module.targets(batch)
        output = module(batch, targets, teacher=False)
    figure = module.figure(output, batch, targets, sample=0, arm=0)
    Image.fromarray(figure).save(IMAGES / "prediction.png", optimize=True)


def episode(record: dict[str, Any], run: Path) -> None:
    """Save one held-out episode as an animation; `record` is the run's setting `data.record`."""
    loop = ClosedLoop(
        build_stored(record["task"], "data.record.task"),
        {"episode": [{}]},
        episodes=1,
        first_seed=HELD_OUT_SEED + 3,
        image_size=record["image_size"],
        processes=1,
        videos=1,
    )
    (result,) = loop.run(run, run / "figures")
    name = result.episodes[0].video
    assert name is not None
    frames = [Image.fromarray(frame) for frame in read_video(run / "figures" / "videos" / name)]
    small = [frame.resize((320, 320), Image.Resampling.LANCZOS).quantize(64) for frame in frames]
    small[0].save(IMAGES / "episode.gif", save_all=True, append_images=small[1:], duration=100, loop=0, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
