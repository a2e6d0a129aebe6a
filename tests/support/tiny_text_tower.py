"""Text towers of CLIP and SigLIP of a few hundred parameters, saved as the hub ships them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

WORDS = ["<pad>", "<start>", "<end>", "<unk>", "open", "the", "drawer", "push", "cube", "red"]
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def tokenizer() -> Any:
    """Return a tokenizer with one token per word; all unknown words share one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unk>"
    )


def write_text_tower(folder: Path, kind: str = "clip", seed: int = 0) -> Path:
    """Write a tower with random weights and its tokenizer into a folder. `kind`: clip or siglip."""
    torch.manual_seed(seed)
    if kind == "clip":
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZES))
    else:
        model = transformers.SiglipTextModel(transformers.SiglipTextConfig(**SIZES, projection_size=16))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
