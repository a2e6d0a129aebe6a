"""A small instruction encoder that is trained together with its policy: sentences in, states of their words out.

Words are hashed into rows of an embedding table, so that there is no vocabulary to build or to lose: the tokenizer is a
pure function of the settings, which are in the checkpoint. Two independent hashes per word distinguish different words
("Hash Embeddings for Efficient Word Representations", Svenstrup et al., 2017).

Shape legend: B sentences, L tokens, E width of a state.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keygrip.models.nn.attention import Attention
from keygrip.models.nn.sinusoids import sinusoidal_features
from keygrip.training.parts import model_part

PADDING, WHOLE = 0, 1  # rows of the embedding table: padding, and the token of the whole sentence, which comes first
FIRST_WORD = 2
WORD = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")


@dataclass(frozen=True)
class InstructionStates:
    """An encoder's output for B sentences.

    Attributes:
        words: ``[B, L, E]``. mask: bool ``[B, L]``, True for tokens, which come first; at least one per sentence.
        whole: ``[B, E]``, states of the whole sentences.
    """

    words: Tensor
    mask: Tensor
    whole: Tensor


def words_of(sentence: str) -> list[str]:
    """Split a sentence into runs of letters, runs of digits and single other signs, in lower case."""
    return WORD.findall(sentence.lower())


@lru_cache(maxsize=65536)
def _hash_to_rows(word: str, rows: int) -> tuple[int, int]:
    digest = hashlib.sha256(word.encode()).digest()
    first, second = (int.from_bytes(digest[at : at + 8], "big") % rows for at in (0, 8))
    return FIRST_WORD + first, FIRST_WORD + second


class _Block(nn.Module):
    """Pre-norm self-attention and MLP over ``[B, L, E]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.mlp(self.mlp_norm(x))


@model_part
class WordTransformer(nn.Module):
    """A tiny transformer over an instruction's words, trained together with the policy.

    Args:
        width: E, width of a state. layers: transformer blocks. heads: attention heads; their number divides the width.
        rows: rows of the embedding table into which words are hashed. length: L, tokens; longer sentences are refused.

    Raises:
        ValueError: a setting makes no sense.
    """

    places: Tensor
    trained: Tensor

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4, rows: int = 2048, length: int = 32) -> None:
        super().__init__()
        if rows < 16 or length < 2 or layers < 0:
            raise ValueError(
                f"instruction: rows={rows} must be at least 16, length={length} at least 2, layers={layers} at least 0"
            )
        self.width, self.rows, self.length = width, rows, length
        self.embedding = nn.Embedding(FIRST_WORD + rows, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("places", sinusoidal_features(length, width), persistent=False)  # [L, E]
        # Rows that training has changed: words in other rows are noise, and `unknown_words` returns them.
        self.register_buffer("trained", torch.zeros(FIRST_WORD + rows, dtype=torch.bool))

    def prepare(self, sentences: Iterable[str]) -> None:
        """Record the words of the training sentences.

        Raises:
            ValueError: a sentence has no word, or more than fit.
        """
        sentences = sorted(set(sentences))
        self.tokens(sentences)  # refuses here what would end the run in the middle
        for sentence in sentences:
            for word in words_of(sentence):
                self.trained[list(_hash_to_rows(word, self.rows))] = True

    def unknown_words(self, sentence: str) -> list[str]:
        """Return the words of a sentence that no training sentence contained."""
        return [
            word for word in words_of(sentence) if not bool(self.trained[list(_hash_to_rows(word, self.rows))].all())
        ]

    def tokens(self, sentences: Sequence[str]) -> Tensor:
        """Return int64 ``[B, L, 2]``: two rows of the table per word, the whole-sentence token first, 0 at padding.

        Raises:
            ValueError: a sentence has no word, or more than fit.
        """
        token_rows = torch.full((len(sentences), self.length, 2), PADDING)
        token_rows[:, 0] = WHOLE
        for index, sentence in enumerate(sentences):
            words = words_of(sentence)
            if not words:
                raise ValueError(
                    "an instruction is empty: every demonstration needs a sentence for a policy that reads language "
                    "(or train without: instruction=null)"
                )
            if len(words) >= self.length:
                raise ValueError(
                    f"the instruction {sentence[:60]!r}... has {len(words)} words and signs, and "
                    f"instruction.length={self.length} leaves room for {self.length - 1}: raise it"
                )
            token_rows[index, 1 : 1 + len(words)] = torch.tensor([_hash_to_rows(word, self.rows) for word in words])
        return token_rows

    def forward(self, tokens: Tensor) -> InstructionStates:
        """Compute the states of sentences, given as the output ``[B, L, 2]`` of ``tokens``."""
        mask = tokens[..., 0] != PADDING
        x = self.embedding(tokens).sum(-2) + self.places
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        share = mask / mask.sum(-1, keepdim=True)  # [B, L]
        return InstructionStates(x, mask, F.layer_norm((x * share[..., None]).sum(-2), (self.width,)))
