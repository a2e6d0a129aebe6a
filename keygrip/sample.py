"""Generate images: ``python -m keygrip.sample checkpoint=RUN prompt="..." [image=FILE]``.

Text and reference images can be given together or alone. Writes PNG files and a grid. The last line on standard output
is JSON with their paths and the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig

from keygrip.command import entry_point, printable_json
from keygrip.config import EntrySchema, register


@dataclass
class SampleSchema(EntrySchema):
    """Root of ``conf/sample.yaml``."""

    checkpoint: str = MISSING
    seed: int = 0
    run_dir: str | None = None
    checkpoint_step: int | None = None
    trust: Any = ()
    external: dict[str, Any] = field(default_factory=dict)
    prompt: Any = None
    prompts: str | None = None
    image: Any = None
    blend: bool = False
    image_mask: Any = None
    start_image: str | None = None
    strength: float | None = None
    redraw: str | None = None
    lora: str | None = None
    samples: int = 1
    size: Any = None
    batch_size: int = 16
    text_scale: float | None = None
    dino_scale: float | None = None
    full_scale: float | None = None
    text_rescale: float | None = None
    dino_rescale: float | None = None
    full_rescale: float | None = None
    interval: Any = None
    steps: int | None = None
    solver: str | None = None
    timestep_shift: float | None = None
    guidance: str | None = None
    cls_scale: float | None = None
    guide_scale: float | None = None


register("sample_schema", SampleSchema)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Generate images with the settings of ``cfg``; return the printed result (`keygrip.inference.images.sample`)."""
    from keygrip.inference.images import sample

    return sample(cfg)


def print_result(cfg: DictConfig) -> None:
    """Generate images and print the result as one line of JSON."""
    print(printable_json(run(cfg)))


def main() -> None:
    """Command line."""
    entry_point("sample", print_result)


if __name__ == "__main__":
    main()
