"""Which model goes with which data: asked before anything is built, so that a pair without sense ends in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

# Groups whose objects reach a run only where another part names them, as in `${rotation}`.
PARTS = ("backbone", "rotation", "language", "encoders", "vlm", "geometry")


def refuse_unfit(cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Refuses data that the model cannot learn from, and a chosen part that nothing in the run uses.

    Args:
        cfg: composed from ``conf/train.yaml``, unresolved. overrides: what the user gave on the command line.

    Raises:
        ValueError: with the choices that would fit.
    """
    wanted, given = batch_type(cfg.model), batch_type(cfg.data)
    if wanted is not None and given is not None and not issubclass(given, wanted):
        fitting = ", ".join(f"data={name}" for name in data_sets_of(wanted)) or "your own data module"
        raise ValueError(
            f"{_class_name(cfg.model)} learns from {wanted.__name__} and {_class_name(cfg.data)} gives "
            f"{given.__name__}: choose {fitting}"
        )
    for override in overrides:
        name, _, choice = override.lstrip("+").partition("=")
        if name in PARTS and choice not in ("null", "") and not _is_used(cfg, name):
            raise ValueError(f"{name}={choice} has no effect: {_class_name(cfg.model)} has no {name}; leave it out")


def batch_type(node: Mapping[str, Any] | None) -> type | None:
    """The type of batch that a model learns from or a data module gives, from the `batch_type` of its class: a type, or
    a function from the settings to one. None where the class does not say."""
    target = node.get("_target_") if node is not None else None
    kind = getattr(get_class(target), "batch_type", None) if target else None
    return kind if kind is None or isinstance(kind, type) else kind(node)


def data_sets_of(wanted: type) -> list[str]:
    """Names in the group ``data`` that give batches of a type."""
    from keygrip.config import config_folder

    names = []
    for path in sorted((config_folder() / "data").glob("*.yaml")):
        given = batch_type(_read(path))
        if given is not None and issubclass(given, wanted):
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


def _is_used(cfg: DictConfig, name: str) -> bool:
    others = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(others, dict)
    others.pop(name, None)
    return any(f"${{{name}{end}" in text for text in _strings(others) for end in (".", "}"))


def _strings(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [text for child in node.values() for text in _strings(child)]
    if isinstance(node, list):
        return [text for child in node for text in _strings(child)]
    return [node] if isinstance(node, str) else []
