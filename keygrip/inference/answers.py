"""Answers questions about a video with a trained video-language model."""

from __future__ import annotations

import time
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image

from keygrip.artifacts import atomic_write
from keygrip.data.batches import Turn
from keygrip.data.video_text.video_files import read_frames
from keygrip.models.foveated_vlm.attention_maps import patch_maps
from keygrip.models.foveated_vlm.conversations import encode_conversation
from keygrip.models.foveated_vlm.figures import draw_looks
from keygrip.models.foveated_vlm.generation import generate
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.models.foveated_vlm.network import FoveatedVLM, VLMOutput
from keygrip.training.checkpoints import find_checkpoint, load_module


def answer(cfg: DictConfig) -> dict[str, Any]:
    """Answers one question or a list of them about one video; returns what is printed.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint or video, or a mode that the model does not have.
    """
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
    if cfg.figure is not None:
        if not isinstance(network, FoveatedVLM) or answers.looks is None:
            raise ValueError("figure=... shows where queries attended, which this model does not have: leave it out")
        none = torch.zeros(0, device=device)
        output = VLMOutput(none, answers.rows.layout(), none, answers.looks)
        maps = patch_maps(network, output, answers.rows).cpu().numpy()
        streams = answers.rows.streams.of_row.tolist()
        strips = [
            (f"{question}   {answer}", frames, maps[streams[row]])
            for row, (question, answer) in enumerate(zip(questions, answers.texts, strict=True))
        ]
        with atomic_write(cfg.figure) as file:
            Image.fromarray(draw_looks(strips)).save(file, "PNG")
        result["figure"] = str(cfg.figure)
    return result
