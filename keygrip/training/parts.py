"""Trust boundary of checkpoints, run folders and exports: which classes a stored configuration may build.

A checkpoint is data that may come from other people. Its configuration names classes (``_target_``), and a name can
be anything: ``os.system``, ``torch.load``, a recorder that starts processes. A class is therefore built from a
checkpoint only if its author has declared it::

    @model_part(from_checkpoint={"weights": "random"})
    class Tower(nn.Module): ...

and only if it is in one of keygrip's `SUBPACKAGES` or in a package that the caller names (``trust=["my_lab"]``).
:func:`build_stored` first checks the whole configuration, by reading source files, before it imports or calls anything.

``from_checkpoint`` lists settings that are replaced when the part is built from a checkpoint, because the checkpoint
contains what they would load: weights from a file, a run to start from. ``external`` lists settings that point to
files which the checkpoint does not contain (weights of another project's frozen encoder); the caller must name those
files, the checkpoint may not. For the current run they are the `external_settings` of its own configuration.
A part with such files that its model does not use (`omitted_parts`) is not built, and needs none of them.
``places`` lists settings with a folder or a URL: a checkpoint may name a folder, but only the caller may name a URL.
Values that the caller gives by name (``offered``) take precedence over ``from_checkpoint``. ``makers`` lists settings
with functions that generate missing data. If the caller requests this, such a function must be defined in the same
packages as the classes.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

log = logging.getLogger(__name__)

MARK = "__keygrip_part__"
READ_WHERE = "read_where"  # attribute of a class with its conditions (`ReadWhere`) by setting
MODEL, DATA = "model_part", "data_part"  # names of the decorators; the check looks for them in source files
# Subpackages of keygrip whose declared classes a stored configuration may name.
SUBPACKAGES = ("models", "data", "envs", "training", "recording")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+", re.ASCII)
HYDRA_FLAGS = {"_partial_": bool, "_recursive_": bool, "_convert_": str}
PACKAGE = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
DEEPEST = 64
MOST_NODES = 100_000

Class = TypeVar("Class", bound=type)


class UntrustedPartError(ValueError):
    """A stored configuration names something that may not be built; the message states where and what."""


@dataclass(frozen=True)
class Part:
    """The declaration of a class.

    Attributes:
        kind: ``model_part`` or ``data_part``. owner: the class itself, so that a subclass does not inherit it.
        from_checkpoint: settings with the values that replace them when the part is built from a checkpoint.
        external: settings that name files which the checkpoint does not contain.
        plain: settings that the class does not build if the configuration has `_recursive_: false`: they keep the
            values of the checkpoint.
        places: settings that name a folder or a URL (``https://...``), from which files are fetched.
        makers: settings that name functions, which are called if `make_missing` is true.
    """

    kind: str
    owner: type
    from_checkpoint: Mapping[str, Any] = field(default_factory=dict)
    external: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    makers: tuple[str, ...] = ()


class ReadWhere:
    """Condition on other settings under which a setting of a part is used: see `keygrip.training.idle_settings`.

    Args:
        setting: the other setting, at the same level or below ("network.pointing_cells"); for several, separated by
            blanks, one is sufficient. values: values it must have; none: any except null, false and 0. unless: value
            it must not have, instead of values. even_unused: the other setting's value counts even where the other
            setting is itself not used.
        omitted: where the setting is not used, the class accepts None for it and gets None instead of a part that
            needs files outside the checkpoint (see `omitted_parts`).
    """

    def __init__(
        self, setting: str, *values: Any, unless: Any = None, even_unused: bool = False, omitted: bool = False
    ) -> None:
        self.settings, self.values, self.unless = setting.split(), values, unless
        self.even_unused, self.omitted = even_unused, omitted

    def holds(self, options: Any) -> bool:
        """Return whether the setting is used. It counts as used if ``options`` lacks the other setting."""
        from omegaconf import OmegaConf  # environments with a simulator's pinned packages lack it

        missing = object()
        values = [OmegaConf.select(options, name, default=missing) for name in self.settings]
        if self.unless is not None:
            return any(value is missing or value != self.unless for value in values)
        return any(value is missing or (value in self.values if self.values else bool(value)) for value in values)

    def __str__(self) -> str:
        names = " or ".join(self.settings)
        if self.unless is not None:
            return f"{names} is not {self.unless}"
        values = " or ".join("null" if value is None else str(value) for value in self.values)
        return f"{names} is {values}" if values else f"{names} is set"


@overload
def model_part(cls: Class) -> Class: ...
@overload
def model_part(
    *, from_checkpoint: Mapping[str, Any] | None = None, external: Sequence[str] = ()
) -> Callable[[Class], Class]: ...
def model_part(
    cls: Class | None = None, *, from_checkpoint: Mapping[str, Any] | None = None, external: Sequence[str] = ()
) -> Class | Callable[[Class], Class]:
    """Declare a class that the configuration of a stored model may build.

    When it is built, the class must not start processes, write files or use the network. It may read a file only if
    the file's setting is replaced by ``from_checkpoint`` or listed in ``external``.

    Args:
        from_checkpoint: setting -> value that replaces it when the part is built from a checkpoint.
        external: settings that name files which the checkpoint does not contain.
    """

    def mark(cls: Class) -> Class:
        return _mark(MODEL, cls, from_checkpoint or {}, tuple(external))

    return mark if cls is None else mark(cls)


@overload
def data_part(cls: Class) -> Class: ...
@overload
def data_part(
    *,
    from_checkpoint: Mapping[str, Any] | None = None,
    external: Sequence[str] = (),
    plain: Sequence[str] = (),
    places: Sequence[str] = (),
    makers: Sequence[str] = (),
) -> Callable[[Class], Class]: ...
def data_part(
    cls: Class | None = None,
    *,
    from_checkpoint: Mapping[str, Any] | None = None,
    external: Sequence[str] = (),
    plain: Sequence[str] = (),
    places: Sequence[str] = (),
    makers: Sequence[str] = (),
) -> Class | Callable[[Class], Class]:
    """Declare a class that the stored configuration of a run's data or task may build; as :func:`model_part`.

    Args:
        from_checkpoint, external: as for :func:`model_part`.
        plain: settings that are only a description for the class. Neither the class nor `instantiate` builds them from
            a checkpoint if the configuration has ``_recursive_: false``; the parts in them stay unchanged.
        places: settings that name a folder or a URL; a URL is read only if the caller names it.
        makers: settings that name functions, which the class calls if `make_missing` is true. A function is named by
            the module with its `def`, or by a package whose ``__init__.py`` imports it from there.
    """
    named = (tuple(external), tuple(plain), tuple(places), tuple(makers))

    def mark(cls: Class) -> Class:
        return _mark(DATA, cls, from_checkpoint or {}, *named)

    return mark if cls is None else mark(cls)


def _mark(kind: str, cls: Class, from_checkpoint: Mapping[str, Any], *named: tuple[str, ...]) -> Class:
    setattr(cls, MARK, Part(kind, cls, dict(from_checkpoint), *named))
    return cls


def build_stored(
    config: Any,
    where: str,
    trust: Sequence[str] = (),
    external: Mapping[str, Any] | None = None,
    offered: Mapping[str, Any] | None = None,
) -> Any:
    """Build the object of a stored configuration, if every part of it is declared.

    Args:
        config: plain dictionaries, lists and scalars, as read from a checkpoint.
        where: its path in the checkpoint, for messages ("model").
        trust: packages other than keygrip whose declared parts may be built; importing them executes their code.
        external: values of settings that name files outside the checkpoint, by dotted key, "network.geometry.weights".
        offered: as `external`, but used only for settings that the checkpoint has; others are ignored. For data it may
            also contain settings of `from_checkpoint` and then overrides their replacement.

    Raises:
        UntrustedPartError: a name that is not a declared part, a Hydra directive that calls something, an
            interpolation (in these cases nothing was imported or called), an external file or a URL that the caller
            has not named, or an untrusted function for generating missing data.
        ValueError: a declared part rejects its settings.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    _check_names(trust)
    for path, node in _nodes(config, where):
        _check_node(node, ".".join(path), trust)
    ready = copy.deepcopy(config)
    unused_external = dict(external or {})
    plain: list[tuple[str, ...]] = []  # paths below which nothing is built; tuples, since keys may contain dots
    for path, node in list(_nodes(ready, where)):  # parents come first
        if "_target_" in node and not any(path[: len(above)] == above for above in plain):
            location = ".".join(path)
            part = _prepare_part(node, location, ".".join(path[1:]), unused_external, offered or {})
            _check_makers(part, node, location, trust)
            if node.get("_recursive_") is False:
                plain += [(*path, setting) for setting in part.plain]
            for setting in omitted_parts(part.owner, node):
                node[setting] = None
                plain.append((*path, setting))
                _drop_external(unused_external, ".".join((*path[1:], setting)))
    if unused_external:
        raise ValueError(
            f"external: {', '.join(sorted(unused_external))} is no setting of this checkpoint that names a file"
        )
    if not isinstance(ready, dict | list):
        return ready
    try:
        return instantiate(OmegaConf.create(ready), _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"{where}: the stored settings do not fit this keygrip: {str(cause).splitlines()[0]}"
        ) from error


def omitted_parts(cls: Any, options: Mapping[str, Any]) -> list[str]:
    """Return the settings of a class for which it gets None: they are not used because of its other settings (the
    class declares this with ``ReadWhere(..., omitted=True)``), and building their parts would need files outside the
    checkpoint, such as another project's weights. Other unused parts are built: that draws random numbers, and without
    it a seed would give other initial weights.

    Args:
        options: resolved settings of the class, whose parts are declared or the user's own.
    """
    from omegaconf import OmegaConf

    conditions: Mapping[str, ReadWhere] = getattr(cls, READ_WHERE, {})
    named = [name for name, where in conditions.items() if where.omitted and isinstance(options.get(name), dict)]
    unused = [name for name in named if not conditions[name].holds(OmegaConf.create(dict(options)))]
    return [name for name in unused if external_settings(options[name])]


def without_omitted_parts(config: Any) -> Any:
    """Return a copy of a user's own resolved configuration with null for each of the `omitted_parts`."""
    from hydra.utils import get_object

    config = copy.deepcopy(config)
    for _, node in _nodes(config, ""):  # does not enter parts that are set to None meanwhile
        for setting in omitted_parts(get_object(node["_target_"]), node) if "_target_" in node else ():
            node[setting] = None
    return config


def _drop_external(external: dict[str, Any], omitted: str) -> None:
    """Remove the caller's files for a part that is not built, and log it; the checkpoint does have their settings."""
    for key in [key for key in external if key.startswith(f"{omitted}.")]:
        log.info("external.%s=%s is not read: this model does not use %s", key, external.pop(key), omitted)


def external_settings(config: Any) -> dict[str, Any]:
    """Return the settings of a model's own configuration that name files which no checkpoint contains, by dotted key.
    Those of `omitted_parts` are left out.

    Args:
        config: resolved, and composed by the user in this process, because its classes are imported. A configuration
            from a checkpoint must not be used: it gives no permission to read its files.
    """
    from hydra.utils import get_object

    external: dict[str, Any] = {}
    for path, node in _nodes(without_omitted_parts(config), ""):
        part = getattr(get_object(node["_target_"]), MARK, None) if "_target_" in node else None
        for setting in part.external if isinstance(part, Part) else ():
            if node.get(setting) is not None:
                external[".".join((*path[1:], setting))] = node[setting]
    return external


def named_packages(config: Any) -> tuple[str, ...]:
    """Return the packages other than keygrip whose classes a user's own configuration names, for use as `trust`."""
    targets = [str(node["_target_"]) for _, node in _nodes(config, "") if "_target_" in node]
    packages = {target.partition(".")[0] for target in targets} - {"keygrip"}
    return tuple(sorted(each for each in packages if PACKAGE.fullmatch(each)))


def check_plain(config: Any, where: str) -> None:
    """Raise UntrustedPartError if a stored configuration is not plain data without interpolations."""
    for _ in _nodes(config, where):
        pass


def _check_names(trust: Sequence[str]) -> None:
    if isinstance(trust, str):
        raise ValueError(f"trust is a list of packages, e.g. trust=[{trust}]")
    for package in trust:
        if not PACKAGE.fullmatch(package):
            raise ValueError(f"trust={package!r} is not the name of a package")


def _nodes(config: Any, root: str) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield all dictionaries of a configuration with their paths, which start with `root`; check that it is plain."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((root,), config)]
    node_count = 0
    while waiting:
        path, node = waiting.pop()
        location = ".".join(path)
        node_count += 1
        if len(path) > DEEPEST + 1 or node_count > MOST_NODES:
            raise UntrustedPartError(f"{root}: the stored configuration is too deep or too large to be one")
        if isinstance(node, dict):
            if not all(isinstance(key, str) for key in node):
                raise UntrustedPartError(f"{location}: a stored configuration has keys that are not text")
            yield path, node
            waiting += [((*path, key), child) for key, child in node.items()]
        elif isinstance(node, list | tuple):
            waiting += [((*path, str(index)), child) for index, child in enumerate(node)]
        elif isinstance(node, str):
            if "${" in node:
                raise UntrustedPartError(f"{location}: {node[:80]!r} is an interpolation, which is not evaluated here")
            if node == "???":  # omegaconf would report a missing setting of the command
                raise UntrustedPartError(f"{location}: {node!r} stands for a value that is missing")
        elif not (node is None or isinstance(node, bool | int | float)):
            raise UntrustedPartError(f"{location}: a {type(node).__name__} is no plain setting")


def _check_node(node: dict[str, Any], location: str, trust: Sequence[str]) -> None:
    for key, value in node.items():
        if key.startswith("_") and key != "_target_":
            kind = HYDRA_FLAGS.get(key)
            if kind is None or not isinstance(value, kind):
                raise UntrustedPartError(f"{location}.{key}: this directive is not allowed in a stored configuration")
    if "_target_" not in node:
        return
    target = node["_target_"]
    if not isinstance(target, str) or not NAME.fullmatch(target):
        raise UntrustedPartError(f"{location}._target_: {str(target)[:80]!r} is not the name of a class")
    reason = _reason_not_trusted(target, tuple(trust))
    if reason:
        raise UntrustedPartError(f"{location}._target_: {target} is not built from a checkpoint: {reason}")


@functools.lru_cache(maxsize=1024)
def _reason_not_trusted(target: str, trust: tuple[str, ...], function: bool = False) -> str | None:
    """Return why a class may not be built or a function may not be called, or None; reads source files without
    importing them."""
    holds: Callable[[Path, str], bool] = _defines_function if function else _declares_class
    lacking = (
        "defines no such function (give the module where its `def` stands)"
        if function
        else "declares no such part (@model_part or @data_part)"
    )
    module, _, name = target.rpartition(".")
    package, *submodules = module.split(".")
    if package == "keygrip":
        if not submodules or submodules[0] not in SUBPACKAGES:
            return "it lies in no part of keygrip that a checkpoint may name"
        root = Path(__file__).resolve().parents[1]
    elif package in trust:
        spec = importlib.util.find_spec(package)  # of a top-level name: imports nothing
        if spec is None or spec.origin is None:
            return f"the trusted package {package} is not installed"
        if spec.submodule_search_locations is None:
            if submodules:
                return f"{package} is a single file without submodules"
            return None if holds(Path(spec.origin), name) else f"it {lacking}"
        root = Path(spec.origin).resolve().parent
    else:
        return f"it is neither keygrip's own nor in a package that you trust (trust=[{package}] if you do)"
    for file in (
        (root.joinpath(*submodules).with_suffix(".py"), root.joinpath(*submodules, "__init__.py"))
        if submodules
        else (root / "__init__.py",)
    ):
        if file.is_file() and holds(file, name):
            return None
        if file.name == "__init__.py" and file.is_file():
            home = _origin_of_reexport(file, name, module)
            if home is not None and home != target and home.split(".")[0] == package:
                return _reason_not_trusted(home, trust, function)
    return f"that module {lacking}"


def _statements(file: Path) -> list[ast.stmt]:
    """Return the top-level statements of a source file; empty if it cannot be read."""
    try:
        return ast.parse(file.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError, OSError):
        return []


@functools.lru_cache(maxsize=1024)
def _declares_class(file: Path, name: str) -> bool:
    """Return whether a source file defines a class of this name, at its top level, with one of the decorators."""
    for statement in _statements(file):
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return any(_decorator_name(each) in (MODEL, DATA) for each in statement.decorator_list)
    return False


def _defines_function(file: Path, name: str) -> bool:
    """Return whether a source file defines a function of this name, at its top level."""
    return any(isinstance(each, ast.FunctionDef) and each.name == name for each in _statements(file))


def _origin_of_reexport(file: Path, name: str, package: str) -> str | None:
    """Return the origin of a name that a package's ``__init__.py`` imports: ``from package.module import Name``."""
    for statement in _statements(file):
        if isinstance(statement, ast.ImportFrom) and statement.level <= 1 and statement.module:
            for alias in statement.names:
                if alias.name == name and alias.asname is None:
                    home = f"{package}.{statement.module}" if statement.level else statement.module
                    return f"{home}.{name}"
    return None


def _decorator_name(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _prepare_part(
    node: dict[str, Any], location: str, key: str, external_values: dict[str, Any], offered: Mapping[str, Any]
) -> Part:
    """Import a declared class and set the settings for which the checkpoint's values are not trusted."""
    module, _, name = node["_target_"].rpartition(".")
    cls = getattr(importlib.import_module(module), name, None)
    part = vars(cls).get(MARK) if isinstance(cls, type) else None
    if not isinstance(part, Part) or part.owner is not cls:
        raise UntrustedPartError(f"{location}._target_: {node['_target_']} is not a declared part")
    for setting, value in part.from_checkpoint.items():
        named = offered if part.kind == DATA else {}  # a model's weights always come from the checkpoint
        node[setting] = copy.deepcopy(named.get(f"{key}.{setting}".lstrip("."), value))
    for setting in (*part.external, *part.places):
        dotted = f"{key}.{setting}".lstrip(".")
        if dotted in external_values:
            node[setting] = external_values.pop(dotted)
        elif dotted in offered:
            node[setting] = offered[dotted]
        elif setting in part.places and "://" in str(node.get(setting)):
            raise UntrustedPartError(
                f"{location}.{setting}: the checkpoint names an address ({str(node[setting])[:80]!r}), from which "
                f"nothing is fetched on its word; name it, or a folder with a copy, yourself: {location}.{setting}=..."
            )
        elif setting in part.external and node.get(setting) is not None:
            raise UntrustedPartError(
                f"{location}.{setting}: the checkpoint names files outside itself ({str(node[setting])[:80]!r}), which "
                f"are not read on its word; name them yourself: external={{{dotted}: PATH}}"
            )
    return part


def _check_makers(part: Part, node: dict[str, Any], location: str, trust: Sequence[str]) -> None:
    """Raise UntrustedPartError if an untrusted function named by the checkpoint would generate missing data."""
    for setting in part.makers if node.get("make_missing") else ():
        name = str(node.get(setting))
        named = NAME.fullmatch(name)
        reason = _reason_not_trusted(name, tuple(trust), function=True) if named else "it is not the name of a function"
        if reason:
            raise UntrustedPartError(
                f"{location}.{setting}: {name[:80]!r} is not called on the checkpoint's word: {reason}"
            )
