"""Accuracy of a video-language model on multiple-choice questions about videos."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from keygrip.data.batches import Turn
from keygrip.data.video_text.conversations import image_frames_of
from keygrip.data.video_text.sample_types import repeat_image
from keygrip.data.video_text.video_files import read_timed_frames
from keygrip.evaluation.chosen_options import chosen_option
from keygrip.evaluation.vqa_benchmarks import ChoiceQuestion
from keygrip.models.foveated_vlm.generation import answer_scores, check_room, encoded, generate
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.progress import Progress

log = logging.getLogger(__name__)

FOLDER_FPS = 3.0  # frame rate of MVBench's folders of frames
WHOLE = (0.0, 100_000.0)  # seconds; a clip that ends with the video, so that its frames are selected as for a clip
ROWS = 32  # number of questions, or of their letter answers, at a time


@torch.no_grad()
def evaluate_choices(
    module: FoveatedVLMModule,
    questions: Sequence[ChoiceQuestion],
    modes: Sequence[str],
    max_new_tokens: int = 64,
    record: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the accuracy by mode: `likelihood`, for the letter with the highest likelihood as the answer, and
    `generation`, for the option that a generated answer names; over all questions, by task and further group, and as
    the mean over tasks (`..._task_mean`: MLVU's M-Avg).

    Each video (or clip of a video) is decoded and encoded once, for all its questions and modes. Questions whose video
    cannot be decoded (`unreadable`) and questions that do not fit into the language model's context with their frames
    (`too_long`) are counted and excluded from the accuracy. Generated answers that name no option count as wrong; their
    fraction is `share_without_option`.

    Further figures are `tokens_per_frame` and, by mode, `ms_per_frame`: the time of the encoder, and of queries and
    language model for a question with one of its letters. It includes neither decoding of files nor generation and, if
    there are several videos, not the first video.

    Args:
        max_new_tokens: of a generated answer; reasoning before the answer counts.
        record: each answer is appended to it, as plain values.

    Returns:
        The counts and the figures of each mode; if no question is left, only the counts.
    """
    module.eval()
    scores: dict[str, dict[str, list[float]]] = {mode: defaultdict(list) for mode in modes}
    seconds_of: dict[str, float] = defaultdict(float)  # times of the encoder, and of the likelihoods by mode
    unreadable = too_long = videos = frames_seen = row_frames = 0
    with Progress(total=len(questions), desc="multiple choice", unit="question") as bar:
        for video_questions in _group_by_video(questions):
            bar.update(len(video_questions))
            try:
                frames, seconds = _frames(module, video_questions[0])
            except (ValueError, OSError) as error:
                unreadable += len(video_questions)
                log.warning("%d questions left out: %s", len(video_questions), error)
                continue
            group = _filter_fitting(module, video_questions, seconds, max_new_tokens)
            too_long += len(video_questions) - len(group)
            if not group:
                continue
            if videos == 1:  # the first video was the warm-up of the encoder and the first mode
                seconds_of.clear()
                frames_seen = row_frames = 0
            videos += 1
            inputs, counts = module.as_input(frames), [len(frames)]
            with timed(seconds_of, "encoder", inputs.device):
                kv = encoded(module.network, inputs, counts)
            video = (inputs, counts, kv, [seconds])
            frames_seen += len(frames)
            row_frames += len(frames) * sum(len(question.letters) for question in group)
            for mode in modes:
                with timed(seconds_of, mode, inputs.device):
                    likeliest = _likeliest(module, group, video, mode)
                answers = _generate_answers(module, group, video, mode, max_new_tokens)
                for question, letter, text in zip(group, likeliest, answers, strict=True):
                    chosen = chosen_option(text, question.options)
                    hits = {"likelihood": letter == question.answer, "generation": chosen == question.answer}
                    for name, hit in hits.items():
                        scores[mode][f"accuracy_{name}"].append(float(hit))
                        for part in (question.task, *question.groups):
                            scores[mode][f"accuracy_{name}/{part}"].append(float(hit))
                    scores[mode]["share_without_option"].append(float(chosen is None))
                    if record is not None:
                        record.append(_answer_record(question, mode, letter, chosen, text))
    evaluated_count = len(questions) - unreadable - too_long
    counted = {"questions": evaluated_count, "unreadable": unreadable, "too_long": too_long}
    if not evaluated_count:
        log.warning(
            "no question is left: the videos of %d cannot be decoded, and %d are too long", unreadable, too_long
        )
        return counted
    tasks = {question.task for question in questions}
    for mode_scores in scores.values():
        for name in ("accuracy_likelihood", "accuracy_generation"):
            mode_scores[f"{name}_task_mean"] = [
                float(np.mean(mode_scores[f"{name}/{t}"])) for t in tasks if f"{name}/{t}" in mode_scores
            ]
    figures = {
        mode: {name: round(float(np.mean(values)), 5) for name, values in mode_scores.items()}
        for mode, mode_scores in scores.items()
    }
    for mode in modes:
        seconds_per_frame = seconds_of["encoder"] / frames_seen + seconds_of[mode] / row_frames
        figures[mode]["ms_per_frame"] = round(1000 * seconds_per_frame, 5)
    return {**counted, "tokens_per_frame": module.network.tokens_per_frame, **figures}


@contextmanager
def timed(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Add the duration of the block in seconds to `seconds[name]`, after waiting for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] += time.perf_counter() - started


def _answer_record(question: ChoiceQuestion, mode: str, likeliest: int, named: int | None, text: str) -> dict[str, Any]:
    letters = question.letters
    return {
        "task": question.task,
        "video": str(question.video),
        "clip": question.clip,
        "question": question.question,
        "options": list(question.options),
        "answer": letters[question.answer],
        "mode": mode,
        "likeliest": letters[likeliest],
        "generated": text,
        "named": None if named is None else letters[named],
    }


def _filter_fitting(
    module: FoveatedVLMModule, questions: Sequence[ChoiceQuestion], seconds: Sequence[float], max_new_tokens: int
) -> list[ChoiceQuestion]:
    """Return the questions about a video that fit into the model's context, with its frames and an answer."""
    fitting, reason = [], ""
    for question in questions:
        text = len(module.collator.prompt((Turn("user", question.prompt),), seconds).ids)
        try:
            check_room(module.network, text, len(seconds), max_new_tokens)
        except ValueError as error:
            reason = reason or str(error)
        else:
            fitting.append(question)
    if reason:
        log.warning("%d questions about %s left out: %s", len(questions) - len(fitting), questions[0].video, reason)
    return fitting


def _group_by_video(questions: Sequence[ChoiceQuestion]) -> Iterator[list[ChoiceQuestion]]:
    """Group questions about the same seconds of the same video, in the order of the videos."""
    groups: dict[Any, list[ChoiceQuestion]] = {}
    for question in questions:
        groups.setdefault((question.video, question.clip), []).append(question)
    yield from groups.values()


def _frames(module: FoveatedVLMModule, question: ChoiceQuestion) -> tuple[np.ndarray, tuple[float, ...]]:
    images, clip = module.image_options, question.clip
    if clip is None and question.middles and not question.video.is_dir():  # a folder has only a few images per second
        clip = WHOLE
    found = read_timed_frames(
        question.video, images["image_size"], images["fit"], images["max_frames"], clip, FOLDER_FPS
    )
    return repeat_image(*found, image_frames_of(images))


def _likeliest(module: FoveatedVLMModule, group: Sequence[ChoiceQuestion], video: Any, mode: str) -> list[int]:
    """Return for each question the option whose letter has the highest likelihood as the answer."""
    inputs, counts, kv, seconds = video
    rows = [
        (index, module.collator.prompt((Turn("user", question.prompt), Turn("assistant", letter)), seconds[0]))
        for index, question in enumerate(group)
        for letter in question.letters
    ]
    scores: list[list[float]] = [[] for _ in group]
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        texts = [text for _, text in part]
        part_scores = answer_scores(module.network, inputs, counts, texts, [0] * len(part), mode, kv, seconds)
        for (index, _), score in zip(part, part_scores.tolist(), strict=True):
            scores[index].append(score)
    return [int(np.argmax(each)) for each in scores]


def _generate_answers(
    module: FoveatedVLMModule, group: Sequence[ChoiceQuestion], video: Any, mode: str, max_new_tokens: int
) -> list[str]:
    """Return the generated answer to each question."""
    inputs, counts, kv, seconds = video
    texts: list[str] = []
    for start in range(0, len(group), ROWS):
        prompts = [module.collator.prompt((Turn("user", q.prompt),), seconds[0]) for q in group[start : start + ROWS]]
        videos = [0] * len(prompts)
        answers = generate(
            module.network,
            module.tokenizer,
            inputs,
            counts,
            prompts,
            videos,
            mode,
            max_new_tokens,
            kv=kv,
            seconds=seconds,
        )
        texts += answers.texts
    return texts
