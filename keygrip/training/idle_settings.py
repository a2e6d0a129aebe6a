"""Reject settings on the command line that have no effect because of other settings.

A class that is built from a configuration declares which of its settings are used only if others have certain values::

    class Network(nn.Module):
        read_where = {"coupling_rank": ReadWhere("coupling", "bilinear"), "look_size": ReadWhere("second_look")}

Configuration files may contain such settings, for use when the others change. A user who gives one on the command line
expects an effect.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from keygrip.config import SettingError, compose, leaves_of, references_in, register_options
from keygrip.training.parts import READ_WHERE, ReadWhere
from keygrip.training.sweep_jobs import in_sweep

log = logging.getLogger(__name__)

Path = tuple[str, ...]
# Sections of a run's configuration that are built; the other sections are used through interpolations.
BUILT = ("model", "data", "callbacks")


def refuse_idle(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Reject settings of the command line that the run does not use, ablations without effect, and shifts and windows
    that a recipe overrides. In a sweep, whose jobs share overrides, unused settings of shared groups (backbone,
    geometry) only cause a warning.

    Args:
        cfg: composed and unresolved. overrides: as given, e.g. ``["model.network.look_size=32"]``.

    Raises:
        SettingError: the message names the first such setting, and the condition under which it is used.
    """
    references = _references(cfg)
    for override in overrides:
        key = override.lstrip("+").partition("=")[0]
        if "=" not in override or override.startswith("~") or "/" in key or "@" in key:
            continue
        reason = _reason_unused(cfg, tuple(key.split(".")), references)
        if reason is None:
            continue
        if key.partition(".")[0] not in BUILT and in_sweep():  # e.g. of an encoder that some jobs lack
            log.warning("nothing in this job reads %r: %s", key, reason)
            continue
        raise SettingError(f"nothing in this run reads {key!r}: {reason}; leave it out")
    _refuse_idle_option(cfg, overrides, references)
    refuse_idle_ablation(overrides)


def _refuse_idle_option(cfg: DictConfig, overrides: Sequence[str], references: list[tuple[Path, Path]]) -> None:
    """Reject a shift or window whose data settings are not used, or have other values because a recipe sets them too:
    the run would be reported under its name but trained on other data. A value given on the command line is
    accepted."""
    paths = [tuple(each.lstrip("+~").partition("=")[0].split(".")) for each in overrides]
    typed = [path for path in paths if len(path) > 1]  # data=NAME chooses an option and sets no value
    for choice in overrides:
        group, _, name = choice.partition("=")
        settings = _read_option(f"{group}/{name}.yaml") if group in ("shift", "window") else None
        for path, value in leaves_of(OmegaConf.to_container(settings), ()) if settings else ():
            key = ".".join(path)
            reason = _reason_unused(cfg, path, references)
            if reason is not None:
                raise SettingError(
                    f"{choice} sets {key}, which nothing in this run reads: {reason}; leave one of them out"
                )
            set_value = OmegaConf.select(cfg, key)
            if path[0] == "data" and set_value != value and not any(path[: len(each)] == each for each in typed):
                raise SettingError(
                    f"{choice} sets {key} to {value}, and the experiment or ablation of this run sets it to "
                    f"{set_value}: add {key}={value}, or leave {choice} out"
                )


def unread(options: Mapping[str, Any]) -> set[Path]:
    """Return the paths of settings of one part that have no effect because of its other settings.

    Args:
        options: the part's resolved settings, with its ``_target_``; without it the result is empty.
    """
    conditions = _conditions_of(options.get("_target_"))
    if not conditions:
        return set()
    node = OmegaConf.create(dict(options))
    return {name for name in conditions if _unmet_condition(conditions, name, node) is not None}


def refuse_idle_ablation(overrides: Sequence[str]) -> None:
    """Reject an ablation that does not change the run; an intentionally empty ablation is accepted.

    Args:
        overrides: overrides of ``keygrip.train``, as given.

    Raises:
        SettingError: the ablation only sets values that are already set or that the run does not read, or removes
            settings that do not exist.
    """
    for ablation in overrides:
        group, _, name = ablation.partition("=")
        if group != "ablation" or not _has_settings(name):
            continue
        with_it = _compose_config(overrides)
        try:
            without = _compose_config([each for each in overrides if each != ablation])
        except ConfigCompositionException:  # another override changes a setting that the ablation adds
            continue
        if _settings_of(with_it) == _settings_of(without):
            if _effect_is_overridden(overrides, ablation, _settings_of(with_it)):
                continue
            raise SettingError(
                f"{ablation} changes nothing here: what it sets is so already, or leaves out what is not there; leave "
                "it out"
            )
        reason = _reason_difference_is_unused(with_it, without)
        if reason is not None:
            raise SettingError(
                f"{ablation} changes nothing here: nothing in this run reads what it sets ({reason}); leave it out"
            )


def _reason_difference_is_unused(left: DictConfig, right: DictConfig) -> str | None:
    """Return why the settings in which two configurations differ are not used; None if one of them is used."""
    missing = object()
    leaves = [dict(leaves_of(_settings_of(cfg), ())) for cfg in (left, right)]
    reasons = []
    for cfg, own, others in zip((left, right), leaves, reversed(leaves), strict=True):
        references = _references(cfg)
        different = [path for path, value in own.items() if others.get(path, missing) != value]
        reasons += [_reason_unused(cfg, path, references) for path in different]
    return None if None in reasons else next(iter(reasons), None)


def _effect_is_overridden(overrides: Sequence[str], ablation: str, with_it: Any) -> bool:
    """Return whether the ablation has an effect by itself which other overrides replace."""
    choices = [each for each in overrides if "." not in each.partition("=")[0]]
    alone = _settings_of(_compose_config(choices))
    without = _settings_of(_compose_config([each for each in choices if each != ablation]))
    return bool(alone not in (without, with_it))


def _has_settings(ablation: str) -> bool:
    return _read_option(f"ablation/{ablation}.yaml") != {}


def _read_option(path: str) -> Any:
    """Return the settings of an option of a group; None if the option is not one of keygrip's."""
    register_options()
    try:
        return ConfigStore.instance().load(path).node or {}
    except OSError:
        return None


def _compose_config(overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration of a run, with the running Hydra, which may have further config folders, or with a new
    one."""
    if not GlobalHydra.instance().is_initialized():
        return compose("train", overrides)
    is_demo = HydraConfig.initialized() and HydraConfig.get().job.config_name == "demo"
    return hydra_compose("demo" if is_demo else "train", list(overrides))


def _settings_of(cfg: DictConfig) -> Any:
    """Return the settings without nulls, because the null of a part that does not exist has no effect."""
    return _without_nulls(OmegaConf.to_container(cfg, resolve=False))


def _without_nulls(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {name: _without_nulls(child) for name, child in node.items() if child is not None}


def _references(cfg: DictConfig) -> list[tuple[Path, Path]]:
    """Return all interpolations: the setting that contains one, and its target."""
    leaves = leaves_of(OmegaConf.to_container(cfg, resolve=False), ())
    return [(place, target) for place, value in leaves for target in references_in(place, value)]


def _reason_unused(cfg: DictConfig, path: Path, references: list[tuple[Path, Path]]) -> str | None:
    """Return why a setting is not used, at its own path and through interpolations; None if it is used."""
    reasons = []
    waiting, seen = [path], {path}
    while waiting:
        node_path = waiting.pop()
        reason = _first_unmet_condition(cfg, node_path)
        holder_paths = []  # paths whose interpolations refer to the setting or to a parent of it
        handed_on = False
        for holder, target in references:
            common = min(len(target), len(node_path))
            if target[:common] != node_path[:common]:
                continue
            holder_paths.append(holder + node_path[len(target) :])
            is_section = len(target) <= len(node_path) and isinstance(
                OmegaConf.select(cfg, ".".join(target)), DictConfig
            )
            handed_on = handed_on or (is_section and target[0] not in BUILT)
        waiting += [each for each in holder_paths if each not in seen]
        seen |= set(holder_paths)
        if reason is None and not handed_on:
            return None
        reasons += [] if reason is None else [reason]
    return reasons[0] if reasons else None


def _first_unmet_condition(cfg: DictConfig, path: Path) -> str | None:
    """Return the first unmet condition for the use of a setting: its own, or that of a part that contains it."""
    for depth in range(1, len(path)):
        node = OmegaConf.select(cfg, ".".join(path[:depth]))
        conditions = _conditions_of(node.get("_target_") if isinstance(node, DictConfig) else None)
        for name in conditions:
            if path[depth : depth + len(name)] == name:
                unmet = _unmet_condition(conditions, name, node)
                if unmet is not None:
                    return f"{'.'.join((*path[:depth], *name))} is read where {unmet}"
    return None


def _unmet_condition(conditions: Mapping[Path, ReadWhere], name: Path, options: Any) -> ReadWhere | None:
    """Return the unmet condition for the use of a setting: its own, or that of a setting on which it depends."""
    condition = conditions[name]
    if not condition.holds(options):
        return condition
    if condition.even_unused:
        return None
    required_paths = [tuple(other.split(".")) for other in condition.settings]
    unmet_conditions = [
        _unmet_condition(conditions, other, options) if other in conditions else None for other in required_paths
    ]
    return None if None in unmet_conditions else unmet_conditions[0]


def _conditions_of(target: str | None) -> dict[Path, ReadWhere]:
    """Return the conditions that a class declares; "network.geometry.init_from" is a setting of a nested part."""
    declared: Mapping[str, ReadWhere] = getattr(get_object(target), READ_WHERE, {}) if target else {}
    return {tuple(name.split(".")): where for name, where in declared.items()}
