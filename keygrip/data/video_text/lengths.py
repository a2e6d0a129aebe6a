"""Estimate the positions that samples need in the language model, from the characters in an index and the tokens per
character measured on some of the texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from keygrip.data.bad_samples import BadSample, convert_errors, raise_connection_error
from keygrip.data.shards.reader import ShardSet
from keygrip.data.spacing import evenly
from keygrip.data.video_text.batching import MeasuringCollator
from keygrip.data.video_text.conversations import read_conversations, text_length
from keygrip.data.video_text.sample_types import Conversation, Turn

CHARACTERS_A_TOKEN = 4.0  # roughly, for English; used if nothing is measured
# Measured samples of a source, and from how many shards: remote shards are fetched as a whole.
MEASURED, MEASURED_SHARDS = 256, 8
NEARLY_ALL = 0.99  # share of measured texts with at most `most` tokens per character, and share with at least `least`
SHORTEST = Conversation((Turn("user", "a"), Turn("assistant", "a")), "text", {})
FIRST_ANSWER = "first_answer"  # column; see `keygrip.data.video_text.conversations`


class TextLengths(Protocol):
    """The lengths of a source's texts in the language model: estimated (`TokenLengths`), or counted
    (`keygrip.data.video_text.exact_lengths.ExactLengths`). `chosen`, int64 [n], are indices of samples in a shard set.
    """

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens of an image."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """Length at which texts are cut; None: they are not cut."""
        ...

    def tokens(self, shards: ShardSet, chosen: np.ndarray, most: bool = False) -> np.ndarray:
        """Return the tokens of each sample's longest row without its frames, float [n]. With `most`: values that nearly
        all samples stay below."""
        ...

    def rows(self, shards: ShardSet, chosen: np.ndarray) -> np.ndarray:
        """Return how many conversations of each sample may be rows, int64 [n]. Raise ValueError if not in the index."""
        ...

    def tokens_of_rows(self, shards: ShardSet, chosen: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the tokens of `rows` rows of each sample without its frames, sample after sample, float [sum of
        `rows`]. Of a sample with more rows, some are chosen at random, always the same ones.

        Args:
            rows: int64 [n], at least 1 and at most `self.rows`.
        """
        ...

    def prefixes_of_rows(self, shards: ShardSet, chosen: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
        """Return how many tokens of the same rows stand before the frames, float [sum of `rows`]; None: not known."""
        ...

    def usable(self, shards: ShardSet, chosen: np.ndarray, room: np.ndarray | None = None) -> np.ndarray:
        """Return bool [n], False for samples without a conversation that can be a row, as far as this is known.

        Args:
            room: text tokens that a row of each sample may have in addition to its frames, int [n]; None: any number.
        """
        ...


@dataclass(frozen=True)
class TokenLengths:
    """The lengths of a source's texts, estimated from characters.

    Args:
        template: tokens of a conversation in addition to its words. typical: tokens per character of all measured texts
            together; most, least: rates that nearly all texts stay below and above. tokens_per_frame: of an image.
            max_tokens: length at which texts are cut.
    """

    template: float = 0.0
    typical: float = 1 / CHARACTERS_A_TOKEN
    most: float = 1 / CHARACTERS_A_TOKEN
    least: float = 1 / CHARACTERS_A_TOKEN
    tokens_per_frame: int = 1
    max_tokens: int | None = None

    def tokens(self, shards: ShardSet, chosen: np.ndarray, most: bool = False) -> np.ndarray:
        """See `TextLengths`; computed with the rate `typical`, or `most`."""
        rate = self.most if most else self.typical
        found = self.template + shards.columns["text_length"][chosen].astype(float) * rate
        return found if self.max_tokens is None else np.minimum(found, self.max_tokens)

    def rows(self, shards: ShardSet, chosen: np.ndarray) -> np.ndarray:
        """See `TextLengths`."""
        if "conversations" not in shards.columns:
            raise ValueError(
                f"data.budget counts the conversations of each sample, and the index of {shards.root} is of an "
                f"earlier version: make it anew with `keygrip prepare step=manifest again=true root={shards.root}`"
            )
        return np.asarray(shards.columns["conversations"][chosen])

    def tokens_of_rows(self, shards: ShardSet, chosen: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """See `TextLengths`; all rows of a sample are assumed to be as long as its longest row."""
        return np.repeat(self.tokens(shards, chosen), rows)

    def prefixes_of_rows(self, shards: ShardSet, chosen: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
        """See `TextLengths`; an index holds the characters of whole conversations only."""
        return None

    def usable(self, shards: ShardSet, chosen: np.ndarray, room: np.ndarray | None = None) -> np.ndarray:
        """See `TextLengths`; False if the first answer is too long even at the lowest rate. Other samples that are too
        long are found when they are read."""
        if FIRST_ANSWER not in shards.columns:
            return np.ones(len(chosen), bool)
        shortest = self.template + shards.columns[FIRST_ANSWER][chosen].astype(float) * self.least
        is_usable = np.ones(len(chosen), bool) if self.max_tokens is None else shortest <= self.max_tokens
        return np.asarray(is_usable if room is None else is_usable & (shortest <= room))


def measure_lengths(
    shards: ShardSet, chosen: np.ndarray, collator: MeasuringCollator, kinds: Sequence[str] | None = None
) -> TokenLengths:
    """Measure the lengths of a source's texts on some samples, always the same ones.

    Args:
        chosen: int64 [N], samples of `shards`. kinds: of their conversations; None: all.

    Raises:
        ValueError: none of the samples that are read has a text that can be encoded. ConnectionError: a remote shard
            cannot be reached; with fewer samples the lengths, and so the order of batches, would be others.
    """
    template = collator.text_tokens(SHORTEST, (0.0, 1.0), whole=True) - 2
    characters, tokens, problem = [], [], "no conversation"
    for sample in spread_samples(shards, chosen).tolist():
        try:
            conversations = [c for c in read_conversations(shards, sample) if kinds is None or c.kind in kinds]
            with convert_errors(shards.where(sample)):
                longest = max(conversations, key=lambda each: text_length([each]))
                seconds = tuple(float(second) for second in range(int(shards.columns["frames"][sample])))
                tokens.append(collator.text_tokens(longest, seconds, whole=True) - template)
                characters.append(max(1, text_length([longest])))
        except BadSample as error:
            raise_connection_error(error)
            problem = str(error)
    if not tokens:
        raise ValueError(f"{shards.root}: none of its texts that were tried can be encoded; the last: {problem}")
    count, length = np.maximum(tokens, 1).astype(float), np.array(characters, float)
    typical = count.sum() / length.sum()
    most = max(typical, np.quantile(count / length, NEARLY_ALL, method="higher"))
    least = min(typical, np.quantile(count / length, 1 - NEARLY_ALL, method="lower"))
    rates = (float(typical), float(most), float(least))
    return TokenLengths(template, *rates, collator.tokens_per_frame, collator.max_tokens)


def spread_samples(shards: ShardSet, chosen: np.ndarray) -> np.ndarray:
    """Return some of the chosen samples, evenly spaced in some of their shards."""
    shard = shards.shard[chosen]
    names = np.unique(shard)
    picked_shards = names[evenly(len(names), MEASURED_SHARDS)]
    samples = []
    for name in picked_shards:
        shard_samples = chosen[shard == name]
        samples.append(shard_samples[evenly(len(shard_samples), MEASURED // len(picked_shards))])
    return np.concatenate(samples)
