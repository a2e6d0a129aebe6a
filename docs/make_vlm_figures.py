"""Make the images of the foveated model's card from a trained run: ``python docs/make_vlm_figures.py runs/vlm``.

Writes docs/images/where_it_looked.png: questions of different kinds about held-out videos, the model's answers, and
the query's attention in every frame. Also writes its upper half, where_it_looked_three.png, for README.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

from keygrip.models.foveated_vlm.figures import show_answers
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.training.checkpoints import load_module, read_checkpoint
from keygrip.training.parts import build_stored

IMAGES = Path(__file__).parent / "images"
ROWS = 6


@torch.no_grad()
def main(run: Path) -> None:
    module = load_module(run, expected=FoveatedVLMModule)
    assert isinstance(module, FoveatedVLMModule)
    data = build_stored(read_checkpoint(run)["keygrip"]["config"]["data"], "data")
    data.collator = module.collator
    data.prepare_data()
    data.setup("validate")
    batch = next(batch for batch in data.test_dataloader() if batch.frame_mask.any())
    figure, _ = show_answers(module, batch, ROWS)
    assert figure is not None
    IMAGES.mkdir(exist_ok=True)
    image = Image.fromarray(figure).quantize(192)
    image.save(IMAGES / "where_it_looked.png", optimize=True)
    image.crop((0, 0, image.width, image.height // 2)).save(IMAGES / "where_it_looked_three.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
