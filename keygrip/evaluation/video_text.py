"""Evaluation of a trained video-language model: losses by mode and kind, captions, answers, multiple choice, speed."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from keygrip.artifacts import refuse_unwritable, write_text
from keygrip.data.batches import Turn, VideoTextBatch
from keygrip.data.video_text.conversations import frame_settings, image_frames_of
from keygrip.data.video_text.shard_source import AUTO
from keygrip.evaluation.kinds import Evaluated, plain
from keygrip.evaluation.multiple_choice import evaluate_choices, timed
from keygrip.evaluation.text_metrics import caption_metrics, vqa_accuracy
from keygrip.evaluation.vqa_benchmarks import read_benchmark
from keygrip.models.backbone import BlockKV
from keygrip.models.foveated_vlm.attention_maps import attention_on_targets
from keygrip.models.foveated_vlm.conversations import EncodedText
from keygrip.models.foveated_vlm.generation import encoded, generate, room
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.models.foveated_vlm.scores import REFINED, Scores, comparisons
from keygrip.progress import Progress

log = logging.getLogger(__name__)

ENCODER = "encoder"  # name of its time, next to the times of the modes


@dataclass(frozen=True)
class _ScoredRows:
    """The rows of a batch whose generated text is scored: captions and VQA questions.

    Attributes:
        rows: B indices; of captions of a video that follow the same turns only the first. prompts: B conversations up
            to the answer. true: B lists of one text, or of all these captions. too_long: further rows that do not fit.
            unanswered: further rows that end with the user's turn.
    """

    rows: list[int]
    prompts: list[EncodedText]
    true: list[list[str]]
    too_long: list[str]
    unanswered: list[str]


@dataclass(frozen=True)
class _ScoredAnswer:
    """A generated answer. true: see `_ScoredRows`."""

    kind: str
    true: list[str]
    evidence: dict[str, Any]
    generated: str


@dataclass(frozen=True)
class _Sums:
    """What is collected over the batches, by mode.

    Attributes:
        scores: by kind. by_length: by kind and length of the video. generated: of each scored row. seconds: also of the
            encoder. attention: of each question, by kind.
    """

    scores: dict[str, Scores] = field(default_factory=lambda: defaultdict(Scores))
    by_length: dict[str, Scores] = field(default_factory=lambda: defaultdict(Scores))
    generated: dict[str, list[_ScoredAnswer]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    attention: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))

    def figures(self, mode: str, frames: int) -> dict[str, Any]:
        """Return the figures of a mode. frames: number of frames to which `seconds` belong."""
        figures: dict[str, Any] = self.scores[mode].figures() | self.scores[mode].questions()
        by_length = self.by_length[mode]
        if len({label.rpartition("_of_")[2] for label in by_length.sums}) > 1:
            parts = by_length.figures()
            figures |= {name: value for name, value in parts.items() if name.startswith("accuracy_")}
            figures |= by_length.questions()
        if frames:
            figures["ms_per_frame"] = 1000 * (self.seconds[ENCODER] + self.seconds[mode]) / frames
        figures |= _score_answers(self.generated[mode])
        figures |= {f"attention_{kind}": float(np.mean(share)) for kind, share in self.attention[mode].items()}
        return figures


@torch.no_grad()
def evaluate_modes(
    module: FoveatedVLMModule,
    batches: Iterable[VideoTextBatch],
    modes: Sequence[str],
    max_new_tokens: int = 64,
) -> dict[str, Any]:
    """Return the figures of each mode over batches, and comparisons between modes (`gap`, `fine_over_coarse`).

    A model that was trained with refinement is also evaluated with it, as `coarse_fine_refined` (and `gap_refined`).
    The videos of a batch are encoded once, for all modes and their generated text. `evidence` is the ground truth of a
    record.

    For each mode: loss, perplexity and exactness of answers, over all and by kind; for generated answers, `bleu_*`,
    `treebank_tokenizer`, `cider`, `meteor` (kind caption; the captions of a video that follow the same turns are the
    references of one generated caption), `vqa_accuracy` (if the evidence has `answers`, of ten annotators or fewer;
    over all, and as `vqa_accuracy/<collection>` if it names a collection);
    `accuracy_<kind>_of_<n>` (videos of up to n frames, n a power of two, if they differ in length), the number of
    questions of each (`questions_<kind>`, `questions_<kind>_of_<n>`; of videos: `videos_of_<n>` next to the modes);
    `attention_<kind>` (on the object of the question, relative to uniform, if the evidence has its position; in the
    last block, and as `..._all_blocks` over all blocks but the first); and `ms_per_frame` (encoder, queries and
    language model for all questions of a video, at the batches' size; without generation, without batches of text only,
    and without the first batch if several have frames). Next to the modes: `too_long`: captions and VQA questions for
    which nothing is generated, because they do not fit into the language model's context with their frames and an
    answer; `unanswered`: those that end with the user's turn, so that the annotators' answers are unknown; and
    `left_out_rows`: conversations of these videos that are not scored, because they are too long or cannot be rows.

    Raises:
        ValueError: The network does not have a mode, or there is no batch.
    """
    for mode in modes:
        if mode not in module.network.modes:
            raise ValueError(f"mode={mode}: {type(module.network).__name__} has {', '.join(module.network.modes)}")
    module.eval()
    sums = _Sums()
    evaluated = {mode: (mode, 0) for mode in modes}
    if module.refinement and "coarse_fine" in modes:
        evaluated[REFINED] = ("coarse_fine", module.refinement)
    videos: Counter[str] = Counter()
    frames_seen, too_long, unanswered = 0, list[str](), list[str]()
    with_frames = left_out = 0
    image_frames = image_frames_of(module.image_options) if module.image_options else 1
    for batch in Progress(batches, desc="evaluate", unit="batch"):
        batch = batch.to(module.device)
        left_out += batch.left_out
        frames = int(batch.frame_mask.sum())
        with_frames += bool(frames)
        if frames and with_frames == 2:  # the first such batch was the warm-up of the encoder and the first mode
            sums.seconds.clear()
            frames_seen = 0
        frames_seen += frames
        clock = sums.seconds if frames else defaultdict[str, float](float)  # text only has no frames for its time
        lengths = _octaves(batch, image_frames)
        videos.update(f"videos_of_{length}" for length in lengths)
        asked = _select_scored(module, batch, max_new_tokens)
        too_long += asked.too_long
        unanswered += asked.unanswered
        with timed(clock, ENCODER, module.device):
            inputs, rows = module.inputs(batch)
            kv = encoded(module.network, inputs, rows.frame_counts)
        for mode, (of_network, refinement) in evaluated.items():
            with timed(clock, mode, module.device):
                output = module.network(inputs, rows, of_network, refinement, kv)
                scored = module.score(output, batch)
                sums.scores[mode].add(scored, batch.kind)
                sums.by_length[mode].add(scored, _label_kinds_and_lengths(batch, lengths))
            if output.passes is not None:
                for kind, share in attention_on_targets(module.network, output, rows, batch):
                    sums.attention[mode][kind].append(share)
                for kind, share in attention_on_targets(module.network, output, rows, batch, "all"):
                    sums.attention[mode][f"{kind}_all_blocks"].append(share)
            if mode in modes:
                sums.generated[mode] += _generate_answers(module, batch, asked, inputs, kv, mode, max_new_tokens)
    if not sums.scores:
        raise ValueError("nothing to evaluate: the data have no samples")
    _warn_of_unscored(module, unanswered, too_long, max_new_tokens)
    figures = {mode: sums.figures(mode, frames_seen) for mode in evaluated}
    return {
        "tokens_per_frame": module.network.tokens_per_frame,
        **dict(sorted(videos.items())),
        "too_long": len(too_long),
        "unanswered": len(unanswered),
        "left_out_rows": left_out,
        **{mode: _round_values(values) for mode, values in figures.items()},
        **_round_values(comparisons(figures)),
    }


def _warn_of_unscored(
    module: FoveatedVLMModule, unanswered: Sequence[str], too_long: Sequence[str], max_new_tokens: int
) -> None:
    if unanswered:
        log.warning(
            "no answer is scored of %d conversations, which end with the user's turn; the first: %s",
            len(unanswered),
            unanswered[0],
        )
    if too_long:
        log.warning(
            "nothing is generated for %d questions, which with their frames and an answer of up to %d tokens do not "
            "fit into the %d positions of the language model; the first: %s",
            len(too_long),
            max_new_tokens,
            module.network.language.context,
            too_long[0],
        )


def _octaves(batch: VideoTextBatch, image_frames: int) -> list[int]:
    """Return the number of frames of each video, rounded up to a power of two; 0 for text only, 1 for an image that is
    repeated as `image_frames` equal frames."""
    counts = batch.frame_mask.sum(1).tolist()
    if image_frames > 1:
        equal_frames = (batch.frames == batch.frames[:, :1]).flatten(2).all(2) | ~batch.frame_mask
        is_still = equal_frames.all(1).tolist()
        counts = [
            1 if still and count == image_frames else count for still, count in zip(is_still, counts, strict=True)
        ]
    return [1 << (count - 1).bit_length() if count else 0 for count in counts]


def _label_kinds_and_lengths(batch: VideoTextBatch, lengths: Sequence[int]) -> list[str]:
    """Return the kind of each row and the octave of its video, as one label."""
    return [f"{kind}_of_{lengths[at]}" for kind, at in zip(batch.kind, batch.video_index.tolist(), strict=True)]


def _select_scored(module: FoveatedVLMModule, batch: VideoTextBatch, max_new_tokens: int) -> _ScoredRows:
    """Select captions and VQA questions that fit into the language model's context with their frames and an answer."""
    scored = [row for row, text in enumerate(batch.texts) if batch.kind[row] == "caption" or "answers" in text.evidence]
    answered = [row for row in scored if batch.texts[row].turns[-1].role == "assistant"]
    unanswered = [_describe_row(batch, row) for row in scored if row not in answered]
    counts, videos = batch.frame_mask.sum(1).tolist(), batch.video_index.tolist()
    rows, prompts, too_long = [], [], []
    references = dict[tuple[int, tuple[Turn, ...]], list[str]]()
    true: list[list[str]] = []
    for row in answered:
        *asked, answer = batch.texts[row].turns
        if batch.kind[row] == "caption" and "answers" not in batch.texts[row].evidence:
            same = references.setdefault((videos[row], tuple(asked)), [])
            same.append(answer.text)
            if len(same) > 1:
                continue
        else:
            same = [answer.text]
        prompt = module.collator.prompt(asked, batch.seconds_of(row))
        frames = counts[videos[row]]
        if room(module.network, len(prompt.ids), frames) < max_new_tokens:
            too_long.append(f"{_describe_row(batch, row)}, with {frames} frames")
            continue
        rows.append(row)
        prompts.append(prompt)
        true.append(same)
    return _ScoredRows(rows, prompts, true, too_long, unanswered)


def _describe_row(batch: VideoTextBatch, row: int) -> str:
    return f"{batch.key[row]} in {batch.source[row]}"


def _generate_answers(
    module: FoveatedVLMModule,
    batch: VideoTextBatch,
    scored_rows: _ScoredRows,
    frames: Tensor,
    kv: Sequence[BlockKV] | None,
    mode: str,
    max_new_tokens: int,
) -> list[_ScoredAnswer]:
    """Return the answers to `scored_rows`; `frames` and `kv` are the batch's."""
    if not scored_rows.rows:
        return []
    counts, videos = batch.frame_mask.sum(1).tolist(), batch.video_index.tolist()
    video_indices = sorted({videos[row] for row in scored_rows.rows})
    answers = generate(
        module.network,
        module.tokenizer,
        frames[video_indices],
        [counts[video] for video in video_indices],
        scored_rows.prompts,
        [video_indices.index(videos[row]) for row in scored_rows.rows],
        mode,
        max_new_tokens,
        kv=_select_videos(kv, counts, video_indices),
        seconds=[batch.seconds[video] for video in video_indices] if batch.seconds else None,
    )
    return [
        _ScoredAnswer(batch.kind[row], true, batch.texts[row].evidence, text)
        for row, true, text in zip(scored_rows.rows, scored_rows.true, answers.texts, strict=True)
    ]


def _select_videos(
    kv: Sequence[BlockKV] | None, counts: Sequence[int], selected: Sequence[int]
) -> Sequence[BlockKV] | None:
    """Select keys and values of some of the videos from those of the concatenated frames of all videos."""
    if kv is None or len(selected) == len(counts):
        return kv
    starts = [0, *itertools.accumulate(counts)]
    frames = [frame for video in selected for frame in range(starts[video], starts[video + 1])]
    indices = torch.tensor(frames, dtype=torch.int64, device=kv[0].key.device)
    return [BlockKV(block.key[indices], block.value[indices]) for block in kv]


def _score_answers(answers: Sequence[_ScoredAnswer]) -> dict[str, float]:
    captions = [answer for answer in answers if answer.kind == "caption"]
    figures: dict[str, float] = {}
    if captions:
        figures |= caption_metrics([answer.generated for answer in captions], [answer.true for answer in captions])
    agreed: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        if "answers" in answer.evidence:
            agreed["vqa_accuracy"].append(vqa_accuracy(answer.generated, answer.evidence["answers"]))
            if isinstance(collection := answer.evidence.get("collection"), str):
                agreed[f"vqa_accuracy/{collection}"].append(agreed["vqa_accuracy"][-1])
    return figures | {name: sum(values) / len(values) for name, values in agreed.items()}


def _round_values(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(float(value), 5) for name, value in values.items()}


def _preparation(own: Mapping[str, Any], data_changes: Mapping[str, Any], frames: Mapping[str, Any]) -> dict[str, Any]:
    """Return how frames are prepared (`frame_settings`), for the benchmarks as for the split.

    Args:
        own: the model's own preparation. data_changes: to the data of the run, of which only the preparation counts.
            frames: `max_frames` of the command, if it is given.

    Raises:
        ValueError: A setting is invalid.
    """
    changes = {name: data_changes[name] for name in ("max_frames", "fit", "image_frames") if name in data_changes}
    if changes.get("fit") == AUTO:  # that of the run's data; a benchmark has none
        del changes["fit"]
    options = {**own, **changes, **frames}
    if "image_frames" not in changes:
        options["image_frames"] = image_frames_of(options)
    return frame_settings(**options)


def evaluate_answers(evaluated: Evaluated, cfg: DictConfig) -> dict[str, Any]:
    """Return the figures of a video-language model, by mode, on a split of its run's data and on local VQA benchmarks.

    Raises:
        ValueError: The model does not have a mode, a split has no samples, a benchmark has another form, or there is
            nothing to evaluate. FileNotFoundError: A benchmark does not exist.
    """
    module: Any = evaluated.module
    chosen = module.network.modes if cfg.mode is None else cfg.mode
    modes = [chosen] if isinstance(chosen, str) else list(dict.fromkeys(chosen))
    if not modes:
        raise ValueError(f"mode=[]: {type(module.network).__name__} has {', '.join(module.network.modes)}")
    for name in ("max_frames", "max_new_tokens", "limit_batches"):
        if cfg[name] is not None and cfg[name] < 1:
            raise ValueError(f"{name}={cfg[name]}: it must be at least 1")
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {}
    if cfg.split not in ("val", "test", "none"):
        raise ValueError(f"split={cfg.split}: choose val, test or none")
    data_changes = plain(cfg.get("data")) or {}
    frames = {} if cfg.max_frames is None else {"max_frames": cfg.max_frames}
    trained_frames = module.image_options.get("image_frames", 1)
    if module.image_options:
        module.image_options = _preparation(module.image_options, data_changes, frames)
    image_frames = module.image_options.get("image_frames", 1)
    if (trained_frames, image_frames) != (1, 1):  # also 1 in place of more: the run's data have the number of training
        frames["image_frames"] = image_frames
    # checked before anything that takes hours
    benchmark_roots = {name: root for name, root in (plain(cfg.vqa_benchmarks) or {}).items() if root is not None}
    benchmarks = {name: read_benchmark(name, root) for name, root in benchmark_roots.items()}
    if cfg.split == "none" and not benchmarks:
        raise ValueError("split=none and no vqa_benchmarks: there is nothing to evaluate")
    if cfg.vqa_answers is not None and not benchmarks:
        raise ValueError(f"vqa_answers={cfg.vqa_answers} holds the answers to vqa_benchmarks: name one")
    if cfg.vqa_answers is not None:
        refuse_unwritable(cfg.vqa_answers, "vqa_answers")
    if cfg.split != "none":
        if "collator" in data_changes:
            raise ValueError("data.collator has no effect: text is prepared as the checkpoint's was")
        size = module.image_options["image_size"]
        if data_changes.get("image_size", size) != size:
            raise ValueError(
                f"data.image_size={data_changes['image_size']}: the model was trained on frames of {size} pixels"
            )
        datamodule = evaluated.stored_data(data_changes | frames)
        datamodule.collator = module.collator  # with the checkpoint's tokenizer
        if "fit" not in data_changes and hasattr(datamodule, "given_fit"):
            # as in training, whatever a set not used in training specifies
            datamodule.given_fit = module.image_options["fit"]
        if hasattr(datamodule, "configure_for"):
            datamodule.configure_for(module)  # as in training: rows beyond the context are left out of both
        datamodule.prepare_data()
        datamodule.setup("validate")
        loader = datamodule.test_dataloader() if cfg.split == "test" else datamodule.val_dataloader()
        batches = itertools.islice(iter(loader), cfg.limit_batches)
        result[cfg.split] = evaluate_modes(module, batches, modes, cfg.max_new_tokens)
        if hasattr(datamodule, "unusable"):
            result[cfg.split]["left_out_samples"] = datamodule.unusable.count
            result[cfg.split]["unreadable_samples"] = datamodule.skipped.count
    answers: list[dict[str, Any]] = []
    for name, benchmark in benchmarks.items():
        record: list[dict[str, Any]] = []
        figures = evaluate_choices(module, benchmark.questions, modes, cfg.max_new_tokens, record)
        result[name] = figures | {
            "without_video": benchmark.without_video,
            "unscored": benchmark.unscored,
            "open_ended": benchmark.open_ended,
        }
        answers += [{"benchmark": name, **entry} for entry in record]
        # known answers are kept if a later set fails, and those of an earlier run are replaced
        if cfg.vqa_answers is not None:
            lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in answers]
            write_text(Path(cfg.vqa_answers), "".join(lines))
    if benchmarks and not answers:
        left_out = ", ".join(
            f"{name}: {counts['unreadable']} whose videos cannot be decoded and {counts['too_long']} that are too long"
            for name, counts in result.items()
            if name in benchmarks
        )
        raise ValueError(f"no question is left of {left_out}")
    return result
