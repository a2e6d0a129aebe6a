"""Instruction conditioning of the volume query: feature-wise modulation of the map F, and three inputs to every arm's
query and time condition.

These modules are optional and are built after the rest of the network. A network without an instruction therefore keeps
the same weights and the same results, to the bit.

Shape legend: B batch, T steps, C feature width, E width of the instruction's states, P' side of the backbone's map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from keygrip.models.language.instructions import InstructionStates
from keygrip.models.nn.adaln import AdaLNModulation, modulate
from keygrip.models.nn.attention import Attention


class InstructionEncoder(Protocol):
    """Encoder of sentences as states; a module whose weights are stored in the checkpoint."""

    width: int

    def prepare(self, sentences: Sequence[str]) -> None:
        """Record the words of the training split's sentences."""
        ...

    def unknown_words(self, sentence: str) -> list[str]:
        """Return the words of a sentence that no training sentence contains."""
        ...

    def tokens(self, sentences: Sequence[str]) -> Tensor:
        """Convert sentences to int64 tokens ``[B, ...]``, the network's input."""
        ...

    def __call__(self, tokens: Tensor) -> InstructionStates: ...


class FeatureModulation(nn.Module):
    """Scales and shifts the channels of a map ``[B, C, P', P']`` (FiLM: Perez et al., 2018); initially the identity."""

    def __init__(self, width: int, d_feat: int) -> None:
        super().__init__()
        self.modulation = AdaLNModulation(width, d_feat, parts=2)

    def forward(self, features: Tensor, states: InstructionStates, views: int = 1) -> Tensor:
        """Modulate the features; ``views``: number of consecutive maps that belong to one sentence."""
        sentence_states = states.whole if views == 1 else states.whole.repeat_interleave(views, dim=0)
        shift, scale = (part[..., None, None] for part in self.modulation(sentence_states))
        return modulate(features, shift, scale)


class QueryInstruction(nn.Module):
    """Adds an instruction to one arm's query and time condition.

    The state of the whole sentence is added to the query, which also attends to single words. It is also added to the
    time condition, which modulates every trunk block.
    """

    def __init__(self, width: int, trunk: int, d_cond: int, heads: int = 4) -> None:
        super().__init__()
        self.query = nn.Linear(width, trunk)
        self.condition = nn.Linear(width, d_cond)
        self.read = Attention(trunk, heads, d_context=width, zero_output=True)

    def forward(self, query: Tensor, condition: Tensor, states: InstructionStates) -> tuple[Tensor, Tensor]:
        """Return the query ``[B, trunk]`` and the condition ``[B, T, d_cond]`` with the instruction added."""
        query = query + self.query(states.whole)
        read = self.read(query[:, None], self.read.keys_values(states.words), states.mask)[:, 0]
        return query + read, condition + self.condition(states.whole)[:, None]


class InstructionConditioning(nn.Module):
    """All modules that an instruction adds to a volume-query network: encoder, feature modulation and one
    `QueryInstruction` per arm."""

    def __init__(self, encoder: nn.Module, arms: Sequence[str], d_feat: int, trunk: int, d_cond: int) -> None:
        super().__init__()
        width = encoder.width
        assert isinstance(width, int)
        self.encoder = encoder
        self.features = FeatureModulation(width, d_feat)
        self.queries = nn.ModuleDict({arm: QueryInstruction(width, trunk, d_cond) for arm in arms})
