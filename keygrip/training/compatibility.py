"""Check that model and data fit together, and check a run's numeric settings, before anything is built."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_class, get_object
from omegaconf import DictConfig, OmegaConf

from keygrip.config import config_folder

log = logging.getLogger(__name__)

LARGEST_SEED = 1 << 32  # numpy's generator accepts smaller seeds only


def refuse_unfit(cfg: DictConfig) -> None:
    """Reject data that the model cannot be trained on, data without the depth that it learns, and two sources of an
    encoder's weights, before a pretraining stage is trained for hours.

    Args:
        cfg: composed from ``conf/train.yaml``, unresolved.

    Raises:
        ValueError: the message names suitable data sets, or the settings to change.
    """
    model_batch, data_batch = batch_type(cfg.model), batch_type(cfg.data)
    if model_batch is not None and data_batch is not None and not issubclass(data_batch, model_batch):
        fitting = ", ".join(f"data={name}" for name in data_sets_of(model_batch)) or "your own data module"
        raise ValueError(
            f"{_class_name(cfg.model)} learns from {model_batch.__name__} and {_class_name(cfg.data)} gives "
            f"{data_batch.__name__}: choose {fitting}"
        )
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    encoder, geometry = plain.get("backbone") or {}, plain.get("geometry") or {}
    pretrained, initialised = encoder.get("weights") == "pretrained", _is_given(encoder.get("init_from"))
    if initialised and pretrained:
        raise ValueError(
            f"backbone.init_from and backbone.weights={encoder['weights']} both give the encoder's weights: set "
            "backbone.weights=random, or backbone.init_from=null"
        )
    # the run of geometry.init_from contains the backbone too, if the geometry encoder has one
    contains_backbone = geometry.get("backbone") == "${backbone}" and _is_given(geometry.get("init_from"))
    if contains_backbone and (pretrained or initialised):
        setting, without = ("weights=pretrained", "weights=random") if pretrained else ("init_from", "init_from=null")
        raise ValueError(
            f"geometry.init_from and backbone.{setting} both give the weights of the geometry encoder's backbone: set "
            f"backbone.{without}, or geometry=dino_multiview geometry.init_from=null"
        )
    network = (plain.get("model") or {}).get("network")
    network = network if isinstance(network, dict) and network.get("geometry") == "${geometry}" else {}
    read = any(network.get(name) for name in ("geom_inject_to_dit", "geom_inject_to_vlm"))
    learned = not geometry.get("frozen") and any(geometry.get(name) for name in ("point_weight", "depth_weight"))
    if read and learned and (plain.get("data") or {}).get("depth") is False:
        raise ValueError(
            "data.depth=false, but the geometry encoder learns from depth: set data.depth=true, or "
            "geometry=dino_multiview_no_depth to train it on the actions alone"
        )


def refuse_uneven_batch(data: Mapping[str, Any], processes: int) -> None:
    """Reject a batch size that cannot be divided equally over the processes, before data are read or recorded.

    Args:
        data: config node. Data modules without `ranks` divide batches in their own way, and batches of a `budget` have
            different sizes anyway.

    Raises:
        ValueError: the message contains the nearest possible batch size.
    """
    size, target = data.get("batch_size"), data.get("_target_")
    if size is None or data.get("budget") is not None or not hasattr(get_class(str(target)), "ranks"):
        return
    if size % processes:
        raise ValueError(
            f"data.batch_size={size} is the global batch and must divide by the {processes} processes; "
            f"{max(1, size // processes) * processes} would"
        )


def refuse_idle_limits(cfg: DictConfig) -> None:
    """Reject numbers at the root of ``conf/train.yaml`` with which nothing would be trained, or without end.

    Raises:
        ValueError: the message names the setting and its possible values.
    """
    for name in ("max_steps", "max_epochs"):
        if cfg[name] != -1 and cfg[name] < 1:
            raise ValueError(f"{name}={cfg[name]}: must be at least 1, or -1 for no limit")
    if cfg.max_minutes is not None and not (math.isfinite(cfg.max_minutes) and cfg.max_minutes > 0):
        raise ValueError(f"max_minutes={cfg.max_minutes}: must be finite and above 0, or null for no limit")
    for name in ("val_every_n_steps", "log_every_n_steps", "accumulate_grad_batches"):
        if cfg[name] is not None and cfg[name] < 1:
            raise ValueError(f"{name}={cfg[name]}: must be at least 1")
    if cfg.limit_val_batches is not None and cfg.limit_val_batches < 0:
        raise ValueError(f"limit_val_batches={cfg.limit_val_batches}: must be 0 or more, or null for all")
    if not 0 <= cfg.seed < LARGEST_SEED:
        raise ValueError(f"seed={cfg.seed}: must lie in 0 to {LARGEST_SEED - 1}")


def refuse_divided(optimizer: Mapping[str, Any] | None, kind: str) -> None:
    """Reject an optimizer that needs complete parameters if the strategy shards them over processes.

    Args:
        optimizer: node of the recipe. kind: kind of the strategy.

    Raises:
        ValueError: the message states what to use instead.
    """
    target = (optimizer or {}).get("_target_")
    reason = getattr(get_object(target), "not_divided", None) if target and kind == "fsdp" else None
    if reason:
        raise ValueError(reason)


def no_validation(cfg: DictConfig) -> str:
    """Return why a run with these settings never validates, in words; empty if this does not follow from them."""
    if cfg.limit_val_batches == 0:
        return "limit_val_batches=0"
    if cfg.val_every_n_steps and 0 < cfg.max_steps < cfg.val_every_n_steps:
        return f"val_every_n_steps={cfg.val_every_n_steps} is above max_steps={cfg.max_steps}"
    return ""


def log_no_validation(reason: str, monitor: str | None) -> None:
    """Log why a run never validates, and what it will therefore lack.

    Args:
        monitor: metric of the best checkpoint; None: no best checkpoint is requested.
    """
    log.info("no validation: %s", reason)
    if monitor:
        log.warning("without validation there is no best checkpoint by callbacks.checkpoint.monitor=%s", monitor)


def refuse_missing_weights(settings: Mapping[str, Any]) -> None:
    """Reject missing runs, checkpoints and files of initial weights, before other weights are downloaded.

    Args:
        settings: plain data; pretraining stages, which are not paths yet, are checked elsewhere.

    Raises:
        FileNotFoundError: the message names the setting.
    """
    for group in ("model", "backbone", "geometry"):
        start = (settings.get(group) or {}).get("init_from")
        if isinstance(start, str) and not Path(start).exists():
            raise FileNotFoundError(
                f"{group}.init_from={start}: there is no run folder, checkpoint or file of weights; give the run "
                "before this one, or null to start without"
            )


def batch_type(node: Mapping[str, Any] | None) -> type | None:
    """Return the batch type of a model or a data module, from the `batch_type` of its class: a type, or a function from
    the settings to a type. None if the class has none."""
    target = node.get("_target_") if node is not None else None
    kind = getattr(get_class(target), "batch_type", None) if target else None
    return kind if kind is None or isinstance(kind, type) else kind(node)


def data_sets_of(wanted: type) -> list[str]:
    """Return the names in the group ``data`` whose batches have a type."""
    names = []
    for path in sorted((config_folder() / "data").glob("*.yaml")):
        data_batch = batch_type(_read_merged_config(path))
        if not path.stem.startswith("_") and data_batch is not None and issubclass(data_batch, wanted):
            names.append(path.stem)
    return names


def _read_merged_config(path: Path) -> dict[str, Any]:
    """Read the top level of a config and of its base configs in the same group."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    merged: dict[str, Any] = {}
    for base in content.pop("defaults", []):
        if isinstance(base, str) and base != "_self_":
            merged |= _read_merged_config(path.parent / f"{base}.yaml")
    return merged | content


def _is_given(start: Any) -> bool:
    """Return whether initial weights are chosen: neither null nor left to the user."""
    return start not in (None, "${mandatory:}")


def _class_name(node: DictConfig) -> str:
    return str(node._target_).rpartition(".")[2]
