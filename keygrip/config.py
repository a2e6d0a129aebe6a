"""Configuration: where conf/ lies, the root schemas, composition, and errors that name the nearest setting.

Groups (model, data, ...) are untyped nodes built by ``_target_``; root settings are typed scalars, so that a misspelt
or ill-typed setting is an error that names the nearest one. Nothing heavy is imported here: ``--help`` stays quick.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

# Settings and options that have a new name: old dotted key or old `group=option` -> new one. A key stands for all
# below it. Each is refused with its new name for one version.
RENAMED: dict[str, str] = {
    "question_sets": "vqa_benchmarks",
}


class SettingError(ValueError):
    """A setting that does not exist."""


@dataclass
class EntrySchema:
    """Settings that every entry point has. Derive from it, add typed scalars, and ``register`` the result."""

    seed: int = 0
    debug: bool = False
    run_dir: str | None = None


@dataclass
class TrainSchema(EntrySchema):
    """Root of ``conf/train.yaml``."""

    model: Any = MISSING
    data: Any = MISSING
    backbone: Any = None
    rotation: Any = None
    language: Any = None
    encoders: Any = None
    vlm: Any = None
    geometry: Any = None
    strategy: Any = MISSING
    compile: Any = None
    optimizer: Any = MISSING
    callbacks: Any = None
    logger: Any = None
    closed_loop: Any = None
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


def register(name: str, schema: type) -> None:
    """Makes ``schema`` (a dataclass) available to the defaults list of a root config under ``name``.

    Its dictionaries take any key from the command line (``task.object_size_m=0.025``): what reads them refuses those
    that it does not know.
    """
    node = OmegaConf.structured(schema)
    for setting in fields(schema):
        if setting.default_factory is dict:
            OmegaConf.set_struct(node[setting.name], False)
    ConfigStore.instance().store(name=name, node=node)


_COMPLETIONS: dict[str, Callable[[Sequence[str]], list[str]]] = {}


def register_completion(config_name: str, complete: Callable[[Sequence[str]], list[str]]) -> None:
    """Lets a root config choose options by what its overrides name: ``complete`` returns further overrides."""
    _COMPLETIONS[config_name] = complete


def completed(config_name: str, overrides: Sequence[str]) -> list[str]:
    """The overrides and those that `register_completion`'s function adds to them."""
    complete = _COMPLETIONS.get(config_name)
    return [*overrides, *(complete(overrides) if complete else [])]


def config_folder() -> Path:
    """The folder of configs: ``conf/`` inside the package (wheel) or beside it (checkout).

    Raises:
        FileNotFoundError: there is neither.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/ folder in or beside {package}: reinstall keygrip, or run from a whole checkout")


def compose(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Composes a root config without running anything (tests, notebooks, a command that calls another's ``run``).

    Hydra may be running a command meanwhile: its state is left as it was.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton

    running = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        check_overrides(config_name, overrides)
        overrides = completed(config_name, overrides)
        with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
            return hydra_compose(config_name, overrides=overrides)
    finally:
        Singleton.set_state(running)


def check_overrides(config_name: str, overrides: Sequence[str]) -> None:
    """Refuses what Hydra would take: renamed settings, and additions at the root that nobody reads (``+max_stepz=3``).

    Raises:
        SettingError: with the new name, or the nearest one.
    """
    for override in overrides:
        _refuse_renamed(override)
    try:
        schema = ConfigStore.instance().load(f"{config_name}_schema.yaml").node
    except OSError:
        return
    known = [str(key) for key in schema]
    groups = [path.name for path in config_folder().iterdir() if path.is_dir()]
    for override in overrides:
        key = override.lstrip("+").partition("=")[0].partition("@")[0]
        if override.startswith("+") and "." not in key and "/" not in key and key not in {*known, *groups}:
            close = nearest(key, known)
            hint = f"the nearest is {close!r}" if close else f"it has {', '.join(known)}"
            raise SettingError(f"there is no setting {key!r} in {config_name}.yaml: {hint}")


def _refuse_renamed(override: str) -> None:
    key, _, value = override.lstrip("+~").partition("=")
    for option in value.split(","):
        new = RENAMED.get(f"{key}={option}")
        if new is not None:
            raise SettingError(f"{key}={option} is now {new}")
    new = new_name(key)
    if new is not None:
        raise SettingError(f"the setting {key!r} is now {new!r}")


def new_name(key: str) -> str | None:
    """The present name of a renamed dotted key, or None where it was not renamed."""
    for old, new in RENAMED.items():
        if "=" not in old and (key == old or key.startswith(f"{old}.")):
            return f"{new}{key.removeprefix(old)}"
    return None


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known dotted key nearest to a misspelt one, or None: whole keys first, then last parts."""
    known = sorted(set(known))
    whole = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if whole:
        return whole[0]
    last = name.rpartition(".")[2]
    by_last: dict[str, str] = {}
    for key in sorted(known, key=lambda key: (key.count("."), key)):
        by_last.setdefault(key.rpartition(".")[2], key)
    found = difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)
    return by_last[found[0]] if found else None


def known_keys(config_name: str, overrides: Sequence[str] = ()) -> list[str]:
    """All dotted keys of a composed config and the names of its groups."""
    try:
        config = compose(config_name, overrides)
    except Exception:
        config = compose(config_name)
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                keys.append(f"{prefix}{name}")
                walk(child, f"{prefix}{name}.")

    walk(OmegaConf.to_container(config, resolve=False), "")
    groups = [path.name for path in config_folder().iterdir() if path.is_dir()]
    return keys + groups


def describe_config_error(error: BaseException, config_name: str, overrides: Sequence[str]) -> str:
    text = one_line(error)
    cause = error.__cause__
    missing = re.search(r"Could not find '([^']+)/([^'/]+)'", text)
    if missing:
        group, name = missing.groups()
        options = group_options(group)
        close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
        hint = f"nearest is {group}={close[0]}; " if close else ""
        if group == "hydra/launcher":
            hint += "joblib and slurm need their plugins: pip install 'keygrip[slurm]'; "
        return f"no option {name!r} in group {group!r}: {hint}options are {', '.join(options) or 'none'}"
    causes = " ".join([text] + [one_line(each) for each in chain(error)])
    unknown = re.search(r"Could not override '([^']+)'", causes) or re.search(r"Key '([^']+)' (?:is )?not in", causes)
    if unknown:
        key = unknown.group(1)
        full = next(
            (o.lstrip("+~").split("=")[0] for o in overrides if o.lstrip("+~").split("=")[0].endswith(key)), key
        )
        others = [o for o in overrides if not o.startswith("-") and o.lstrip("+~").split("=")[0] != full and "=" in o]
        close_key = nearest(full, known_keys(config_name, others))
        hint = f"the nearest is {close_key!r}" if close_key else "see all with `--cfg job`"
        return f"there is no setting {full!r} in {config_name}.yaml: {hint}"
    mandatory = re.search(r"Missing mandatory value: (\S+)", causes)
    if mandatory:
        return f"the setting {mandatory.group(1)} has no value: give {mandatory.group(1)}=..."
    if cause is not None and one_line(cause) not in text:
        text = f"{text.rstrip('.')}: {one_line(cause)}"
    if type(error).__name__ == "OverrideParseException":
        text = f"cannot read {getattr(error, 'override', 'the override')}: {text}"
    return text


def group_options(group: str) -> list[str]:
    folder = config_folder() / group
    options = {path.stem for path in folder.glob("*.yaml")}
    if group.startswith("hydra/"):
        with contextlib.suppress(OSError):
            options |= {name.removesuffix(".yaml") for name in ConfigStore.instance().list(group)}
    return sorted(options)


def chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    cause = error.__cause__
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__
    return chain


def root_cause(error: BaseException) -> BaseException:
    """What a resolver or constructor raised, without what Hydra and OmegaConf wrapped around it."""
    from hydra.errors import HydraException
    from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

    current = error
    while isinstance(current, HydraException | OmegaConfBaseException):
        inner = current.__cause__
        if isinstance(current, InterpolationResolutionError):
            inner = inner or current.__context__  # what a resolver raised is not named as the cause
        if inner is None:
            break
        current = inner
    return current


def one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    if isinstance(error, KeyError) and error.args:
        text = f"missing key {error.args[0]!r}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.strerror}: {error.filename}"
    lines = [
        line.strip() for line in text.splitlines() if line.strip() and not re.match(r"\s*(full_key|object_type)", line)
    ]
    return " ".join(lines)


register("train_schema", TrainSchema)


def listed(overrides: Sequence[str]) -> list[str]:
    """Overrides as a list; a single string is refused, since its letters would each be one."""
    if isinstance(overrides, str):
        raise ValueError(f"overrides are a list of settings, e.g. [{overrides!r}]")
    return list(overrides)


def quoted(text: str) -> str:
    """A text as the value of an override, whatever signs it holds."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
