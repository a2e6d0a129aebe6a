"""Caches for what composing a configuration computes again each time."""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import omegaconf.base
import pytest
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf

from keygrip.config import config_folder

SUPPORT = Path(__file__).parent


def memoized(patch: pytest.MonkeyPatch) -> None:
    """Cache each configuration file as read until the file changes, each interpolation as parsed, and the merge of the
    same options before settings are given. Build the choices that a defaults list may refer to only where one does.
    None of this changes the composed configuration."""
    Plugins.instance()  # imports the sources again: it does not use the classes imported before
    known: dict[tuple[object, ...], bytes] = {}
    for scheme in ("file", "pkg"):
        source = SourcesRegistry.instance().resolve(scheme)
        patch.setattr(source, "load_config", _read_once(source, known))
    patch.setattr(omegaconf.base, "parse", functools.lru_cache(maxsize=None)(omegaconf.base.parse))
    patch.setattr(defaults_list, "_create_interpolation_map", _where_needed(defaults_list._create_interpolation_map))
    patch.setattr(config_loader_impl, "create_defaults_list", _chosen_once(config_loader_impl.create_defaults_list))
    loader = config_loader_impl.ConfigLoaderImpl
    patch.setattr(loader, "_compose_config_from_defaults_list", _merged_once(loader._compose_config_from_defaults_list))


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
            known[key] = pickle.dumps(load(self, config_path))  # unpickling is faster than a deep copy
        return pickle.loads(known[key])

    return load_config


def _where_needed(make: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    def create(overrides: Any, defaults_list: list[Any], self_added: bool) -> DictConfig:
        if any(default.is_interpolation() for default in defaults_list):
            return make(overrides, defaults_list, self_added)
        return OmegaConf.create()

    return create


def _chosen_once(create: Callable[..., defaults_list.DefaultsList]) -> Callable[..., defaults_list.DefaultsList]:
    known: dict[tuple[object, ...], bytes] = {}

    @functools.wraps(create)
    def create_defaults_list(repo: IConfigRepository, overrides_list: list[Any], **named: Any) -> Any:
        state = _state(repo)
        if state is None:
            return create(repo=repo, overrides_list=overrides_list, **named)
        chosen = defaults_list.Overrides(repo=repo, overrides_list=overrides_list)
        settings, chosen.config_overrides = chosen.config_overrides, []
        key = (state, repr(chosen), repr(named))
        if key not in known:
            made = create(repo=repo, overrides_list=overrides_list, **named)
            made.config_overrides = made.overrides.config_overrides = []
            known[key] = pickle.dumps(made)
        made = pickle.loads(known[key])
        made.config_overrides = made.overrides.config_overrides = settings
        return made

    return create_defaults_list


def _merged_once(compose: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    known: dict[tuple[object, ...], bytes] = {}

    @functools.wraps(compose)
    def merge(self: Any, defaults: list[Any], repo: IConfigRepository) -> DictConfig:
        state = _state(repo)
        if state is None:
            return compose(self, defaults=defaults, repo=repo)
        key = (state, repr(defaults))
        if key not in known:
            known[key] = pickle.dumps(compose(self, defaults=defaults, repo=repo))
        merged: DictConfig = pickle.loads(known[key])
        return merged

    return merge


def _state(repo: IConfigRepository) -> tuple[object, ...] | None:
    """Return where options come from, and each file there with its time and size. None: a test has a folder of its
    own."""
    sources = [(source.provider, source.scheme(), source.path) for source in repo.get_sources()]
    folders = [path for _, scheme, path in sources if scheme == "file"]
    if not all(Path(folder) in (config_folder(), SUPPORT / "conf") for folder in folders):
        return None
    return (*sources, *(file for folder in folders for file in _files(folder)))


def _files(folder: str) -> Iterator[tuple[object, ...]]:
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _files(entry.path)
        else:
            yield entry.path, entry.stat().st_mtime_ns, entry.stat().st_size
