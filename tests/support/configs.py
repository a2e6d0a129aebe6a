"""Composing configs in tests, and checking that they fit the code they name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, open_dict

from keygrip.config import TrainSchema, config_folder, register_options
from keygrip.setting_types import refuse_ill_typed
from keygrip.training.compatibility import refuse_unfit
from keygrip.training.run_folder import register_resolvers
from keygrip.unread_settings import refuse_unread


def composed(root: str, overrides: list[str], with_hydra: bool = False) -> DictConfig:
    """Compose a root config, with the node ``hydra`` if `with_hydra`."""
    importlib.import_module(f"keygrip.{root}")  # registers its schema
    register_resolvers()
    register_options()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose(root, overrides=overrides, return_hydra_config=with_hydra)


def nodes(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every mapping with a ``_target_``, with its path."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for name, child in node.items():
            yield from nodes(child, f"{path}.{name}" if path else str(name))
    elif isinstance(node, list):
        for number, child in enumerate(node):
            yield from nodes(child, f"{path}[{number}]")


@cache
def _signature(target: str) -> inspect.Signature:
    return inspect.signature(get_object(target))


def assert_fits(path: str, node: dict[str, Any]) -> None:
    """Assert that the keys of a config node are parameters of its target, and that all required ones are given."""
    signature = _signature(node["_target_"])
    given = {key: value for key, value in node.items() if not (key.startswith("_") and key.endswith("_"))}
    if node["_target_"].startswith("keygrip."):
        kinds = [parameter.kind for parameter in signature.parameters.values()]
        assert inspect.Parameter.VAR_KEYWORD not in kinds, f"{path}: {node['_target_']} takes **kwargs"
    if node.get("_partial_"):
        signature.bind_partial(**given)
    else:
        signature.bind(**given)


def assert_sound(cfg: DictConfig) -> None:
    """Assert that the config of a run fits the code, that nothing in it is left unread, and that it is not refused. Its
    run folder is given, if it has none."""
    for path, node in nodes(OmegaConf.to_container(cfg, resolve=False)):
        assert_fits(path, node)
    refuse_unfit(cfg)
    refuse_unread(cfg, TrainSchema)
    with open_dict(cfg):
        cfg.run_dir = cfg.run_dir or "run"  # chosen before settings are checked
    refuse_ill_typed(OmegaConf.to_container(cfg, resolve=True))
    if cfg.max_steps > 0 and cfg.limit_val_batches != 0:  # otherwise results would be figures of an earlier step
        assert cfg.max_steps % cfg.val_every_n_steps == 0, "no validation at the last step"
