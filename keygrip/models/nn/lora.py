"""Low-rank adaptation by peft: a trained network stays as it is, and its linear layers each learn a small difference.

    y = W x + b + (alpha / rank) B A x          A [rank, in], B [out, rank], B starts at zero

The layers are peft's. Its files (`adapter_config.json`, `adapter_model.safetensors`) are written so that peft reads
them, and read here by a few known settings and tensors alone: nothing else that they name is looked at. What has been
trained is merged for export and for inference in fewer bits, which needs no peft. Source: Hu et al., "LoRA: Low-Rank
Adaptation of Large Language Models" (2021).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keygrip.data.bad_samples import BadSample, read_json
from keygrip.training.parts import model_part

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of peft, before a network's own names
INSTALL = "LoRA needs peft: pip install 'keygrip[lora]'"
NAME = "default"  # of the one adapter
BASE, LOW, HIGH = "base_layer", f"lora_A.{NAME}", f"lora_B.{NAME}"
# Settings of peft that change what an adapter means; only these values are known here.
PLAIN: dict[str, Any] = {"use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "bias": "none"}
PLAIN |= {"alpha_pattern": {}, "rank_pattern": {}, "modules_to_save": None, "lora_bias": False}


@model_part
@dataclass(frozen=True)
class LoRA:
    """What is adapted, and how.

    Args:
        rank: of the differences. alpha: they are scaled by alpha / rank. targets: last names of the linear layers.

    Raises:
        ValueError: no rank, scale or layers.
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
        network: that `add_lora` changed. lora: as it was told. prefix: of the network's names within the model that
            others know it as, with its dot.
    """

    network: nn.Module
    lora: LoRA
    prefix: str = ""


# ---- training --------------------------------------------------------------------------------------------------------


def add_lora(network: nn.Module, lora: LoRA) -> list[str]:
    """Puts peft's layers in the place of the named ones and freezes everything else; the layers' names.

    Raises:
        ValueError: there is no such linear layer. ImportError: peft is not installed.
    """
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    chosen = [name for name, _ in network.named_modules() if name.rpartition(".")[2] in lora.targets]
    for target in lora.targets:
        found = [name for name in chosen if name.rpartition(".")[2] == target]
        if not found or not linear.issuperset(found):
            raise ValueError(f"lora.targets: the network has no linear layer named {target}")
    try:
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f"{INSTALL} ({error})") from error
    network.requires_grad_(False)
    inject_adapter_in_model(_peft_config(lora, list(lora.targets)), network, NAME)
    return chosen


def _peft_config(lora: LoRA, targets: list[str] | str) -> Any:
    from peft import LoraConfig

    alpha: Any = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    return LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none")


def plain_name(name: str) -> str:
    """The name that a layer's weight has without LoRA; one of a difference stays."""
    return name.replace(f".{BASE}.", ".")


def is_difference(name: str) -> bool:
    """Whether a weight belongs to a difference."""
    return f".{LOW}." in name or f".{HIGH}." in name


def _adapted(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """peft's layers with their names, known without peft."""
    for name, module in network.named_modules():
        if hasattr(module, BASE) and hasattr(module, "lora_A"):
            yield name, module


# ---- merging ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(network: nn.Module) -> None:
    """Adds the differences to the weights and leaves plain linear layers; without LoRA nothing changes."""
    for name, layer in list(_adapted(network)):
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, layer.get_base_layer())


@torch.no_grad()
def merged_weights(weights: Mapping[str, Tensor], lora: LoRA) -> dict[str, Tensor]:
    """A state dictionary as of the network without LoRA, with the differences added."""
    found = {}
    for name, value in weights.items():
        if is_difference(name):
            continue
        layer, _, last = name.rpartition(f".{BASE}.")
        if last == "weight":
            low, high = weights[f"{layer}.{LOW}.weight"], weights[f"{layer}.{HIGH}.weight"]
            value = (value.float() + lora.alpha / lora.rank * high.float() @ low.float()).to(value)
        found[plain_name(name)] = value
    return found


def merged_checkpoint(
    content: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """A checkpoint's content and those of its weights that are used, as of the model without LoRA."""
    header = content["keygrip"]
    config, lora = without_lora(header["config"])
    if lora is None:
        return content, weights
    return {**content, "keygrip": {**header, "config": config}}, merged_weights(weights, lora)


def without_lora(config: Any) -> tuple[Any, LoRA | None]:
    """A stored configuration with null for its LoRA, and that."""
    if isinstance(config, Mapping):
        if config.get("_target_") == f"{LoRA.__module__}.{LoRA.__qualname__}":
            return None, LoRA(config["rank"], config["alpha"], config["targets"])
        pairs = {key: without_lora(value) for key, value in config.items()}
        return {key: value for key, (value, _) in pairs.items()}, _first(lora for _, lora in pairs.values())
    if isinstance(config, list):
        each = [without_lora(value) for value in config]
        return [value for value, _ in each], _first(lora for _, lora in each)
    return config, None


def _first(found: Iterator[LoRA | None]) -> LoRA | None:
    return next((lora for lora in found if lora is not None), None)


# ---- files -----------------------------------------------------------------------------------------------------------


def write_lora(adapter: Adapter, folder: Path) -> None:
    """The adapter's two files as peft writes them, into a folder that is there.

    Raises:
        ValueError: the network has no adapter.
    """
    from safetensors.torch import save_file

    tensors, lora = {}, adapter.lora
    for name, layer in _adapted(adapter.network):
        for part in ("lora_A", "lora_B"):
            value = getattr(layer, part)[NAME].weight.detach().cpu().contiguous()
            tensors[f"{PREFIX}{adapter.prefix}{name}.{part}.weight"] = value
    if not tensors:
        raise ValueError("this network has no LoRA: there is no adapter to write")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    names = "|".join(map(re.escape, lora.targets))
    inside = rf"{re.escape(adapter.prefix)}(.*\.)?({names})"
    config = _peft_config(lora, inside if adapter.prefix else list(lora.targets))
    config.inference_mode = True
    config.save_pretrained(str(folder))


def write_adapter(folder: Path, module: Any, *_: object) -> None:
    """What ``keygrip export format=lora`` writes. Raises ValueError: a model without an adapter."""
    adapter = getattr(module, "adapter", None)
    if not isinstance(adapter, Adapter):
        raise ValueError("this model was trained without LoRA: give format=safetensors")
    write_lora(adapter, folder)


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
    layers = {
        name.removesuffix(f".{BASE}"): module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and not is_difference(f"{name}.")
    }
    for name, pair in pairs.items():
        if set(pair) != {"lora_A", "lora_B"}:
            raise ValueError(f"{folder / WEIGHTS}: {name} has {', '.join(sorted(pair))} and not both lora_A and lora_B")
        if name not in layers:
            raise ValueError(f"{folder / WEIGHTS}: this network has no linear layer {name}: it is of another network")
        low, high, weight = pair["lora_A"], pair["lora_B"], layers[name].weight
        fits = low.ndim == high.ndim == 2 and low.shape[0] == high.shape[1] == config["r"]
        if not fits or (high.shape[0], low.shape[1]) != tuple(weight.shape):
            shapes = f"{list(high.shape)} x {list(low.shape)}"
            raise ValueError(
                f"{folder / WEIGHTS}: {name} is {list(weight.shape)}, its difference {shapes} of rank {config['r']}"
            )
        changes.append((weight, scale * high.to(weight.device).float() @ low.to(weight.device).float()))
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
        if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number < 1e6:
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
