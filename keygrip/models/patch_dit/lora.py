"""Low-rank adaptation: a trained network stays as it is, and each of its linear layers learns a small difference.

    y = W x + b + (alpha / rank) B A x          A [rank, in], B [out, rank], B starts at zero

Adapters are written and read in the layout of peft (`adapter_model.safetensors`, `adapter_config.json`), so that an
adapter that peft trained on this network can be used, and the other way round. Source: Hu et al., "LoRA: Low-Rank
Adaptation of Large Language Models" (2021).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from keygrip.data.bad_samples import BadSample, read_json
from keygrip.training.parts import model_part

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
ATTENTION = ("query", "key_value", "output")
# Settings of peft that change what an adapter means; only these values are known here.
PLAIN = {"use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "bias": "none", "alpha_pattern": {}}
PLAIN |= {"rank_pattern": {}, "modules_to_save": None, "lora_bias": False}


@model_part
@dataclass(frozen=True)
class LoRA:
    """What is adapted.

    Args:
        rank: of the differences. alpha: they are scaled by alpha / rank. targets: last names of the linear layers.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: Sequence[str] = ATTENTION

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise ValueError(
                f"model.lora: rank={self.rank} and alpha={self.alpha} must be positive, and targets name layers"
            )


class LoRALinear(nn.Linear):
    """A linear layer whose own weights are frozen, with a low-rank difference; its names are those of the layer."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = layer.in_features, layer.out_features, alpha / rank
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.lora_B = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = functional.linear(functional.linear(x, self.lora_A), self.lora_B)
        return functional.linear(x, self.weight, self.bias) + self.scale * low


def add_lora(network: nn.Module, lora: LoRA) -> list[str]:
    """Puts differences on the named layers of a network and freezes everything else; the layers' names.

    Raises:
        ValueError: there is no such layer.
    """
    chosen = _layers(network, lora.targets)
    for target in lora.targets:
        if not any(name.rpartition(".")[2] == target for name in chosen):
            raise ValueError(f"model.lora.targets: the network has no linear layer named {target}")
    network.requires_grad_(False)
    for name, layer in chosen.items():
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, LoRALinear(layer, lora.rank, lora.alpha))
    return list(chosen)


def _layers(network: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            found[name] = module
    return found


def write_lora(network: nn.Module, folder: Path, lora: LoRA) -> None:
    """The adapter's two files, into a folder that is there.

    Raises:
        ValueError: the network has no adapter.
    """
    from safetensors.torch import save_file

    tensors = {}
    for name, module in network.named_modules():
        if isinstance(module, LoRALinear):
            for part in ("lora_A", "lora_B"):
                tensors[f"{PREFIX}{name}.{part}.weight"] = getattr(module, part).detach().cpu().contiguous()
    if not tensors:
        raise ValueError("this model was trained without LoRA (model.lora): there is no adapter to write")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.targets)}
    config |= {"lora_dropout": 0.0, "task_type": None, "base_model_name_or_path": None, "inference_mode": True, **PLAIN}
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def write_adapter(folder: Path, module: Any, *_: object) -> None:
    """What ``keygrip export format=lora`` writes. Raises ValueError: a model without an adapter."""
    lora = getattr(module, "lora", None)
    if not isinstance(lora, LoRA):
        raise ValueError("this model was trained without LoRA (model.lora): give format=safetensors")
    write_lora(module.network, folder, lora)


@torch.no_grad()
def load_lora(network: nn.Module, folder: Path) -> list[str]:
    """Adds an adapter's differences to the weights of a network; the layers' names.

    Raises:
        FileNotFoundError: no adapter there. ValueError: of another kind or another network; nothing is changed then.
    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"lora={folder}: there is no {name}; give a folder as `keygrip export format=lora` makes"
            )
    config = _config(folder / CONFIG)
    pairs = _pairs(folder / WEIGHTS)
    scale = config["lora_alpha"] / config["r"]
    changes = []
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    for name, pair in pairs.items():
        if set(pair) != {"lora_A", "lora_B"}:
            raise ValueError(f"{folder / WEIGHTS}: {name} has {', '.join(sorted(pair))} and not both lora_A and lora_B")
        if name not in layers:
            raise ValueError(f"{folder / WEIGHTS}: this network has no linear layer {name}: it is of another network")
        low, high, weight = pair["lora_A"], pair["lora_B"], layers[name].weight
        fits = low.ndim == high.ndim == 2 and low.shape[0] == high.shape[1]
        if not fits or (high.shape[0], low.shape[1]) != tuple(weight.shape):
            shapes = f"{list(high.shape)} x {list(low.shape)}"
            raise ValueError(f"{folder / WEIGHTS}: {name} is {list(weight.shape)}, its difference {shapes}")
        changes.append((weight, scale * high.float() @ low.float()))
    for weight, change in changes:
        weight += change.to(weight)
    return list(pairs)


def _config(file: Path) -> dict[str, Any]:
    try:
        config = read_json(file)
    except BadSample as error:
        raise ValueError(f"{file} cannot be read: {error.what}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{file} is not the configuration of a LoRA")
    for name, value in PLAIN.items():
        if config.get(name, value) not in (value, None):
            raise ValueError(f"{file}: {name}={config[name]!r} is not supported, only {value!r}")
    for name in ("r", "lora_alpha"):
        number = config.get(name)
        if not isinstance(number, int | float) or isinstance(number, bool) or not number > 0:
            raise ValueError(f"{file}: {name}={number!r} is not a positive number")
    return config


def _pairs(file: Path) -> dict[str, dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not torch.isfinite(value).all():
            raise ValueError(f"{file}: {key} holds numbers that are not finite")
        found.setdefault(name, {})[part] = value
    if not found:
        raise ValueError(f"{file} holds no tensors")
    return found
