"""Read and write LoRA adapters (`keygrip.models.nn.lora`) as files in peft's layout.

The files are written so that peft can read them. When a file is read, only a few known settings and tensors are used;
everything else in it is ignored.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from keygrip.data.bad_samples import BadSample
from keygrip.data.untrusted_files import read_json
from keygrip.exporting.folder import save_tensors
from keygrip.models.nn.lora import BASE, NAME, Adapter, adapted_layers, is_difference, peft_config, plain_name
from keygrip.training.integrity import tensors_digest

log = logging.getLogger(__name__)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
INPUTS = "keygrip.inputs"  # in the weights' metadata: how the network's inputs were normalised
BASE_WEIGHTS = "keygrip.base"  # in the weights' metadata too: `base_digest` of the network
PREFIX = "base_model.model."  # the prefix that peft puts before a network's own parameter names
# Settings of peft that change how an adapter is applied. Only the values listed here are supported.
PLAIN: dict[str, Any] = {"use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "bias": "none"}
PLAIN |= {"alpha_pattern": {}, "rank_pattern": {}, "modules_to_save": None, "lora_bias": False, "kasa_config": None}
PLAIN |= {"alora_invocation_tokens": None, "layer_replication": None, "arrow_config": None, "use_qalora": False}
PLAIN |= {"trainable_token_indices": None, "target_parameters": None}
# Initialisations of peft that leave the base weights unchanged. The others (pissa, pissa_niter_N, olora, corda,
# lora_ga, loftq) subtract the adapter's initial value from the base weights or quantise them. Such an adapter is a
# difference to those modified weights; added to the unchanged weights it gives wrong results.
OF_UNCHANGED_WEIGHTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def write_lora(adapter: Adapter, folder: Path) -> None:
    """Write the adapter's two files in peft's format into an existing folder.

    Raises:
            ValueError: The network has no adapter.
    """
    tensors, lora = {}, adapter.lora
    for name, layer in adapted_layers(adapter.network):
        for part in ("lora_A", "lora_B"):
            value = getattr(layer, part)[NAME].weight.detach().cpu().contiguous()
            tensors[f"{PREFIX}{adapter.prefix}{name}.{part}.weight"] = value
    if not tensors:
        raise ValueError("this network has no LoRA: there is no adapter to write")
    inputs = {} if adapter.inputs is None else {INPUTS: adapter.inputs}
    save_tensors(tensors, folder / WEIGHTS, {"format": "pt", BASE_WEIGHTS: base_digest(adapter.network)} | inputs)
    names = "|".join(map(re.escape, lora.targets))
    inside = rf"{re.escape(adapter.prefix)}(.*\.)?({names})"
    config = peft_config(lora, inside if adapter.prefix else list(lora.targets))
    config.inference_mode = True
    config.save_pretrained(str(folder))


def write_adapter(folder: Path, module: Any, *_: object) -> None:
    """Write the files of ``keygrip export format=lora``. Raises ValueError if the model has no adapter."""
    adapter = getattr(module, "adapter", None)
    if not isinstance(adapter, Adapter):
        raise ValueError("this model was trained without LoRA: give format=safetensors")
    write_lora(adapter, folder)


@torch.no_grad()
def load_lora(network: nn.Module, folder: Path, inputs: str | None = None) -> list[str]:
    """Add an adapter's differences to the weights of a network. Return the names of the changed layers.

    Args:
        inputs: how the network's inputs are normalised, see `Adapter`. Adapters from other tools do not contain this.

    Raises:
        FileNotFoundError: The folder holds no adapter. ValueError: The adapter is of another kind or belongs to another
            network. The network is unchanged in both cases.
    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"lora={folder}: there is no {name}; give a folder as `keygrip export format=lora` makes"
            )
    config = _read_config(folder / CONFIG)
    metadata = _read_metadata(folder / WEIGHTS)
    trained_on = metadata.get(INPUTS)
    if None not in (inputs, trained_on) and inputs != trained_on:
        raise ValueError(
            f"lora={folder} was trained on features that were normalised otherwise than this checkpoint's "
            f"({trained_on}, not {inputs}): train it with model.init_from_statistics=source, or draw from its own run"
        )
    pairs = _read_pairs(folder / WEIGHTS)
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
        change = scale * high.to(weight.device).float() @ low.to(weight.device).float()
        if not torch.isfinite((weight + change).to(weight)).all():
            raise ValueError(f"{folder / WEIGHTS}: {name} becomes infinite by its difference: the adapter is damaged")
        changes.append((weight, change))
    if BASE_WEIGHTS in metadata and metadata[BASE_WEIGHTS] != base_digest(network):
        log.warning(
            "lora=%s was trained on other weights than this checkpoint's, and its differences fit those: draw from the "
            "checkpoint that its run began with",
            folder,
        )
    for weight, change in changes:
        weight += change.to(weight)
    return list(pairs)


def base_digest(network: nn.Module) -> str:
    """Return a fingerprint of a network's weights without the adapter's differences."""
    return tensors_digest(
        {plain_name(name): value for name, value in network.named_parameters() if not is_difference(f"{name}.")}
    )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = read_json(file)
    except BadSample as error:
        raise ValueError(f"{file} cannot be read: {error.what}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{file} is not the configuration of a LoRA")
    for name, value in PLAIN.items():
        if config.get(name, value) not in (value, None):
            raise ValueError(f"{file}: {name}={config[name]!r} is not supported, only {value!r}")
    start = config.get("init_lora_weights")
    if start not in OF_UNCHANGED_WEIGHTS:
        raise ValueError(
            f"{file}: init_lora_weights={start!r} is not supported: such an adapter is a difference to base weights "
            "that its initialisation has changed. Give one that was converted to a plain LoRA, as peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=...) does for pissa, olora, corda and lora_ga"
        )
    for name in ("r", "lora_alpha"):
        number = config.get(name)
        if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number < 1e6:
            raise ValueError(f"{file}: {name}={number!r} is not a positive number")
    return config


def _read_metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error


def _read_pairs(file: Path) -> dict[str, dict[str, Tensor]]:
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not value.is_floating_point():
            raise ValueError(f"{file}: {key} holds {str(value.dtype).removeprefix('torch.')}, no weights")
        if not torch.isfinite(value).all():
            raise ValueError(f"{file}: {key} holds numbers that are not finite")
        pairs.setdefault(name, {})[part] = value
    if not pairs:
        raise ValueError(f"{file} holds no tensors")
    return pairs
