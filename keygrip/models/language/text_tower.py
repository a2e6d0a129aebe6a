"""The text tower of a CLIP or SigLIP model as a frozen instruction encoder.

Shape legend: B sentences, L tokens, E width of a state.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keygrip.artifacts import sha256_bytes
from keygrip.models.language.hub import read_config, read_tokenizer, read_weights
from keygrip.models.language.instructions import InstructionStates
from keygrip.training.parts import model_part

log = logging.getLogger(__name__)

CLIP, SIGLIP = ("clip", "clip_text_model"), ("siglip", "siglip_text_model", "siglip2", "siglip2_text_model")
PROBE = "open the drawer left of 12 red cubes, slowly"  # hashed with the vocabulary: how a tokenizer splits this text


@model_part(external=["source"])
class PretrainedTextTower(nn.Module):
    """A frozen CLIP or SigLIP text tower: states of a sentence's tokens, and its pooled state.

    Weights and tokenizer stay in their folder: they are neither trained nor written into checkpoints. Checkpoints hold
    a hash of both, and another tower is refused.

    Args:
        source: a local folder in the layout of the hub, of the whole model or of its text tower, or a name on the hub.
        width: E, width of a state (the tower's hidden_size). length: L, number of tokens, at most that of the tower's
            training; longer sentences are refused.
    """

    _digest: Tensor

    def __init__(self, source: str, width: int = 512, length: int = 64) -> None:
        super().__init__()
        self.source, self.width, self.length = source, width, length
        self._loaded: list[Any] = []  # a list: no submodule, so neither trained nor in the checkpoint
        self.register_buffer("_digest", torch.zeros(32, dtype=torch.uint8))  # of the tower used in training
        self.register_load_state_dict_pre_hook(_refuse_other_tower)

    def _parts(self) -> tuple[Any, Any, int]:
        """Return tokenizer, tower and the padding token's id, loaded at the first call.

        Raises:
            ImportError: transformers is not installed. FileNotFoundError: the source does not exist. ValueError:
                another kind of model, another width, a tower for fewer tokens, or weights that are missing.
        """
        if not self._loaded:
            try:
                from transformers import CLIPTextModel, SiglipTextModel
            except ImportError as error:
                raise ImportError("instruction=pretrained needs transformers: pip install 'keygrip[vlm]'") from error
            full_config = read_config(self.source)
            if full_config.model_type not in CLIP + SIGLIP:
                raise ValueError(
                    f"{self.source} is a {full_config.model_type} model: instruction.source must be CLIP or SigLIP"
                )
            config = getattr(full_config, "text_config", full_config)
            if config.hidden_size != self.width or config.max_position_embeddings < self.length:
                raise ValueError(
                    f"{self.source} has states of {config.hidden_size} numbers and up to "
                    f"{config.max_position_embeddings} tokens; instruction.width={self.width}, "
                    f"instruction.length={self.length}"
                )
            kind: Any = CLIPTextModel if full_config.model_type in CLIP else SiglipTextModel
            tower = read_weights(kind, self.source, "text tower")
            tokenizer = read_tokenizer(self.source)
            if tokenizer.pad_token_id is None:
                raise ValueError(f"the tokenizer of {self.source} has no padding token")
            self._loaded = [tokenizer, tower.eval().requires_grad_(False), int(tokenizer.pad_token_id)]
        return self._loaded[0], self._loaded[1], self._loaded[2]

    def digest(self) -> Tensor:
        """Return uint8 [32], the SHA-256 of the tower's weights, independent of their names, and of its tokenizer."""
        tokenizer, tower, _ = self._parts()
        flat = (weight.detach().cpu().reshape(-1).numpy() for weight in tower.parameters())
        weights = sorted(hashlib.sha256(numbers.data).hexdigest() for numbers in flat)
        text = [sorted(tokenizer.get_vocab().items()), list(tokenizer(PROBE)["input_ids"])]
        return torch.tensor(list(bytes.fromhex(sha256_bytes(json.dumps([weights, text]).encode()))), dtype=torch.uint8)

    def prepare(self, sentences: Iterable[str]) -> None:
        """Refuse training sentences that do not fit, before training starts, and store the hash of the tower."""
        self.tokens(sorted(set(sentences)))
        self._digest.copy_(self.digest())

    def unknown_words(self, sentence: str) -> list[str]:
        """Return an empty list: the tower was trained on more words than any robot's data set has."""
        return []

    def tokens(self, sentences: Sequence[str]) -> Tensor:
        """Return int64 ``[B, L, 2]``: the token's id, and whether it belongs to the sentence.

        Raises:
            ValueError: an empty sentence, or one that is longer than `length`.
        """
        tokenizer, _, _ = self._parts()
        if any(not sentence.strip() for sentence in sentences):
            raise ValueError("an instruction is empty: every demonstration needs a sentence (or instruction=null)")
        token_ids = [tokenizer(sentence)["input_ids"] for sentence in sentences]
        for sentence, ids in zip(sentences, token_ids, strict=True):
            if len(ids) > self.length:
                raise ValueError(
                    f"the instruction {sentence[:60]!r}... has {len(ids)} tokens, instruction.length={self.length}"
                )
        padding = self._parts()[2]
        rows = [[[each, 1] for each in ids] + [[padding, 0]] * (self.length - len(ids)) for ids in token_ids]
        return torch.tensor(rows)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> InstructionStates:
        """Compute the states of sentences, given as the output ``[B, L, 2]`` of `tokens`."""
        _, tower, padding = self._parts()
        tower.to(tokens.device)
        ids, mask = tokens[..., 0], tokens[..., 1].bool()
        # CLIP's causal tower does not attend to later tokens. SigLIP was trained on sentences padded to its own length,
        # without a mask; its pooled state is that of the last position.
        if tower.config.model_type in SIGLIP:
            ids = F.pad(ids, (0, tower.config.max_position_embeddings - self.length), value=padding)
        output = tower(input_ids=ids)
        words = F.layer_norm(output.last_hidden_state[:, : self.length].float(), (self.width,)) * mask[..., None]
        return InstructionStates(words, mask, F.layer_norm(output.pooler_output.float(), (self.width,)))


def _refuse_other_tower(tower: PretrainedTextTower, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Raise ValueError if the weights to load were trained with another tower. Older checkpoints have no hash: for
    them, this tower is assumed."""
    stored = state_dict.get(f"{prefix}_digest")
    if stored is None:
        log.warning(
            "the checkpoint was saved before text towers had a hash, so it is unknown whether instruction.source=%s "
            "is the tower that it was trained with; it is assumed to be",
            tower.source,
        )
        state_dict[f"{prefix}_digest"] = tower.digest()
        return
    if not bool(stored.any()):  # no tower was used in training
        return
    digest = tower.digest()
    if not torch.equal(stored.cpu(), digest):
        here, there = (bytes(each.flatten()[:8].to(torch.uint8).tolist()).hex() for each in (digest, stored))
        raise ValueError(
            f"instruction.source={tower.source} is another text tower than the one that was trained with (weights and "
            f"tokenizer have the hash {here}, in the checkpoint it is {there}): its states mean something else; name "
            "that one's folder"
        )
