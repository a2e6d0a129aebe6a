"""Time and memory of the foveated video-language model: of a training step in each mode, and of a frame of the
autoregressive pass."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from keygrip.benchmarks.measuring import (
    Timed,
    Work,
    interleaved_seconds,
    milliseconds,
    peak_extra_bytes,
    random_module,
    threads,
)
from keygrip.config import compose
from keygrip.data.batches import VideoTextBatch
from keygrip.data.shards.budget import Budget
from keygrip.models.foveated_vlm.loss import token_cross_entropy
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.models.foveated_vlm.rows import TextRows
from keygrip.models.foveated_vlm.streaming import StreamingSession
from keygrip.models.language.cache import LanguageCache
from keygrip.training.compute import OPERATIONS
from keygrip.training.memory import GIB

log = logging.getLogger(__name__)

SHORTEST_TEXT = 32  # tokens of a question and an answer
PROMPT_SHARE = 0.75  # share of the text tokens before the answer, where the question comes first
RANDOM_WEIGHTS = ("language.model.weights=random", "backbone.weights=random")


@dataclass(frozen=True)
class VLMStep(Timed):
    """A training step (forward, loss, backward) in `coarse_fine` compared with a step in `coarse_only`, and its peak
    memory.

    The headline figures are for the published order, visual tokens first. Without `quick`, the order with the question
    first is measured too. Weights are random.

    Args:
        overrides: overrides of ``keygrip.train`` that select the network.
        frames, text_tokens, videos, questions: size of the batch: frames per video, tokens per row, videos, and rows
            per video.
        memory_frames: numbers of frames for which the peak memory of a step is reported.
        threads: number of CPU threads.
        quick_image_size, quick_layers: side of the frames in pixels and layers of the language model with `quick`: at
            full size a step takes 5 s on a core without bf16. Quick figures are therefore not those of the full size;
            `image_size` and `layers` are reported with them.
    """

    overrides: Sequence[str]
    frames: int
    text_tokens: int
    videos: int
    questions: int
    memory_frames: Sequence[int]
    threads: int
    quick_image_size: int
    quick_layers: int

    def run(self, quick: bool) -> dict[str, float]:
        """`step_ms` and `peak_mb` of coarse_fine, and `fine_over_coarse_time` of each order; `step_gflop`, the
        floating-point operations (10^9) of such a step, and `encoder_gflop`, those of the frames in the encoder."""
        smaller = [f"backbone.image_size={self.quick_image_size}", f"language.model.layers={self.quick_layers}"]
        network, device = _network([*self.overrides, *(smaller if quick else [])])
        network.train()
        figures: dict[str, float] = {}
        if quick:
            figures |= {"image_size": self.quick_image_size, "layers": self.quick_layers}
        repetitions, limit_s = self.effort(quick)
        with threads(self.threads):
            for order in ("visual_first",) if quick else ("visual_first", "question_first"):
                frames, rows = self._batch(network, order, self.frames, device)
                sides: dict[str, Work] = {
                    mode: _Step(network, frames, rows, mode) for mode in ("coarse_only", "coarse_fine")
                }
                seconds = interleaved_seconds(sides, repetitions, device, limit_s)
                fine, coarse = seconds["coarse_fine"], seconds["coarse_only"]
                figures[f"{order}_step_ms"] = milliseconds(fine)
                figures[f"{order}_fine_over_coarse_time"] = round(float(np.median(fine / coarse)), 3)
            frames, rows = self._batch(network, "visual_first", self.frames, device)
            figures["step_gflop"] = _gflop(_Step(network, frames, rows, "coarse_fine"))
            figures["encoder_gflop"] = _gflop(_Encoding(network, frames))
            for count in self.memory_frames[:1] if quick else self.memory_frames:
                frames, rows = self._batch(network, "visual_first", count, device)
                work = _Step(network, frames, rows, "coarse_fine")
                if count != self.frames:
                    work()  # the first call also makes permanent allocations
                figures[f"peak_{count}_frames_mb"] = round(peak_extra_bytes(work, device) / 2**20, 1)
        figures["step_ms"] = figures["visual_first_step_ms"]
        figures["fine_over_coarse_time"] = figures["visual_first_fine_over_coarse_time"]
        figures["peak_mb"] = figures[f"peak_{self.memory_frames[0]}_frames_mb"]
        return figures

    def _batch(self, network: FoveatedVLM, order: str, frames: int, device: torch.device) -> tuple[Tensor, TextRows]:
        size, rows = network.backbone.image_size, self.videos * self.questions
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.videos, frames, 3, size, size, generator=generator).to(device)
        ids = torch.randint(3, 300, (rows, self.text_tokens), generator=generator).to(device)
        visual_at = 0 if order == "visual_first" else int(PROMPT_SHARE * self.text_tokens)
        videos = [row // self.questions for row in range(rows)]
        lengths, seconds = [self.text_tokens] * rows, [tuple(map(float, range(frames)))] * self.videos
        return images, TextRows(ids, lengths, [visual_at] * rows, videos, [frames] * self.videos, seconds)


@dataclass(frozen=True)
class VLMDecode(Timed):
    """Autoregressive passes with all caches: milliseconds per frame at the 8th and the 64th frame.

    The time of a frame is that of one query over the encoder's cached keys and values, and one step of the language
    model; encoding the frame is not included. The two frames are measured alternately, after 7 and after 63 earlier
    frames.

    Args:
        overrides: overrides of ``keygrip.train`` that select the network. prompt_tokens: tokens before the frames.
        threads: number of CPU threads.
    """

    overrides: Sequence[str]
    prompt_tokens: int
    threads: int

    def run(self, quick: bool) -> dict[str, float]:
        """`ms_per_frame_8`, `ms_per_frame_64` and their ratio."""
        network, device = _network(self.overrides)
        network.eval()
        repetitions, limit_s = self.effort(quick)
        with threads(self.threads), torch.inference_mode():
            size = network.backbone.image_size
            kv = network.encode(torch.randn(1, 3, size, size, device=device))
            sides: dict[str, Work] = {
                f"ms_per_frame_{frame}": _Frame(network, kv, self.prompt_tokens + frame - 1, device)
                for frame in (8, 64)
            }
            seconds = interleaved_seconds(sides, repetitions, device, limit_s, warm_up=2)
        figures = {name: milliseconds(values) for name, values in seconds.items()}
        ratio = np.median(seconds["ms_per_frame_64"] / seconds["ms_per_frame_8"])
        return figures | {"frame_64_over_frame_8_time": round(float(ratio), 3)}


@dataclass(frozen=True)
class VLMStream(Timed):
    """Time and memory of pushing one frame into a streaming session, encoder included, by the number of earlier frames.

    Neither grows with the number of earlier frames, except for the language model's cache, which holds them. The
    earlier frames are random visual tokens. Weights are random.

    Args:
        overrides: overrides of ``keygrip.train`` that select the network. prompt_tokens: tokens before the frames.
        frames: numbers of the measured frames; the last is compared with the first. threads: number of CPU threads.
    """

    overrides: Sequence[str]
    prompt_tokens: int
    frames: Sequence[int]
    threads: int

    def run(self, quick: bool) -> dict[str, float]:
        """`push_ms_<F>` and `push_extra_mb_<F>` (peak memory during the push, beyond the memory in use before it), and
        `frame_<last>_over_<first>_time`."""
        network, device = _network(self.overrides)
        network.eval()
        repetitions, limit_s = self.effort(quick)
        figures: dict[str, float] = {}
        with threads(self.threads), torch.inference_mode():
            works: dict[str, Work] = {
                f"push_ms_{count}": _Push(network, self.prompt_tokens, count, device) for count in self.frames
            }
            seconds = interleaved_seconds(works, repetitions, device, limit_s, warm_up=1)
            figures |= {name: milliseconds(values) for name, values in seconds.items()}
            for count, work in zip(self.frames, works.values(), strict=True):
                figures[f"push_extra_mb_{count}"] = round(peak_extra_bytes(work, device) / 2**20, 1)
        first, last = self.frames[0], self.frames[-1]
        ratio = np.median(seconds[f"push_ms_{last}"] / seconds[f"push_ms_{first}"])
        return figures | {f"frame_{last}_over_{first}_time": round(float(ratio), 3)}


class _Push:
    """Push a frame as number `count` of a stream, then restore the stream."""

    def __init__(self, network: FoveatedVLM, prompt_tokens: int, count: int, device: torch.device) -> None:
        self.session = StreamingSession(network, None)  # type: ignore[arg-type]  # no tokenizer: it writes no text
        size = network.backbone.image_size
        self.frame = torch.randn(3, size, size, device=device)
        self.session.read_embedded(torch.randn(1, prompt_tokens + count - 1, network.language.width, device=device))
        self.session.frames = count - 1
        self.mark = self.session.mark()

    def __call__(self) -> None:
        self.session.push(self.frame)
        self.session.back(self.mark)


@dataclass(frozen=True)
class VLMTokens(Timed):
    """Time of a forward pass of the language model over a question with its visual tokens, for one and for several
    tokens per frame and for several numbers of frames. Weights are random; the encoder is not included.

    Args:
        overrides: overrides of ``keygrip.train`` that select the network. text_tokens: tokens of question and answer.
        frames: numbers of frames. tokens: numbers of visual tokens per frame; the others are compared with the first.
        threads: number of CPU threads.
    """

    overrides: Sequence[str]
    text_tokens: int
    frames: Sequence[int]
    tokens: Sequence[int]
    threads: int

    def run(self, quick: bool) -> dict[str, float]:
        """`frames_<F>_tokens_<K>_ms`, and for each further K the time at the largest number of frames, divided by the
        time with the first K."""
        network, device = _network(self.overrides)
        language = network.language.eval()
        repetitions, limit_s = self.effort(quick)
        frames = list(self.frames)[: 2 if quick else None]  # long rows take a while
        tokens = list(self.tokens)[: 2 if quick else None]
        figures: dict[str, float] = {}
        with threads(self.threads), torch.inference_mode():
            for count in frames:
                rows = {each: torch.randn(1, self.text_tokens + each * count, language.width) for each in tokens}
                sides: dict[str, Work] = {
                    f"frames_{count}_tokens_{each}_ms": _Reading(network, row.to(device)) for each, row in rows.items()
                }
                seconds = interleaved_seconds(sides, repetitions, device, limit_s / len(frames))
                figures |= {name: milliseconds(values) for name, values in seconds.items()}
        last = f"frames_{frames[-1]}_tokens"
        reference_ms = figures[f"{last}_{tokens[0]}_ms"]
        for each in tokens[1:]:
            figures[f"tokens_{each}_over_{tokens[0]}_time"] = round(figures[f"{last}_{each}_ms"] / reference_ms, 2)
        return figures


@dataclass(frozen=True)
class _Reading:
    network: FoveatedVLM
    row: Tensor

    def __call__(self) -> None:
        self.network.language(self.row)


@dataclass(frozen=True)
class _Step:
    network: FoveatedVLM
    frames: Tensor
    rows: TextRows
    mode: str

    def __call__(self) -> None:
        output = self.network(self.frames, self.rows, self.mode)
        mask = torch.ones_like(self.rows.input_ids, dtype=torch.bool)
        hidden, predicted = output.predicting(mask)
        losses, _ = token_cross_entropy(hidden, self.network.language.head_weight, self.rows.input_ids[predicted])
        losses.mean().backward()
        self.network.zero_grad(set_to_none=True)  # not before: the gradients are part of this step's peak memory


@dataclass(frozen=True)
class _Encoding:
    """Keys and values of all frames, and their gradients."""

    network: FoveatedVLM
    frames: Tensor

    def __call__(self) -> None:
        kv = self.network.encode(self.frames.flatten(0, 1))
        sum((block.key.sum() + block.value.sum() for block in kv), torch.zeros(())).backward()
        self.network.zero_grad(set_to_none=True)


def _gflop(work: Work) -> float:
    """Return the floating-point operations of a call of `work`, 10^9."""
    with FlopCounterMode(display=False, custom_mapping=OPERATIONS) as counter:
        work()
    return float(f"{counter.get_total_flops() / 1e9:.4g}")


class _Frame:
    """Process one more frame with a cache of `past` positions, then cut the cache back to that length."""

    def __init__(self, network: FoveatedVLM, kv: Sequence[object], past: int, device: torch.device) -> None:
        self.network, self.kv, self.past = network, kv, past
        self.cache = LanguageCache()
        self.state = network.language.extend(torch.randn(1, past, network.language.width, device=device), self.cache)
        self.state = self.state[:, -1:]

    def __call__(self) -> None:
        network = self.network
        attended = network.query_frames(network.query_projection(self.state), self.kv)  # type: ignore[arg-type]
        network.language.extend(network.connector(attended), self.cache)
        self.cache.layers.crop(-1)
        self.cache.length -= 1


@dataclass(frozen=True)
class VLMMemory:
    """Memory of a training step of a stage's recipe on the largest batches that its budget allows. On a GPU it is
    measured; otherwise it is counted without computing (`keygrip.training.memory`).

    The batches are the largest ones with videos of one length (`fullest`). Memory is largest where both limits of the
    budget are reached: in the budgets of the stages, at all lengths from 16 to 22 frames (published stages 2 and 3,
    whose texts have up to 1024 tokens: to 42). Each video has one row. Several rows per video with the question first
    need more queries; `dry_run=true` finds that memory in the data.

    Args:
        recipes: overrides of ``keygrip.train`` by name. frames: lengths of the videos of each batch; 0: text only.
            Lengths above a recipe's `data.max_frames` are left out.
        quick_frames: lengths with `quick`. ema: whether an EMA is kept.
    """

    recipes: Mapping[str, Sequence[str]]
    frames: Sequence[int]
    quick_frames: Sequence[int]
    ema: bool

    def run(self, quick: bool) -> dict[str, float]:
        """For each recipe: `<frames>_frames_gib` of each length, `worst_gib`, the largest of them, and `weights_gib`:
        weights, optimizer and EMA. A recipe whose `data.max_frames` is below all lengths is left out."""
        figures: dict[str, float] = {}
        for name, overrides in [*self.recipes.items()][: 1 if quick else None]:
            module, data, text, accumulated = _module_and_settings(overrides)
            budget = Budget(data["budget"]["frames"], data["budget"]["positions"])
            worst, memory = 0.0, None
            for frames in self.quick_frames if quick else self.frames:
                if frames > data["max_frames"]:
                    continue
                visual = frames * module.network.tokens_per_frame
                videos, tokens = fullest(budget, data["batch_size"], frames, visual, text)
                memory = module.step_memory(_full_batch(module, videos, frames, tokens), True, self.ema, accumulated)
                gib = round(memory.total / GIB, 2)
                figures[f"{name}_{frames}_frames_gib"] = gib
                worst = max(worst, gib)
            if memory is None:
                log.warning("%s is left out: its videos have at most %d frames", name, data["max_frames"])
                continue
            figures[f"{name}_worst_gib"] = worst
            figures[f"{name}_weights_gib"] = round((memory.weights + memory.optimizer + memory.ema) / GIB, 2)
            figures["measured"] = float(memory.measured)
        return figures


def fullest(budget: Budget, most: int, frames: int, visual: int, text: int) -> tuple[int, int]:
    """Return the largest batch of a budget with videos of `frames` frames: the number of videos, and the tokens of each
    text.

    The batch has as many videos as the frame limit allows, and the text fills the remaining positions, up to `text`
    tokens; below `text` tokens both limits are reached. If fewer than `SHORTEST_TEXT` tokens remain, the batch has as
    many videos as fit with texts of `text` tokens.

    Args:
        most: largest number of videos of a batch. visual: tokens of a video. text: largest number of tokens of a text.
    """
    videos = min(most, budget.frames // frames) if frames else most
    text_tokens = min(text, budget.positions // videos - visual)
    if text_tokens >= SHORTEST_TEXT:
        return videos, text_tokens
    return min(videos, budget.positions // (visual + text)), text


def _module_and_settings(overrides: Sequence[str]) -> tuple[FoveatedVLMModule, Mapping[str, Any], int, bool]:
    """Return the module with random weights, its data settings, the largest number of tokens of a text, and whether
    gradients are accumulated."""
    config = compose("train", [*overrides, *RANDOM_WEIGHTS])
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "meta"):  # counting needs only shapes
        module = random_module(config, FoveatedVLMModule)
    module = module.to("cuda") if on_gpu else module
    return module, config.data, config.collator.max_tokens, config.accumulate_grad_batches > 1


def _full_batch(module: FoveatedVLMModule, videos: int, frames: int, text: int) -> VideoTextBatch:
    """Return a batch with the given numbers of videos, frames per video and tokens per row, one row per video, all
    tokens supervised. Only its shapes are meaningful."""
    size, mask = module.network.backbone.image_size, torch.ones(videos, text, dtype=torch.bool)
    question = 0 if module.collator.prompt_order == "visual_first" else int(PROMPT_SHARE * text)
    return VideoTextBatch(
        frames=torch.zeros(videos, frames, 3, size, size, dtype=torch.uint8),
        frame_mask=torch.ones(videos, frames, dtype=torch.bool),
        video_index=torch.arange(videos),
        input_ids=torch.zeros(videos, text, dtype=torch.int64),
        attention_mask=mask,
        loss_mask=mask,
        answer_mask=mask,
        visual_at=[question] * videos,
        truncated=0,
        kind=["memory"] * videos,
        source=[""] * videos,
        key=[""] * videos,
        texts=[],
        seconds=[tuple(map(float, range(frames)))] * videos,  # for recipes whose model is told them
    ).to("cuda" if torch.cuda.is_available() else "cpu")


def _network(overrides: Sequence[str]) -> tuple[FoveatedVLM, torch.device]:
    network = random_module(compose("train", [*overrides, *RANDOM_WEIGHTS]), FoveatedVLMModule).network
    if not isinstance(network, FoveatedVLM):
        raise ValueError(f"this case measures the foveated network; its overrides name a {type(network).__name__}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return network.to(device), device
