"""What composing a configuration computes again each time, computed once."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import omegaconf.base
import pytest
from hydra._internal import defaults_list
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf


def memoized(patch: pytest.MonkeyPatch) -> None:
    """Keeps what is read of a configuration file until the file changes, and what an interpolation is parsed to; makes
    the choices that a defaults list may refer to only where one does. None of it changes what is composed."""
    Plugins.instance()  # imports the sources anew: classes imported before are not those that it uses
    known: dict[tuple[object, ...], bytes] = {}
    for scheme in ("file", "pkg"):
        source = SourcesRegistry.instance().resolve(scheme)
        patch.setattr(source, "load_config", _read_once(source, known))
    patch.setattr(omegaconf.base, "parse", functools.lru_cache(maxsize=None)(omegaconf.base.parse))
    patch.setattr(defaults_list, "_create_interpolation_map", _where_needed(defaults_list._create_interpolation_map))


def _read_once(
    source: type[ConfigSource], known: dict[tuple[object, ...], bytes]
) -> Callable[[ConfigSource, str], ConfigResult]:
    load = source.load_config

    def load_config(self: ConfigSource, config_path: str) -> ConfigResult:
        key: tuple[object, ...] = (self.provider, self.scheme(), self.path, config_path)
        if self.scheme() == "file":
            file = Path(self.path, self._normalize_file_name(config_path))
            if not file.is_file():
                return load(self, config_path)
            key += (file.stat().st_mtime_ns, file.stat().st_size)
        if key not in known:
            known[key] = pickle.dumps(load(self, config_path))  # read back sooner than a deep copy is made
        return pickle.loads(known[key])

    return load_config


def _where_needed(make: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    def create(overrides: Any, defaults_list: list[Any], self_added: bool) -> DictConfig:
        if any(default.is_interpolation() for default in defaults_list):
            return make(overrides, defaults_list, self_added)
        return OmegaConf.create()

    return create
