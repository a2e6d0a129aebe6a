"""Encoders of captions as text states: frozen random vectors of words, or the encoder of a T5.

Legend: B captions, L text tokens, Dt width of a text state.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from keygrip.models.language.hub import checked_tokenizer
from keygrip.models.patch_dit.pretrained import INSTALL, from_source, named_dtype, sample_of, subfolder_of
from keygrip.training.parts import model_part

log = logging.getLogger(__name__)


class TextEncoder(Protocol):
    """Encodes captions as `length` states of `width` values each. `cut`: number of longer captions so far."""

    length: int
    width: int
    cut: int

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """float32 [B, L, Dt] with zeros at padding, and bool [B, L], True for tokens, which come first."""
        ...

    def to(self, device: torch.device | str) -> Self: ...

    def settings(self) -> dict[str, Any]:
        """The part of `description` that is known without loading weights."""
        ...

    def description(self) -> dict[str, Any]: ...


@model_part
class RandomWordVectors:
    """A frozen text encoder without training: every word has a fixed random vector, and so has every position.

    A word's vector is sampled from a generator seeded by the word itself, so there is no vocabulary and no unknown
    word. State i is word vector + 0.5 * place vector i. Words are runs of letters or digits, in lower case; each other
    sign is a separate word.

    Args:
        length: tokens; longer captions are cut off there, with one warning.
        width: of a state.
    """

    def __init__(self, length: int = 16, width: int = 64) -> None:
        if length < 1 or width < 1:
            raise ValueError(f"encoders.text: length {length} and width {width} must be at least 1")
        self.length, self.width, self.cut = length, width, 0

    def tokens(self, caption: str) -> list[str]:
        """The words of a caption, at most `length`."""
        words = re.findall(r"[^\W\d_]+|\d+|[^\w\s]|_", caption.lower())
        if len(words) > self.length:
            if not self.cut:
                log.warning("captions of more than %d words are cut off, the first: %s", self.length, caption[:100])
            self.cut += 1
        return words[: self.length]

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        states = torch.zeros(len(captions), self.length, self.width)
        mask = torch.zeros(len(captions), self.length, dtype=torch.bool)
        for row, caption in enumerate(captions):
            for index, word in enumerate(self.tokens(caption)):
                vector = random_vector(f"word {word}", self.width) + 0.5 * random_vector(f"place {index}", self.width)
                states[row, index] = torch.from_numpy(vector)
                mask[row, index] = True
        return states, mask

    def to(self, device: torch.device | str) -> Self:
        return self

    def settings(self) -> dict[str, Any]:
        return {"kind": "random word vectors", "length": self.length, "width": self.width}

    def description(self) -> dict[str, Any]:
        # one random value: another random generator would make another encoder
        probe = round(float(random_vector("word cube", self.width)[0]), 6)
        return {**self.settings(), "probe": probe}


@lru_cache(maxsize=65536)
def random_vector(name: str, width: int) -> np.ndarray:
    """float32 [width] of standard normal values that depend only on the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    vector.setflags(write=False)
    return vector


@model_part(external=["source"])
class T5Text:
    """The encoder of a T5 model: the hidden states of its last layer.

    Args:
        source: a local folder with config.json and the tokenizer's files, or a name on the Hugging Face hub.
        length: tokens; captions are cut off or padded to it.
        width: of a state (the model's d_model). dtype: of its weights.
        subfolder, tokenizer_subfolder: their folders within a larger model ("text_encoder_2", "tokenizer_2" in FLUX.1's
            folder).
    """

    def __init__(
        self,
        source: str,
        length: int = 512,
        width: int = 4096,
        dtype: str = "bfloat16",
        subfolder: str | None = None,
        tokenizer_subfolder: str | None = None,
    ) -> None:
        self.source, self.length, self.width, self.dtype = source, length, width, named_dtype(dtype)
        self.subfolder, self.tokenizer_subfolder = subfolder, tokenizer_subfolder
        self.cut = 0
        self.device: torch.device | str = "cpu"
        self._parts: tuple[Any, Any] | None = None

    @property
    def parts(self) -> tuple[Any, Any]:
        """Tokenizer and model, loaded on first use.

        Raises:
            ImportError: transformers is not installed. FileNotFoundError: not found. ValueError: another width, the
                source needs its own Python code, or as `checked_tokenizer`.
        """
        if self._parts is None:
            try:
                from transformers import AutoTokenizer, T5EncoderModel
            except ImportError as error:
                raise ImportError(f"the T5 encoder needs transformers: {INSTALL}") from error
            folders = [subfolder_of(self.source, name) for name in (self.tokenizer_subfolder, self.subfolder)]
            subfolders: list[dict[str, Any]] = [{"subfolder": folder} if folder else {} for folder in folders]
            common = {"trust_remote_code": False}
            tokenizer = checked_tokenizer(
                lambda: from_source(AutoTokenizer, self.source, "the T5 tokenizer", common | subfolders[0]),
                self.source,
                **subfolders[0],
            )
            loading = common | {"dtype": self.dtype, "weights_only": True}
            model = from_source(T5EncoderModel, self.source, "the T5 encoder", loading | subfolders[1])
            if model.config.d_model != self.width:
                raise ValueError(
                    f"{self.source} has states of {model.config.d_model} numbers, encoders.text.width={self.width}"
                )
            self._parts = (tokenizer, model.eval().requires_grad_(False).to(self.device))
        return self._parts

    def to(self, device: torch.device | str) -> Self:
        self.device = device
        if self._parts is not None:
            self._parts[1].to(device)
        return self

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokenizer, model = self.parts
        encoding = tokenizer(
            list(captions), max_length=self.length, truncation=True, padding="longest", return_tensors="pt"
        )
        untruncated = tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]
        longer = [caption for caption, tokens in zip(captions, untruncated, strict=True) if len(tokens) > self.length]
        if longer and not self.cut:
            log.warning("captions of more than %d tokens are cut off, the first: %s", self.length, longer[0][:100])
        self.cut += len(longer)
        ids, mask = (encoding[name].to(self.device) for name in ("input_ids", "attention_mask"))
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        mask = mask.bool()
        missing = self.length - ids.shape[1]  # states after the longest caption are not computed
        states = functional.pad(states * mask[..., None], (0, 0, 0, missing))
        return states, functional.pad(mask, (0, missing))

    def settings(self) -> dict[str, Any]:
        return {"kind": "T5", "length": self.length}

    def description(self) -> dict[str, Any]:
        tokenizer, model = self.parts
        sizes = {name: getattr(model.config, name) for name in ("d_model", "d_ff", "num_layers", "num_heads")}
        probe = tokenizer("a red cube left of the blue block")["input_ids"]
        return {**self.settings(), "config": sizes, "probe": probe, **sample_of(model)}
