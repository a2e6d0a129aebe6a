"""``--help`` of every command: its groups with their options, and its settings with the comments of the YAML files."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from keygrip.config import (
    OPTIONS,
    compose_with_choices,
    config_folder,
    config_folders,
    first_job,
    group_options,
    overrides_of,
)

# The loader of libyaml, if PyYAML has it, takes a fifth of the time; files with many options are read for each group.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
EXAMPLES = {
    "train": (
        "experiment=demo",
        "model=geometry_vla data=yam_language --help",
        "-m sweep=volume_query_options seed=0,1,2",
    ),
    "evaluate": ("checkpoint=RUN", "checkpoint=RUN episodes=20 'suites=[position]'", "checkpoint=RUN run_dir=FOLDER"),
    "prepare": ("step=doctor root=FOLDER", "step=record root=FOLDER demos=50", "step=import --help"),
    "sample": ("checkpoint=RUN prompt='a red cube'", "checkpoint=RUN image=FILE", "checkpoint=RUN image=FILE steps=50"),
    "generate": (
        "checkpoint=RUN video=FILE question='Which cube is red?'",
        "checkpoint=RUN video='[a.mp4,b.mp4]' question='[\"Which?\",\"How many?\"]'",
        "checkpoint=RUN conversations=talks.jsonl",
    ),
    "serve": (
        "checkpoint=RUN",
        "checkpoint=RUN port=0",
        "checkpoint=RUN host=192.168.1.5 'token=${oc.env:KEYGRIP_TOKEN}'",
    ),
    "run": (
        "checkpoint=RUN robot=sim_yam",
        "checkpoint=RUN robot=yam robot.calibration=FILE dry_run=plan.png",
        "checkpoint=RUN robot=yam robot.calibration=FILE motion_limits=slow takeover=keyboard record=FOLDER",
    ),
    "bench": ("case=volume_loss", "case=inference quick=true", "suite=gpu"),
    "export": (
        "checkpoint=RUN to=FOLDER",
        "checkpoint=RUN to=FOLDER format=onnx",
        "checkpoint=RUN to=FOLDER format=torch_export",
    ),
    "demo": ("", "data.record.task.name=pick", "max_steps=100"),
}
COMMON = {
    "seed": "of everything random",
    "debug": "true: full stack traces",
    "compile": "null: PyTorch's eager mode",
    "logger": "none: the progress line and result.json alone",
    "takeover": "null: no corrections",
}
# Folders of ablations whose name is not that of the model whose recipes they change, with these models.
ABLATED_MODELS = {
    "vlm_claims": ("foveated_vlm",),
    "yam_depth": ("volume_query", "coordinate_regression", "geometry_vla"),
}
WIDTH = 120
LONGEST_SETTING = 72  # longer values are truncated, so that the comment stays visible


def help_text(command: str, overrides: Sequence[str]) -> str:
    """Return the help of a command: its settings, for the options that ``overrides`` choose; with ``-m``, the settings
    of the sweep's first job.

    Raises:
        keygrip.config.SettingError, HydraException: the overrides cannot be composed.
    """
    plain_overrides = overrides_of(overrides)
    if {"-m", "--multirun"} & set(overrides):
        plain_overrides = first_job(plain_overrides)
    lines = [f"keygrip {command} [group=option ...] [setting=value ...]", ""]
    for line in _head_comment(config_folder() / f"{command}.yaml"):
        lines += _wrap_lines("  ", line)
    if command == "prepare" and not any(override.startswith("step=") for override in plain_overrides):
        lines += ["", "Steps (`keygrip prepare step=NAME --help` lists the settings of one):"]
        steps = group_options("step", plain_overrides)
        width = max(map(len, steps)) + 1
        for name in steps:
            lines += _wrap_lines(
                f"  step={name:<{width}}", " ".join(_step_head_comment(name, config_folders(plain_overrides)))
            )
        return "\n".join([*lines, *_example_lines(command)])
    config, choices = compose_with_choices(command, plain_overrides)
    groups = [(group, choice) for group, choice in choices.items() if not group.startswith("hydra")]
    comments = _option_comments("", command)
    for group, choice in groups:
        if choice is not None:
            for folder in config_folders(plain_overrides):
                comments |= _option_comments(group, choice, folder)
    shown_groups = [(group, choice) for group, choice in groups if group != "evaluate"]
    if shown_groups:
        lines += ["", "Groups, with the option chosen here and all there are:"]
        for group, choice in shown_groups:
            options = f"  {group}={choice or 'null'}  ({_format_options(group, choices, plain_overrides)})"
            lines += textwrap.wrap(options, WIDTH, subsequent_indent=" " * 6)
    lines += ["", "Settings:"]
    for path, value in _leaves(OmegaConf.to_container(config, resolve=False), ()):
        key = ".".join(path)
        comment = comments.get(path, "")
        comment = comment or COMMON.get(key, "")
        if not comment and str(value).startswith("${"):
            continue  # an alias: the setting that it refers to is listed
        for end in range(len(path) - 1, 1, -1):  # the comment of a parent describes several values together
            comment = comment or comments.get(path[:end], "")
        setting = f"{key}={_format_value(value)}"
        if comment and len(setting) > LONGEST_SETTING:
            setting = f"{setting[: LONGEST_SETTING - 3]}..."
        lines += _wrap_lines(f"  {setting:<34}  # ", comment) if comment else [f"  {setting}"]
    return "\n".join([*lines, *_example_lines(command)])


def _example_lines(command: str) -> list[str]:
    return ["", "Examples:", *(f"  keygrip {command} {example}".rstrip() for example in EXAMPLES[command])]


def _format_options(group: str, choices: dict[str, str | None], overrides: Sequence[str]) -> str:
    options = group_options(group.partition("@")[0], overrides)
    if group == "ablation":  # ablations of other models have no effect here
        model, models = choices.get("model") or "", group_options("model", overrides)
        folders = {name: name.partition("/")[0] for name in options}
        models_of = {folder: ABLATED_MODELS.get(folder, (folder,)) for folder in folders.values()}
        unmatched = {folder for folder in models_of if not any(each.startswith(models_of[folder]) for each in models)}
        options = [
            name for name, folder in folders.items() if folder in unmatched or model.startswith(models_of[folder])
        ]
    return " | ".join(options) or "none for this model"


def _leaves(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(node, dict) and node:
        for name, child in node.items():
            if not (str(name).startswith("_") and str(name).endswith("_")):
                yield from _leaves(child, (*path, str(name)))
    elif path:
        yield path, node


def _format_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(_format_value(each) for each in value)}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_format_value(each)}" for key, each in value.items()) + "}"
    return {None: "null", True: "true", False: "false"}[value] if isinstance(value, bool | None) else str(value)


def _wrap_lines(start: str, text: str) -> list[str]:
    """Wrap a text after a prefix; further lines are indented to the first word, in a comment with a # of their own."""
    further = start.rpartition("# ")[1].rjust(len(start))
    lines = textwrap.wrap(text, WIDTH - len(start), break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{start}{lines[0]}", *(further + line for line in lines[1:])]


def _head_comment(path: Path) -> list[str]:
    """Return the comment at the beginning of a config file."""
    comment_lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comment_lines.append(line.lstrip("# "))
    return comment_lines


def _step_head_comment(name: str, folders: Sequence[Path]) -> list[str]:
    """Return the comment at the beginning of a step's file, or above its section of an options file."""
    for folder in folders:
        if (folder / "step" / f"{name}.yaml").is_file():
            return _head_comment(folder / "step" / f"{name}.yaml")
    files = (folder / "step" / OPTIONS for folder in folders)
    texts = [file.read_text(encoding="utf-8").splitlines() for file in files if file.is_file()]
    lines = next((lines for lines in texts if f"{name}:" in lines), [f"{name}:"])
    end = lines.index(f"{name}:")
    start = end
    while start and lines[start - 1].startswith("#"):
        start -= 1
    return [line.removeprefix("#").strip() for line in lines[start:end]]


def _option_comments(group: str, option: str, configs: Path | None = None) -> dict[tuple[str, ...], str]:
    """Return the comments of an option of a group and of its base options, by path in the composed config.

    Args:
        group: name, with the option's path in the config if it is different: ``env@callbacks.closed_loop.env``.
        configs: the folder of configs; None: keygrip's own.
    """
    group, _, put = group.partition("@")
    folder = (configs or config_folder()) / group
    file, section = folder / f"{option}.yaml", ""
    if not file.is_file():
        inner, _, section = option.rpartition("/")
        file = folder / inner / OPTIONS
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8")
    package = re.match(r"# @package (\S+)", text)
    config_path = put or ((group or "_global_") if package is None else package.group(1))
    prefix = () if config_path == "_global_" else tuple(config_path.replace("/", ".").split("."))
    content: Any = yaml.load(text, Loader=LOADER) or {}
    defaults = (content.get(section) or {}).get("defaults", []) if section else content.get("defaults", [])
    comments: dict[tuple[str, ...], str] = {}
    for base in defaults:
        if isinstance(base, str) and base != "_self_":
            comments |= _option_comments(group, base, configs)
    own_comments = _read_comments(file)
    if section:
        own_comments = {path[1:]: comment for path, comment in own_comments.items() if path[0] == section}
    return comments | {(*prefix, *path): comment for path, comment in own_comments.items()}


def _read_comments(path: Path) -> dict[tuple[str, ...], str]:
    """Return the comment next to each key of a YAML file (or on the lines directly above it), by path of the key."""
    comments: dict[tuple[str, ...], str] = {}
    stack: list[tuple[int, str]] = []
    comment_lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("#"):
            comment_lines.append(line.strip().lstrip("# "))
            continue
        entry = re.match(r"(\s*)([\w./@+~-]+):(?:\s+(.*))?$", line)
        if entry is None:
            comment_lines = []
            continue
        indent, key, value = len(entry.group(1)), entry.group(2), entry.group(3) or ""
        stack = [each for each in stack if each[0] < indent] + [(indent, key)]
        comment_match = re.search(r"(?:^|\s)#\s*(.*)$", value)
        text = comment_match.group(1) if comment_match else " ".join(comment_lines)
        if text:
            comments[tuple(name for _, name in stack)] = text
        comment_lines = []
    return comments
