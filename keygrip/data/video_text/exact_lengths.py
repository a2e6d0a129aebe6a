"""Count the positions that samples need in the language model: encode every text once and store the counts.

The counts of a shard set are in one file next to its shards (or in the cache, see `VideoTexts`). The file's name is a
hash of everything that the counts depend on: the set, the tokenizer with its chat template and the collator's settings.
Missing counts are computed and added, so that training, validation, and runs with fewer samples share a file.
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
from keygrip.data.bad_samples import BadSample, convert_errors, raise_connection_error
from keygrip.data.shards.packing import ranges
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.resuming import ensure_enough_files
from keygrip.data.shards.sampling import start_worker
from keygrip.data.untrusted_files import read_npz
from keygrip.data.video_text.batching import MeasuringCollator
from keygrip.data.video_text.conversations import read_timed_conversations
from keygrip.data.video_text.lengths import TokenLengths
from keygrip.progress import Progress

FORMAT = 9  # version of the file of counts, and of how they are computed
NOT_COUNTED, UNREADABLE = -1, -2  # values in place of a sample's tokens
BLOCK = 256  # samples that a worker counts at a time
KEPT_EVERY = 200_000  # samples after which the counts are written: a killed run continues from there


@dataclass(frozen=True, eq=False)
class ExactLengths:
    """The text lengths of a shard set with N samples, some of which were counted.

    Args:
        fingerprint: of the longest rows and the numbers of rows, from which batches are planned.
        longest: int32 [N], tokens of each sample's longest row without its frames, 0 if none of its conversations can
            be a row; or NOT_COUNTED or UNREADABLE. row_counts: int32 [N], number of conversations that can be rows.
        row_tokens, row_prefixes: int32 [R], tokens of each row without its frames, sample after sample (`row_offsets`),
            and those of them before the frames.
        tokens_per_frame: of an image. max_tokens: length at which texts are cut.
    """

    fingerprint: str
    longest: np.ndarray = field(repr=False)
    row_counts: np.ndarray = field(repr=False)
    row_tokens: np.ndarray = field(repr=False)
    row_prefixes: np.ndarray = field(repr=False)
    tokens_per_frame: int = 1
    max_tokens: int | None = None

    def tokens(self, shards: ShardSet, chosen: np.ndarray, most: bool = False) -> np.ndarray:
        """See `keygrip.data.video_text.lengths.TextLengths`."""
        found = self.longest[chosen]
        assert (found != NOT_COUNTED).all(), "samples whose tokens were not counted"
        # unreadable samples get an estimate here; they are replaced and counted as bad samples when they are read
        return np.where(found == UNREADABLE, TokenLengths().tokens(shards, chosen), found).astype(float)

    def rows(self, shards: ShardSet, chosen: np.ndarray) -> np.ndarray:
        """See `keygrip.data.video_text.lengths.TextLengths`."""
        return np.maximum(1, self.row_counts[chosen]).astype(np.int64)

    def tokens_of_rows(self, shards: ShardSet, chosen: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """See `keygrip.data.video_text.lengths.TextLengths`."""
        row_indices, owner = self._choose_rows(chosen, rows)
        token_counts = self.row_tokens[row_indices].astype(float)
        return np.where(self.longest[chosen][owner] == UNREADABLE, self.tokens(shards, chosen)[owner], token_counts)

    def prefixes_of_rows(self, shards: ShardSet, chosen: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """See `keygrip.data.video_text.lengths.TextLengths`; 0 for samples that cannot be read."""
        return self.row_prefixes[self._choose_rows(chosen, rows)[0]].astype(float)

    def _choose_rows(self, chosen: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of `rows` rows of each chosen sample, int64 [sum of `rows`], and for each of them the
        position of its sample in `chosen`."""
        first, count = row_offsets(self.longest, self.row_counts)
        count = count[chosen]
        row_indices, owner = ranges(first[chosen], count), np.repeat(np.arange(len(chosen)), count)
        if (rows < count).any():  # shuffle the rows of each sample and use the first ones
            row_indices = row_indices[np.lexsort((np.random.default_rng(0).random(len(owner)), owner))]
            row_mask = ranges(np.zeros_like(count), count) < rows[owner]
            row_indices, owner = row_indices[row_mask], owner[row_mask]
        return row_indices, owner

    def usable(self, shards: ShardSet, chosen: np.ndarray, room: np.ndarray | None = None) -> np.ndarray:
        """See `keygrip.data.video_text.lengths.TextLengths`."""
        is_usable = self.longest[chosen] != 0
        if room is None or not len(chosen):
            return np.asarray(is_usable)
        first, count = (each[chosen] for each in row_offsets(self.longest, self.row_counts))
        starts = np.cumsum(count) - count  # start of each sample's rows among the rows of all chosen samples
        shortest = np.minimum.reduceat(self.row_tokens[ranges(first, count)], starts)
        return np.asarray(is_usable & ((shortest <= room) | (self.longest[chosen] == UNREADABLE)))


def row_offsets(longest: np.ndarray, row_counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each sample's row lengths begin in the array of all rows, and their number: int64 [N] each. A sample
    that has no row or cannot be read has one entry of 0 tokens."""
    counts = np.where(longest == NOT_COUNTED, 0, np.maximum(row_counts, 1)).astype(np.int64)
    return np.cumsum(counts) - counts, counts


def count_lengths(
    shards: ShardSet,
    chosen: np.ndarray,
    collator: MeasuringCollator,
    folder: Path,
    kinds: Sequence[str] | None = None,
    max_frames: int = 64,
    workers: int = 0,
) -> ExactLengths:
    """Return the lengths of the chosen samples; count those missing in `folder`, by one process at a time.

    Args:
        chosen: int64 [n], samples of `shards`. kinds: of their conversations; None: all. max_frames: frames used of
            longer samples; the text of a row may contain their times. workers: loader processes; 0: this process.

    Raises:
        ValueError: the file of counts is damaged. ConnectionError: a remote shard cannot be reached; the counts so
            far are stored.
    """
    kind_names = None if kinds is None else sorted(kinds)
    identity = (FORMAT, shards.fingerprint, collator.lengths_depend_on(), kind_names, max_frames)
    file = folder / f"lengths-{sha256_bytes(repr(identity).encode())[:16]}.npz"
    longest, rows, tokens = _read_counts(file, len(shards))
    if (longest[chosen] == NOT_COUNTED).any():  # a complete file is not locked: its folder may be read-only
        with locked(file.with_name(f".{file.name}.lock"), together_without=True):
            longest, rows, tokens = _read_counts(file, len(shards))
            groups = [(np.flatnonzero(longest != NOT_COUNTED), tokens)]  # samples, and the lengths of their rows
            missing = np.sort(chosen[longest[chosen] == NOT_COUNTED])
            blocks = [missing[start : start + BLOCK] for start in range(0, len(missing), BLOCK)]
            source, unwritten = Counting(shards, collator, kinds, max_frames, blocks), 0
            bar = Progress(total=len(missing), desc=f"count tokens of {shards.root}", unit="sample")
            try:
                for block, block_counts in zip(blocks, _counting_loader(source, workers), strict=True):
                    if isinstance(block_counts, ConnectionError):
                        raise block_counts
                    longest[block], rows[block], added = block_counts
                    groups.append((block, added))
                    bar.update(len(block))
                    unwritten += len(block)
                    if unwritten >= KEPT_EVERY:
                        _write_counts(file, longest, rows, _together(longest, rows, groups))
                        unwritten = 0
            except ConnectionError:
                if unwritten:
                    _write_counts(file, longest, rows, _together(longest, rows, groups))
                raise
            bar.close()
            tokens = _together(longest, rows, groups)
            if unwritten:
                _write_counts(file, longest, rows, tokens)
    digest = hashlib.sha256(longest[chosen].tobytes() + rows[chosen].tobytes()).hexdigest()[:16]
    per_frame, cut_at = collator.tokens_per_frame, collator.max_tokens
    return ExactLengths(digest, longest, rows, tokens[:, 0], tokens[:, 1], per_frame, cut_at)


def _together(longest: np.ndarray, rows: np.ndarray, groups: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Join the row lengths of disjoint groups of samples, sample after sample (`row_offsets`): int32 [R, 2]."""
    first, counts = row_offsets(longest, rows)
    joined = np.zeros((int(counts.sum()), 2), np.int32)
    for samples, tokens in groups:
        joined[ranges(first[samples], counts[samples])] = tokens
    return joined


# `longest` and `row_counts` of `ExactLengths`, and its `row_tokens` and `row_prefixes` as two columns
Counted = tuple[np.ndarray, np.ndarray, np.ndarray]


class Counting(Dataset[Counted | ConnectionError]):
    """Blocks of samples, each as `Counted` arrays, int32 [n], [n] and [R, 2]; or as the error of a remote shard that
    cannot be reached. It is not raised here: the loader would add a worker's stack trace to it."""

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

    def __getitem__(self, number: int) -> Counted | ConnectionError:
        try:
            row_tokens = [self._count(sample) for sample in self.blocks[number].tolist()]
        except ConnectionError as error:
            return error
        longest = [UNREADABLE if rows is None else max((each for each, _ in rows), default=0) for rows in row_tokens]
        counts = [1 if rows is None else len(rows) for rows in row_tokens]
        tokens = [each for rows in row_tokens for each in rows or [(0, 0)]]
        return np.array(longest, np.int32), np.array(counts, np.int32), np.array(tokens, np.int32).reshape(-1, 2)

    def _count(self, sample: int) -> list[tuple[int, int]] | None:
        """Return the tokens of each row of a sample and those before its frames; None if it cannot be read. Raise
        ConnectionError if its remote shard cannot be reached: UNREADABLE would be stored, and the sample not counted by
        later runs either."""
        try:
            conversations, seconds = read_timed_conversations(self.shards, sample, self.max_frames)
            with convert_errors(self.shards.where(sample)):
                times = seconds if self.shards.columns["frames"][sample] else ()
                selected = [each for each in conversations if self.kinds is None or each.kind in self.kinds]
                tokens = [self.collator.text_tokens(each, times) for each in selected]
                prefixes = [self.collator.tokens_before_frames(each, times) for each in selected]
        except BadSample as error:
            raise_connection_error(error)
            return None
        return [each for each in zip(tokens, prefixes, strict=True) if each[0] > 0]


def _counting_loader(source: Counting, workers: int) -> DataLoader[Counted | ConnectionError]:
    ensure_enough_files(workers)
    # a separate generator: counting must not change the run's random numbers
    options: dict[str, Any] = {"worker_init_fn": start_worker, "generator": torch.Generator()}
    options["collate_fn"] = _return_unchanged  # torch's types assume collate functions of lists
    return DataLoader(source, batch_size=None, num_workers=workers, **options)


def _return_unchanged(block: Counted | ConnectionError) -> Counted | ConnectionError:
    return block


def _read_counts(file: Path, samples: int) -> Counted:
    """Read the counts of a set with N samples; NOT_COUNTED if there is no file. Raise ValueError if it is damaged."""
    if not file.is_file():
        return np.full(samples, NOT_COUNTED, np.int32), np.zeros(samples, np.int32), np.zeros((0, 2), np.int32)
    try:
        arrays = read_npz(file)
        with convert_errors(file):
            longest, rows, tokens = arrays["longest"], arrays["rows"], arrays["tokens"]
            if any(each.dtype != np.int32 or each.shape != (samples,) for each in (longest, rows)):
                raise ValueError(f"its arrays are not of {samples} samples")
            if longest.min(initial=0) < UNREADABLE or min(rows.min(initial=0), tokens.min(initial=0)) < 0:
                raise ValueError("it holds a number of tokens below zero")
            if tokens.dtype != np.int32 or tokens.shape != (int(row_offsets(longest, rows)[1].sum()), 2):
                raise ValueError("it holds not as many lengths as rows")
    except BadSample as error:
        raise ValueError(f"{file} is damaged ({error.what}): remove it and the tokens are counted again") from error
    return longest.copy(), rows.copy(), tokens


def _write_counts(file: Path, longest: np.ndarray, rows: np.ndarray, tokens: np.ndarray) -> None:
    with atomic_write(file) as opened:
        np.savez_compressed(opened, longest=longest, rows=rows, tokens=tokens)
