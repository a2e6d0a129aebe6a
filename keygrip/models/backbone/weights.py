"""Sources of the backbone's weights, and loading of the weights.

`find_weights` resolves `weights` and the environment to one source; `read_file` reads it, whole or in shards;
`load_weights` recognises its format (`weight_formats.py`), checks that the weights fit and loads them strictly. There
is no fallback: weights that cannot be found, recognised or fitted are an error with advice.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import eva, load_state_dict_from_hf, vision_transformer
from torch import Tensor, nn

from keygrip.hub_network import kept_without_network
from keygrip.models.backbone.architectures import VARIANTS, Variant
from keygrip.models.backbone.weight_formats import State, read_state
from keygrip.training.checkpoints import refuse_other_format
from keygrip.training.ema import EMA_STATE
from keygrip.training.integrity import load_tensors
from keygrip.training.torch_files import TorchFileError

logger = logging.getLogger(__name__)

# Weights files of Hugging Face folders, in the order in which transformers searches for them.
_HUGGING_FACE_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


@dataclass(frozen=True)
class WeightSource:
    """A local file, or (path None) timm's weights of the variant on the Hugging Face hub."""

    path: Path | None
    why: str  # the setting that names this source, for messages


# ---------------------------------------------------------------------- sources


def find_weights(
    variant: Variant, weights: str, weights_path: str | None, init_from: str | None = None
) -> WeightSource | None:
    """Resolve the settings to a source; None stands for random weights.

    `init_from` is a file, checkpoint or run folder. `pretrained` uses the first of: `weights_path`, the environment
    variable DINO_WEIGHTS_PATH, `weights/<official file name>` under the environment variable DINO_REPO_DIR, timm's hub
    weights. A setting that names a missing file is an error; the search does not continue.

    Raises:
        ValueError: settings that contradict each other, or a folder with several checkpoints that is no run folder.
        FileNotFoundError: a named file or folder that does not exist or holds no weights.
    """
    if weights != "pretrained" and weights_path is not None:
        raise ValueError(
            f"backbone.weights_path={weights_path} has no effect with backbone.weights={weights}; "
            "set backbone.weights=pretrained"
        )
    if weights not in ("random", "pretrained"):
        raise ValueError(
            f"backbone.weights={weights}: choose random or pretrained; weights of a file or a run are "
            f"backbone.init_from={weights} with backbone.weights=random"
        )
    if init_from is not None:
        if weights != "random":
            raise ValueError(
                f"backbone.init_from={init_from} and backbone.weights={weights} both give the encoder's weights: set "
                "backbone.weights=random"
            )
        return WeightSource(_weights_file(Path(init_from), variant, "backbone.init_from"), "backbone.init_from")
    if weights == "random":
        return None
    if weights_path is not None:
        return WeightSource(
            _weights_file(Path(weights_path), variant, "backbone.weights_path"), "backbone.weights_path"
        )
    if from_environment := os.environ.get("DINO_WEIGHTS_PATH"):
        return WeightSource(_weights_file(Path(from_environment), variant, "DINO_WEIGHTS_PATH"), "DINO_WEIGHTS_PATH")
    if variant.timm_name is None:
        raise ValueError(
            f"there are no pretrained weights of backbone {variant.name}; use backbone.weights=random, and "
            "backbone.init_from for a keygrip run that trained it"
        )
    if repository := os.environ.get("DINO_REPO_DIR"):
        if not Path(repository).is_dir():
            raise FileNotFoundError(
                f"DINO_REPO_DIR={repository} is not a folder; point it at a checkout of Meta's DINO or unset it"
            )
        assert variant.official_file is not None
        official = Path(repository) / "weights" / variant.official_file
        if official.is_file():
            return WeightSource(official, "DINO_REPO_DIR")
        logger.warning("DINO_REPO_DIR holds no %s; asking the Hugging Face hub for timm's copy", official)
    return WeightSource(None, "backbone.weights=pretrained")


def _weights_file(path: Path, variant: Variant, setting: str) -> Path:
    """Return the weights file of a setting: the path itself, or the file inside a run folder or a download folder."""
    path = path.expanduser()
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(
            f"{setting}={path}: no such file or folder. It takes a weights file (.pth, .safetensors) "
            "or a keygrip checkpoint or run folder"
        )
    candidates = ["checkpoints/last.ckpt", "last.ckpt", *_HUGGING_FACE_FILES]
    if variant.official_file is not None:
        candidates += [variant.official_file, f"weights/{variant.official_file}"]
    for candidate in candidates:
        if (path / candidate).is_file():
            return path / candidate
    checkpoints = sorted(path.rglob("*.ckpt"))
    if len(checkpoints) == 1:
        return checkpoints[0]
    if checkpoints:
        listing = ", ".join(str(file.relative_to(path)) for file in checkpoints[:4]) + ", ..." * (len(checkpoints) > 4)
        content = f"no checkpoints/last.ckpt and {len(checkpoints)} other checkpoints: name one of them ({listing})"
        raise ValueError(f"{setting}={path}: the folder holds {content}")
    raise FileNotFoundError(
        f"{setting}={path}: the folder holds no weights; looked for {', '.join(candidates)} and *.ckpt below it"
    )


def _from_hub(variant: Variant) -> State:
    name = variant.hub_name
    try:
        cached_file = kept_without_network(name, "model.safetensors")
        return dict(load_state_dict_from_hf(name, weights_only=True)) if cached_file is None else read_file(cached_file)
    except Exception as error:  # the hub client raises its HTTP library's errors; all mean: not available
        raise FileNotFoundError(
            f"cannot get the weights of {variant.name} from the hub ({name}: {_first_line(error)}). Download "
            f"{variant.official_file} from {variant.download_page} (or model.safetensors from https://huggingface.co/"
            f"{name}) and set backbone.weights_path or DINO_WEIGHTS_PATH to it, or put it into $DINO_REPO_DIR/weights/"
        ) from error


# ---------------------------------------------------------------------- reading


def read_file(path: Path) -> State:
    """Read all tensors of a `.safetensors` or torch file, nested dictionaries flattened with dots, or of the files that
    a Hugging Face `.index.json` names. Never unpickles code.

    Raises:
        ValueError: a file that is cut off, is not a weights file, or holds more than tensors and plain values.
        FileNotFoundError: the index names a file that does not exist.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{path} cannot be read as safetensors ({_first_line(error)}); download it again"
            ) from error
    try:
        content = load_tensors(path)
    except TorchFileError as error:
        if error.__cause__ is None or isinstance(error.__cause__, pickle.UnpicklingError):
            raise ValueError(
                f"{path} is not a plain weights file, or holds objects that are not loaded for safety "
                f"({_first_line(error.__cause__ or error)})"
            ) from error
        raise ValueError(f"{path} cannot be read ({error}); it is cut off or no weights file") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    if isinstance(content.get("state_dict"), dict):  # a Lightning checkpoint
        refuse_other_format(content, path)
        ema = content.get(EMA_STATE)
        content = content["state_dict"]
        if isinstance(ema, dict) and ema.get("updates") and isinstance(ema.get("parameters"), dict):
            content = {**content, **ema["parameters"]}
    flat: State = {}
    _flatten(content, "", flat)
    return flat


def shard_names(index: Path) -> list[str]:
    """Return the files that a Hugging Face `.index.json` names; they are in the same folder.

    Raises:
        ValueError: it is damaged, or names something else.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names:
            raise ValueError("its weight_map is empty")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights ({_first_line(error)}); download it again") from error
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", str(name)):  # in the same folder, and no index itself
            raise ValueError(f"{index} names {str(name)[:200]!r}, which is no weights file of its own folder")
    return names


def _read_shards(index: Path) -> State:
    state: State = {}
    for name in shard_names(index):
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which does not lie beside it; download it too")
        state |= read_file(index.parent / name)
    return state


def _flatten(content: dict[Any, Any], prefix: str, into: State) -> None:
    for key, value in content.items():
        if isinstance(value, Tensor):
            into[f"{prefix}{key}"] = value
        elif isinstance(value, dict):
            _flatten(value, f"{prefix}{key}.", into)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# ---------------------------------------------------------------------- loading


def load_weights(network: nn.Module, variant: Variant, source: WeightSource, prefix: str | None = None) -> str:
    """Load a source into timm's network, strictly, and return a description of what was loaded.

    DINOv3 files without rotary periods (Hugging Face, timm) get Meta's, so that the same weights give the same
    features from every file; transformers and timm use unrounded periods for these files, which is off by 6e-3.

    Raises:
        ValueError: an unknown format, or weights of another architecture.
        FileNotFoundError: hub weights without a network connection.
    """
    if source.path is None:
        origin = variant.hub_name
        raw = _from_hub(variant)
    else:
        origin = str(source.path)
        raw = read_file(source.path)
    description = load_state(network, variant, raw, origin, prefix)
    logger.info("backbone %s: weights of %s, found by %s", variant.name, description, source.why)
    return description


def load_state(network: nn.Module, variant: Variant, raw: State, origin: str, prefix: str | None = None) -> str:
    """Load tensors that are read already, of any known format; otherwise as `load_weights`.

    Args:
        origin: their source, for messages.
    """
    state, periods, kind = read_state(raw, origin, prefix)
    if kind == "keygrip checkpoint":
        adopt_position_table(network, state.get("pos_embed"))
    else:
        state = _to_timm(state, network, variant, origin, kind)
    if isinstance(rope := getattr(network, "rope", None), nn.Module):
        own_periods = rope.get_buffer("periods")
        state["rope.periods"] = own_periods if periods is None else periods.float()
    _check_fit(state, network.state_dict(), variant, origin, kind)
    network.load_state_dict(state, strict=True)
    return f"{origin} ({kind})"


def adopt_position_table(network: nn.Module, table: Tensor | None) -> None:
    """Give a DINOv2 network a position table [1, L, D] of the checkpoint's size (37 x 37 for Meta's, other sizes for
    other checkpoints)."""
    own_table = getattr(network, "pos_embed", None)
    if own_table is None or table is None or table.ndim != 3 or table.shape[1] == own_table.shape[1]:
        return
    extra = 0 if network.no_embed_class else 1
    side = round((table.shape[1] - extra) ** 0.5)
    if side * side + extra == table.shape[1]:
        shape = (1, table.shape[1], own_table.shape[2])
        network.pos_embed = nn.Parameter(own_table.new_zeros(shape), requires_grad=own_table.requires_grad)
        patch = network.patch_embed.patch_size[0]  # type: ignore[union-attr, index]
        network.patch_embed.set_input_size(img_size=(side * patch, side * patch))  # type: ignore[union-attr, operator]


def _to_timm(state: State, network: nn.Module, variant: Variant, origin: str, kind: str) -> State:
    """Convert Meta's names with timm's own conversion, and prevent it from changing anything except names."""
    state = dict(state)  # the conversions remove entries from their input
    patch = state.get("patch_embed.proj.weight")
    registers = any(key in state for key in ("register_tokens", "storage_tokens", "reg_token"))
    if (
        variant.family != ("dinov2" if "pos_embed" in state else "dinov3")
        or patch is None  # the patch size is checked here because timm would silently resample the weights
        or patch.shape[2:] != (variant.patch_size, variant.patch_size)
        or registers != (variant.registers > 0)
    ):
        raise ValueError(_describe_misfit(state, variant, origin, kind))
    if variant.family == "dinov3":
        _refuse_satellite(state, origin, kind)
        _check_key_biases(state, origin)
        return eva.checkpoint_filter_fn(state, network)
    table = state["pos_embed"]
    adopt_position_table(network, table[:, 1:] if "register_tokens" in state else table)
    return vision_transformer.checkpoint_filter_fn(state, network)  # type: ignore[arg-type]


def _refuse_satellite(state: State, origin: str, kind: str) -> None:
    """Raise ValueError for weights of satellite images: of Meta's files for the variants here, only those have a norm
    for local crops."""
    hint = ", or rename what is called sat493m if these are others" if "sat493m" in origin.lower() else ""
    if hint or (kind == "DINOv3, Meta" and "local_cls_norm.weight" in state):
        raise ValueError(
            f"{origin} holds weights of satellite images (SAT-493M), for images of mean (0.430, 0.411, 0.296) and "
            f"deviation (0.213, 0.156, 0.143); all images here have ImageNet's: take the weights of LVD-1689M{hint}"
        )


def _check_key_biases(state: State, origin: str) -> None:
    """Raise ValueError for key biases that have an effect: DINOv3 has none (Meta's files mask them, timm leaves them
    out), so they would be lost."""
    for name, bias in state.items():
        if not name.endswith("attn.qkv.bias"):
            continue
        _, keys, _ = bias.chunk(3)
        mask = state.get(f"{name}_mask")
        if mask is not None:
            keys = torch.where(mask.chunk(3)[1] == 0, torch.zeros_like(keys), keys)
        if keys.any():
            raise ValueError(f"{origin}: {name} has key biases, which DINOv3 does not have; they would be lost")


def _check_fit(state: State, network_state: State, variant: Variant, origin: str, kind: str) -> None:
    missing = sorted(network_state.keys() - state.keys())
    surplus = sorted(state.keys() - network_state.keys())
    shapes = [
        f"{key} is {list(state[key].shape)}, wanted {list(network_state[key].shape)}"
        for key in network_state
        if key in state and state[key].shape != network_state[key].shape
    ]
    if not (missing or surplus or shapes):
        return
    details = [f"missing {', '.join(missing[:3])}"] if missing else []
    details += [f"surplus {', '.join(surplus[:3])}"] if surplus else []
    details += shapes[:2]
    if kind == "DINOv3, timm" and any(key.endswith(".attn.q_bias") for key in missing):
        details.append(f"timm's plain DINOv3 files lack the query and value biases: take those of {variant.timm_name}")
    raise ValueError(f"{_describe_misfit(state, variant, origin, kind)} ({'; '.join(details)})")


def _describe_misfit(state: State, variant: Variant, origin: str, kind: str) -> str:
    """Return one line: the content of the file, the variant that was requested, and the variant that fits."""
    width = next((value.shape[-1] for key, value in state.items() if key.endswith("cls_token")), 0)
    depth = 1 + max((int(match.group(1)) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    patch = state.get("patch_embed.proj.weight")
    side = patch.shape[-1] if patch is not None and patch.ndim == 4 else None
    registers = any(key in state for key in ("register_tokens", "storage_tokens", "reg_token"))
    gated = any(re.search(r"\.mlp\.(w1|fc1_g)\.", key) for key in state)
    family = "dinov2" if "pos_embed" in state else "tiny" if side is None else "dinov3"
    fitting = [
        row.name
        for row in VARIANTS.values()
        if (row.family, row.width, row.depth, row.registers > 0) == (family, width, depth, registers)
        and gated == (row.name == "dinov3_vits16plus")
        and row is not variant
    ]
    advice = f"; set backbone.variant={fitting[0]} (conf/backbone has a file for it)" if len(fitting) == 1 else ""
    size = f"width {width}, {depth} blocks" + (f", patch {side}" if side else "") + (", registers" if registers else "")
    return f"{origin} ({kind}; {size}) does not fit backbone.variant={variant.name}{advice}"
