"""How much of what the self-supervised encoder predicts is a digit: ``python digit_share.py RUN``.

RUN is a run of ``experiment=vlm_encoder_self_supervised``; its validation videos are read. The camera and the cubes
stand still and digits change every second, so on a cube where no gripper comes or goes, what differs between a video's
frames is the digits. Prints one line of JSON: the share of the squared target (detail of patches) that is digits, on
those patches and in the loss of asked prediction, whose patches are drawn by how detailed they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from keygrip.data.batches import normalised
from keygrip.models.backbone.architectures import IMAGENET_MEAN, IMAGENET_STD
from keygrip.models.foveated_vlm.encoder_pretraining import cubes_of
from keygrip.models.foveated_vlm.self_supervised import patches_of, targets_of
from keygrip.training.checkpoints import read_checkpoint
from keygrip.training.parts import build_stored

VIDEOS, PATCH = 60, 16
STILL = 0.25  # change of a patch's mean colour, in standard deviations of images, above which the gripper moved there


def main(run: Path) -> None:
    data = build_stored(read_checkpoint(run)["keygrip"]["config"]["data"], "data")
    data.collator = list
    data.prepare_data()
    data.setup("validate")
    samples = [sample for batch in data.val_dataloader() for sample in batch][:VIDEOS]
    sums = np.zeros(5)  # over videos
    for sample in samples:
        images = torch.from_numpy(np.stack(list(sample.frames))).permute(0, 3, 1, 2)
        wanted, detail = targets_of(patches_of(normalised(images, IMAGENET_MEAN, IMAGENET_STD), PATCH))
        target, mean = wanted[..., :-3], wanted[..., -3:]  # [F, N, .]
        side = images.shape[-1] // PATCH
        cube = torch.zeros(side * side, dtype=torch.bool)
        for place in cubes_of(sample).values():
            x, y = (min(side - 1, int(value) // PATCH) for value in place["pixel"])
            cube[y * side + x] = True
        cube &= (mean - mean.mean(0)).abs().amax((0, 2)) < STILL
        squared, digits = target.square().mean((0, 2)), target.var(0).mean(-1)  # [N]
        drawn = (detail.square() / detail.square().sum(1, keepdim=True)).mean(0)
        sums += [
            *(float(cube.sum()), float(squared[cube].sum()), float(digits[cube].sum())),
            *(float((drawn * squared).sum()), float((drawn * digits)[cube].sum())),
        ]
    print(
        json.dumps(
            {
                "videos": len(samples),
                "patches": int(sums[0]),
                "digits_of_target_on_cubes": round(sums[2] / sums[1], 4),
                "digits_of_asked_target": round(sums[4] / sums[3], 4),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
