"""Answers questions about videos with a trained video-language model."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image

from keygrip.artifacts import atomic_write
from keygrip.data.batches import Turn
from keygrip.data.video_text.video_files import read_timed_frames
from keygrip.models.foveated_vlm.attention_maps import patch_maps
from keygrip.models.foveated_vlm.figures import draw_looks
from keygrip.models.foveated_vlm.generation import Answers, generate
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.models.foveated_vlm.network import FoveatedVLM, VLMOutput
from keygrip.training.checkpoints import find_checkpoint, load_module


def answer(cfg: DictConfig) -> dict[str, Any]:
    """Answers one question or a list of them about one video or a list of them; returns what is printed.

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
    network = module.network
    mode = cfg.mode or network.modes[-1]
    if mode not in network.modes:
        raise ValueError(f"mode={mode}: {type(network).__name__} has {', '.join(network.modes)}")
    images = module.pictures
    paths = [cfg.video] if isinstance(cfg.video, str) else [str(path) for path in cfg.video]
    questions = [cfg.question] if isinstance(cfg.question, str) else [str(question) for question in cfg.question]
    if not paths or not questions:
        raise ValueError("video and question: give at least one of each")
    most = cfg.max_frames or images["max_frames"]
    timed = [read_timed_frames(path, images["image_size"], images["fit"], most) for path in paths]
    videos, seconds = [frames for frames, _ in timed], [times for _, times in timed]
    asked = [(video, question) for video in range(len(paths)) for question in questions]
    started = time.perf_counter()
    answers: Answers | None = None
    if cfg.stream:
        texts = [_streamed(module, timed[video], question, mode, cfg) for video, question in asked]
    else:
        counts = [len(frames) for frames in videos]
        padded = np.zeros((len(videos), max(counts), *videos[0].shape[1:]), np.uint8)
        for row, frames in enumerate(videos):
            padded[row, : len(frames)] = frames
        answers = generate(
            network,
            module.tokenizer,
            module.as_input(padded.reshape(-1, *padded.shape[2:]))[0].unflatten(0, padded.shape[:2]),
            counts,
            [module.collator.prompt((Turn("user", question),), seconds[video]) for video, question in asked],
            [video for video, _ in asked],
            mode,
            cfg.max_new_tokens,
            cfg.temperature,
            cfg.seed,
            seconds=seconds,
        )
        texts = answers.texts
    result: dict[str, Any] = {
        "answers": [
            {"video": paths[video], "question": question, "answer": text}
            for (video, question), text in zip(asked, texts, strict=True)
        ],
        "mode": mode,
        "frames": sum(len(frames) for frames in videos),
        "wall_s": round(time.perf_counter() - started, 3),
    }
    if cfg.figure is not None:
        if not isinstance(network, FoveatedVLM) or answers is None or answers.looks is None:
            raise ValueError(
                "figure=... shows where queries attended, which this model (or stream=true) does not give: leave it out"
            )
        none = torch.zeros(0, device=device)
        output = VLMOutput(none, answers.rows.layout(), none, answers.looks)
        maps = patch_maps(network, output, answers.rows).cpu().numpy()
        streams = answers.rows.streams.of_row.tolist()
        strips = [
            (f"{question}   {text}", videos[video], maps[streams[row]][: len(videos[video])])
            for row, ((video, question), text) in enumerate(zip(asked, texts, strict=True))
        ]
        with atomic_write(cfg.figure) as file:
            Image.fromarray(draw_looks(strips)).save(file, "PNG")
        result["figure"] = str(cfg.figure)
    return result


def _streamed(
    module: FoveatedVLMModule, timed: tuple[np.ndarray, Sequence[float]], question: str, mode: str, cfg: DictConfig
) -> str:
    """An answer, written to standard error as it comes."""
    stream = module.stream(question, mode)
    for frame, second in zip(*timed, strict=True):
        stream.push(frame, second)
    sys.stderr.write(f"{question} ")
    said = ""
    for piece in stream.stream(cfg.max_new_tokens, cfg.temperature, cfg.seed):
        sys.stderr.write(piece)
        sys.stderr.flush()
        said += piece
    sys.stderr.write("\n")
    return said.strip()
