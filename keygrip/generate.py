"""Answers a question about a video: ``python -m keygrip.generate checkpoint=RUN video=FILE question="..."``.

Prints one line of JSON last on standard output: the answer, and where the picture with the queries' attention lies.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig

from keygrip.command import entry_point
from keygrip.config import EntrySchema, register

log = logging.getLogger(__name__)


@dataclass
class GenerateSchema(EntrySchema):
    """Root of ``conf/generate.yaml``."""

    checkpoint: str = MISSING
    checkpoint_step: int | None = None
    trust: Any = ()
    video: str = MISSING
    question: Any = MISSING
    mode: str | None = None
    max_frames: int | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    picture: str | None = None


register("generate_schema", GenerateSchema)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Answers one question or a list of them about one video; returns what is printed.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint or video, or a mode that the model does not have.
    """
    import torch

    from keygrip.data.batches import Turn
    from keygrip.data.video_text.video_files import read_frames
    from keygrip.models.foveated_vlm.conversations import encode_conversation
    from keygrip.models.foveated_vlm.figures import draw_looks
    from keygrip.models.foveated_vlm.generation import generate
    from keygrip.models.foveated_vlm.module import FoveatedVLMModule, patch_maps
    from keygrip.models.foveated_vlm.network import FoveatedVLM, VLMOutput
    from keygrip.training.checkpoints import find_checkpoint, load_module

    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = load_module(
        find_checkpoint(cfg.checkpoint, cfg.checkpoint_step),
        map_location=device,
        expected=FoveatedVLMModule,
        trust=tuple(cfg.trust),
    )
    assert isinstance(module, FoveatedVLMModule)
    network, collator = module.network, module.collator
    mode = cfg.mode or network.modes[-1]
    if mode not in network.modes:
        raise ValueError(f"mode={mode}: {type(network).__name__} has {', '.join(network.modes)}")
    pictures = module.pictures
    frames = read_frames(cfg.video, pictures["image_size"], pictures["fit"], cfg.max_frames or pictures["max_frames"])
    questions = [cfg.question] if isinstance(cfg.question, str) else [str(question) for question in cfg.question]
    prompts = [
        encode_conversation((Turn("user", question),), module.tokenizer, collator.prompt_order, "answers")
        for question in questions
    ]
    started = time.perf_counter()
    answers = generate(
        network,
        module.tokenizer,
        module.as_input(frames),
        [len(frames)],
        prompts,
        [0] * len(prompts),
        mode,
        cfg.max_new_tokens,
        cfg.temperature,
        cfg.seed,
    )
    result: dict[str, Any] = {
        "answers": [{"question": q, "answer": a} for q, a in zip(questions, answers.texts, strict=True)],
        "mode": mode,
        "frames": len(frames),
        "wall_s": round(time.perf_counter() - started, 3),
    }
    if cfg.picture is not None:
        if not isinstance(network, FoveatedVLM) or answers.looks is None:
            raise ValueError("picture=... shows where queries looked, which this model does not have: leave it out")
        from PIL import Image

        none = torch.zeros(0, device=device)
        output = VLMOutput(none, answers.rows.layout(), none, answers.looks)
        maps = patch_maps(network, output, answers.rows).cpu().numpy()
        streams = answers.rows.streams.of_row.tolist()
        strips = [
            (f"{question}   {answer}", frames, maps[streams[row]])
            for row, (question, answer) in enumerate(zip(questions, answers.texts, strict=True))
        ]
        file = Path(cfg.picture)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.stem}.writing{file.suffix or '.png'}")
        Image.fromarray(draw_looks(strips)).save(temporary)
        temporary.replace(file)
        result["picture"] = str(file)
    return result


def print_answers(cfg: DictConfig) -> None:
    """Answers and prints the result as one line of JSON."""
    print(json.dumps(run(cfg), ensure_ascii=False))


def main() -> None:
    """Command line."""
    entry_point("generate", print_answers)


if __name__ == "__main__":
    main()
