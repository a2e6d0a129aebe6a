"""Llama-type language models: SmolLM2, Llama 2 and 3, or a small one from scratch."""

from __future__ import annotations

from keygrip.models.language.decoder import LanguageModel, llama_config
from keygrip.training.parts import model_part


@model_part(from_checkpoint={"weights": "random"})
class Llama(LanguageModel):
    """A Llama of any size. All sizes are in the config: a checkpoint rebuilds the model without other files.

    Args:
        layers, width, heads, kv_heads, mlp_width, vocabulary: sizes; `heads` divides `width`, `kv_heads` divides
            `heads`.
        context: the longest row in positions, text and visual tokens together.
        rope_theta: base of the rotary periods. norm_eps: of RMSNorm.
        tie_embeddings: the output layer is the embedding table.
        weights, embedding_std, gradient_checkpointing: see `LanguageModel`.

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
        norm_eps: float = 1e-5,
        embedding_std: float = 0.14,
        weights: str = "random",
        gradient_checkpointing: bool = False,
    ) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

        config = llama_config(
            LlamaConfig,
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
            attention_bias=False,
        )
        super().__init__(config, LlamaModel, LlamaForCausalLM, weights, embedding_std, gradient_checkpointing)
