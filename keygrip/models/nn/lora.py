"""Low-rank adaptation with peft: a trained network is frozen, and each of its linear layers learns a small difference.

    y = W x + b + (alpha / rank) B A x          A [rank, in], B [out, rank], B starts at zero

The layers are peft's; `keygrip.inference.adapters` writes and reads peft's files. Trained differences are merged into
the weights for export and for inference in fewer bits; merging does not need peft. Source: Hu et al., "LoRA: Low-Rank
Adaptation of Large Language Models" (2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from keygrip.training.parts import model_part

INSTALL = "LoRA needs peft: pip install 'keygrip[lora]'"
NAME = "default"  # name of the only adapter
BASE, LOW, HIGH = "base_layer", f"lora_A.{NAME}", f"lora_B.{NAME}"


@model_part
@dataclass(frozen=True)
class LoRA:
    """Settings of low-rank adaptation.

    Args:
        rank: rank of the differences. alpha: they are scaled by alpha / rank. targets: linear layers to adapt, by the
            last part of their names.

    Raises:
        ValueError: rank or alpha is not positive, or `targets` is empty.
    """

    rank: int
    alpha: float
    targets: Sequence[str]

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not self.targets:
            raise ValueError(f"lora: rank={self.rank} and alpha={self.alpha} must be positive, and targets name layers")


@dataclass(frozen=True)
class Adapter:
    """The trained differences of a network.

    Args:
        network: the network that `add_lora` changed. lora: the settings of that call. prefix: prefix of the network's
            parameter names in the published model that contains it, with the dot. inputs: fingerprint of the
            normalisation of the network's inputs, if that is not part of its weights: the differences fit no other
            normalisation.
    """

    network: nn.Module
    lora: LoRA
    prefix: str = ""
    inputs: str | None = None


# ---- training --------------------------------------------------------------------------------------------------------


def add_lora(network: nn.Module, lora: LoRA) -> list[str]:
    """Replace the named layers by peft's, freeze everything else, and return the layers' names.

    Raises:
        ValueError: there is no such linear layer. ImportError: peft is not installed.
    """
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    chosen = [name for name, _ in network.named_modules() if name.rpartition(".")[2] in lora.targets]
    for target in lora.targets:
        matches = [name for name in chosen if name.rpartition(".")[2] == target]
        if not matches or not linear.issuperset(matches):
            raise ValueError(f"lora.targets: the network has no linear layer named {target}")
    try:
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f"{INSTALL} ({error})") from error
    network.requires_grad_(False)
    inject_adapter_in_model(peft_config(lora, list(lora.targets)), network, NAME)
    return chosen


def peft_config(lora: LoRA, targets: list[str] | str) -> Any:
    """Return peft's `LoraConfig` for layers given by the last parts of their names or by a regular expression."""
    from peft import LoraConfig

    alpha: Any = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    return LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none")


def plain_name(name: str) -> str:
    """Return the name that a layer's weight has without LoRA; names of differences are not changed."""
    return name.replace(f".{BASE}.", ".")


def is_difference(name: str) -> bool:
    """Return whether a weight belongs to a difference."""
    return f".{LOW}." in name or f".{HIGH}." in name


def adapted_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield peft's layers with their names, without importing peft."""
    for name, module in network.named_modules():
        if hasattr(module, BASE) and hasattr(module, "lora_A"):
            yield name, module


# ---- merging ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(network: nn.Module) -> None:
    """Add the differences to the weights and restore plain linear layers; without LoRA nothing changes."""
    for name, layer in list(adapted_layers(network)):
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, layer.get_base_layer())


@torch.no_grad()
def merged_weights(weights: Mapping[str, Tensor], lora: LoRA) -> dict[str, Tensor]:
    """Return the state dictionary of the network without LoRA, with the differences added to its weights."""
    merged = {}
    for name, value in weights.items():
        if is_difference(name):
            continue
        layer, _, last = name.rpartition(f".{BASE}.")
        if last == "weight":
            low, high = weights[f"{layer}.{LOW}.weight"], weights[f"{layer}.{HIGH}.weight"]
            value = (value.float() + lora.alpha / lora.rank * high.float() @ low.float()).to(value)
        merged[plain_name(name)] = value
    return merged


def merged_checkpoint(
    content: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """Convert a checkpoint's content, and those of its weights that are used, to those of the model without LoRA."""
    header = content["keygrip"]
    config, lora = without_lora(header["config"])
    if lora is None:
        return content, weights
    return {**content, "keygrip": {**header, "config": config}}, merged_weights(weights, lora)


def without_lora(config: Any) -> tuple[Any, LoRA | None]:
    """Return a stored configuration with null in place of its LoRA settings, and these settings."""
    if isinstance(config, Mapping):
        if config.get("_target_") == f"{LoRA.__module__}.{LoRA.__qualname__}":
            return None, LoRA(config["rank"], config["alpha"], config["targets"])
        pairs = {key: without_lora(value) for key, value in config.items()}
        return {key: value for key, (value, _) in pairs.items()}, _first(lora for _, lora in pairs.values())
    if isinstance(config, list):
        converted = [without_lora(value) for value in config]
        return [value for value, _ in converted], _first(lora for _, lora in converted)
    return config, None


def _first(loras: Iterator[LoRA | None]) -> LoRA | None:
    return next((lora for lora in loras if lora is not None), None)
