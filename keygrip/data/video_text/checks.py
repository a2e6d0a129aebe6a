"""Check the samples of all sources before training begins, and leave out those that cannot be used."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from keygrip.data.bad_samples import BadSample, raise_connection_error
from keygrip.data.shards.index import MOST_FRAMES
from keygrip.data.spacing import evenly
from keygrip.data.video_text.batching import Questions, uses_kind
from keygrip.data.video_text.clips import SubClips, one_second_apart
from keygrip.data.video_text.conversations import read_timed_conversations
from keygrip.data.video_text.lengths import TokenLengths, spread_samples
from keygrip.data.video_text.samples import Part

log = logging.getLogger(__name__)

TRIED = 64  # videos of a source that are tested whether clips can be cut out of them
LARGE_SHARE = 0.2  # of the tested samples: if more are too long, the log message is a warning


def check_kinds(parts: Sequence[Part], chosen: Mapping[str, Questions]) -> None:
    """Raise ValueError if a setting requests questions of a kind that no source has.

    Args:
        parts: of all splits. chosen: the chosen questions, by the name of the setting.
    """
    source_kinds = {kind for part in parts for kind in part.kinds_present()}
    for name, questions in chosen.items():
        missing = [kind for kind, count in questions.items() if count] if isinstance(questions, Mapping) else []
        missing = [kind for kind in missing if kind not in source_kinds]
        if missing:
            raise ValueError(
                f"data.{name} names {missing[0]!r}, of which no source holds a question; they hold "
                f"{', '.join(sorted(source_kinds)) or 'none'}"
            )


def check_clips(parts: Sequence[Part], questions: Questions) -> None:
    """Raise ValueError if a lookback names a kind that no source has, or if none of the tested longer videos can be
    cut into clips."""
    source_kinds = {kind for part in parts for kind in part.kinds_present()}
    for clips in {id(part.clips): part.clips for part in parts if part.clips is not None}.values():
        if unknown := sorted(set(clips.lookback) - source_kinds):
            raise ValueError(f"clips.lookback names {unknown[0]!r}; the sources hold {', '.join(sorted(source_kinds))}")
        tried, timed, cut = _count_cuttable(clips, [part for part in parts if part.clips is clips], questions)
        if not cut:
            lacking = (
                "has a conversation, of the kinds that are used, that says of which frame it speaks (evidence: frame) "
                f"and that a clip of at most {clips.frames[1]} frames can keep: with its lookback, the seconds that it "
                "names, and no time in another form"
            )
            if tried and not timed:
                lacking = "has frames that are one second apart (fps: 1)"
            raise ValueError(
                f"data.clips: none of {tried} training videos of more than {clips.frames[0]} frames that were tried "
                f"{lacking}, so that none can be cut: leave data.clips (or data.sources.NAME.clips) out"
            )
        log.info("clips: %d of %d longer videos that were tried can be cut", cut, tried)


def _count_cuttable(clips: SubClips, parts: Sequence[Part], questions: Questions) -> tuple[int, int, int]:
    """Return how many longer training videos were tested, how many of them have frames one second apart, and how many
    can be cut. Raise ConnectionError if one of them cannot be reached."""
    tried = timed = cut = 0
    for part in parts:
        longer_samples = part.chosen[part.column("frames") > clips.frames[0]]
        for sample in longer_samples[evenly(len(longer_samples), TRIED)].tolist():
            try:
                conversations, seconds = read_timed_conversations(part.shards, sample, MOST_FRAMES)
            except BadSample as error:
                raise_connection_error(error)
                continue  # counted when it is read
            tried += 1
            frames = int(part.shards.columns["frames"][sample])
            if one_second_apart(seconds, frames):
                timed += 1
                used = [each for each in conversations if uses_kind(each.kind, part.kinds, questions)]
                cut += clips.may_be_cut(used, frames)
    return tried, timed, cut


def usable_parts(split: str, parts: Sequence[Part], questions: Questions, fitting: bool = True) -> list[Part]:
    """Return the parts without samples that hold only kinds that are not used, or that are too long to be used, as far
    as this is known beforehand.

    Args:
        questions: chosen conversations of each sample of this split. fitting: whether training will begin.

    Raises:
        ValueError: no sample of a source is left for training.
    """
    usable = []
    trained = fitting and split == "train"
    for opened in parts:
        part = opened.of_used_kinds(questions)
        _report_unused_kinds(split, opened, part, questions, trained)
        if not len(part):
            continue
        within_tokens, usable_part = part.within_max_tokens(), part.usable()
        basis = "by estimate " if isinstance(part.lengths, TokenLengths) else ""
        if part.lengths is not None and len(within_tokens) < len(part):
            log.info(
                "%s: %d of %d samples of %s are left out: %stheir first answer ends beyond collator.max_tokens=%s",
                *(split, len(part) - len(within_tokens), len(part), part.name, basis, part.lengths.max_tokens),
            )
        if not len(within_tokens) and trained:
            raise ValueError(
                f"no sample of the source {part.name!r} has an answer that ends within collator.max_tokens; raise it"
            )
        if part.context is not None and len(usable_part) < len(within_tokens):
            log.info(
                "%s: %d of %d samples of %s are left out: %stheir rows are longer than the language model's context of "
                "%d; to use them, %s",
                *(split, len(within_tokens) - len(usable_part), len(part), part.name, basis),
                *(part.context.positions, part.context.advice(_has_frames(part))),
            )
        if trained:
            _refuse_too_long(part, usable_part, questions)
        if len(usable_part):
            usable.append(usable_part)
    return usable


def _report_unused_kinds(split: str, part: Part, used: Part, questions: Questions, trained: bool) -> None:
    """Log how many samples of a source are left out since `questions` excludes all their kinds. Raise ValueError if
    none is left for training.

    Args:
        part: the source's samples. used: those that are not left out.
    """
    if len(used) == len(part):
        return
    setting = f"data.questions={questions}"
    if split != "train":
        setting = f"data.val_questions={questions} (kinds with 0 in data.questions included)"
    if trained and not len(used):
        # `excluded` also contains kinds that the source's own `kinds` leaves out, which this setting does not change
        first = min(kind for kind in used.excluded if uses_kind(kind, part.kinds, None))
        raise ValueError(
            f"no sample of the source {part.name!r} has a conversation of a kind that is used: they hold "
            f"{', '.join(sorted(part.kinds_present()))}, and {setting}: raise a number of 0 there, for all sources "
            f"(data.questions.{first}=1), or leave the source out "
            f"(data.sources.{part.name}=null)"
        )
    log.log(
        logging.INFO if len(used) else logging.WARNING,
        "%s: %d of %d samples of %s are left out: they hold only %s, and %s",
        *(split, len(part) - len(used), len(part), part.name, ", ".join(sorted(used.excluded)), setting),
    )


def _refuse_too_long(part: Part, usable: Part, questions: Questions) -> None:
    """Raise ValueError if no row of a source, or none of the tested samples, fits into the language model's context;
    log how many of the tested samples have no row that fits.

    Args:
        part: the source's samples. usable: those that are not left out.
    """
    if part.context is None:
        return
    if not len(usable):
        frames = int(part.frames().min())
        raise ValueError(
            f"every sample of the source {part.name!r} (of {min(frames, part.context.max_frames)} frames or more, "
            f"{part.context.collator.tokens_per_frame} positions each) has rows longer than the language model's "
            f"context of {part.context.positions}: {part.context.advice(_has_frames(part))}"
        )
    if part.clips is not None or not isinstance(part.lengths, TokenLengths | None):
        return  # clips are shorter; counted lengths need no test
    problems, tried = [], 0
    tested_part = replace(usable, chosen=spread_samples(usable.shards, usable.chosen))
    for sample, frames in zip(
        tested_part.chosen.tolist(), tested_part.frames(part.context.max_frames).tolist(), strict=True
    ):
        with contextlib.suppress(BadSample):  # counted when they are read
            conversations, seconds = read_timed_conversations(usable.shards, sample, part.context.max_frames)
            requested = [each for each in conversations if uses_kind(each.kind, part.kinds, questions)]
            row_problems = [part.context.problem(each, frames, seconds if frames else ()) for each in requested]
            tried += 1
            if row_problems and None not in row_problems:
                problems.append(f"{usable.shards.where(sample)}: {row_problems[0]}")
    if not problems:
        return
    if len(problems) == tried:
        raise ValueError(
            f"every sample of the source {part.name!r} that was tried ({len(problems)}) is too long; the first: "
            f"{problems[0]}"
        )
    log.log(
        logging.WARNING if len(problems) > LARGE_SHARE * tried else logging.INFO,
        "train: %d of %d samples of %s that were tried are too long, and others take the place of such ones; the "
        "first: %s",
        *(len(problems), tried, part.name, problems[0]),
    )


def _has_frames(part: Part) -> bool:
    return bool(part.column("frames").any())
