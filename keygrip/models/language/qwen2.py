"""Qwen2 and Qwen2.5 language models: a Llama with biases on queries, keys and values."""

from __future__ import annotations

from keygrip.models.language.decoder import LanguageModel
from keygrip.training.parts import model_part


@model_part(from_checkpoint={"weights": "random"})
class Qwen2(LanguageModel):
    """A Qwen2 of any size, without sliding windows (the published models do not use them either).

    Args: those of `keygrip.models.language.llama.Llama`.

    Raises:
        ValueError: impossible sizes, or weights of other sizes. FileNotFoundError: weights that are not there.
    """

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
        norm_eps: float = 1e-6,
        embedding_std: float = 0.14,
        weights: str = "random",
        gradient_checkpointing: bool = False,
    ) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

        if width % heads or heads % kv_heads:
            raise ValueError(
                f"language: heads={heads} must divide width={width}, and kv_heads={kv_heads} must divide heads"
            )
        config = Qwen2Config(
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
            use_sliding_window=False,
            use_cache=False,
            initializer_range=width**-0.5,
        )
        super().__init__(config, Qwen2Model, Qwen2ForCausalLM, weights, embedding_std, gradient_checkpointing)
