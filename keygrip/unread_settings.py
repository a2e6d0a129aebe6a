"""Reject settings that nothing in a run reads, and name the models that have them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from keygrip.config import (
    SettingError,
    config_folder,
    config_folders,
    group_options,
    leaves_of,
    package_of,
    references_in,
)
from keygrip.nearest_setting import nearest


def refuse_unread(cfg: DictConfig, schema: type) -> None:
    """Reject settings, other than those of ``schema``, that the run does not use directly or through ``${...}``.

    Args:
        cfg: composed and unresolved.

    Raises:
        SettingError: there is such a setting; the message names the first one, and the models that have it or the
            nearest setting that is read.
    """
    root_names = {setting.name for setting in fields(schema)}
    leaves = list(leaves_of(OmegaConf.to_container(cfg, resolve=False), ()))
    used_paths: set[tuple[str, ...]] = {(name,) for name in root_names}
    left = leaves
    while True:
        live = [path for path, _ in left if any(path[: len(each)] == each for each in used_paths)]
        references = {target for path, value in left if path in set(live) for target in references_in(path, value)}
        left = [leaf for leaf in left if leaf[0] not in set(live)]
        if not references - used_paths:
            break
        used_paths |= references
    if left:
        unread, group = left[0][0], left[0][0][0]
        key = ".".join(unread)
        if models_with(group):
            hint = f", or make a choice that has it ({with_group(group, root_names | set(map(str, cfg)))})"
        else:
            unread_paths = {path for path, _ in left}
            read = {".".join(path) for path, _ in leaves if path not in unread_paths}
            near = nearest(key, root_names | read)
            hint = f"; the nearest setting that is read is {near!r}" if near else ""
        raise SettingError(f"nothing in this run reads {key!r}: leave it out{hint}")


def models_with(group: str, overrides: Sequence[str] = ()) -> list[str]:
    """Return the options of the group ``model``, including those in folders that `overrides` add, whose defaults lists
    add this group or root setting; none if every training run has it (models set values of `optimizer` too)."""
    return [] if group in _names_of_every_training() else _options_with(group, "model", overrides)


def with_group(group: str, read: Collection[str] = (), overrides: Sequence[str] = ()) -> str:
    """Return a text that lists what adds a group or root setting to a run.

    Args:
        read: root names of the run's config. If an option of one of the model's groups among them adds it
            (``geometry=dino_multiview`` a backbone), such options are listed, and otherwise models.
        overrides: may add folders of configs.
    """
    own = [name for name in sorted(read) if name not in (group, "model") and models_with(name, overrides)]
    choices = [f"{name}={option}" for name in own for option in _options_with(group, name, overrides)]
    choices = choices or [f"model={name}" for name in models_with(group, overrides)]
    kind = "group" if (config_folder() / group).is_dir() else "setting"
    return f"{group} is a {kind} of {', '.join(choices)}"


def _options_with(name: str, group: str, overrides: Sequence[str]) -> list[str]:
    """Return the options of a group that add the group or root setting `name`."""
    options, folders = group_options(group, overrides), tuple(config_folders(overrides))
    return [option for option in options if name in _names_added_by(f"{group}/{option}", folders)]


@cache
def _names_of_every_training() -> frozenset[str]:
    """Return the groups and root settings of ``train.yaml``."""
    content = OmegaConf.to_container(OmegaConf.load(config_folder() / "train.yaml"), resolve=False)
    assert isinstance(content, dict)
    groups = {str(group) for entry in content["defaults"] if isinstance(entry, dict) for group in entry}
    return frozenset(groups | {str(key) for key in content})


@cache
def _names_added_by(option: str, folders: tuple[Path, ...]) -> frozenset[str]:
    """Return the groups and root settings that an option (``model/volume_query``) adds to a run, including those of its
    bases and groups."""
    node, is_global = _load_option(option, folders)
    content = OmegaConf.to_container(node, resolve=False)
    if not isinstance(content, dict):
        return frozenset()
    names = {str(key) for key in content if is_global} - {"defaults"}
    for entry in content.get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            names |= _names_added_by(f"{option.rpartition('/')[0]}/{entry}", folders)
        for key, choice in entry.items() if isinstance(entry, dict) else ():
            group, _, package = str(key).lstrip("/").partition("@")
            if not str(key).startswith("/"):
                continue
            if package.startswith("_global_.") or (is_global and not package):
                names.add(package.removeprefix("_global_.").partition(".")[0] or group)
            if choice is not None:
                names |= _names_added_by(f"{group}/{choice}", folders)
    return frozenset(names)


def _load_option(option: str, folders: Sequence[Path]) -> tuple[Any, bool]:
    """Return the settings of an option, from a file of its own or a section of ``options.yaml``, and whether its
    package is ``_global_``; no settings if there is no such option."""
    for folder in folders:
        if (file := folder / f"{option}.yaml").is_file():
            return OmegaConf.load(file), package_of(file) == "_global_"
    try:
        stored = ConfigStore.instance().load(f"{option}.yaml")
    except OSError:
        return OmegaConf.create({}), False
    return stored.node, stored.package == "_global_"
