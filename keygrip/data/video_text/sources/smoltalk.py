"""SmolTalk: conversations without images, to retain text ability. Reads the published parquet files."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keygrip.data.bad_samples import BadSample, convert_errors
from keygrip.data.shards.set_writer import Broken, MadeSample, write_shards
from keygrip.data.video_text.conversations import describe_video_text, video_text_parts
from keygrip.data.video_text.sample_types import Conversation, Turn
from keygrip.data.video_text.sources.tables import RowGroup, row_groups

log = logging.getLogger(__name__)

STAGES = 3
WHOLE = "all"  # the folder that contains every conversation again, next to the folders of the subsets


@dataclass(frozen=True)
class SmolTalkMaker:
    """Makes samples from the rows of a group that belong to a stage."""

    stage: int
    max_characters: int

    def __call__(self, group: RowGroup) -> Iterable[MadeSample | Broken]:
        for index, row in group.rows(["messages"]):
            key = f"{group.name}-{index:08d}"
            if stage_of(key) != self.stage:
                continue
            try:
                with convert_errors(key):
                    sample = self._sample(key, row)
            except BadSample as error:
                yield Broken(str(error))
            else:
                if sample is not None:
                    yield sample

    def _sample(self, key: str, row: dict[str, Any]) -> MadeSample | None:
        """Return the sample of a row; None if it is left out because of its length."""
        turns = tuple(Turn(message["role"], message["content"]) for message in row["messages"] or ())
        if not turns or not all(isinstance(turn.text, str) for turn in turns):
            raise ValueError("it has no turns, or one without text")
        if sum(len(turn.text) for turn in turns) > self.max_characters:
            return None  # longer than any context: from a cut answer the model would learn not to stop
        return MadeSample(key, *video_text_parts([], [Conversation(turns, "text", {})], "smoltalk"))


def stage_of(key: str) -> int:
    """Return the stage of a conversation, 1, 2 or 3; stages have no conversation in common."""
    return 1 + int.from_bytes(hashlib.sha256(f"stage {key}".encode()).digest()[:4], "big") % STAGES


def smoltalk(
    source: Path | str,
    root: Path | str,
    stage: int,
    max_characters: int = 8000,
    groups_per_shard: int = 10,
    processes: int | None = None,
    max_failed_share: float = 0.5,
) -> dict[str, Any]:
    """Write the third of SmolTalk that belongs to a training stage as shards of 0-frame samples.

    Args:
        source: folder with `train-*.parquet` at any depth; if the download has the folder `all`, only this folder is
            read, since it repeats the subsets next to it. root: of the set. stage: 1, 2 or 3.
        max_characters: longer conversations are left out. groups_per_shard: parquet row groups (of about 1000).
        max_failed_share: a larger share of broken rows is an error.

    Raises:
        ValueError: there is no such stage, or max_characters is below 1. FileNotFoundError: there are no tables.
    """
    if not 1 <= stage <= STAGES:
        raise ValueError(f"stage={stage}: training has the stages 1 to {STAGES}")
    if max_characters < 1:
        raise ValueError(f"max_characters={max_characters} must be at least 1")
    groups = row_groups(source, "train-*.parquet", ["messages"], "SmolTalk (HuggingFaceTB/smoltalk)")
    groups = _prefer_folder_all(groups, Path(source))
    settings = {"data": "smoltalk", "stage": stage, "max_characters": max_characters}
    maker = SmolTalkMaker(stage, max_characters)
    return write_shards(
        root,
        groups,
        maker,
        settings,
        groups_per_shard,
        f"smoltalk-stage{stage}",
        processes,
        max_failed_share,
        describe=describe_video_text,
        kind=f"samples of stage {stage} with at most max_characters={max_characters} characters",
    ).report()


def _prefer_folder_all(groups: list[RowGroup], source: Path) -> list[RowGroup]:
    """Return the row groups of the folder `all` if there is one, otherwise all row groups. No conversation then occurs
    twice, and none is in two stages or in two splits."""
    whole = [group for group in groups if WHOLE in group.path.relative_to(source).parent.parts]
    if not whole or len(whole) == len(groups):
        return groups
    left_out = len({group.path for group in groups}) - len({group.path for group in whole})
    log.info(
        "%s: the folder %r is read; %d tables beside it, of subsets that it repeats, are not", source, WHOLE, left_out
    )
    return whole
