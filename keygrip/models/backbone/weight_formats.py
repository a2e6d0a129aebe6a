"""File formats of DINO weights, recognised by their keys; tensors are renamed to Meta's or timm's names.

Known formats: Meta's released `.pth`; training files of Meta's repositories (`teacher.backbone.*`); Hugging Face
`Dinov2Model`, `Dinov2WithRegistersModel` and `DINOv3ViTModel`; timm's own; checkpoints of keygrip models
(`...backbone.net.*`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

State = dict[str, Tensor]

_KEYGRIP_KEY = re.compile(r"^((?:.*\.)?backbone\.)?net\.(?:blocks|patch_embed|cls_token)")
# Meta's training code: blocks.<chunk>.<index>., index counts over all chunks
_CHUNKED_BLOCK = re.compile(r"^blocks\.\d+\.(\d+)\.")


def read_state(raw: State, origin: str, prefix: str | None = None) -> tuple[State, Tensor | None, str]:
    """Recognise a file by its keys; return (tensors under Meta's or timm's names, rotary periods or None, name of the
    format).

    Args:
        raw: result of `read_file`.
        origin: the file, for messages.
        prefix: which backbone of a keygrip checkpoint to use if it holds several.

    Raises:
        ValueError: no known format; the message lists the first keys.
    """
    keygrip_prefixes = sorted({match.group(1) or "" for key in raw if (match := _KEYGRIP_KEY.match(key))})
    if keygrip_prefixes:
        state = _keygrip_part(raw, keygrip_prefixes, origin, prefix)
        return state, state.get("rope.periods"), "keygrip checkpoint"
    if prefix is not None:
        raise ValueError(f"backbone.weights_prefix={prefix} is for keygrip checkpoints, and {origin} is not one")

    state = raw
    for start in ("teacher.backbone.", "model.teacher.backbone.", "teacher.module.backbone."):
        if any(key.startswith(start) for key in raw):
            state = {_CHUNKED_BLOCK.sub(r"blocks.\1.", key): value for key, value in _strip(raw, start).items()}
            _, periods, kind = _meta_state(state, origin)
            return state, periods, f"{kind} training file (teacher)"
    if any(key.startswith("module.") for key in raw):
        state = _strip(raw, "module.")
    if "embeddings.position_embeddings" in state:
        return _from_hugging_face_v2(state), None, "Hugging Face Dinov2Model"
    if "embeddings.cls_token" in state and "embeddings.patch_embeddings.weight" in state:
        return _from_hugging_face_v3(state), None, "Hugging Face DINOv3ViTModel"
    return _meta_state(state, origin)


def _meta_state(state: State, origin: str) -> tuple[State, Tensor | None, str]:
    if "storage_tokens" in state:
        return state, state.get("rope_embed.periods"), "DINOv3, Meta"
    if "pos_embed" in state and "mask_token" in state and "blocks.0.ls1.gamma" in state:
        return state, None, "DINOv2, Meta"
    if "reg_token" in state and "blocks.0.gamma_1" in state and "pos_embed" not in state:
        return state, state.get("rope.periods"), "DINOv3, timm"
    if "pos_embed" in state and "blocks.0.ls1.gamma" in state:
        return state, None, "DINOv2, timm"
    first = ", ".join(list(state)[:5]) or "none"
    raise ValueError(
        f"{origin} is no known DINO weights file; its first tensors are: {first}. Known are Meta's .pth, "
        "teacher.backbone.* training "
        "files, Hugging Face Dinov2Model and DINOv3ViTModel, timm's own, and keygrip checkpoints"
    )


def _keygrip_part(raw: State, prefixes: list[str], origin: str, wanted_prefix: str | None) -> State:
    parts = {prefix: _strip(raw, f"{prefix}net.") for prefix in prefixes}
    if wanted_prefix is not None:
        if wanted_prefix not in parts:
            raise ValueError(
                f"{origin} has no backbone under backbone.weights_prefix={wanted_prefix}; it has {', '.join(prefixes)}"
            )
        return parts[wanted_prefix]
    first = parts[prefixes[0]]
    for other in list(parts.values())[1:]:
        same = first.keys() == other.keys() and all(torch.equal(first[key], other[key]) for key in first)
        if not same:
            raise ValueError(
                f"{origin} holds several backbones that differ: {', '.join(prefixes)}; name one with "
                "backbone.weights_prefix"
            )
    return first


def _strip(state: State, start: str) -> State:
    return {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}


def _rename(key: str, table: Iterable[tuple[str, str]]) -> str:
    for old, new in table:
        key = key.replace(old, new)
    return key


def _from_hugging_face_v2(state: State) -> State:
    """`Dinov2Model` -> Meta's names. Query, key and value have two spellings, depending on the transformers release
    that wrote the file."""
    table = (
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("embeddings.", ""),
        ("encoder.layer.", "blocks."),
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attn.proj"),
        ("attention.o_proj", "attn.proj"),
        ("layer_scale1.lambda1", "ls1.gamma"),
        ("layer_scale2.lambda1", "ls2.gamma"),
        ("layernorm.", "norm."),
    )
    return _join_qkv({_rename(key, table): value for key, value in state.items()})


def _from_hugging_face_v3(state: State) -> State:
    """`DINOv3ViTModel` -> Meta's names, without rotary periods, which that format does not contain."""
    gated = any(".mlp.gate_proj." in key for key in state)
    table = (
        ("embeddings.patch_embeddings.", "patch_embed.proj."),
        ("embeddings.register_tokens", "storage_tokens"),
        ("embeddings.", ""),
        ("model.layer.", "layer."),
        ("layer.", "blocks."),
        ("attention.o_proj", "attn.proj"),
        ("layer_scale1.lambda1", "ls1.gamma"),
        ("layer_scale2.lambda1", "ls2.gamma"),
        ("mlp.gate_proj", "mlp.w1"),
        ("mlp.up_proj", "mlp.w2" if gated else "mlp.fc1"),
        ("mlp.down_proj", "mlp.w3" if gated else "mlp.fc2"),
    )
    return _join_qkv({_rename(key, table): value for key, value in state.items()})


def _join_qkv(state: State) -> State:
    """Separate projections -> one `attn.qkv`; a bias that the file does not have (DINOv3 keys) is zero."""
    joined = {key: value for key, value in state.items() if ".attention." not in key}
    starts = sorted({key.split("attention.")[0] for key in state if ".attention." in key})
    for start in starts:
        weight_names = [f"{start}attention.{part}_proj.weight" for part in "qkv"]
        if not all(name in state for name in weight_names):
            continue  # loading the weights reports what is missing
        weights = [state[name] for name in weight_names]
        joined[f"{start}attn.qkv.weight"] = torch.cat(weights)
        biases = [state.get(f"{start}attention.{part}_proj.bias") for part in "qkv"]
        if any(bias is not None for bias in biases):
            joined[f"{start}attn.qkv.bias"] = torch.cat(
                [
                    weight.new_zeros(weight.shape[0]) if bias is None else bias
                    for weight, bias in zip(weights, biases, strict=True)
                ]
            )
    return joined
