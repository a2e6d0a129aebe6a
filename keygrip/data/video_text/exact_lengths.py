"""How many of the language model's positions samples take, counted: every text is encoded once and the counts are kept.

The counts of a shard set lie in one file beside its shards (or in the cache, see `VideoTexts`), whose name is a hash of
everything that they depend on: the set, the tokenizer with its chat template and the collator's settings. What is not
there yet is counted and added, so that training and validation, and runs of fewer samples, share a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from keygrip.artifacts import atomic_write, locked, sha256_bytes
from keygrip.data.bad_samples import BadSample, guard
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.resuming import ensure_enough_files
from keygrip.data.shards.sampling import start_worker
from keygrip.data.untrusted_files import read_npz
from keygrip.data.video_text.batching import MeasuringCollator
from keygrip.data.video_text.conversations import read_timed_conversations
from keygrip.data.video_text.lengths import TokenLengths
from keygrip.progress import Progress

FORMAT = 4  # of a file of counts, and of how they are made
NOT_COUNTED, UNREADABLE = -1, -2  # in place of a sample's tokens
BLOCK = 256  # samples that a worker counts at a time
KEPT_EVERY = 200_000  # samples after which the counts so far are written: a run that is killed goes on from there


@dataclass(frozen=True, eq=False)
class ExactLengths:
    """What the texts of a shard set of N samples take, of which some were counted.

    Args:
        fingerprint: of the counts.
        longest: int32 [N], tokens of each sample's longest row without its frames, 0 where none of its conversations
            can be a row, else NOT_COUNTED or UNREADABLE. row_counts: int32 [N], conversations that can be rows.
        tokens_per_frame: of an image. max_tokens: where texts are cut.
    """

    fingerprint: str
    longest: np.ndarray = field(repr=False)
    row_counts: np.ndarray = field(repr=False)
    tokens_per_frame: int = 1
    max_tokens: int | None = None

    def tokens(self, shards: ShardSet, chosen: np.ndarray, most: bool = False) -> np.ndarray:
        """See `keygrip.data.video_text.lengths.TextLengths`."""
        found = self.longest[chosen]
        assert (found != NOT_COUNTED).all(), "samples whose tokens were not counted"
        # what cannot be read is replaced, and counted as such, when it is its turn
        return np.where(found == UNREADABLE, TokenLengths().tokens(shards, chosen), found).astype(float)

    def rows(self, shards: ShardSet, chosen: np.ndarray) -> np.ndarray:
        """See `keygrip.data.video_text.lengths.TextLengths`."""
        return np.maximum(1, self.row_counts[chosen]).astype(np.int64)

    def usable(self, shards: ShardSet, chosen: np.ndarray) -> np.ndarray:
        """See `keygrip.data.video_text.lengths.TextLengths`."""
        return np.asarray(self.longest[chosen] != 0)


def counted(
    shards: ShardSet,
    chosen: np.ndarray,
    collator: MeasuringCollator,
    folder: Path,
    kinds: Sequence[str] | None = None,
    max_frames: int = 64,
    workers: int = 0,
) -> ExactLengths:
    """The lengths of the chosen samples; those that `folder` does not hold yet are counted, by one process at a time.

    Args:
        chosen: int64 [n], samples of `shards`. kinds: of their conversations; None: all. max_frames: of longer samples,
            so many, whose times may be told in words. workers: loader processes that count; 0: this one.

    Raises:
        ValueError: the file of counts is damaged.
    """
    these = None if kinds is None else sorted(kinds)
    how = (FORMAT, shards.fingerprint, collator.lengths_depend_on(), these, max_frames)
    file = folder / f"lengths-{sha256_bytes(repr(how).encode())[:16]}.npz"
    longest, rows = _stored(file, len(shards))
    if (longest[chosen] == NOT_COUNTED).any():  # a whole file is not locked: it may lie where nothing can be written
        with locked(file.with_name(f".{file.name}.lock"), together_without=True):
            longest, rows = _stored(file, len(shards))
            missing = np.sort(chosen[longest[chosen] == NOT_COUNTED])
            blocks = [missing[start : start + BLOCK] for start in range(0, len(missing), BLOCK)]
            source, unwritten = Counting(shards, collator, kinds, max_frames, blocks), 0
            bar = Progress(total=len(missing), desc=f"count tokens of {shards.root}", unit="sample")
            for block, found in zip(blocks, _loader(source, workers), strict=True):
                longest[block], rows[block] = found
                bar.update(len(block))
                unwritten += len(block)
                if unwritten >= KEPT_EVERY:
                    _write(file, longest, rows)
                    unwritten = 0
            bar.close()
            if unwritten:
                _write(file, longest, rows)
    digest = hashlib.sha256(longest[chosen].tobytes() + rows[chosen].tobytes()).hexdigest()[:16]
    return ExactLengths(digest, longest, rows, collator.tokens_per_frame, collator.max_tokens)


class Counting(Dataset[np.ndarray]):
    """Blocks of samples, each as the tokens of their longest rows and their numbers of rows: int32 [2, n]."""

    def __init__(
        self,
        shards: ShardSet,
        collator: MeasuringCollator,
        kinds: Sequence[str] | None,
        max_frames: int,
        blocks: Sequence[np.ndarray],
    ) -> None:
        self.shards, self.collator, self.kinds, self.max_frames = shards, collator, kinds, max_frames
        self.blocks = list(blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, number: int) -> np.ndarray:
        return np.array([self._count(sample) for sample in self.blocks[number].tolist()], np.int32).T

    def _count(self, sample: int) -> tuple[int, int]:
        try:
            found, seconds = read_timed_conversations(self.shards, sample, self.max_frames)
            with guard(self.shards.where(sample)):
                times = seconds if self.shards.columns["frames"][sample] else ()
                wanted = [each for each in found if self.kinds is None or each.kind in self.kinds]
                tokens = [self.collator.text_tokens(each, times) for each in wanted]
        except BadSample:
            return UNREADABLE, 1
        return max(tokens, default=0), sum(each > 0 for each in tokens)


def _loader(source: Counting, workers: int) -> DataLoader[np.ndarray]:
    ensure_enough_files(workers)
    # a generator of its own: whether there is something to count must not change the run's random numbers
    options: dict[str, Any] = {"worker_init_fn": start_worker, "generator": torch.Generator()}
    options["collate_fn"] = _unchanged  # torch knows only collators of lists
    return DataLoader(source, batch_size=None, num_workers=workers, **options)


def _unchanged(block: np.ndarray) -> np.ndarray:
    return block


def _stored(file: Path, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts of a set, int32 [N] each, NOT_COUNTED where the file has none. Raises ValueError: it is damaged."""
    if not file.is_file():
        return np.full(samples, NOT_COUNTED, np.int32), np.zeros(samples, np.int32)
    try:
        arrays = read_npz(file)
        with guard(file):
            found = arrays["longest"], arrays["rows"]
            if any(each.dtype != np.int32 or each.shape != (samples,) for each in found):
                raise ValueError(f"its arrays are not of {samples} samples")
            if found[0].min(initial=0) < UNREADABLE or found[1].min(initial=0) < 0:
                raise ValueError("it holds a number of tokens below zero")
    except BadSample as error:
        raise ValueError(f"{file} is damaged ({error.what}): remove it and the tokens are counted again") from error
    return found[0].copy(), found[1].copy()


def _write(file: Path, longest: np.ndarray, rows: np.ndarray) -> None:
    with atomic_write(file) as opened:
        np.savez_compressed(opened, longest=longest, rows=rows)
