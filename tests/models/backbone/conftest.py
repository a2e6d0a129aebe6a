"""Reduced DINO models with strong random weights, and checkpoints of them in every format that the backbone reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from keygrip.models.backbone import VARIANTS, DinoBackbone

SIZES = {"width": 64, "depth": 3, "heads": 4}

State = dict[str, Tensor]


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Set every tensor far from its initial value, so that a lost, swapped or ignored tensor changes the features."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.12 * noise if parameter.ndim > 1 else 0.5 + 0.3 * noise)


@pytest.fixture(autouse=True)
def _one_thread_and_no_outside_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.delenv("DINO_WEIGHTS_PATH", raising=False)


@pytest.fixture
def small() -> Callable[..., DinoBackbone]:
    """Build a reduced backbone of any variant in eval mode with random weights, `pretrained` weights or those of a
    path."""

    def build(variant: str, weights: str = "random", **options: object) -> DinoBackbone:
        settings: dict[str, object] = {"image_size": 6 * VARIANTS[variant].patch_size, "weights": weights, **SIZES}
        if weights not in ("random", "pretrained"):
            settings |= {"weights": "random", "init_from": weights}
        settings.update(options)
        backbone = DinoBackbone(variant, **settings)  # type: ignore[arg-type]
        if weights == "random":
            randomise(backbone)
        return backbone.eval()

    return build


@pytest.fixture
def hf_v2() -> Callable[[bool], nn.Module]:
    """transformers' own DINOv2 of the reduced size, with or without registers, and a 37 x 37 position table."""

    def build(registers: bool) -> nn.Module:
        from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

        sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 4}
        if registers:
            model: nn.Module = Dinov2WithRegistersModel(
                Dinov2WithRegistersConfig(**sizes, image_size=518, patch_size=14, num_register_tokens=4)
            )
        else:
            model = Dinov2Model(Dinov2Config(**sizes, image_size=518, patch_size=14))
        randomise(model)
        return model.eval()

    return build


@pytest.fixture
def hf_v3() -> Callable[[bool], nn.Module]:
    """transformers' own DINOv3 of the reduced size, with a plain or a gated MLP."""

    def build(gated: bool) -> nn.Module:
        from transformers import DINOv3ViTConfig, DINOv3ViTModel

        model = DINOv3ViTModel(
            DINOv3ViTConfig(
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=96,
                patch_size=16,
                num_register_tokens=4,
                use_gated_mlp=gated,
                hidden_act="silu" if gated else "gelu",
                intermediate_size=256,
            )
        )
        randomise(model)
        return model.eval()

    return build


def round_rope(model: nn.Module) -> Tensor:
    """Set a transformers DINOv3 to the rotary periods of Meta's files (rounded to bfloat16) and return them."""
    rope = next(module for module in model.modules() if hasattr(module, "inv_freq"))
    periods = (1.0 / rope.inv_freq).bfloat16()
    rope.inv_freq = 1.0 / periods.float()
    return periods


def meta_v3(model: nn.Module, periods: Tensor) -> State:
    """Meta's release format of a transformers DINOv3: fused qkv with a bias mask, storage tokens, rotary periods."""
    source = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
    state: State = {
        "cls_token": source["embeddings.cls_token"],
        "storage_tokens": source["embeddings.register_tokens"],
        "mask_token": source["embeddings.mask_token"][0],
        "patch_embed.proj.weight": source["embeddings.patch_embeddings.weight"],
        "patch_embed.proj.bias": source["embeddings.patch_embeddings.bias"],
        "rope_embed.periods": periods,
        "norm.weight": source["norm.weight"],
        "norm.bias": source["norm.bias"],
    }
    gated = "layer.0.mlp.gate_proj.weight" in source
    mlp = {"w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"} if gated else {"fc1": "up_proj", "fc2": "down_proj"}
    for i in range(3):
        layer, block = f"layer.{i}.", f"blocks.{i}."
        width = source[f"{layer}norm1.weight"].shape[0]
        state[f"{block}attn.qkv.weight"] = torch.cat([source[f"{layer}attention.{p}_proj.weight"] for p in "qkv"])
        state[f"{block}attn.qkv.bias"] = torch.cat(
            [
                source[f"{layer}attention.q_proj.bias"],
                torch.full((width,), 9.0),  # masked in the release, whatever the values are
                source[f"{layer}attention.v_proj.bias"],
            ]
        )
        ones = torch.ones(width)
        state[f"{block}attn.qkv.bias_mask"] = torch.cat([ones, 0 * ones, ones])
        for kind in ("weight", "bias"):
            state[f"{block}attn.proj.{kind}"] = source[f"{layer}attention.o_proj.{kind}"]
            for name in ("norm1", "norm2"):
                state[f"{block}{name}.{kind}"] = source[f"{layer}{name}.{kind}"]
            for ours, theirs in mlp.items():
                state[f"{block}mlp.{ours}.{kind}"] = source[f"{layer}mlp.{theirs}.{kind}"]
        for n in (1, 2):
            state[f"{block}ls{n}.gamma"] = source[f"{layer}layer_scale{n}.lambda1"]
    return {key: value.clone() for key, value in state.items()}


def meta_v2(model: nn.Module) -> State:
    """Meta's release format of a transformers DINOv2."""
    source = model.state_dict()
    state: State = {
        "cls_token": source["embeddings.cls_token"],
        "pos_embed": source["embeddings.position_embeddings"],
        "mask_token": source["embeddings.mask_token"],
        "patch_embed.proj.weight": source["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": source["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": source["layernorm.weight"],
        "norm.bias": source["layernorm.bias"],
    }
    if "embeddings.register_tokens" in source:
        state["register_tokens"] = source["embeddings.register_tokens"]
    for i in range(3):
        layer, block = f"encoder.layer.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            state[f"{block}attn.qkv.{kind}"] = torch.cat([source[f"{layer}attention.{p}_proj.{kind}"] for p in "qkv"])
            state[f"{block}attn.proj.{kind}"] = source[f"{layer}attention.o_proj.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{block}{name}.{kind}"] = source[f"{layer}{name}.{kind}"]
        for n in (1, 2):
            state[f"{block}ls{n}.gamma"] = source[f"{layer}layer_scale{n}.lambda1"]
    return {key: value.clone() for key, value in state.items()}


@pytest.fixture
def formats() -> dict[str, Callable[..., State]]:
    """The inverse mappings: from a transformers model to Meta's files."""
    return {"meta_v2": meta_v2, "meta_v3": meta_v3, "round_rope": round_rope}  # type: ignore[dict-item]


@pytest.fixture
def images() -> Callable[[int, int], Tensor]:
    def make(height: int, width: int) -> Tensor:
        return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(5))

    return make


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    def save(content: object, name: str = "weights.pth") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
        return str(path)

    return save
