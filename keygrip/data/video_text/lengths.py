"""How many of the language model's positions samples take: from the characters that an index holds, at the rate at
which the tokenizer makes tokens of some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keygrip.data.bad_samples import BadSample, guard
from keygrip.data.shards.reader import ShardSet
from keygrip.data.video_text.batching import MeasuringCollator
from keygrip.data.video_text.conversations import Conversation, Turn, read_conversations, text_length

CHARACTERS_A_TOKEN = 4.0  # for English, roughly: where nothing is measured
MEASURED, MEASURED_SHARDS = 256, 8  # samples of a source, and of how many shards: remote ones are fetched whole
NEARLY_ALL = 0.99  # of the measured texts have no more tokens per character than `most`
SHORTEST = Conversation((Turn("user", "a"), Turn("assistant", "a")), "text", {})


@dataclass(frozen=True)
class TokenLengths:
    """What texts of a source take.

    Args:
        template: tokens of a conversation beside its words. typical, most: tokens per character, of all measured texts
            together, and which nearly all stay below. tokens_per_frame: of an image. max_tokens: where texts are cut.
    """

    template: float = 0.0
    typical: float = 1 / CHARACTERS_A_TOKEN
    most: float = 1 / CHARACTERS_A_TOKEN
    tokens_per_frame: int = 1
    max_tokens: int | None = None

    def tokens(self, characters: np.ndarray, most: bool = False) -> np.ndarray:
        """Tokens of texts of so many characters, [N] float: about, or at `most` in nearly all."""
        found = self.template + characters * (self.most if most else self.typical)
        return found if self.max_tokens is None else np.minimum(found, self.max_tokens)


def measured(
    shards: ShardSet, chosen: np.ndarray, collator: MeasuringCollator, kinds: Sequence[str] | None = None
) -> TokenLengths:
    """The lengths of a source's texts, of which some are read: always the same.

    Args:
        chosen: int64 [N], samples of `shards`. kinds: of their conversations; None: all.

    Raises:
        ValueError: none of those that are read has a text that can be encoded.
    """
    template = collator.text_tokens(SHORTEST, (0.0, 1.0), whole=True) - 2
    characters, tokens, problem = [], [], "no conversation"
    for sample in _spread(shards, chosen).tolist():
        try:
            found = [c for c in read_conversations(shards, sample) if kinds is None or c.kind in kinds]
            with guard(shards.where(sample)):
                longest = max(found, key=lambda each: text_length([each]))
                seconds = tuple(float(second) for second in range(int(shards.columns["frames"][sample])))
                tokens.append(collator.text_tokens(longest, seconds, whole=True) - template)
                characters.append(max(1, text_length([longest])))
        except BadSample as error:
            problem = str(error)
    if not tokens:
        raise ValueError(f"{shards.root}: none of its texts that were tried can be encoded; the last: {problem}")
    count, length = np.maximum(tokens, 1).astype(float), np.array(characters, float)
    typical = count.sum() / length.sum()
    most = max(typical, np.quantile(count / length, NEARLY_ALL, method="higher"))
    return TokenLengths(template, float(typical), float(most), collator.tokens_per_frame, collator.max_tokens)


def _spread(shards: ShardSet, chosen: np.ndarray) -> np.ndarray:
    """Some of the chosen samples, evenly of some of their shards."""
    shard = shards.shard[chosen]
    names = np.unique(shard)
    picked = names[np.linspace(0, len(names) - 1, min(MEASURED_SHARDS, len(names))).round().astype(int)]
    found = []
    for name in picked:
        inside = chosen[shard == name]
        count = min(len(inside), MEASURED // len(picked))
        found.append(inside[np.linspace(0, len(inside) - 1, count).round().astype(int)])
    return np.concatenate(found)
