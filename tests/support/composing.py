"""Caches for what composing a configuration computes again each time."""

from __future__ import annotations

import functools
import os
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import omegaconf.base
import pytest
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf

from keygrip.config import config_folder

SUPPORT = Path(__file__).parent


def memoized(patch: pytest.MonkeyPatch) -> None:
    """Cache each configuration file as read until the file changes, each interpolation as parsed, and the merge of the
    same options before settings are given, also of the first options that two configurations have in common. Build the
    choices that a defaults list may refer to only where one does. None of this changes the composed configuration."""
    Plugins.instance()  # imports the sources again: it does not use the classes imported before
    known: dict[tuple[object, ...], bytes] = {}
    for scheme in ("file", "pkg"):
        source = SourcesRegistry.instance().resolve(scheme)
        patch.setattr(source, "load_config", _read_once(source, known))
    patch.setattr(omegaconf.base, "parse", functools.lru_cache(maxsize=None)(omegaconf.base.parse))
    patch.setattr(defaults_list, "_create_interpolation_map", _where_needed(defaults_list._create_interpolation_map))
    patch.setattr(config_loader_impl, "create_defaults_list", _chosen_once(config_loader_impl.create_defaults_list))
    patch.setattr(ConfigRepository, "load_config", _found_once(ConfigRepository.load_config))
    loader = config_loader_impl.ConfigLoaderImpl
    patch.setattr(loader, "_load_single_config", _or_merged(loader._load_single_config))
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


def _found_once(load: Callable[..., ConfigResult | None]) -> Callable[..., ConfigResult | None]:
    known: dict[tuple[object, ...], bytes] = {}
    states: weakref.WeakKeyDictionary[ConfigRepository, tuple[object, object]] = weakref.WeakKeyDictionary()

    @functools.wraps(load)
    def load_config(self: ConfigRepository, config_path: str) -> ConfigResult | None:
        sources, state = states.get(self, (None, None))
        if sources is not self.sources:  # each composition has its own repository and may change its sources
            state = _state(self)
            states[self] = self.sources, state
        if state is None:
            return load(self, config_path)
        if (state, config_path) not in known:
            known[state, config_path] = pickle.dumps(load(self, config_path))
        found: ConfigResult | None = pickle.loads(known[state, config_path])
        return found

    return load_config


class _Merged(NamedTuple):
    """The merge of the first options of a configuration, in place of these options."""

    pickled: bytes
    config_path: str = "the options merged before"


def _or_merged(load: Callable[..., ConfigResult]) -> Callable[..., ConfigResult]:
    def load_single_config(self: Any, default: Any, repo: IConfigRepository) -> ConfigResult:
        if isinstance(default, _Merged):
            return ConfigResult(provider="", path="", config=pickle.loads(default.pickled), header={})
        return load(self, default, repo)

    return load_single_config


def _merged_once(compose: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    known: dict[tuple[object, tuple[str, ...]], bytes] = {}
    begun: set[tuple[object, tuple[str, ...]]] = set()  # the first options of all configurations, by their number

    @functools.wraps(compose)
    def merge(self: Any, defaults: list[Any], repo: IConfigRepository) -> DictConfig:
        state = _state(repo)
        if state is None:
            return compose(self, defaults=defaults, repo=repo)
        names = tuple(map(repr, defaults))

        def keep(number: int) -> None:
            """Merge the first options, beginning with as many as were merged before."""
            start = max((n for n in range(number) if (state, names[:n]) in known), default=0)
            before = [_Merged(known[state, names[:start]])] if start else []
            merged = compose(self, defaults=[*before, *defaults[start:number]], repo=repo)
            known[state, names[:number]] = pickle.dumps(merged)

        if (state, names) not in known:
            common = max((n for n in range(1, len(names)) if (state, names[:n]) in begun), default=0)
            if common and (state, names[:common]) not in known:
                keep(common)
            keep(len(names))
            begun.update((state, names[:n]) for n in range(1, len(names)))
        merged: DictConfig = pickle.loads(known[state, names])
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
