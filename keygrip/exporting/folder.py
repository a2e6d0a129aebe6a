"""An exported model: a folder with weights as safetensors and everything else as JSON.

    model.safetensors      the weights for inference (EMA if the run has them), buffers included
    processor.safetensors  tensors that the module stores besides its weights; only if it has any
    config.json            format, model configuration, step, metadata, data stored by the module (tokenizer,
                           statistics), and the SHA-256 of each safetensors file and of these values themselves
    README.md              the model card

Nothing in it is code, and addresses in its header and model card have no passwords. A folder is read as the content of
a checkpoint, and the model is built from it under the same rules as from any checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from keygrip.artifacts import atomic_folder, sha256_bytes, sha256_file, without_passwords, write_json, write_text

WEIGHTS, PROCESSOR, CONFIG, CARD = "model.safetensors", "processor.safetensors", "config.json", "README.md"
SCHEMA = "keygrip.export/1"
CONVERTED_FROM = (
    "converted_from"  # in a checkpoint's header: whose weights they are, where another program trained them
)
TENSOR = "__tensor__"  # {"__tensor__": name in processor.safetensors} replaces a tensor in config.json
TUPLE = "__tuple__"
FLOAT = "__float__"  # {"__float__": "inf"} replaces a number that JSON does not have
NOT_FINITE = ("inf", "-inf", "nan")
LARGEST_CONFIG_BYTES = 256 << 20  # a tokenizer with a large vocabulary has tens of megabytes
DEEPEST = 64
USAGE = 'import keygrip\n\nmodel = keygrip.load("{name}")'
POLICY_USAGE = """import keygrip

policy = keygrip.load_policy("{name}")
print(policy.needs)  # the arms, cameras and further entries of an observation that it reads
plan = policy.plan(observation)  # poses in metres; docs/serving.md of keygrip builds an observation
print(plan.position, plan.quaternion, plan.gripper)"""
# Usage for users, by a module's `evaluation_kind`: lines of Python, and commands.
USAGES = {"policy": POLICY_USAGE}
COMMANDS = {
    "policy": ("evaluate checkpoint={name}", "run checkpoint={name} robot=sim_yam", "serve checkpoint={name}"),
    "video_text": ('generate checkpoint={name} video=clip.mp4 question="..."',),
    "image_text": ('sample checkpoint={name} prompt="..." image=reference.png',),
}
# Data that Lightning and the callbacks store for training only.
TRAINING_ONLY = frozenset(
    {"epoch", "loops", "callbacks", "optimizer_states", "lr_schedulers", "hparams_name", "hyper_parameters"}
    | {"datamodule_hparams_name", "datamodule_hyper_parameters", "pytorch-lightning_version", "sampler_state"}
)


def _is_data_position(value: Any) -> bool:
    """Return whether a part of a checkpoint is a data module's position, with the names of all its training data."""
    return isinstance(value, Mapping) and "batches_done" in value


def is_export(path: str | Path) -> bool:
    """Return whether a folder has the files of an export."""
    folder = Path(path)
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def write_export(
    folder: str | Path,
    content: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    card: str,
    also: Callable[[Path], None] = lambda folder: None,
    files: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write an export atomically, without the passwords of addresses in the header and the model card.

    Args:
        folder: new or empty. content: of the checkpoint. weights: the state dictionary to write. card: Markdown.
        also: writes further files into the folder; if it fails, nothing remains.
        files: further files by name, text or JSON values (a tokenizer, a chat template). facts: entries of config.json
            for other programs; if there are any, the weights' `dtype` is added, as in transformers.

    Raises:
        FileExistsError: The folder holds something. ValueError: The checkpoint holds values that are not plain data.
    """
    tensors: dict[str, Tensor] = {}
    exported = {key: value for key, value in content.items() if key not in TRAINING_ONLY}
    exported.pop("ema", None)  # its parameters are the exported weights
    exported = {key: value for key, value in exported.items() if not _is_data_position(value)}
    if "keygrip" in exported:
        exported["keygrip"] = without_passwords(exported["keygrip"])
    stored = _to_json({key: value for key, value in exported.items() if key != "state_dict"}, "", tensors)
    with atomic_folder(folder) as target:
        save_tensors(weights, target / WEIGHTS)
        hashes = {WEIGHTS: sha256_file(target / WEIGHTS)}
        if tensors:
            save_tensors(tensors, target / PROCESSOR)
            hashes[PROCESSOR] = sha256_file(target / PROCESSOR)
        keygrip_fields = {"schema": SCHEMA, "sha256": hashes | {CONFIG: _digest(stored)}, "checkpoint": stored}
        dtype_field = {"dtype": _most_common_dtype(weights)} if facts else {}
        write_json(target / CONFIG, {**(facts or {}), **dtype_field, **keygrip_fields})
        for name, value in (files or {}).items():
            if isinstance(value, str):
                write_text(target / name, value)
            else:
                write_json(target / name, value)
        write_text(target / CARD, without_passwords(card))
        also(target)
    return Path(folder)


def _most_common_dtype(weights: Mapping[str, Tensor]) -> str | None:
    """Return the most common floating-point dtype of a state dictionary; rotary periods are always float32."""
    counts: Counter[torch.dtype] = Counter()
    for value in weights.values():
        if value.is_floating_point():
            counts[value.dtype] += value.numel()
    return str(counts.most_common(1)[0][0]).removeprefix("torch.") if counts else None


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any new file; safetensors itself would allow only the owner.

    Raises:
        OSError: The file cannot be written, for instance because the disk is full.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    copied = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    try:
        save_file(copied, path, metadata)
    except SafetensorError as error:
        if system := re.search(r"\(os error (\d+)\)", str(error)):  # a full disk, for instance
            raise OSError(int(system[1]), os.strerror(int(system[1])), str(path)) from error
        raise OSError(f"{path} cannot be written: {error}") from error
    path.chmod(mode)


def read_export(folder: str | Path) -> dict[str, Any]:
    """Return the content of the checkpoint from which an export was made, without data for training only.

    Raises:
        FileNotFoundError: A file is missing. ValueError: It is not an export, or a byte has changed.
    """
    root = Path(folder)
    file = root / CONFIG
    if file.stat().st_size > LARGEST_CONFIG_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, more than any export: it is not read")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("schema") != SCHEMA:
        schema = config.get("schema") if isinstance(config, dict) else None
        raise ValueError(f"{file} is not a keygrip export of schema {SCHEMA!r} (it says {schema!r})")
    hashes = config.get("sha256")
    if not isinstance(hashes, dict) or not {WEIGHTS, CONFIG} <= set(hashes) <= {WEIGHTS, PROCESSOR, CONFIG}:
        raise ValueError(f"{file} does not name the hashes of its weights and values: the export is incomplete")
    parts: dict[str, dict[str, Tensor]] = {PROCESSOR: {}}
    for name in sorted(hashes.keys() - {CONFIG}):
        if not (root / name).is_file():  # reading from a pipe or a device could block forever
            raise FileNotFoundError(f"{root / name} is missing, or is no file: copy the export again")
        if sha256_file(root / name) != hashes[name]:
            raise ValueError(f"{root / name} is not the file that was exported (its SHA-256 differs): copy it again")
        try:
            parts[name] = load_file(root / name)
        except SafetensorError as error:
            raise ValueError(f"{root / name} is not a safetensors file: {error}") from error
    content = _from_json(config.get("checkpoint"), parts[PROCESSOR], 0)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no checkpoint")
    if hashes[CONFIG] != _digest(config["checkpoint"]):
        raise ValueError(f"{file} is not the file that was exported (the SHA-256 of its values differs): copy it again")
    return content | {"state_dict": parts[WEIGHTS]}


def model_card(
    name: str,
    content: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    which: str,
    result: Mapping[str, Any],
    module: Any = None,
    closed_loop: Mapping[str, Any] | None = None,
    measured: str | None = None,
) -> str:
    """Return a short model card in Markdown.

    Args:
        name: of the exported folder. content: of the checkpoint. weights: those that were exported.
        which: description of the weights, EMA or last step.
        result: `result.json` of the run, or empty.
        module: the model, with its description and usage (`keygrip.training.system.System`); None: neither is written.
        closed_loop: `closed_loop/result.json` of the run, or empty. Success is reported with the counts in it, and not
            at all without it.
        measured: description, like `which`, of the weights that the run evaluates; None: as `which`. Figures of other
            weights, or of another step, are left out.
    """
    header = content["keygrip"]
    target = str(header["config"]["model"].get("_target_", "")).rpartition(".")[2]
    kind, of_network = getattr(module, "evaluation_kind", None), getattr(module, "network", None)
    about = getattr(of_network, "about", None) or getattr(module, "about", None)
    usage = getattr(module, "usage", None) or USAGES.get(kind or "", USAGE)
    commands = [f"keygrip {command}" for command in COMMANDS.get(kind or "", ())]
    parameters = sum(value.numel() for value in weights.values() if value.is_floating_point())
    keygrip, converted_from = "[keygrip](https://github.com/keygrip/keygrip)", header.get(CONVERTED_FROM)
    if converted_from is None:
        origin = f"It was trained with {keygrip}, step {content.get('global_step', 0)}"
    else:
        origin = f"{keygrip} did not train it: its weights are those of {converted_from}, in keygrip's form"
    lines = [
        f"# {name}",
        "",
        f"The model is {about}." if about else f"The model is a `{target}`.",
        f"{origin}: {parameters / 1e6:.2f} M parameters in `{WEIGHTS}`, {which}.",
        "",
        "```python",
        usage.replace("{name}", name),
        "```",
        "",
    ]
    if commands:
        lines += ["```bash", *(command.replace("{name}", name) for command in commands), "```", ""]
    episodes = closed_loop or {}
    conditions = {**(episodes.get("conditions") or {}), "all": episodes.get("all") or {}}
    figures = _format_metrics(result.get("metrics") or {}, conditions)
    others = ""  # how the figures were measured, if not with these weights
    if result.get("steps") != content.get("global_step"):
        others = f"at step {result.get('steps', 'unknown')}"
    elif measured not in (None, which):
        others = f"with the {measured}"
    if figures and others:
        lines += [f"The run's figures were measured {others}, not with these weights, and are left out.", ""]
    elif figures:
        lines += ["| figure of the run | value |", "| --- | --- |"]
        lines += [f"| {key} | {value} |" for key, value in sorted(figures.items())]
        lines += [""]
    overrides = result.get("overrides") or []
    if overrides:
        command = shlex.join(["python", "-m", f"keygrip.{result.get('command') or 'train'}", *map(str, overrides)])
        lines += ["Trained by", "", "```", command, "```", ""]
    if converted_from is None and not (figures and others):
        lines += ["The figures are the run's own; no claim is made about other data, cameras or robots.", ""]
    return "\n".join(lines)


def _format_metrics(metrics: Mapping[str, Any], conditions: Mapping[str, Any]) -> dict[str, str]:
    """Format a run's finite metrics; success rates have the number of episodes, or are left out if it is unknown."""
    figures = {}
    for key, value in metrics.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            continue
        if not key.endswith("/success_rate"):
            figures[key] = f"{value:.5g}"
            continue
        counted = conditions.get(key.split("/")[1], {})
        if math.isclose(counted.get("success_rate", math.nan), value, abs_tol=1e-6):
            low, high = counted["success_low"], counted["success_high"]
            counts = f"{counted['successes']} of {counted['episodes']}"
            figures[key.removesuffix("_rate")] = f"{counts} (95 % interval {low:.2g} to {high:.2g})"
    return figures


def _digest(stored: Any) -> str:
    """Return the hash of JSON values, independent of the file's formatting."""
    return sha256_bytes(json.dumps(stored, sort_keys=True).encode())


def _to_json(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Convert a value to JSON; tensors are moved to ``tensors`` under their path."""
    if isinstance(value, Tensor):
        name = path.lstrip("/")
        tensors[name] = value
        return {TENSOR: name}
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        wrong += [key for key in (TENSOR, TUPLE, FLOAT) if key in value]
        if wrong:
            raise ValueError(f"{path or 'the checkpoint'} has keys that JSON cannot hold: {wrong}")
        return {key: _to_json(child, f"{path}/{key}", tensors) for key, child in value.items()}
    if isinstance(value, tuple):
        return {TUPLE: [_to_json(child, f"{path}/{index}", tensors) for index, child in enumerate(value)]}
    if isinstance(value, list):
        return [_to_json(child, f"{path}/{index}", tensors) for index, child in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {FLOAT: str(float(value))}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{path} is a {type(value).__name__}, which an export cannot hold: it stores plain data")


def _from_json(value: Any, tensors: Mapping[str, Tensor], depth: int) -> Any:
    if depth > DEEPEST:
        raise ValueError(f"{CONFIG} is nested more than {DEEPEST} levels deep: it is not an export")
    if isinstance(value, dict):
        if set(value) == {TENSOR}:
            if not isinstance(value[TENSOR], str) or value[TENSOR] not in tensors:
                raise ValueError(f"{CONFIG} names the tensor {value[TENSOR]!r}, which {PROCESSOR} does not hold")
            return tensors[value[TENSOR]]
        if set(value) == {TUPLE} and isinstance(value[TUPLE], list):
            return tuple(_from_json(child, tensors, depth + 1) for child in value[TUPLE])
        if set(value) == {FLOAT}:
            if value[FLOAT] not in NOT_FINITE:
                raise ValueError(f"{CONFIG} has the number {value[FLOAT]!r:.80}, which is none of {NOT_FINITE}")
            return float(value[FLOAT])
        return {key: _from_json(child, tensors, depth + 1) for key, child in value.items()}
    if isinstance(value, list):
        return [_from_json(child, tensors, depth + 1) for child in value]
    return value
