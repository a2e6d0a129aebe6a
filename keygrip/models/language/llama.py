"""Llama-type language models: SmolLM2, Llama 2 and 3, or a small one from scratch; a base class for similar models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from keygrip.models.language.decoder import LanguageModel
from keygrip.training.parts import model_part


class LlamaSized(LanguageModel):
    """A decoder of any size with Llama's settings. All sizes are in the config: a checkpoint rebuilds the model without
    other files.

    A subclass gives the common prefix of the classes in transformers (`architecture`: "Llama" for LlamaConfig,
    LlamaModel and LlamaForCausalLM), and further settings of the configuration (`own`).

    Args:
        layers, width, heads, kv_heads, mlp_width, vocabulary: sizes; `heads` divides `width`, `kv_heads` divides
            `heads`.
        context: the longest row in positions, text and visual tokens together.
        rope_theta: base of the rotary periods. norm_eps: of RMSNorm.
        tie_embeddings: the output layer is the embedding table.
        weights, embedding_std, gradient_checkpointing: see `LanguageModel`.

    Raises:
        ValueError: impossible sizes, or weights of other sizes. FileNotFoundError: weights that do not exist.
    """

    architecture: ClassVar[str]
    own: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        kv_heads: int,
        mlp_width: int,
        vocabulary: int,
        context: int,
        rope_theta: float,
        tie_embeddings: bool,
        norm_eps: float,
        embedding_std: float = 0.14,
        weights: str = "random",
        gradient_checkpointing: bool = False,
    ) -> None:
        import transformers

        if width % heads or heads % kv_heads:
            raise ValueError(
                f"language: heads={heads} must divide width={width}, and kv_heads={kv_heads} must divide heads"
            )
        config, decoder, whole = (
            getattr(transformers, self.architecture + part) for part in ("Config", "Model", "ForCausalLM")
        )
        sizes = config(
            hidden_size=width,
            intermediate_size=mlp_width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            max_position_embeddings=context,
            rope_parameters={"rope_type": "default", "rope_theta": float(rope_theta)},
            rms_norm_eps=norm_eps,
            tie_word_embeddings=tie_embeddings,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
            # transformers' 0.02 is for widths of thousands: at 128 attention would start uniform and stay so for long
            initializer_range=width**-0.5,
            **self.own,
        )
        super().__init__(sizes, decoder, whole, weights, embedding_std, gradient_checkpointing)


@model_part(from_checkpoint={"weights": "random"})
class Llama(LlamaSized):
    """A Llama; see `LlamaSized`."""

    architecture = "Llama"
    own: ClassVar = {"attention_bias": False}
