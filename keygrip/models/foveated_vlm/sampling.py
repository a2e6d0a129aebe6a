"""How the tokens of an answer are chosen: the most probable ones, or sampled ones."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from numbers import Integral, Real

import torch
from torch import Tensor

MOST_TEMPERATURE = 1e4  # nearly uniform
LEAST_TEMPERATURE = 1e-4  # logits divided by less may overflow float32
SEEDS = 2**63  # torch accepts integers below it


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, with transformers' names.

    Args:
        temperature: 0 chooses the most probable token; above 0, tokens are sampled from softmax(logits / temperature).
        seed: seed of the sampling.
        top_k: sample only from the k most probable tokens, and those that are as probable as the k-th. None or 0: all.
        top_p: of these, sample only from the most probable ones whose probabilities together reach `top_p`, at least
            one. None or 1: all.

    Raises:
        ValueError: a value out of range, or `top_k` or `top_p` at temperature 0.
    """

    temperature: float = 0.0
    seed: int = 0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (
            isinstance(self.temperature, Real)
            and math.isfinite(self.temperature)
            and (self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE)
        ):
            raise ValueError(
                f"temperature={self.temperature}: give 0 (the most probable token) or a number of at least "
                f"{LEAST_TEMPERATURE} and at most {MOST_TEMPERATURE:g} (tokens are drawn)"
            )
        if not isinstance(self.seed, Integral) or not -SEEDS <= self.seed < SEEDS:
            raise ValueError(f"seed={self.seed} is no seed: give a whole number of at most 18 digits")
        if self.top_k is not None and (
            not isinstance(self.top_k, Integral) or isinstance(self.top_k, bool) or self.top_k < 0
        ):
            raise ValueError(f"top_k={self.top_k}: give a whole number from 1 on, or None (all tokens)")
        if self.top_p is not None and (
            not isinstance(self.top_p, Real) or isinstance(self.top_p, bool) or not 0 < self.top_p <= 1
        ):
            raise ValueError(f"top_p={self.top_p}: give a share above 0 and at most 1, or None (all tokens)")
        for name, value, whole in (("top_k", self.top_k, (None, 0)), ("top_p", self.top_p, (None, 1))):
            if not self.temperature and value not in whole:
                raise ValueError(
                    f"{name}={value} has no effect at temperature=0, which takes the most probable token: give a "
                    "temperature too (1: the model's own shares), or leave it out"
                )

    def of(self, sample: int) -> Sampling:
        """Return the settings of one of several answers to the same conversation, counted from 0: with the seed `seed`
        + `sample`, so that each answer can be reproduced alone. Raises ValueError: there is no such seed."""
        return replace(self, seed=int(self.seed) + sample) if sample else self

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the random generator of an answer."""
        return torch.Generator(device).manual_seed(int(self.seed))

    def next(self, logits: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Choose the next token of each row, [B, W] -> int64 [B]; each row samples with its own generator."""
        if not self.temperature:
            return logits.argmax(-1)
        shares = self.kept(logits / self.temperature).softmax(-1)
        tokens = [
            torch.multinomial(row, 1, generator=generator) for row, generator in zip(shares, generators, strict=True)
        ]
        return torch.cat(tokens)

    def kept(self, logits: Tensor) -> Tensor:
        """Set logits [..., W], already divided by the temperature, to -inf for tokens that must not be sampled."""
        if self.top_k:
            threshold = logits.topk(min(int(self.top_k), logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, token = logits.sort(-1, descending=True)
            shares = ordered.softmax(-1)
            # A token is left out if the tokens before it reach the share already; the first is never left out.
            preceding = shares.cumsum(-1) - shares
            excluded = preceding >= self.top_p
            excluded[..., 0] = False
            logits = logits.masked_fill(excluded.scatter(-1, token, excluded), -torch.inf)
        return logits


GREEDY = Sampling()
# Settings of generation in transformers, and what to use instead of them.
INSTEAD = {
    "do_sample": "temperature says it: 0 takes the most probable token, above it tokens are drawn",
    "num_return_sequences": "samples=n gives n answers to each conversation",
    "generator": "seed=n says what is drawn",
}


def refuse_settings(others: Collection[str], known: Collection[str], what: str) -> None:
    """Raise TypeError for settings that a function does not have. The message lists its settings, and for settings of
    transformers what to use instead."""
    if not others:
        return
    instead = [f"; in place of {name}: {INSTEAD[name]}" for name in others if name in INSTEAD]
    raise TypeError(f"{what} has no {', '.join(others)}: its settings are {', '.join(known)}{''.join(instead)}")
