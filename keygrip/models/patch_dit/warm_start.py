"""Warm start: what of another checkpoint fits is taken, what does not is listed, and nothing at all is an error."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from keygrip.training.checkpoints import find_checkpoint, refuse_other_format
from keygrip.training.ema import EMA_STATE

log = logging.getLogger(__name__)

# What wrappers put before a network's own names; taken off where a name does not fit as it is.
PREFIXES = ("network.", "model.", "module.", "ema.", "_orig_mod.")
SHOWN = 12


@dataclass(frozen=True)
class WarmStart:
    """What became of each name.

    Args:
        loaded: taken over. unexpected: in the file and not of the network. missing: of the network and not in the file.
            reshaped: in both, with other shapes, as "name (file -> network)". The last two stay as initialised.
    """

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]

    def describe(self) -> list[str]:
        """One line for each list, long ones cut."""
        lines = [f"{len(self.loaded)} parameters taken over"]
        for title, names in (
            ("new, initialised afresh", self.missing),
            ("not of this network, left out", self.unexpected),
            ("of another shape, initialised afresh", self.reshaped),
        ):
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                lines.append(f"{len(names)} {title}: {', '.join(names[:SHOWN])}{more}")
        return lines


@torch.no_grad()
def warm_start(network: nn.Module, path: str | Path) -> WarmStart:
    """Copies what fits into the network and logs what does not.

    Args:
        path: a keygrip run folder or checkpoint (its EMA weights, where it has them), a file of torch.save, or a
            .safetensors file.

    Raises:
        FileNotFoundError: there is no such file. ValueError: nothing in it fits, or it cannot be read.
    """
    report = take(network, read_weights(path), str(path))
    for line in report.describe():
        log.info("warm start from %s: %s", path, line)
    return report


@torch.no_grad()
def take(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> WarmStart:
    """As `warm_start`, from weights by name."""
    own = dict(network.named_parameters())
    found = {_own_name(name, own): value for name, value in weights.items()}
    loaded = [name for name in own if name in found and found[name].shape == own[name].shape]
    reshaped = [
        f"{name} ({_shape(found[name])} -> {_shape(own[name])})"
        for name in own
        if name in found and found[name].shape != own[name].shape
    ]
    if not loaded:
        raise ValueError(
            f"init_from={source}: none of its {len(weights)} tensors fits this network by name and shape "
            f"(it has {', '.join(list(weights)[:3]) or 'none'}; the network {', '.join(list(own)[:3])})"
        )
    for name in loaded:
        own[name].copy_(found[name])
    return WarmStart(
        loaded,
        [name for name in own if name not in found],
        sorted(name for name in found if name not in own),
        reshaped,
    )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name of a checkpoint of any of the known kinds, on the CPU.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it cannot be read as weights.
    """
    file = find_checkpoint(path)
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"init_from={file} cannot be read as weights: {str(error).splitlines()[0]}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"init_from={file} holds a {type(content).__name__}, not weights by name")
    refuse_other_format(content, file)
    weights = content
    for key in ("state_dict", "model", "ema"):
        if isinstance(content.get(key), Mapping):
            weights = content[key]
            break
    ema = content.get(EMA_STATE)
    if isinstance(ema, Mapping) and ema.get("updates", 0) > 0:
        weights = {**weights, **ema["parameters"]}
    # A module's statistics and parts beside its network are no weights of the network.
    inside = {name: value for name, value in weights.items() if name.startswith("network.")}
    return {name: value for name, value in (inside or weights).items() if isinstance(value, Tensor)}


def _own_name(name: str, own: Mapping[str, Tensor]) -> str:
    """A name as the network has it, without what wrappers put before."""
    shorter = name
    while shorter not in own:
        prefix = next((prefix for prefix in PREFIXES if shorter.startswith(prefix)), None)
        if prefix is None:
            return name.removeprefix("network.")
        shorter = shorter.removeprefix(prefix)
    return shorter


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
