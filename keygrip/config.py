"""Configuration: the folder conf/, the root schemas, composition, and errors that name the nearest setting.

Groups (model, data, ...) are untyped nodes built by ``_target_``. Root settings are typed scalars, so that a misspelt
or ill-typed setting is an error that names the nearest one. No slow imports here, so that ``--help`` stays fast.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import OverrideParseException
from omegaconf import MISSING, DictConfig, Node, OmegaConf, open_dict

from keygrip.nearest_setting import nearest
from keygrip.override_values import quoted, texts_quoted
from keygrip.renamed_settings import ABLATED, RENAMED, new_name

OPTIONS = "options.yaml"


class SettingError(ValueError):
    """A setting that does not exist."""


_SCHEMAS: dict[str, type] = {}


@dataclass
class EntrySchema:
    """Settings of every entry point. Derive a dataclass from it, add typed scalars, and ``register`` it."""

    debug: bool = False


@dataclass
class TrainSchema(EntrySchema):
    """Root of ``conf/train.yaml``: the settings of training itself. A model adds further groups (its backbone, its
    language model, ...); `keygrip.unread_settings` rejects settings that nothing uses."""

    seed: int = 0
    run_dir: str | None = None
    model: Any = MISSING
    data: Any = MISSING
    strategy: Any = MISSING
    compile: Any = None
    optimizer: Any = MISSING
    callbacks: Any = None
    logger: Any = None
    max_epochs: int = -1
    max_steps: int = MISSING
    max_minutes: float | None = None
    val_every_n_steps: int | None = None
    limit_val_batches: int | None = None
    log_every_n_steps: int = 20
    accumulate_grad_batches: int = 1
    deterministic: bool = True
    resume: Any = False
    dry_run: bool = False


def register(name: str, schema: type, open_root: bool = False) -> None:
    """Make ``schema`` (a dataclass) available under ``name`` in the defaults list of a root config.

    With ``open_root``, config files may add groups at the root; the command line may only change existing settings.
    Dictionaries of the schema accept any key from the command line (``task.object_size_m=0.025``); the code that uses
    them rejects unknown keys.
    """
    node = OmegaConf.structured(schema)
    for setting in fields(schema):
        if setting.default_factory is dict:
            OmegaConf.set_struct(node[setting.name], False)
    if open_root:
        OmegaConf.set_struct(node, False)
    ConfigStore.instance().store(name=name, node=node)
    _SCHEMAS[name] = schema


# Optional groups: Hydra accepts `null` for them in files only, not on the command line.
_LEFT_OUT = ("ablation", "closed_loop", "compile", "experiment", "shift", "sweep", "takeover", "window")
_WITHOUT: dict[str, tuple[str, ...]] = {f"{group}=null": (f"~{group}",) for group in _LEFT_OUT}
_WITHOUT["instruction=null"] = ("~instruction", "model.network.instruction=null")

_TEXTS_OF_HYDRA = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")

_COMPLETIONS: dict[str, Callable[[Sequence[str]], list[str]]] = {}


# Commands for which step=1000 is a checkpoint's step; Hydra would read it as the group of `keygrip prepare step=...`.
READ_CHECKPOINTS = ("evaluate", "run", "serve", "sample", "generate", "export")


def register_completion(config_name: str, complete: Callable[[Sequence[str]], list[str]]) -> None:
    """Register a function that returns further overrides for a root config, depending on the given overrides."""
    _COMPLETIONS[config_name] = complete


def complete_overrides(config_name: str, overrides: Sequence[str]) -> list[str]:
    """Return the overrides in the form that Hydra accepts, with those added by `register_completion`'s function, before
    options such as ``-m`` (see `keygrip.command.overrides_first`).

    Raises:
        SettingError: null for a group.
    """
    overrides = [part for each in overrides for part in _WITHOUT.get(each, (each,))]
    if config_name in READ_CHECKPOINTS:
        overrides = [f"checkpoint_{each}" if each.startswith("step=") else each for each in overrides]
    for override in overrides:
        group, _, value = override.partition("=")
        if "null" in re.split(r"\s*,\s*", value) and group in _groups():
            if f"{group}=null" in _WITHOUT:
                raise SettingError(f"{override}: a sweep takes no null: run {group}=null as a command of its own")
            raise SettingError(
                f"{override}: a group is chosen, not emptied: its options are {', '.join(group_options(group))}"
                f"{_ways_to_leave_out(group)}"
            )
    overrides = texts_quoted(overrides, [*_TEXTS_OF_HYDRA, *_text_settings(config_name)])
    complete = _COMPLETIONS.get(config_name)
    flags_start = next((index for index, each in enumerate(overrides) if each.startswith("-")), len(overrides))
    return [*overrides[:flags_start], *(complete(overrides) if complete else []), *overrides[flags_start:]]


def _ways_to_leave_out(group: str) -> str:
    """Describe how a part of a group's option is left out, or all of it if its section has another name."""
    section = package_of(next((config_folder() / group).rglob("*.yaml"))) or group
    if section == "_global_":  # its settings have no common section
        return ""
    if section == group:
        return f"; a part of it is left out with {section}.NAME=null"
    return f"; all of it is left out with {section}=null, a part with {section}.NAME=null"


def _text_settings(config_name: str) -> set[str]:
    """Return the root settings with text values, such as folders; `keygrip prepare` has only those of its steps."""
    root = "train" if config_name == "demo" else config_name
    of_root = [schema for name, schema in _SCHEMAS.items() if re.fullmatch(rf"{root}(_.+)?_schema", name)]
    return {"resume"} | {name for schema in of_root for name in _text_fields(schema)}


@cache
def _text_fields(schema: type) -> list[str]:
    return [name for name, hint in get_type_hints(schema).items() if hint in (str, str | None)]


def _groups() -> list[str]:
    return [path.name for path in config_folder().iterdir() if path.is_dir()]


def config_folder() -> Path:
    """Return the folder of configs: ``conf/`` inside the package (wheel) or next to it (checkout).

    Raises:
        FileNotFoundError: neither exists.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/ folder in or beside {package}: reinstall keygrip, or run from a whole checkout")


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """Return the settings on a command line, with ``--config-dir FOLDER`` as the equivalent override and without other
    options."""
    waiting, overrides, folders = iter(arguments), list[str](), list[Path]()
    for argument in waiting:
        name, _, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            folders.append(Path(value or next(waiting, "")).resolve())
        elif argument.startswith("~") or ("=" in argument and not argument.startswith("-")):
            overrides.append(argument)
    return [*overrides, *(f"hydra.searchpath=[{quoted(f'file://{folder}')}]" for folder in folders)]


def first_job(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a sweep's first job: ``seed=0,1`` becomes ``seed=0``. An override that Hydra cannot parse
    is left as it is; composing reports it.

    Raises:
        HydraException: a sweep that lists no values, ``interval(0,1)``.
    """
    parser = OverridesParser.create()
    job = []
    for given in texts_quoted([*overrides, "-m"], ())[:-1]:  # -m: a comma separates values in sentences too
        try:
            override = parser.parse_override(given)
        except OverrideParseException:
            job.append(given)
            continue
        if override.is_sweep_override():
            pattern = override.value()
            values = (
                iter(pattern.filter(group_options(override.key_or_group, overrides)))
                if isinstance(pattern, Glob)
                else override.sweep_string_iterator()
            )
            given = next((f"{override.get_key_element()}={value}" for value in values), given)
        job.append(given)
    return job


def config_folders(overrides: Sequence[str] = ()) -> list[Path]:
    """Return `config_folder` and the folders added by ``hydra.searchpath``.

    Raises:
        OverrideParseException: Hydra cannot parse that override.
    """
    added = [each for each in overrides if each.startswith("hydra.searchpath=")]
    lists = [each.value() for each in OverridesParser.create().parse_overrides(added)] if added else []
    paths = [str(path).removeprefix("file://") for each in lists if isinstance(each, list) for path in each]
    return [config_folder(), *(Path(path) for path in paths if "://" not in path)]


def register_options(overrides: Sequence[str] = ()) -> None:
    """Make every section of ``<group>/options.yaml`` an option of that group, as if it were a separate file: in
    ``conf/`` and in the folders that ``overrides`` add.

    A first line ``# @package ...`` applies to all sections.

    Raises:
        SettingError: an added folder has an option with the name of one of keygrip's, so that one of the two would be
            ignored, or an option without settings.
    """
    shipped = _register_shipped_configs()
    for folder in config_folders(overrides)[1:]:
        if folder.resolve() == config_folder():
            continue
        files = [file for group in _groups() for part in ("", "*/") for file in folder.glob(f"{group}/{part}{OPTIONS}")]
        loaded = {file: _read_options(folder, file) for file in files}
        sections = {option for options in loaded.values() for option in options}
        twice = sorted(shipped & sections | {option for option in shipped if (folder / f"{option}.yaml").is_file()})
        if twice:
            more = f" (and {len(twice) - 1} more)" if len(twice) > 1 else ""
            raise SettingError(
                f"{folder} has an option {twice[0]}{more}, and so has keygrip: one of the two would not be read; give "
                "yours another name"
            )
        for file, options in loaded.items():
            _store_options(file, options)


@cache
def _register_shipped_configs() -> frozenset[str]:
    """Register the sections of ``conf/``; return the names of all its configs: ``optimizer/adamw``, ``train``."""
    OmegaConf.register_new_resolver("mandatory", _refuse_without_value, replace=True)
    OmegaConf.register_new_resolver("if_given", _choose_if_given, replace=True)
    folder = config_folder()
    names = set[str]()
    for file in sorted(folder.rglob("*.yaml")):
        if file.name == OPTIONS:
            options = _read_options(folder, file)
            _store_options(file, options)
            names.update(options)
        else:
            names.add(file.relative_to(folder).with_suffix("").as_posix())
    ConfigStore.instance().repo = _SharedOptions(ConfigStore.instance().repo)
    return frozenset(names)


def _read_options(folder: Path, file: Path) -> dict[str, Any]:
    """Return a file's options by group and name, ``optimizer/adamw``. Reading files dominates the registration time."""
    group, options = file.parent.relative_to(folder).as_posix(), OmegaConf.load(file)
    if not isinstance(options, DictConfig) or not all(OmegaConf.is_dict(options[name]) for name in options):
        raise SettingError(f"{file}: an option is a name with settings below it, as in a file {group}/NAME.yaml")
    if nested := [str(name) for name in options if "/" in str(name)]:
        raise SettingError(f"{file}: {nested[0]} is no name of an option, since / ends a group's: give another name")
    return {f"{group}/{name!s}": node for name, node in options.items()}


def package_of(file: Path) -> str | None:
    """Return the section of the config where a first line ``# @package ...`` puts a file's settings."""
    package = re.match(r"# @package (\S+)", file.read_text(encoding="utf-8"))
    return package.group(1) if package else None


def _store_options(file: Path, options: Mapping[str, Any]) -> None:
    package = package_of(file)
    for option, node in options.items():
        group, _, name = option.rpartition("/")
        ConfigStore.instance().store(name=name, node=node, group=group, package=package, provider="keygrip")


def _refuse_without_value(*, _node_: Node) -> None:
    """Resolve ``${mandatory:}``, a setting of a recipe that the user must give. Hydra's ``???`` is not suitable: a
    recipe is merged over a value, and ``???`` keeps that value.

    Raises:
        SettingError: always; if the setting is given, this function is not called.
    """
    key = _node_._get_full_key(None)
    raise SettingError(f"the setting {key} has no value: give {key}=...")


def _choose_if_given(value: Any, with_value: Any, without: Any) -> Any:
    """Resolve ``${if_given:${SETTING},A,B}``: A if the setting has a value, B if it is null."""
    return without if value is None else with_value


class _SharedOptions(dict[str, Any]):
    """Options that are shared by Hydra's copies of its store. Hydra copies the whole store for each composition, a
    quarter of its time. The store copies each option that it returns, so that no caller can change it here."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _SharedOptions:
        return self


def option_of(group: str, name: str) -> dict[str, Any]:
    """Return a section of ``conf/<group>/options.yaml`` as plain settings."""
    register_options()
    found = OmegaConf.to_container(ConfigStore.instance().load(f"{group}/{name}.yaml").node, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def compose(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose a root config without running anything (tests, notebooks, a command that calls another's ``run``).

    If Hydra is running a command at the same time, its state is restored.
    """
    return compose_with_choices(config_name, overrides)[0]


def compose_with_choices(config_name: str, overrides: Sequence[str] = ()) -> tuple[DictConfig, dict[str, Any]]:
    """As `compose`, but also return the option of each group, e.g. ``{"model": "volume_query", "ablation": None}``."""
    register_options(overrides)
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        check_overrides(config_name, overrides)
        if any(override.startswith("hydra.run.dir=") for override in overrides):  # used by Hydra's command line only
            raise SettingError("the run folder is given by run_dir, not by hydra.run.dir")
        overrides = complete_overrides(config_name, overrides)
        with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
            cfg = hydra_compose(config_name, overrides=overrides, return_hydra_config=True)
        choices = {str(group): option for group, option in cfg.hydra.runtime.choices.items()}
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg, choices
    finally:
        GlobalHydra.instance().hydra = running  # on the current instance, which initialize_config_dir has replaced


def check_overrides(config_name: str, overrides: Sequence[str]) -> None:
    """Reject overrides that Hydra would accept: renamed or unused root settings (``+max_stepz=3``), two run folders.

    Raises:
        SettingError: the message contains the new name or the nearest one.
    """
    for override in overrides:
        _refuse_renamed(override)
    try:
        settings = [str(key) for key in ConfigStore.instance().load(f"{config_name}_schema.yaml").node]
    except OSError:  # for `keygrip prepare`, where each step has its own settings
        settings = []
    if "run_dir" in settings and "hydra.run.dir=" in overrides:
        raise SettingError("hydra.run.dir is empty, which would be the present folder: name the run folder by run_dir")
    if {"run_dir", "hydra.run.dir"} <= {override.partition("=")[0] for override in overrides}:
        raise SettingError("run_dir and hydra.run.dir both name the run folder: give run_dir alone")
    groups = _groups()
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0].partition("@")[0]
        if override.startswith("~") and key in settings and key not in groups:
            raise SettingError(f"~{key} leaves out a setting that is always read: give it another value, {key}=VALUE")
        if override.startswith("+") and "." not in key and "/" not in key and key not in {*settings, *groups}:
            close = nearest(key, settings)
            has = f"it has {', '.join(settings)}" if settings else f"give {key}=... without + where a step has it"
            hint = f"the nearest is {close!r}" if close else has
            raise SettingError(f"there is no setting {key!r} in {config_name}.yaml: {hint}")


def _refuse_renamed(override: str) -> None:
    key, _, value = override.lstrip("+~").partition("=")
    for option in value.split(","):
        new = RENAMED.get(f"{key}={option}")
        system, _, name = option.partition("_")
        if key == "ablation" and "/" not in option and system in ABLATED:
            qualified = f"ablation={ABLATED[system]}/{name}"
            new = RENAMED.get(qualified, qualified)
            if new.partition("=")[2] not in group_options("ablation"):
                new = None
        if new is not None:
            raise SettingError(f"{key}={option} is now {new}")
    if (new := new_name(key)) is not None:
        raise SettingError(f"the setting {key!r} is now {new!r}")


def leaves_of(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the paths and values of the settings below a node at ``path``."""
    if isinstance(node, dict) and node:
        for name, child in node.items():
            yield from leaves_of(child, (*path, str(name)))
    elif node is not None or len(path) > 1:
        yield path, node


def references_in(path: tuple[str, ...], value: Any) -> Iterator[tuple[str, ...]]:
    """Yield the paths that the interpolations in a value refer to."""
    for reference in re.findall(r"\$\{([^${}:]+)\}", str(value)):
        dots = len(reference) - len(reference.lstrip("."))
        name = re.sub(r"\[(\w+)\]", r".\1", reference.lstrip("."))
        yield (*(path[:-dots] if dots else ()), *name.split("."))


def group_options(group: str, overrides: Sequence[str] = ()) -> list[str]:
    """Return all options of a group, including those in its subgroups (``volume_query/no_state``) and in folders that
    `overrides` add."""
    folders = [folder / group for folder in config_folders(overrides)]
    options = {
        path.relative_to(folder).with_suffix("").as_posix() for folder in folders for path in folder.rglob("*.yaml")
    }
    options = {name for name in options if f"{name}.yaml".rpartition("/")[2] != OPTIONS and name[0] != "_"}
    register_options(overrides)

    def stored(inside: str) -> Iterator[str]:
        with contextlib.suppress(OSError):
            for name in ConfigStore.instance().list(f"{group}{inside}"):
                if name.endswith(".yaml"):
                    yield f"{inside}/{name.removesuffix('.yaml')}".lstrip("/")
                else:
                    yield from stored(f"{inside}/{name}")

    return sorted(options | set(stored("")))


def as_list(overrides: Sequence[str]) -> list[str]:
    """Return overrides as a list; reject a single string, which would be read as a list of letters, and other items.

    Raises:
        ValueError: the message contains an example of a list.
    """
    if isinstance(overrides, str):
        raise ValueError(f"overrides are a list of settings, e.g. [{overrides!r}]")
    given = list(overrides)
    for each in given:
        if not isinstance(each, str):
            raise ValueError(f"overrides are a list of settings, e.g. ['max_steps=2'], and {each!r} is no text")
    return given


register("train_schema", TrainSchema, open_root=True)
ConfigStore.instance().store(name="open_section", node=OmegaConf.create({}, flags={"struct": False}))  # takes any key
