"""Examination of shards of conversations about images and videos."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from keygrip.data.shards.examination import ShardReport, digest_of, unknown_member
from keygrip.data.shards.index import Parts
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.separate_images import TEXT
from keygrip.data.video_text.conversations import (
    KNOWN_MEMBERS,
    conversation_problem,
    parse_conversations,
    parse_text,
    read_sample,
    unknown_members,
)

log = logging.getLogger(__name__)

PROBE_SIZE = 32  # images are decoded completely and then reduced; only whether they can be decoded matters


def examine_video_text(shards: ShardSet, sample: int, parts: Parts, report: ShardReport) -> None:
    """Decode a sample and check that its conversations can be used in training.

    Raises:
        BadSample: the text, images or video of the sample cannot be read.
    """
    read_sample(shards, sample, PROBE_SIZE)
    conversations = parse_conversations(parse_text(parts))
    if unknown := unknown_members(parts):
        report.problems.append(unknown_member(shards.where(sample), unknown[0], KNOWN_MEMBERS))
    for conversation in conversations:
        report.kinds[conversation.kind] += 1
        if fault := conversation_problem(conversation):
            report.problems.append(f"{shards.where(sample)}: {fault}")
    report.frames[int(shards.columns["frames"][sample])] += 1
    report.contents.append((digest_of(parts), shards.where(sample)))
    if media_parts := {name: part for name, part in parts.items() if name not in TEXT}:
        report.media.append(digest_of(media_parts))


def report_shared(reports: Sequence[ShardReport]) -> None:
    """Warn about images and videos that occur in several splits: held-out questions should not be about training media.
    In a set without splits, samples are held out by their keys, so that copies may be in training and validation."""
    splits: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    for report in reports:
        for digest in report.media:
            splits.setdefault(digest, set()).add(str(Path(report.name).parent))
            counts[digest] += 1
    shared_digests = [digest for digest, places in splits.items() if len(places) > 1]
    if shared_digests:
        first = ", ".join(sorted(splits[shared_digests[0]]))
        log.warning(
            "%d images or videos stand in several splits, with other text (the first in %s)", len(shared_digests), first
        )
    copies = sum(count - 1 for count in counts.values())
    if copies and len(set().union(*splits.values())) == 1:
        log.warning(
            "%d samples have the images or the video of another one: a set without val/ is divided by keys, and copies "
            "may be trained on and held out; write val/ by video",
            copies,
        )
