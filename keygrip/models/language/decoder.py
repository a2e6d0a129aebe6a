"""The interface between video-language models and language models, over any decoder of transformers.

A family of models (Llama, Qwen2, ...) is one file: a class that derives from `LanguageModel`, takes its sizes as
arguments, builds the configuration of transformers, and passes it to `LanguageModel`. A family with Llama's sizes
derives from `keygrip.models.language.llama.LlamaSized`, which does this.

Shapes: B rows, T positions, C width, K positions in a cache, W vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keygrip.models.language.cache import LanguageCache
from keygrip.models.language.hub import read_config, read_weights, with_fused_attention
from keygrip.models.nn.kept_buffers import KeptBuffers
from keygrip.models.nn.processor_attention import recompute_contexts

log = logging.getLogger(__name__)

# Names of the sizes in a configuration of transformers, and in those of conf/language.
SIZES = {
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "vocab_size": "vocabulary",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}


class LanguageModel(KeptBuffers):
    """A causal language model from embeddings to hidden states.

    The decoders of transformers share the parts that are used here: `embed_tokens`, `layers`, `norm` and `rotary_emb`.
    A family whose decoder differs (scaled embeddings, layers with a sliding window) overrides `embed` and `_run`.

    Args:
        config: of transformers, with all sizes. Its padding, begin and end ids must be None: SmolLM2 names its end
            token as padding, and an embedding with a padding index would never train the end token.
        decoder: class of transformers without output layer. whole: the class with it, whose weights the hub has.
        weights: `random`, a local folder with config.json and model.safetensors, or a name on the Hugging Face hub.
        embedding_std: standard deviation of randomly initialised token embeddings.
        gradient_checkpointing: recompute each layer's activations in the backward pass.
        sizes: settings that must agree between `config` and the weights' configuration: names in transformers to ours.

    Attributes:
        width, layers, vocabulary: C, number of layers, W. context: the longest row in positions, text and visual tokens
            together. loaded_weights: `weights`.

    Raises:
        ValueError: weights of other sizes, of another family or of a smaller context. FileNotFoundError: weights that
            do not exist, or hub weights without a network connection.
    """

    def __init__(
        self,
        config: Any,
        decoder: Any,
        whole: Any,
        weights: str = "random",
        embedding_std: float = 0.14,
        gradient_checkpointing: bool = False,
        sizes: Mapping[str, str] = SIZES,
    ) -> None:
        super().__init__()
        self.width, self.layers = int(config.hidden_size), int(config.num_hidden_layers)
        self.vocabulary, self.context = int(config.vocab_size), int(config.max_position_embeddings)
        self.model: Any = decoder(with_fused_attention(config))
        self.head = None if config.tie_word_embeddings else nn.Linear(self.width, self.vocabulary, bias=False)
        nn.init.normal_(self.model.embed_tokens.weight, std=embedding_std)
        self.loaded_weights = "random"
        if weights != "random":
            self._load(weights, whole, sizes)
        self.gradient_checkpointing = gradient_checkpointing

    def kept(self) -> Mapping[str, Tensor]:
        """Return the rotary frequencies. transformers, too, keeps them in float32 when it loads weights in bfloat16:
        with rounded ones, the angle between positions a thousand apart is off by 0.4 radians (base 10 000) or more."""
        return dict(self.model.rotary_emb.named_buffers(recurse=False))

    def put_back(self, kept: Mapping[str, Tensor]) -> None:
        """See `KeptBuffers`."""
        rotary = self.model.rotary_emb
        for name, saved in kept.items():
            current = rotary.get_buffer(name)
            if current.dtype != saved.dtype:
                setattr(rotary, name, saved.to(current.device))

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings, int64 [...] -> [..., C]."""
        return self.model.embed_tokens(ids)

    @property
    def embedding_std(self) -> Tensor:
        """Standard deviation of the token embeddings now, []."""
        return self.model.embed_tokens.weight.detach().float().std()

    def embedding_scale(self) -> float:
        """Return `embedding_std` as a number to initialise with; 1 on the meta device, where weights have no value."""
        return 1.0 if self.model.embed_tokens.weight.is_meta else float(self.embedding_std)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Hidden states after the last norm, [B, T, C] -> [B, T, C]. Rows begin at position 0; padding is on the right.

        Raises:
            ValueError: more positions than the context holds.
        """
        self._check_length(embeddings.shape[1])
        positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
        return self._run(embeddings, positions, None, None)

    def packed(self, embeddings: Tensor, rows: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Hidden states of several concatenated rows, [n, X, C] -> [n, X, C]; a position attends to its own row only.

        Args:
            rows: int64 [n, X], row of each position; the positions of a row are consecutive. positions: int64 [n, X],
                position in that row. longest: positions of the longest row.

        Raises:
            ValueError: a row has more positions than the context holds; several rows together may have more.
        """
        self._check_length(longest)
        index = torch.arange(embeddings.shape[1], device=embeddings.device)
        mask = (rows[:, :, None] == rows[:, None]) & (index[None] <= index[:, None])
        return self._run(embeddings, positions, mask[:, None], None)

    def extend(self, embeddings: Tensor, cache: LanguageCache, valid: Tensor | None = None) -> Tensor:
        """Hidden states of further positions of rows whose keys and values are cached, [B, t, C] -> [B, t, C].

        Args:
            embeddings: the next t positions of each row.
            cache: extended in place.
            valid: bool [B, t], False for padding: no real token attends to it, and it takes no position.
        """
        if cache.length + embeddings.shape[1] > self.context:  # with padding; rows may be shorter
            self._check_length(cache.longest(embeddings.shape[1], valid))  # before the cache counts them
        mask, positions = cache.advance(embeddings.shape[0], embeddings.shape[1], valid, embeddings.device)
        return self._run(embeddings, positions, mask, cache.layers)

    def _run(self, embeddings: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """Run the layers one by one: transformers' own loop drops the cache under gradient checkpointing."""
        hidden = embeddings.to(self.model.embed_tokens.weight.dtype)  # the residual stream, also under autocast
        angles = self.model.rotary_emb(hidden, position_ids=positions)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and cache is None
        for layer in self.model.layers:
            if recompute:
                hidden = checkpoint(
                    layer,
                    hidden,
                    mask,
                    position_embeddings=angles,
                    use_reentrant=False,
                    context_fn=recompute_contexts,
                )
            else:
                hidden = layer(hidden, mask, position_embeddings=angles, past_key_values=cache)
        return self.model.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., W]."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The output layer's matrix, [W, C]."""
        return self.model.embed_tokens.weight if self.head is None else self.head.weight

    def sharded_parts(self) -> list[nn.Module]:
        """Blocks that are used through their `forward` alone."""
        return list(self.model.layers)

    def _check_length(self, length: int) -> None:
        if length > self.context:
            raise ValueError(
                f"a row has {length} positions and language.model.context={self.context}: give fewer frames or less "
                "text; only with random weights a larger context may be set"
            )

    def refuse_other(self, found: Any, source: str, sizes: Mapping[str, str] = SIZES) -> None:
        """Raise ValueError if weights with a given configuration have other sizes or a smaller context, or need another
        computation.

        Args:
            found: the weights' configuration in transformers. source: its origin. sizes: as in the constructor.
        """
        own_config = self.model.config
        differences = [
            f"{ours} is {getattr(found, theirs, None)}, config says {getattr(own_config, theirs)}"
            for theirs, ours in sizes.items()
            if getattr(found, theirs, None) != getattr(own_config, theirs)
        ]
        longest = getattr(found, "max_position_embeddings", None)
        if longest is not None and self.context > longest:
            differences.append(f"its context is {longest}, config says {self.context}: give context={longest} or less")
        rope = getattr(found, "rope_parameters", None) or {}
        theta = rope.get("rope_theta")
        if theta is not None and float(theta) != own_config.rope_parameters["rope_theta"]:
            differences.append(f"rope_theta is {theta}, config says {own_config.rope_parameters['rope_theta']}")
        if rope.get("rope_type", "default") != "default":
            differences.append(f"its rotary positions are of type {rope['rope_type']}, which is not supported here")
        for name in ("hidden_act", "head_dim", "attention_bias", "mlp_bias"):  # not in `sizes`
            theirs, ours = getattr(found, name, None), getattr(own_config, name, None)
            if theirs is not None and theirs != ours:
                differences.append(f"{name} is {theirs}, here it is {ours}")
        if set(getattr(found, "layer_types", None) or ()) - {"full_attention"}:
            differences.append("some of its layers attend to a sliding window, which is not supported here")
        kind = getattr(found, "model_type", "")
        if kind != own_config.model_type:
            differences.insert(0, f"it is a {kind or 'model without a type'}, not a {own_config.model_type}")
        if differences:
            raise ValueError(
                f"language.model.weights={source} does not fit language.model: {'; '.join(differences[:4])}"
            )

    def _load(self, source: str, whole: Any, sizes: Mapping[str, str]) -> None:
        self.refuse_other(read_config(source), source, sizes)
        model = read_weights(whole, source, "language model")
        self.model.load_state_dict(model.model.state_dict(), strict=True)
        if self.head is not None:
            self.head.load_state_dict(model.lm_head.state_dict(), strict=True)
        self.loaded_weights = source
        log.info("language model: weights of %s", source)
