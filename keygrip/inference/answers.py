"""Answer questions about videos, or continue conversations, with a trained video-language model."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from keygrip.artifacts import atomic_write, refuse_unwritable
from keygrip.data.batches import Turn
from keygrip.data.video_text.conversations import image_frames_of
from keygrip.data.video_text.sample_types import pad_videos, repeat_image
from keygrip.data.video_text.video_files import read_timed_frames
from keygrip.inference.conversation_files import read_conversations
from keygrip.inference.given_texts import texts_of
from keygrip.inference.video_chat import BATCH_ROWS, VideoChat, checked_samples
from keygrip.models.backbone import BlockKV
from keygrip.models.foveated_vlm.attention_maps import patch_maps
from keygrip.models.foveated_vlm.baseline import PooledVLM
from keygrip.models.foveated_vlm.conversations import EncodedText
from keygrip.models.foveated_vlm.figures import draw_attention
from keygrip.models.foveated_vlm.generation import (
    Answers,
    check_room,
    encoded,
    generate,
)
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.models.foveated_vlm.sampling import Sampling
from keygrip.models.foveated_vlm.streaming import NO_STREAM
from keygrip.models.foveated_vlm.video_language import VLMOutput
from keygrip.training.checkpoints import find_checkpoint, load_module, trusted_packages

log = logging.getLogger(__name__)

MOST_STRIPS = 64  # largest number of rows of a figure; each row is two inches high
NO_STRIPS = "figure=... shows where queries attended, which this model (or text alone) does not give: leave it out"


@dataclass(frozen=True)
class Video:
    """A decoded video. path: None for text alone. frames: uint8 [F, S, S, 3]. seconds: F, the time of each frame."""

    path: str | None
    frames: np.ndarray
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class AskedQuestion:
    """A question about a video and the prompt built from both. sample: index of the answer that is sampled for it."""

    video: Video
    question: str
    prompt: EncodedText
    sample: int = 0


def answer(cfg: DictConfig) -> dict[str, Any]:
    """Answer one or several questions about one or several videos, or continue the conversations of a file.

    If there are several videos or conversations, those that cannot be read are listed in the log and in the result
    (`unreadable`). Questions that do not fit into the language model's context together with their video are listed the
    same way (`unanswered`).

    Returns:
        The result that the command prints.

    Raises:
        FileNotFoundError, ValueError: The checkpoint does not exist, nothing can be read or answered, the model does
            not have the requested mode, or settings exclude each other.
    """
    checked_samples(cfg.samples, _sampling(cfg))
    for name in ("max_frames", "max_new_tokens", "batch_frames"):
        if cfg[name] is not None and cfg[name] < 1:
            raise ValueError(f"{name}={cfg[name]}: it must be at least 1")
    given = [name for name in ("video", "question") if not OmegaConf.is_missing(cfg, name)]
    if cfg.conversations is not None and (given or cfg.figure is not None):
        raise ValueError("conversations=FILE stands in place of video and question, and has no figure: leave them out")
    if cfg.figure is not None:
        if Path(cfg.figure).suffix.lower() not in ("", ".png"):
            raise ValueError(f"figure={cfg.figure}: it is written as PNG: give a file name that ends in .png")
        refuse_unwritable(cfg.figure, "figure")
    if cfg.figure is not None and cfg.stream:
        raise ValueError("figure=... shows where queries attended, which stream=true does not keep: leave one out")
    for name in ("figure", "stream"):
        if cfg.samples is not None and cfg[name]:
            raise ValueError(
                f"samples={cfg.samples}: {name}={cfg[name]} shows one answer to each question: leave one out"
            )
    paths, questions = ([], []) if cfg.conversations is not None else _videos_and_questions(cfg)
    talks, broken = ([], {}) if cfg.conversations is None else read_conversations(cfg.conversations)
    module = load_module(
        find_checkpoint(cfg.checkpoint, cfg.checkpoint_step),
        map_location="cuda" if torch.cuda.is_available() else "cpu",
        expected=FoveatedVLMModule,
        trust=trusted_packages(cfg),
        refuse=_refuse_stream if cfg.stream else None,
        dtype=cfg.dtype,
    )
    assert isinstance(module, FoveatedVLMModule)
    mode = cfg.mode or module.answer_mode
    if mode not in module.network.modes:
        raise ValueError(f"mode={mode}: {type(module.network).__name__} has {', '.join(module.network.modes)}")
    if cfg.max_frames is not None:
        module.image_options["max_frames"] = cfg.max_frames
    started = time.perf_counter()
    if cfg.conversations is None:
        result = _answer_questions(module, paths, questions, mode, cfg)
    else:
        result = _answer_conversations(module, talks, broken, mode, cfg)
    return result | {"mode": mode, "wall_s": round(time.perf_counter() - started, 3)}


def _refuse_stream(model: Mapping[str, Any]) -> None:
    """Raise ValueError if the model of this configuration answers whole videos only."""
    network = model.get("network")
    target = network.get("_target_") if isinstance(network, Mapping) else None
    if target == f"{PooledVLM.__module__}.{PooledVLM.__qualname__}":
        raise ValueError(NO_STREAM.format(PooledVLM.__name__))


def _sampling(cfg: DictConfig) -> Sampling:
    return Sampling(cfg.temperature, cfg.seed, cfg.top_k, cfg.top_p)


def _videos_and_questions(cfg: DictConfig) -> tuple[list[Any], list[str]]:
    """Return the paths (None for text alone) and the questions to ask about each. Raises the errors of `answer`."""
    is_single = cfg.video is None or isinstance(cfg.video, str | int | float)
    paths: list[Any] = [cfg.video] if is_single else list(cfg.video)
    questions = [] if cfg.question is None else texts_of("question", cfg.question)
    if any(not question.strip() for question in questions):
        raise ValueError("question='': a question is empty")
    if cfg.figure is not None and paths and all(path is None for path in paths):
        raise ValueError(NO_STRIPS)
    if not (paths and questions):
        raise ValueError("video and question: give at least one of each (video=null: text alone)")
    if any(path is not None and not str(path).strip() for path in paths):
        raise ValueError("video='': a path is empty; name a file or folder (video=null: text alone)")
    if not any(path is None or Path(str(path)).exists() for path in paths):
        raise FileNotFoundError(f"there is no video, image or folder at {paths[0]}")
    if cfg.figure is not None and len(paths) * len(questions) > MOST_STRIPS:
        raise ValueError(
            f"figure=... holds {MOST_STRIPS} answers at most, not {len(paths) * len(questions)}: leave it out"
        )
    return paths, questions


# ---- conversations ---------------------------------------------------------------------------------------------------


def _answer_conversations(
    module: FoveatedVLMModule, conversations: Sequence[list[Any]], broken: dict[int, str], mode: str, cfg: DictConfig
) -> dict[str, Any]:
    chat = VideoChat(module)
    generation_settings = (cfg.max_new_tokens, cfg.temperature, cfg.seed, mode)
    truncation = {"top_k": cfg.top_k, "top_p": cfg.top_p}
    left_out: dict[int, str] = {}
    texts: list[Any] = []
    if cfg.stream:
        for index, talk in enumerate(conversations):
            try:
                texts.append(_write_pieces(f"[{index + 1}]", chat.stream(talk, *generation_settings, **truncation)))
            except (ValueError, OSError) as error:
                texts.append("")
                left_out[index] = str(error)
    else:
        texts = chat.generate(
            conversations, *generation_settings, cfg.batch_frames, left_out, samples=cfg.samples, **truncation
        )
    left_out |= broken  # a line that could not be parsed: its reason replaces that of its empty conversation
    if len(left_out) == len(conversations):
        raise ValueError(f"{cfg.conversations}: no conversation can be read; the first: {left_out[0]}")
    for index, reason in left_out.items():
        log.warning("conversation %d is left out: %s", index + 1, reason)
    key = "answer" if cfg.samples is None else "answers"
    answered = [{"conversation": index + 1, key: reply} for index, reply in enumerate(texts) if index not in left_out]
    unreadable = {str(index + 1): reason for index, reason in left_out.items()}
    return {"answers": answered} | ({"unreadable": unreadable} if unreadable else {})


# ---- questions about videos ------------------------------------------------------------------------------------------


def _answer_questions(
    module: FoveatedVLMModule, paths: Sequence[Any], questions: Sequence[str], mode: str, cfg: DictConfig
) -> dict[str, Any]:
    answers: list[dict[str, Any]] = []
    unanswered: list[dict[str, Any]] = []
    strips: list[tuple[str, np.ndarray, np.ndarray]] = []
    unreadable: dict[str, str] = {}
    names = {} if cfg.figure is None else _names_in_figure([str(path) for path in paths if path is not None])
    frames = 0
    for videos in _batches(module, paths, cfg.batch_frames, unreadable):
        frames += sum(len(video.frames) for video in videos)
        fitting = _fitting_requests(module, videos, questions, cfg.max_new_tokens, unanswered)
        rows = [replace(each, sample=sample) for each in fitting for sample in range(cfg.samples or 1)]
        texts: list[str] = []
        if cfg.stream:
            texts = [_stream_answer(module, each, mode, cfg) for each in rows]
        else:
            for batch, generated in _together(module, rows, mode, cfg):
                texts += generated.texts
                if cfg.figure is not None:
                    strips += _attention_strips(module, batch, generated, names)
        remaining_texts = iter(texts)
        for each in fitting:
            answer_fields: Any = (
                {"answer": next(remaining_texts)}
                if cfg.samples is None
                else {"answers": [*islice(remaining_texts, cfg.samples)]}
            )
            answers.append({"video": each.video.path, "question": each.question, **answer_fields})
    for entry in unanswered:
        log.warning("left out: %r about %s: %s", entry["question"], entry["video"] or "no video", entry["reason"])
    if not answers:
        raise ValueError(f"no question can be answered; the first: {unanswered[0]['reason']}")
    result: dict[str, Any] = {"answers": answers, "frames": frames}
    if unreadable:
        result["unreadable"] = unreadable
    if unanswered:
        result["unanswered"] = unanswered
    if cfg.figure is not None:
        if not strips:
            raise ValueError(NO_STRIPS)
        with atomic_write(cfg.figure) as file:
            Image.fromarray(draw_attention(strips)).save(file, "PNG")
        result["figure"] = str(cfg.figure)
    return result


def _batches(
    module: FoveatedVLMModule, paths: Sequence[Any], batch_frames: int, unreadable: dict[str, str]
) -> Iterator[list[Video]]:
    """Decode videos and yield them in batches of at most `batch_frames` frames, padding included. Videos that cannot be
    read are added to `unreadable`. If no video can be read, the first error is raised."""
    images = module.image_options
    size = images["image_size"]
    waiting: list[Video] = []
    failed: list[Exception] = []
    for path in paths:
        video = Video(None, np.zeros((0, size, size, 3), np.uint8), ())
        if path is not None:
            try:
                timed_frames = read_timed_frames(str(path), size, images["fit"], images["max_frames"])
                video = Video(str(path), *repeat_image(*timed_frames, image_frames_of(images)))
            except (ValueError, OSError) as error:
                failed.append(error)
                unreadable[str(path)] = str(error)
                continue
        longest = max(len(each.frames) for each in (*waiting, video))
        if waiting and longest * (len(waiting) + 1) > batch_frames:
            yield waiting
            waiting = []
        waiting.append(video)
    if len(failed) == len(paths):
        raise failed[0]
    for reason in failed:
        log.warning("left out: %s", reason)
    if waiting:
        yield waiting


def _fitting_requests(
    module: FoveatedVLMModule,
    videos: Sequence[Video],
    questions: Sequence[str],
    max_new_tokens: int,
    unanswered: list[dict[str, Any]],
) -> list[AskedQuestion]:
    """Return every question about each video. Questions that do not fit are added to `unanswered` with the reason."""
    fitting: list[AskedQuestion] = []
    for video in videos:
        for question in questions:
            try:
                prompt = module.collator.prompt((Turn("user", question),), video.seconds)
                check_room(module.network, len(prompt.ids), len(video.frames), max_new_tokens)
            except ValueError as error:
                unanswered.append({"video": video.path, "question": question, "reason": str(error)})
                continue
            fitting.append(AskedQuestion(video, question, prompt))
    return fitting


def _together(
    module: FoveatedVLMModule, requests: Sequence[AskedQuestion], mode: str, cfg: DictConfig
) -> Iterator[tuple[list[AskedQuestion], Answers]]:
    """Answer the questions about a batch of videos. Each video is encoded once."""
    if not requests:
        return
    network = module.network
    videos = list({id(each.video): each.video for each in requests}.values())
    places = {id(video): place for place, video in enumerate(videos)}
    counts = [len(video.frames) for video in videos]
    padded = pad_videos([video.frames for video in videos])
    frames = module.as_input(padded.reshape(-1, *padded.shape[2:]))[0].unflatten(0, padded.shape[:2])
    kv = encoded(network, frames, counts)
    for part in _split_into_parts(requests, cfg.batch_frames):
        rows = [places[id(each.video)] for each in part]
        first, last = rows[0], rows[-1] + 1
        start, stop = sum(counts[:first]), sum(counts[:last])
        answers = generate(
            network,
            module.tokenizer,
            frames[first:last],
            counts[first:last],
            [each.prompt for each in part],
            [row - first for row in rows],
            mode,
            cfg.max_new_tokens,
            _sampling(cfg),
            None if kv is None else [BlockKV(block.key[start:stop], block.value[start:stop]) for block in kv],
            [video.seconds for video in videos[first:last]],
            [each.sample for each in part],
        )
        yield part, answers


def _split_into_parts(requests: Sequence[AskedQuestion], batch_frames: int) -> Iterator[list[AskedQuestion]]:
    """Yield rows that are answered together: at most `batch_frames` frames, padding included, and `BATCH_ROWS` rows.
    Each row holds its video's tokens in the language model, so the number of questions about one video is limited
    too."""
    waiting: list[AskedQuestion] = []
    for each in requests:
        longest = max(len(other.video.frames) for other in (*waiting, each))
        if waiting and (longest * (len(waiting) + 1) > batch_frames or len(waiting) == BATCH_ROWS):
            yield waiting
            waiting = []
        waiting.append(each)
    if waiting:
        yield waiting


def _names_in_figure(paths: Sequence[str]) -> dict[str, str]:
    """Return the names of several videos in the titles of a figure: their paths from the folder that they share. A
    single video needs none."""
    full_paths = {path: Path(path).absolute() for path in paths}
    if len(full_paths) < 2:
        return {}
    folder = os.path.commonpath([path.parent for path in full_paths.values()])
    return {path: os.path.relpath(full_path, folder) for path, full_path in full_paths.items()}


def _attention_strips(
    module: FoveatedVLMModule, requests: Sequence[AskedQuestion], answers: Answers, names: Mapping[str, str]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return title, frames and query attention of each question about frames; the titles contain the video's name if
    `names` has one. Raises ValueError without queries."""
    network = module.network
    if not isinstance(network, FoveatedVLM):
        raise ValueError(NO_STRIPS)
    if answers.passes is None:
        return []
    none = torch.zeros(0, device=answers.rows.input_ids.device)
    output = VLMOutput(none, answers.rows.layout(), none, answers.passes)
    maps = patch_maps(network, output, answers.rows).cpu().numpy()
    streams = answers.rows.streams.of_row.tolist()
    titles = {path: f"{name}: " for path, name in names.items()}
    return [
        (
            f"{titles.get(str(each.video.path), '')}{each.question}   {text}",
            each.video.frames,
            maps[streams[row]][: len(each.video.frames)],
        )
        for row, (each, text) in enumerate(zip(requests, answers.texts, strict=True))
        if len(each.video.frames)
    ]


def _stream_answer(module: FoveatedVLMModule, request: AskedQuestion, mode: str, cfg: DictConfig) -> str:
    """Return an answer and write it to standard error while it is generated."""
    stream = module.stream(request.question, mode, request.video.seconds, cfg.max_new_tokens)
    for frame, second in zip(request.video.frames, request.video.seconds, strict=True):
        stream.push(frame, second)
    pieces = stream.stream(cfg.max_new_tokens, cfg.temperature, cfg.seed, top_k=cfg.top_k, top_p=cfg.top_p)
    return _write_pieces(request.question, pieces)


def _write_pieces(title: str, pieces: Iterator[str]) -> str:
    """Join the pieces of an answer and write them to standard error as they arrive."""
    sys.stderr.write(f"{title} ")
    text = ""
    try:
        for piece in pieces:
            sys.stderr.write(piece)
            sys.stderr.flush()
            text += piece
    finally:
        sys.stderr.write("\n")
    return text
