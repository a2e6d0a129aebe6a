"""Check settings against the signature of their target: unknown names and values of the wrong type.

Groups of the configuration are untyped (a model's settings are arguments of its constructor). Without this check, a
string instead of a number would cause an error deep in the code that names neither the setting nor the expected type.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import MISSING

from keygrip.config import SettingError
from keygrip.config_errors import causes_of
from keygrip.nearest_setting import nearest
from keygrip.renamed_settings import new_name

# Names of sizes and counts that must be at least 1; 0 or less would build an empty part or none.
SIZE = re.compile(
    r"(?:^|_)(?:width|depth|heads|layers|blocks|dim|bins|classes|size|horizon|stride|channels)$|"
    r"^d_(?:feat|sin_z|sin_t|cond)$"
)
NUMBER_AS_TEXT = re.compile(r"[-+]?\d[\d_]*(\.\d*)?([eE][-+]?\d+)?|true|false", re.IGNORECASE)
# Other projects, whose annotations do not always match the accepted values.
FOREIGN = ("lightning", "torch", "torchvision", "transformers", "timm", "hydra", "submitit")

# Errors for a class that cannot be imported or has no signature. They are reported when the object is built.
NOT_THERE = (ImportError, AttributeError, TypeError, ValueError)


def refuse_ill_typed(config: Any, place: str = "", passed_on: Mapping[str, str] | None = None) -> None:
    """Check the settings of all objects that a configuration builds (``_target_``), without building them.

    Args:
        config: resolved, of dictionaries, lists and scalars. place: its dotted key.
        passed_on: dotted keys whose value comes from other settings; messages name those settings instead.

    Raises:
        SettingError: a setting is unknown or has the wrong type; the message names the first one and what is expected.
    """
    if isinstance(config, list | tuple):
        for index, child in enumerate(config):
            refuse_ill_typed(child, f"{place}[{index}]", passed_on)
    if not isinstance(config, Mapping):
        return
    place = (passed_on or {}).get(place, place)
    if isinstance(config.get("_target_"), str):
        _check_node(config, place, passed_on or {})
    for name, child in config.items():
        refuse_ill_typed(child, _dotted_path(place, str(name)), passed_on)


def refuse_left_out(cfg: Mapping[str, Any], *names: str) -> None:
    """Refuse null, or another single value, in place of settings of which each has a value.

    Args:
        cfg: composed. names: of the sections at its root that must remain.

    Raises:
        SettingError: a section has been replaced by a single value.
    """
    for name in names:
        if not isinstance(cfg[name], Mapping):
            raise SettingError(
                f"{name}={written(cfg[name])}: these settings cannot be left out; change a value with "
                f"{name}.NAME=VALUE (`--cfg job` shows all)"
            )


def written(value: Any) -> str:
    """Return a value as it is written in an override: ``null``, ``true``, ``false``."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def type_problem(value: Any, hint: Any) -> str | None:
    """Describe the expected type of a value in words; None if the value has this type, or if the type is not checked.

    Numbers must be finite. A number is not accepted as a string, because Hydra changes ``2024_11_05`` to 20241105.
    """
    if isinstance(value, Mapping) and "_target_" in value:
        return None  # it represents the object that is built from it
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        problems = [type_problem(value, each) for each in inner]
        return None if None in problems else _join_alternatives(list(dict.fromkeys(each for each in problems if each)))
    for check in (_expected_scalar, _expected_container):
        is_checked, problem = check(value, hint, origin, inner)
        if is_checked:
            return problem
    return None


def _join_alternatives(kinds: Sequence[str]) -> str:
    """Describe alternatives in words. Those that contain a comma come last, to avoid ambiguity."""
    short = " or ".join(kind for kind in kinds if "," not in kind)
    return ", or ".join([short] * bool(short) + [kind for kind in kinds if "," in kind])


def hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of a callable's parameters by name, as far as they can be determined."""
    function: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    names: dict[str, Any] = getattr(inspect.unwrap(function), "__globals__", {})
    inherited = _names_of_fields(target) if isinstance(target, type) else {}
    hints: dict[str, Any] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        try:  # separately, because some refer to classes that are imported for type checkers only
            annotated = types.SimpleNamespace(__annotations__={name: parameter.annotation})
            hints[name] = typing.get_type_hints(annotated, inherited.get(name, names))[name]
        except Exception:
            hints[name] = Any
        if parameter.annotation is inspect.Parameter.empty:
            hints[name] = Any
    return hints


def _names_of_fields(target: type) -> dict[str, dict[str, Any]]:
    """Return, by field of a dataclass, the names in the module of the class or base class that declares the field."""
    declaring_class = next(each for each in target.__mro__ if "__init__" in vars(each))
    if "__dataclass_fields__" not in vars(declaring_class):
        return {}
    return {
        name: getattr(sys.modules.get(each.__module__), "__dict__", {})
        for each in reversed(declaring_class.__mro__)
        for name in inspect.get_annotations(each)
    }


def _dotted_path(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _check_node(node: Mapping[str, Any], path: str, passed_on: Mapping[str, str]) -> None:
    try:
        target = get_object(str(node["_target_"]))
        parameters = inspect.signature(target).parameters
        hints = hints_of(target)
    except Exception as error:
        # Hydra converts a signal during the import to an ImportError; it must still end the command.
        if not isinstance([error, *causes_of(error)][-1], NOT_THERE):
            raise
        return
    settings = {
        str(key): value for key, value in node.items() if not (str(key).startswith("_") and str(key)[-1] == "_")
    }
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in settings:
            if key not in parameters:
                raise SettingError(
                    _describe_unknown_setting(
                        _dotted_path(path, key), [_dotted_path(path, name) for name in parameters]
                    )
                )
    if str(getattr(target, "__module__", "")).partition(".")[0] in FOREIGN:
        return
    for key, value in settings.items():
        if value == MISSING:
            continue  # reported when the object is built
        hint = hints.get(key, Any)
        checked_by_target = typing.get_origin(hint) is typing.Literal
        problem = None if checked_by_target else type_problem(value, hint)
        if problem is None and SIZE.search(key) and type(value) is int and value < 1:
            problem = "at least 1"
        if problem is not None:
            shown_value = "null" if value is None else repr(value)
            full = _dotted_path(path, key)
            if isinstance(value, str) and NUMBER_AS_TEXT.fullmatch(value) and re.search(r"number|true", problem):
                problem += "; this is text: leave out its quotes, or write ${oc.decode:${oc.env:NAME}} for a variable"
            name = passed_on.get(full, full)
            if "text" in problem and _holds_number(value):
                text = "['...']" if isinstance(value, list | tuple) else "'...'"
                problem += f'; what you gave is read as a number: put it in two kinds of quotes, "{name}={text}"'
            raise SettingError(f"{name}={shown_value[:80]}: must be {problem}")


def _holds_number(value: Any) -> bool:
    return any(type(each) in (int, float) for each in (value if isinstance(value, list | tuple) else [value]))


def _describe_unknown_setting(key: str, names: Sequence[str]) -> str:
    new = new_name(key)
    if new is not None:
        return f"the setting {key!r} is now {new!r}"
    close = nearest(key, names)
    hint = f"the nearest is {close!r}" if close else f"there are {', '.join(names) or 'none'}"
    return f"there is no setting {key!r}: {hint}"


def _expected_scalar(value: Any, hint: Any, origin: Any, inner: tuple[Any, ...]) -> tuple[bool, str | None]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is None or hint is type(None):
        return True, None if value is None else "null"
    if hint is bool:
        return True, None if isinstance(value, bool) else "true or false"
    if hint is int:
        return True, None if is_number and isinstance(value, int) else "a whole number"
    if hint is float:
        return True, None if is_number and math.isfinite(value) else "a finite number"
    if hint is str or (isinstance(hint, type) and issubclass(hint, Path)):
        return True, None if isinstance(value, str | Path) else "text"
    if origin is typing.Literal:
        return True, None if value in inner else f"one of {', '.join(map(str, inner))}"
    return False, None


def _expected_container(value: Any, hint: Any, origin: Any, inner: tuple[Any, ...]) -> tuple[bool, str | None]:
    kind = origin or hint
    if not isinstance(kind, type) or kind in (object, type):
        return False, None
    if issubclass(kind, tuple | Sequence):
        if not isinstance(value, list | tuple):
            return True, "a list"
        fixed = issubclass(kind, tuple) and inner and inner[-1] is not Ellipsis
        if fixed and len(value) != len(inner):
            return True, f"a list of {len(inner)}"
        types_of = inner if fixed else inner[:1] * len(value)
        problems = [type_problem(each, item_type) for each, item_type in zip(value, types_of, strict=False)]
        problem = next((each for each in problems if each), None)
        many = f"a list of {len(inner)}" if fixed else "a list"
        return True, None if problem is None else f"{many}, each of it {problem}"
    if issubclass(kind, Mapping):
        if not isinstance(value, Mapping):
            return True, "settings by name"
        hint_of_each = inner[1] if len(inner) == 2 else Any
        values = [each for each in value.values() if each is not None and not isinstance(each, Mapping)]
        problem = next((found for each in values if (found := type_problem(each, hint_of_each))), None)
        return True, None if problem is None else f"settings by name, each of them {problem}"
    return False, None
