"""Qwen2 and Qwen2.5 language models: a Llama with biases on queries, keys and values."""

from __future__ import annotations

from keygrip.models.language.decoder import LanguageModel, llama_config
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

        config = llama_config(
            Qwen2Config,
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            mlp_width=mlp_width,
            vocabulary=vocabulary,
            context=context,
            rope_theta=rope_theta,
            tie_embeddings=tie_embeddings,
            norm_eps=norm_eps,
            use_sliding_window=False,
        )
        super().__init__(config, Qwen2Model, Qwen2ForCausalLM, weights, embedding_std, gradient_checkpointing)
