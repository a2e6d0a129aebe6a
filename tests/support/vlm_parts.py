"""A network of a few thousand parameters, and rows of random text about random videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keygrip.models.backbone import DinoBackbone
from keygrip.models.foveated_vlm.conversations import ConversationCollator
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.models.foveated_vlm.rows import TextRows
from keygrip.models.foveated_vlm.self_supervised import (
    LOSSES,
    FramesCollator,
    SelfSupervisedEncoder,
    SelfSupervisedModule,
)
from keygrip.models.language import PromptOrder
from keygrip.models.language.decoder import LanguageModel
from keygrip.models.language.llama import Llama
from keygrip.models.language.tokenizers import TrainedTokenizer
from keygrip.training.optimizers import AdamW

SIZES = {"dinov2_vits14": 28, "dinov3_vits16": 32, "tiny": 32}


def small_backbone(variant: str = "dinov2_vits14") -> DinoBackbone:
    backbone = DinoBackbone(variant, SIZES[variant], "random", width=32, depth=3, heads=2)
    with torch.no_grad():  # LayerScale starts near zero, which would hide the effect of the blocks
        for name, parameter in backbone.named_parameters():
            if "gamma" in name:
                parameter.fill_(0.5)
    return backbone


def small_language(family: type[LanguageModel] = Llama, **changes: object) -> LanguageModel:
    options: dict[str, object] = {
        "layers": 2,
        "width": 24,
        "heads": 4,
        "kv_heads": 2,
        "mlp_width": 48,
        "vocabulary": 320,
        "context": 128,
        "rope_theta": 10000.0,
        "tie_embeddings": True,
        "norm_eps": 1e-5,
        "embedding_std": 0.5,
    }
    return family(**(options | changes))  # type: ignore[arg-type]


def frames_of(counts: Sequence[int], size: int = 28, seed: int = 1, longest: int | None = None) -> Tensor:
    """Return [V, F, 3, S, S]; padding frames hold noise, which must not matter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(counts), longest or max(counts, default=0), 3, size, size, generator=generator)


def rows_of(
    texts: Sequence[tuple[int, int, int]], counts: Sequence[int], width: int | None = None, seed: int = 2
) -> TextRows:
    """Return rows given by (video, length, visual_at); padding holds random ids, which must not matter."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(length for _, length, _ in texts)
    ids = torch.randint(3, 320, (len(texts), width), generator=generator)
    videos, lengths, places = (list(part) for part in zip(*texts, strict=True))
    return TextRows(ids, lengths, places, videos, list(counts))


def small_module(
    folder: Path, texts: Sequence[str], order: PromptOrder = "question_first", context: int = 128, **network: Any
) -> FoveatedVLMModule:
    """Return a module whose tokenizer was trained on some texts, as after training on images of 28 pixels."""
    torch.manual_seed(0)
    collator = ConversationCollator(TrainedTokenizer(320), order, "answers")
    collator.prepare(folder, lambda: iter(texts))
    module = FoveatedVLMModule(
        FoveatedVLM(small_backbone(), small_language(context=context), **network), collator, AdamW(1e-3)
    )
    module.image_options = {"image_size": 28, "fit": "stretch", "max_frames": 8}
    return module.eval()


def sensitive_module(folder: Path, texts: Sequence[str], **network: Any) -> FoveatedVLMModule:
    """Return a `small_module` with weights so large that its answers differ from video to video."""
    module = small_module(folder, texts, visual_scale=1.0, **network)
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return module


def self_supervised_module(weights: dict[str, float] | None = None, **changes: float) -> SelfSupervisedModule:
    """Return a small module; all losses have weight 1 if no weights are given."""
    torch.manual_seed(0)
    network = SelfSupervisedEncoder(small_backbone("tiny"), width=32)
    weights = dict.fromkeys(LOSSES, 1.0) if weights is None else weights
    return SelfSupervisedModule(network, FramesCollator(), AdamW(1e-3), weights, **changes)  # type: ignore[arg-type]
