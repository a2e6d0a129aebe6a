"""keygrip's video-language models as a model of lmms-eval: ``lmms-eval --model keygrip --model_args checkpoint=RUN``.

With ``accelerate launch --num_processes N -m lmms_eval ...`` lmms-eval distributes the documents over the processes.
lmms-eval (`pip install 'keygrip[lmms]'`) finds this model by its entry point (`lmms_entry`); nothing else imports this
module. Its requests are (text, settings, function from a document to its images and videos, index, task, split).
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms

from keygrip.data.bad_samples import HOSTILE, BadSamples, is_of_the_machine
from keygrip.data.batches import Turn
from keygrip.data.spacing import evenly
from keygrip.data.video_text.conversations import image_frames_of, shown_image
from keygrip.data.video_text.placeholders import Placeholders
from keygrip.data.video_text.sample_types import repeat_image
from keygrip.data.video_text.video_files import read_timed_frames
from keygrip.models.foveated_vlm.generation import answer_likelihoods, encoded, generate, room
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.models.foveated_vlm.sampling import Sampling
from keygrip.progress import Progress
from keygrip.training.checkpoints import load_module

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 64  # default where a task gives none
# SystemExit: the task of Video-MME exits Python if a video does not exist
FAILS: tuple[type[BaseException], ...] = (*HOSTILE, SystemExit)
ACCELERATOR_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)  # RuntimeErrors, but no document's fault
FAILED = "-"  # names no option. MVBench's task skips empty answers, which would improve the result
Given = TypeVar("Given")
EncodedVideo = tuple[torch.Tensor, list[int], list[tuple[float, ...]], Any]  # a video with its keys and values
Timed = tuple[np.ndarray, tuple[float, ...]]  # frames and their times; () for several images or videos


class Likelihood(NamedTuple):
    """The likelihood of a text, and whether greedy decoding gives the text, as the pair that a task receives."""

    value: float
    greedy: bool

    def strip(self) -> tuple[()]:
        """Return an empty value. The response cache of lmms-eval (since 0.7) calls this on the `text` of every
        `GenerationResult`, and does not store what is empty then. A stored pair would reach the task as a string."""
        return ()


class KeygripModel(lmms):
    """A trained foveated model, or its baseline.

    Args:
        checkpoint: a run folder, a checkpoint file, or an export.
        mode: how the model attends to videos; None: as at inference.
        max_frames: longer videos are reduced to that many evenly spaced frames; None: as in training.
        device: None or "cuda": this process's GPU, if there is one.
        max_failed_share: failed requests (a video that does not exist or cannot be decoded, a row that does not fit)
            are named in the log and counted as wrong. If there are at least 200 and more than this fraction fails, the
            evaluation ends. Errors of the machine (no GPU memory, a full disk) always end it.
        batch_size, max_batch_size: passed by lmms-eval; requests are processed one
            by one, because each has its own video.

    Raises:
        FileNotFoundError, ValueError: The checkpoint does not exist, or the model does not have the mode.
    """

    def __init__(
        self,
        checkpoint: str,
        mode: str | None = None,
        max_frames: int | None = None,
        device: str | None = None,
        max_failed_share: float = 0.05,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self._rank, self._world_size = (
            int(os.environ.get(name, fallback)) for name, fallback in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        default = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(default if device in (None, "cuda") else device)  # lmms-eval gathers counts on it
        module: Any = load_module(checkpoint, map_location=str(self.device), expected=FoveatedVLMModule, dtype="auto")
        self.module: FoveatedVLMModule = module.eval()
        self.mode = mode or self.module.answer_mode
        if self.mode not in self.module.network.modes:
            raise ValueError(
                f"mode={self.mode}: {type(self.module.network).__name__} has {', '.join(self.module.network.modes)}"
            )
        self.max_frames = int(max_frames or self.module.image_options["max_frames"])
        self.max_failed_share = float(max_failed_share)
        self._last: tuple[tuple[str, ...] | None, EncodedVideo] | None = None
        self._warned: set[str] = set()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Generate answers, each truncated before the first of the task's `until` strings; `FAILED` if the answer is
        empty or the request fails.

        If a task's `max_new_tokens` (32768 in some) exceeds the language model's context, the rest of the context is
        used. If tokens are sampled (`temperature`, unless `do_sample` is false; `top_k` and `top_p`), the seed is 0,
        and for a request that is repeated (`repeats`) 1, 2, ... after that. Settings without effect are logged.
        With the response cache of lmms-eval, a failed request is asked again in the next run.

        Raises:
            ValueError: Too many requests fail, or all.
        """
        draw_counts: Counter[int] = Counter()

        def drawn(request: Any) -> str:
            draw_counts[id(request)] += 1
            return self._answer(request, draw_counts[id(request)] - 1)

        return self._answer_each(requests, drawn, lambda _: FAILED)

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Return the likelihood of each target's text, without the end of the turn: a value, and whether greedy
        decoding gives the text, as the pair (`text`) that a task receives. The response cache stores none.

        lmms-eval 0.7.3 (`ConfigurableTask.process_results`, and the tasks' own `..._mc_ppl`) uses the value in two
        ways, which are distinguished by the form of the target:

        - an option of a `multiple_choice` task, a text: the lowest value is chosen, because its models return losses.
          The value is the mean cross-entropy per token, nats. A failed option has infinity and is never preferred. If
          all options of a question fail, `multiple_choice` chooses the first, and the tasks' own functions none.
          `acc` is thus normalised by tokens; `acc_norm` divides once more, by characters, and prefers long options.
        - the target of a `loglikelihood` task, a function of the document: `perplexity` is exp(-mean). The value is the
          sum of the tokens' log-likelihoods, nats, as in lmms-eval's base class; minus infinity if the request fails.

        Raises:
            ValueError: Too many requests fail, or all.
        """
        pairs = self._answer_each(requests, self._likelihood, _failed_likelihood)
        for request in requests:
            _keep_from_cache(request)
        # its evaluator converts a bare pair to a string (`unwrap_generation_output`, 0.7 to 0.7.3), which no task can
        # read
        return [GenerationResult(Likelihood(*pair)) for pair in pairs]

    def _answer_each(
        self, requests: Sequence[Any], answer: Callable[[Any], Given], failed: Callable[[Any], Given]
    ) -> list[Given]:
        """Return the answer to each request, or the replacement for a failed one."""
        answers: list[Given] = []
        bad = BadSamples(self.max_failed_share, "max_failed_share")
        for request in Progress(requests, desc="keygrip", unit="request", shown=self.rank == 0):
            try:
                answers.append(answer(request))
            except FAILS as error:
                _, _, _, index, task, split = request.args
                if isinstance(error, ACCELERATOR_ERRORS) or is_of_the_machine(error):
                    error.add_note(f"at document {index} of {task}, {split}")
                    raise
                answers.append(failed(request))
                _keep_from_cache(request)
                self._last = None
                bad.add(1, [f"document {index} of {task}, {split}: {error}"])
            else:
                bad.add(1)
        if bad.count:
            log.warning("counted as wrong: %s", bad.summary)
        if bad.count and bad.count == bad.seen:
            raise ValueError(f"all of {bad.seen} requests failed; the first: {next(iter(bad.reasons))}")
        return answers

    def _answer(self, request: Any, seed: int = 0) -> str:
        text, settings, get_visuals, index, task, split = request.args
        inputs, counts, seconds, kv = self._encode_video(get_visuals, task, split, index)
        network = self.module.network
        prompt = self.module.collator.prompt((Turn("user", _remove_image_marks(text)),), seconds[0])
        room_left = room(network, len(prompt.ids), counts[0])
        max_tokens = int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)
        sampling = _parse_sampling(settings, seed)
        for name, value in _find_ignored_settings(settings, sampling.temperature).items():
            self._warn_once(f"{task}: {name}={value} has no effect")
        generated = generate(
            network,
            self.module.tokenizer,
            inputs,
            counts,
            [prompt],
            [0],
            self.mode,
            max(1, min(max_tokens, room_left)),
            sampling,
            kv=kv,
            seconds=seconds,
        )
        if len(generated.ids[0]) == room_left < max_tokens:
            self._warn_once(f"{task}: answers are cut off where the language model's context ends")
        return _cut_at_stop(generated.texts[0], settings) or FAILED

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s", message)

    def _likelihood(self, request: Any) -> tuple[float, bool]:
        text, target, get_visuals, index, task, split = request.args
        words = str(target(self.task_dict[task][split][index]) if callable(target) else target).strip()
        if not words:
            raise ValueError("its target is empty")
        inputs, counts, seconds, kv = self._encode_video(get_visuals, task, split, index)
        turns = (Turn("user", _remove_image_marks(text)), Turn("assistant", words))
        row = self.module.collator.prompt(turns, seconds[0])
        likelihoods = answer_likelihoods(
            self.module.network,
            *(inputs, counts, [row], [0], self.mode, kv),
            with_end=False,
            seconds=seconds,
            tokens=self.module.tokenizer.size,
        )
        total, greedy = float(likelihoods.total[0]), bool(likelihoods.greedy[0])
        if callable(target):
            return total, greedy
        self._warn_once(
            "acc compares options by their mean loss per token; ignore acc_norm, where a task has it: it divides this "
            "loss once more, by the option's characters"
        )
        return -total / int(likelihoods.tokens[0]), greedy

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise NotImplementedError: the rounds of such tasks depend on task-specific forms of answers."""
        raise NotImplementedError("keygrip answers tasks of one round: choose a task of type generate_until")

    def _encode_video(self, get_visuals: Callable[[Any], Any], task: str, split: str, index: int) -> EncodedVideo:
        """Return a document's video with its keys and values. Those of the last video are cached, because documents
        about one video follow each other, and likelihoods need it once per option."""
        visuals = get_visuals(self.task_dict[task][split][index]) or []
        name = tuple(map(str, visuals)) if all(isinstance(each, str | Path) for each in visuals) else None
        if name is None or self._last is None or self._last[0] != name:
            inputs, counts, seconds = self._video(lambda _: visuals, task, split, index)
            self._last = name, (inputs, counts, seconds, encoded(self.module.network, inputs, counts))
        return self._last[1]

    def _video(
        self, get_visuals: Callable[[Any], Any], task: str, split: str, index: int
    ) -> tuple[torch.Tensor, list[int], list[tuple[float, ...]]]:
        """Return a document's images and videos as one video, [1, F, 3, S, S], its number of frames, and their times
        (() if there are several, which have no common time)."""
        images = self.module.image_options
        visuals = [
            self._frames(item, images["image_size"], images["fit"])
            for item in get_visuals(self.task_dict[task][split][index]) or []
        ]
        size = images["image_size"]
        if not visuals:
            visuals = [(np.zeros((0, size, size, 3), np.uint8), ())]
        joined, times = _concatenate(visuals)
        keep = evenly(len(joined), self.max_frames)
        seconds = times and tuple(times[n] for n in keep)
        frames, seconds = repeat_image(joined[keep], seconds, min(image_frames_of(images), self.max_frames))
        return self.module.as_input(frames), [len(frames)], [seconds]

    def _frames(self, item: Any, size: int, fit: str) -> Timed:
        """Return uint8 [F, S, S, 3] of an lmms-eval visual, and its times. A visual is a path, an image, a list of
        either, or {"type": "video", "url": PATH, "video_start": S, "video_end": S} for a part of a video."""
        if isinstance(item, str | Path):
            return read_timed_frames(item, size, fit, self.max_frames)
        if isinstance(item, Mapping):
            source = next((item[key] for key in ("video", "image", "url", "path") if item.get(key) is not None), None)
            start, end = item.get("video_start"), item.get("video_end")
            if start is None and end is None:
                return self._frames(source, size, fit)
            if not isinstance(source, str | Path) or start is None or end is None:
                raise ValueError("a part of a video needs its path, video_start and video_end")
            return read_timed_frames(source, size, fit, self.max_frames, (float(start), float(end)))
        if isinstance(item, Sequence):
            return _concatenate([self._frames(part, size, fit) for part in item])
        if hasattr(item, "convert"):  # a PIL image
            return shown_image(item, size, fit)[None], (0.0,)
        raise ValueError(f"a visual is a {type(item).__name__}; paths and images are known")


def _concatenate(parts: Sequence[Timed]) -> Timed:
    """Concatenate frames; several parts have no common time."""
    return np.concatenate([frames for frames, _ in parts]), parts[0][1] if len(parts) == 1 else ()


def _keep_from_cache(request: Any) -> None:
    """Give a request another task name, under which no run looks for a response: the next run asks again. Only
    lmms-eval's response cache (since 0.7) reads the name. To make it refuse a response is not enough: it still writes
    the response to its log, from which a run with the same identifier (usual with several processes) restores it."""
    request.task_name = f"{request.args[4]} (not from the cache)"


def _remove_image_marks(text: str) -> str:
    """Remove the marks of image positions, because the model has its own position for images."""
    return Placeholders().without(text).strip()


def _parse_sampling(settings: Mapping[str, Any], seed: int) -> Sampling:
    """Return a task's sampling settings: `top_p` 0 means the most probable token, `top_k` 0 or -1 means all tokens."""
    temperature = 0.0 if settings.get("do_sample") is False else float(settings.get("temperature") or 0.0)
    top_k, top_p = settings.get("top_k"), settings.get("top_p")
    if not temperature or (top_p is not None and float(top_p) == 0):
        return Sampling(seed=seed)
    k = None if top_k is None or int(top_k) < 1 else int(top_k)
    return Sampling(temperature, seed, k, None if top_p is None else float(top_p))


def _find_ignored_settings(settings: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    """Return the task's settings that would change the answers but have no effect here."""
    idle = {name: settings[name] for name in ("num_beams", "repetition_penalty") if settings.get(name) not in (None, 1)}
    if not temperature and settings.get("temperature"):
        reason = "do_sample=False" if settings.get("do_sample") is False else "top_p=0"
        idle["temperature"] = f"{settings['temperature']} with {reason}"
    elif not temperature and settings.get("do_sample"):
        idle["do_sample"] = "True without a temperature"
    return idle


def _cut_at_stop(text: str, settings: Mapping[str, Any]) -> str:
    until = settings.get("until") or []
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop)[0] if stop else text
    return text.strip()


def _failed_likelihood(request: Any) -> tuple[float, bool]:
    """Return the result of `loglikelihood` for a failed request: the worst log-likelihood, or the worst loss."""
    return (-math.inf if callable(request.args[1]) else math.inf), False
