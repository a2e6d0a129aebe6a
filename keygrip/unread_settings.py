"""Reject settings that nothing in a run reads, and name the models that have them."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from keygrip.config import SettingError, config_folder, leaves_of, references_in
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
            hint = f", or choose a model that has it ({with_group(group)})"
        else:
            unread_paths = {path for path, _ in left}
            read = {".".join(path) for path, _ in leaves if path not in unread_paths}
            near = nearest(key, root_names | read)
            hint = f"; the nearest setting that is read is {near!r}" if near else ""
        raise SettingError(f"nothing in this run reads {key!r}: leave it out{hint}")


def models_with(group: str) -> list[str]:
    """Return the options of the group ``model`` whose defaults lists add this group or root setting."""
    folder = config_folder()
    return [path.stem for path in sorted((folder / "model").glob("*.yaml")) if group in _names_added_by(path)]


@cache
def _names_added_by(path: Path) -> frozenset[str]:
    """Return the groups and root settings that a config file with the package ``_global_`` adds, including those of its
    bases and groups."""
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    if not isinstance(content, dict):
        return frozenset()
    is_global = path.read_text(encoding="utf-8").startswith("# @package _global_")
    names = {str(key) for key in content if is_global} - {"defaults"}
    for entry in content.get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            names |= _names_added_by(path.parent / f"{entry}.yaml")
        for key, choice in entry.items() if isinstance(entry, dict) else ():
            group = str(key).lstrip("/").partition("@")[0]
            if str(key).startswith("/"):
                names.add(group)
                file = config_folder() / group / f"{choice}.yaml"
                names |= _names_added_by(file) if file.is_file() else frozenset()
    return frozenset(names)


def with_group(group: str) -> str:
    """Return a text that lists the models with a group or root setting."""
    kind = "group" if (config_folder() / group).is_dir() else "setting"
    return f"{group} is a {kind} of {', '.join(f'model={name}' for name in models_with(group))}"
