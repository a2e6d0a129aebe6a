"""Errors of composition as one line: what is wrong, the nearest setting or option, and how a value is quoted."""

from __future__ import annotations

import contextlib
import difflib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence

from keygrip.config import (
    SettingError,
    group_options,
    known_keys,
    models_with,
    nearest,
    overrides_of,
    with_group,
)
from keygrip.override_values import quoted

# What ${oc.env:NAME} says of an environment variable that is not there.
UNSET = re.compile(r"Environment variable '([^']+)' not found")
CLOSED_LOOP = "callbacks.closed_loop"  # where the group closed_loop puts its options
# What Hydra takes within quotes alone: letters beside a to z, and most signs.
UNQUOTED_CANNOT = r"[^a-zA-Z0-9_/\-\\+.$%*@?|:]"


@contextlib.contextmanager
def setting_errors(config_name: str, overrides: Sequence[str]) -> Iterator[None]:
    """What composing or parsing refuses within becomes a `SettingError`, in the words of the command line."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        root = root_cause(error)
        if not isinstance(root, HydraException | OmegaConfBaseException):
            raise root from None  # what a resolver says
        raise SettingError(describe_config_error(error, config_name, overrides)) from error


def describe_config_error(error: BaseException, config_name: str, overrides: Sequence[str]) -> str:
    """What composing or parsing refused, in one line, for the overrides that were given."""
    text = one_line(error)
    cause = error.__cause__
    settings = overrides_of(overrides)
    missing = re.search(r"Could not find '([^']+)/([^'/]*)'", text)
    if missing:
        group, name = missing.groups()
        for override in overrides:  # the option may name a folder: ablation=volume_query/no_state
            key, _, value = override.partition("=")
            if f"{key}/{value}" == f"{group}/{name}":
                group, name = key, value
        options = group_options(group, settings)
        close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
        hint = f"nearest is {group}={close[0]}; " if close else ""
        if group == "hydra/launcher":
            hint += "joblib and slurm need their plugins: pip install 'keygrip[slurm]'; "
        return f"no option {name!r} in group {group!r}: {hint}options are {', '.join(options) or 'none'}"
    unchosen = re.search(r"You must specify '([\w/]+)'", text)
    if unchosen:
        group = unchosen.group(1)
        options = group_options(group, settings)
        return f"nothing is chosen of the group {group!r}: give {group}=NAME, one of {', '.join(options)}"
    causes = " ".join([text] + [one_line(each) for each in chain(error)])
    unset = UNSET.search(causes)
    if unset:
        name = unset.group(1)
        place = re.search(r"full_key: (\S+)", " ".join(str(each) for each in (error, *chain(error))))
        naming = [each.partition("=")[0] for each in overrides if re.search(rf"env:\s*{re.escape(name)}\b", each)]
        key = naming[0] if naming else place.group(1) if place else "a setting"
        return (
            f"{key} takes its value from the environment variable {name}, which is not set: export {name}=..., or give "
            "the setting another value"
        )
    interpolated = re.search(r"Interpolation key '([^']+)' not found", causes)
    if interpolated:
        place = re.search(r"full_key: (\S+)", " ".join(str(each) for each in (error, *chain(error))))
        key = place.group(1) if place else "a setting"
        remedy = f"give {key}=..." if "[" not in key else f"choose another option of {key.partition('.')[0]}"
        return f"{key} takes its value from {interpolated.group(1)}, which this run does not have: {remedy}"
    unknown = re.search(r"Could not override '([^']+)'", causes) or re.search(r"Key '([^']+)' (?:is )?not in", causes)
    if unknown:
        key = unknown.group(1)
        full = next(
            (o.lstrip("+~").split("=")[0] for o in overrides if o.lstrip("+~").split("=")[0].endswith(key)), key
        )
        others = [o for o in settings if o.lstrip("+~").split("=")[0] != full]
        known = known_keys(config_name, others)
        left_out = next((o for o in overrides if o.startswith("~") and f"{full}.".startswith(f"{o[1:]}.")), None)
        if full in known and left_out is not None:
            return f"{left_out} leaves out {full}, which this run needs: a setting is given another value, NAME=VALUE"
        if config_name == "prepare":  # what a step's function gets is set by the step's own settings
            known = [each for each in known if each.partition(".")[0] != "call"]
        given = next((o for o in overrides if o.partition("=")[0] == full and "={" in o), None)
        if full in known and given is not None:
            return f"{given} gives {full} keys that it does not have: each is added with +{full}.KEY=VALUE"
        close_key = nearest(full, [each for each in known if not each.endswith("._target_")])
        hint = f"the nearest is {close_key!r}" if close_key else "see all with `--cfg job`"
        part = full.rpartition(".")[0]
        if part.startswith("logger.") and f"{part}._target_" in known:  # keygrip's own classes take no others
            hint += f"; a further argument of its class is added with +{full}=VALUE"
        if full.startswith(f"{CLOSED_LOOP}.") and not any(each.startswith(CLOSED_LOOP) for each in known):
            hint = f"add closed_loop=NAME, one of {', '.join(group_options('closed_loop', settings))}"
        group = full.partition(".")[0].partition("@")[0]
        if models_with(group) and group not in known:
            if "." in full and not close_key:  # of another model, so spelling alone is left to go by
                closest = difflib.get_close_matches(full, known, n=1, cutoff=0.0)[0]
                hint = f"of what this run reads the nearest is {closest!r}; {hint}"
            hint = f"{with_group(group)}; {hint}"
        return f"there is no setting {full!r} in {config_name}.yaml: {hint}"
    without = re.search(r"Cannot find primary config '([^']+)'", causes)
    if without:
        if any(each.partition("=")[0] in ("--config-path", "-cp") for each in sys.argv[1:]):
            return (
                f"there is no {without.group(1)}.yaml in the folder that stands in place of keygrip's configs "
                "(--config-path): a folder of yours is added to these with --config-dir FOLDER"
            )
        return f"there is no {without.group(1)}.yaml in keygrip's configs, nor in a folder added by --config-dir FOLDER"
    continuous = re.search(r"does not support sweep type : (\w+)_SWEEP", causes)
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
        return _unreadable(str(getattr(error, "override", "the override")), text)
    ambiguous = re.search(r"Ambiguous value for argument '(.*?)' ?1\. ", text)
    if ambiguous:
        key, _, value = ambiguous.group(1).partition("=")
        return (
            f"{key}={value} holds a comma: as a list write {shlex.quote(f'{key}=[{value}]')}, as one text "
            f"{_in_quotes(key, value)}, for a sweep add -m"
        )
    return text


def _unreadable(override: str, reason: str) -> str:
    """Why Hydra cannot read an override, and how it would."""
    key, equals, value = override.partition("=")
    reason = re.sub(r" ?See https\S+ for details", "", reason)
    if not equals:
        return f"cannot read {override}: settings are given as name=value"
    begins = r"(^|[\[,]\s*)~"  # the value, or one of a list
    if re.search(begins, value):
        spelled = re.sub(begins + r"(?=[/,\]]|$)", r"\1$HOME", value)
        write = f'"{key}={spelled}"' if "[" in spelled else f"{key}={spelled}"
        if re.search(begins, spelled):  # ~anna: another's home
            write = "the full path"
        return f"cannot read {override}: behind = the shell leaves ~ as it is: write {write}"
    unread = reason.startswith("LexerNoViableAltException")  # an umlaut, say; the lexer's words say nothing
    if unread and re.match(r"\s*[\[{]", value):
        return (
            f"cannot read {override}: each text with signs such as umlauts or brackets stands in quotes, inside the "
            f"shell's own: \"{key}=['one text','another']\""
        )
    if re.search(UNQUOTED_CANNOT, value) and not re.match(r"\s*[\[{'\"]", value):
        said = "" if unread else f"{reason}; "
        return (
            f"cannot read {override}: {said}a value with such signs stands in quotes, inside the shell's own: "
            f"{_in_quotes(key, value)}"
        )
    return f"cannot read {override}: {reason}"


def _in_quotes(key: str, value: str) -> str:
    """An override as it is typed in a shell, its value one text."""
    override = f"{key}={quoted(value)}"
    return shlex.quote(override) if re.search(r'["$`!\\]', value) else f'"{override}"'


def chain(error: BaseException) -> list[BaseException]:
    """The causes of an error, the nearest first."""
    chain: list[BaseException] = []
    cause = error.__cause__
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__
    return chain


def root_cause(error: BaseException) -> BaseException:
    """What a resolver or constructor raised, without what Hydra, OmegaConf and logging wrapped around it."""
    from hydra.errors import HydraException
    from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

    current = error
    while isinstance(current, HydraException | OmegaConfBaseException):
        inner = current.__cause__
        if isinstance(current, InterpolationResolutionError):
            inner = inner or current.__context__  # what a resolver raised is not named as the cause
            if isinstance(inner, KeyError) and UNSET.search(str(inner)):
                break  # this one names the setting too
        if inner is None:
            break
        current = inner
    if isinstance(current.__cause__, OSError) and str(current).startswith("Unable to configure handler"):
        return current.__cause__  # logging's, of a log file in a folder that takes none
    return current


def one_line(error: BaseException) -> str:
    """An error's message without line breaks and Hydra's additions."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, KeyError) and error.args:
        text = f"missing key {error.args[0]!r}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.strerror}: {error.filename}"
    lines = [
        line.strip() for line in text.splitlines() if line.strip() and not re.match(r"\s*(full_key|object_type)", line)
    ]
    return " ".join(lines)
