"""Checks that model and data fit together before either is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_class
from omegaconf import DictConfig

from keygrip.config import config_folder


def refuse_unfit(cfg: DictConfig) -> None:
    """Refuses data that the model cannot learn from.

    Args:
        cfg: composed from ``conf/train.yaml``, unresolved.

    Raises:
        ValueError: names the data sets that would fit.
    """
    wanted, given = batch_type(cfg.model), batch_type(cfg.data)
    if wanted is not None and given is not None and not issubclass(given, wanted):
        fitting = ", ".join(f"data={name}" for name in data_sets_of(wanted)) or "your own data module"
        raise ValueError(
            f"{_class_name(cfg.model)} learns from {wanted.__name__} and {_class_name(cfg.data)} gives "
            f"{given.__name__}: choose {fitting}"
        )


def batch_type(node: Mapping[str, Any] | None) -> type | None:
    """The type of batch that a model learns from or a data module gives, from the `batch_type` of its class: a type, or
    a function from the settings to one. None where the class does not say."""
    target = node.get("_target_") if node is not None else None
    kind = getattr(get_class(target), "batch_type", None) if target else None
    return kind if kind is None or isinstance(kind, type) else kind(node)


def data_sets_of(wanted: type) -> list[str]:
    """Names in the group ``data`` that give batches of a type."""
    names = []
    for path in sorted((config_folder() / "data").glob("*.yaml")):
        given = batch_type(_read(path))
        if not path.stem.startswith("_") and given is not None and issubclass(given, wanted):
            names.append(path.stem)
    return names


def _read(path: Path) -> dict[str, Any]:
    """The top level of a config, and of the configs of its group that it starts from."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    merged: dict[str, Any] = {}
    for base in content.pop("defaults", []):
        if isinstance(base, str) and base != "_self_":
            merged |= _read(path.parent / f"{base}.yaml")
    return merged | content


def _class_name(node: DictConfig) -> str:
    return str(node._target_).rpartition(".")[2]
