"""Describe errors of config composition in one line: the error, the nearest setting or option, and how to quote."""

from __future__ import annotations

import contextlib
import difflib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence

from hydra.errors import HydraException, InstantiationException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from keygrip.config import (
    SettingError,
    compose_with_choices,
    config_folders,
    first_job,
    group_options,
    overrides_of,
)
from keygrip.nearest_setting import nearest
from keygrip.override_values import as_typed
from keygrip.unread_settings import models_with, with_group

# Error message of ${oc.env:NAME} for an environment variable that is not set.
UNSET = re.compile(r"Environment variable '([^']+)' not found")
CLOSED_LOOP = "callbacks.closed_loop"  # where the group closed_loop puts its options
# Characters that Hydra accepts inside quotes only: letters other than a to z, and most symbols.
UNQUOTED_CANNOT = r"[^a-zA-Z0-9_/\-\\+.$%*@?|:]"


@contextlib.contextmanager
def setting_errors(config_name: str, overrides: Sequence[str]) -> Iterator[None]:
    """Convert errors of composing or parsing in the block to a `SettingError` with the message of the command line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        root = root_cause(error)
        if not isinstance(root, HydraException | OmegaConfBaseException):
            raise root from None  # the error of a resolver
        raise SettingError(describe_config_error(error, config_name, overrides)) from error


@contextlib.contextmanager
def constructor_errors() -> Iterator[None]:
    """Raise the error of a part's constructor without Hydra's error around it; a note names the setting."""
    wrapped: InstantiationException | None = None
    try:
        yield
    except InstantiationException as error:
        wrapped = error
    if wrapped is None:
        return
    root = root_cause(wrapped)
    if root is not wrapped and (key := _full_key(wrapped)) is not None:
        root.add_note(f"setting: {key}")
    raise root from root.__cause__  # Hydra's error is not its context


def describe_config_error(error: BaseException, config_name: str, overrides: Sequence[str]) -> str:
    """Describe in one line why composing or parsing failed, for the given overrides."""
    text = one_line(error)
    cause = error.__cause__
    settings = overrides_of(overrides)
    missing = re.search(r"Could not find '([^']+)/([^'/]*)'", text)
    if missing:
        return _describe_missing_option(missing[1], missing[2], overrides)
    unchosen = re.search(r"You must specify '([\w/]+)'", text)
    if unchosen:
        group = unchosen.group(1)
        options = group_options(group, settings)
        return f"nothing is chosen of the group {group!r}: give {group}=NAME, one of {', '.join(options)}"
    causes = " ".join([text] + [one_line(each) for each in causes_of(error)])
    unset = UNSET.search(causes)
    if unset:
        return _describe_unset_variable(unset[1], error, overrides)
    interpolated = re.search(r"Interpolation key '([^']+)' not found", causes)
    if interpolated:
        key = _full_key(error) or "a setting"
        remedy = f"give {key}=..." if "[" not in key else f"choose another option of {key.partition('.')[0]}"
        return f"{key} takes its value from {interpolated.group(1)}, which this run does not have: {remedy}"
    unknown = re.search(r"Could not (?:override|delete) '([^']+)'|Key '([^']+)' (?:is )?not in", causes)
    if unknown:
        return _describe_unknown_key(unknown[1] or unknown[2], config_name, overrides)
    without = re.search(r"Cannot find primary config '([^']+)'", causes)
    if without:
        return _describe_missing_config(without[1])
    continuous = re.search(r"(?:does not support sweep type : |type is ValueType\.)(\w+)_SWEEP", causes)
    if continuous:
        kind = continuous.group(1).lower()
        given = " ".join(each for each in overrides if each.partition("=")[2].startswith(f"{kind}(")) or "a setting"
        return f"{given}: a sweep runs listed values and does not search an {kind}: give NAME=1,2,3 or NAME=range(1,4)"
    mandatory = re.search(r"Missing mandatory value: (\S+)", causes)
    if mandatory:
        return f"the setting {mandatory.group(1)} has no value: give {mandatory.group(1)}=..."
    if cause is not None and one_line(cause) not in text:
        text = f"{text.rstrip('.')}: {one_line(cause)}"
    if type(error).__name__ == "OverrideParseException":
        return _describe_parse_error(str(getattr(error, "override", "the override")), text)
    ambiguous = re.search(r"Ambiguous value for argument '(.*?)' ?1\. ", text)
    if ambiguous:
        key, _, value = ambiguous.group(1).partition("=")
        return (
            f"{key}={value} holds a comma: as a list write {shlex.quote(f'{key}=[{value}]')}, as one text "
            f"{as_typed(key, value)}, for a sweep add -m"
        )
    return text


def _name_of(override: str) -> str:
    """Return the name of the setting that an override changes."""
    return override.lstrip("+~").split("=")[0]


def _full_key(error: BaseException) -> str | None:
    """Return the setting that an error or one of its causes names."""
    key = re.search(r"full_key: (\S+)", " ".join(str(each) for each in (error, *causes_of(error))))
    return key.group(1) if key else None


def _describe_missing_option(group: str, name: str, overrides: Sequence[str]) -> str:
    for override in overrides:  # the option may name a folder: ablation=volume_query/no_state
        key, _, value = override.partition("=")
        if f"{key}/{value}" == f"{group}/{name}":
            group, name = key, value
    options = group_options(group, overrides_of(overrides))
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"nearest is {group}={close[0]}; " if close else ""
    if group == "hydra/launcher":
        hint += "joblib and slurm need their plugins: pip install 'keygrip[slurm]'; "
    return f"no option {name!r} in group {group!r}: {hint}options are {', '.join(options) or 'none'}"


def _describe_unset_variable(name: str, error: BaseException, overrides: Sequence[str]) -> str:
    """Describe which setting reads an environment variable that is not set."""
    naming = [each.partition("=")[0] for each in overrides if re.search(rf"env:\s*{re.escape(name)}\b", each)]
    key = naming[0] if naming else _full_key(error) or "a setting"
    return (
        f"{key} takes its value from the environment variable {name}, which is not set: export {name}=..., or give "
        "the setting another value"
    )


def _describe_unknown_key(key: str, config_name: str, overrides: Sequence[str]) -> str:
    """Describe a setting that does not exist: the nearest one, or how it is added.

    Args:
        key: the name in Hydra's message, perhaps without the part before its last dot.
    """
    settings = overrides_of(overrides)
    full = next((_name_of(each) for each in overrides if _name_of(each).endswith(key)), key)
    other_overrides = [o for o in settings if _name_of(o) != full]
    valid_keys = known_keys(config_name, other_overrides)
    left_out = next((o for o in overrides if o.startswith("~") and f"{full}.".startswith(f"{o[1:]}.")), None)
    if left_out is not None and full in known_keys(config_name, [o for o in other_overrides if o != left_out]):
        return f"{left_out} leaves out {full}, which this run needs: a setting is given another value, NAME=VALUE"
    if config_name == "prepare":  # the arguments of a step's function are set by the step's own settings
        valid_keys = [each for each in valid_keys if each.partition(".")[0] != "call"]
    given = next((o for o in overrides if o.partition("=")[0] == full and "={" in o), None)
    if full in valid_keys and given is not None:
        return f"{given} gives {full} keys that it does not have: each is added with +{full}.KEY=VALUE"
    candidates = [each for each in valid_keys if not each.endswith("._target_")]
    if "." not in full:  # a group of which nothing is chosen has no key
        candidates += known_groups(config_name, other_overrides)
    close_key = nearest(full, candidates)
    listing = "--cfg job" if "." in full else "--help"  # the composed config lists no group of which nothing is chosen
    hint = f"the nearest is {close_key!r}" if close_key else f"see all with `{listing}`"
    part = full.rpartition(".")[0]
    if part.startswith("logger.") and f"{part}._target_" in valid_keys:  # keygrip's own classes accept no others
        hint += f"; a further argument of its class is added with +{full}=VALUE"
    if full.startswith(f"{CLOSED_LOOP}.") and not any(each.startswith(CLOSED_LOOP) for each in valid_keys):
        hint = f"add closed_loop=NAME, one of {', '.join(group_options('closed_loop', settings))}"
    group = full.partition(".")[0].partition("@")[0]
    if models_with(group, settings) and group not in valid_keys:
        # a setting of another model, so only the spelling can be compared
        if "." in full and valid_keys and not close_key:
            closest = difflib.get_close_matches(full, valid_keys, n=1, cutoff=0.0)[0]
            hint = f"of what this run reads the nearest is {closest!r}; {hint}"
        hint = f"{with_group(group, {name.partition('.')[0] for name in valid_keys}, settings)}; {hint}"
    return f"there is no setting {full!r} in {config_name}.yaml: {hint}"


def _describe_missing_config(name: str) -> str:
    if any(each.partition("=")[0] in ("--config-path", "-cp") for each in sys.argv[1:]):
        return (
            f"there is no {name}.yaml in the folder that stands in place of keygrip's configs "
            "(--config-path): a folder of yours is added to these with --config-dir FOLDER"
        )
    return f"there is no {name}.yaml in keygrip's configs, nor in a folder added by --config-dir FOLDER"


def known_keys(config_name: str, overrides: Sequence[str] = ()) -> list[str]:
    """Return all dotted keys of a composed config, of a sweep's first job.

    There are none if the config cannot be composed.
    """
    keys: list[str] = []
    _collect_keys(_composed(config_name, overrides)[0], "", keys)
    return keys


def known_groups(config_name: str, overrides: Sequence[str] = ()) -> list[str]:
    """Return the groups of a composed config, as `known_keys`, including those of which nothing is chosen."""
    groups = _composed(config_name, overrides)[1]
    return [group for group in groups if not group.startswith("hydra") and "@" not in group]


def _composed(config_name: str, overrides: Sequence[str]) -> tuple[object, list[str]]:
    """Return the config and the groups of a sweep's first job.

    If the overrides contain a further mistake, only the options that they choose of groups are applied, since these
    decide which settings there are. If these cannot be composed either, both are empty.
    """
    for select in (list, _choices_of_groups):
        with contextlib.suppress(Exception):
            config, choices = compose_with_choices(config_name, select(first_job(overrides)))
            return OmegaConf.to_container(config, resolve=False), list(choices)
    return {}, []


def _collect_keys(node: object, prefix: str, keys: list[str]) -> None:
    if isinstance(node, dict):
        for name, child in node.items():
            keys.append(f"{prefix}{name}")
            _collect_keys(child, f"{prefix}{name}.", keys)


def _choices_of_groups(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that choose an option of a group or leave a group out, and those that add folders."""
    folders = config_folders(overrides)
    keys = {each: each.lstrip("+~").partition("=")[0].partition("@")[0] for each in overrides}
    return [
        each
        for each, key in keys.items()
        if key == "hydra.searchpath" or any((folder / key).is_dir() for folder in folders)
    ]


def _describe_parse_error(override: str, reason: str) -> str:
    """Describe why Hydra cannot parse an override, and a form that it can parse."""
    key, equals, value = override.partition("=")
    reason = re.sub(r" ?See https\S+ for details", "", reason)
    if not equals:
        return f"cannot read {override}: settings are given as name=value"
    begins = r"(^|[\[,]\s*)~"  # at the start of the value, or of an item of a list
    if re.search(begins, value):
        spelled = re.sub(begins + r"(?=[/,\]]|$)", r"\1$HOME", value)
        write = f'"{key}={spelled}"' if "[" in spelled else f"{key}={spelled}"
        if re.search(begins, spelled):  # ~anna: the home of another user
            write = "the full path"
        return f"cannot read {override}: behind = the shell leaves ~ as it is: write {write}"
    unread = reason.startswith("LexerNoViableAltException")  # e.g. an umlaut; the lexer's message is not helpful
    if unread and re.match(r"\s*[\[{]", value):
        return (
            f"cannot read {override}: each text with signs such as umlauts or brackets stands in quotes, inside the "
            f"shell's own: \"{key}=['one text','another']\""
        )
    quote = re.match(r"\s*(['\"])", value)
    if unread and quote and value.count(quote[1]) == 1:
        return (
            f"cannot read {override}: its quote {quote[1]} is not closed; if the value holds blanks, the whole setting "
            f"stands in quotes of the shell, too: \"{key}='my folder'\""
        )
    if re.search(UNQUOTED_CANNOT, value) and not re.match(r"\s*[\[{'\"]", value):
        detail = "" if unread else f"{reason}; "
        return (
            f"cannot read {override}: {detail}a value with such signs stands in quotes, inside the shell's own: "
            f"{as_typed(key, value)}"
        )
    return f"cannot read {override}: {reason}"


def causes_of(error: BaseException) -> list[BaseException]:
    """Return the chain of causes of an error, starting with the direct cause."""
    causes: list[BaseException] = []
    cause = error.__cause__
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__
    return causes


def root_cause(error: BaseException) -> BaseException:
    """Return the error of a resolver or constructor, without the wrapping errors of Hydra, OmegaConf and logging."""
    current = error
    while isinstance(current, HydraException | OmegaConfBaseException):
        inner = current.__cause__
        if isinstance(current, InterpolationResolutionError):
            inner = inner or current.__context__  # the error of a resolver is not set as the cause
            if isinstance(inner, KeyError) and UNSET.search(str(inner)):
                break  # the outer error also names the setting
        if inner is None:
            break
        current = inner
    if isinstance(current.__cause__, OSError) and str(current).startswith("Unable to configure handler"):
        return current.__cause__  # an error of logging, for a log file in a folder that is not writable
    return current


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks and Hydra's additions."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, KeyError) and error.args:
        text = f"missing key {error.args[0]!r}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.strerror}: {error.filename}"
    lines = [
        line.strip() for line in text.splitlines() if line.strip() and not re.match(r"\s*(full_key|object_type)", line)
    ]
    return " ".join(lines)
