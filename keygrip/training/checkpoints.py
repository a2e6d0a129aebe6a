"""Checkpoints with everything that a model needs to run: weights, resolved config, statistics, versions.

A keygrip checkpoint is a Lightning checkpoint with two additions: ``keygrip`` (format, resolved config, git revision,
package versions) and, if the run has an EMA of the weights, ``ema``. A module stores anything else that the model needs
(statistics, a rotation basis, class names) in ``on_save_checkpoint`` and restores it in ``on_load_checkpoint``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf

from keygrip.exporting.folder import CONFIG, WEIGHTS, is_export, read_export
from keygrip.renamed_settings import with_new_names
from keygrip.training.build_limits import at_most_stored, settings_of_other_sizes
from keygrip.training.ema import EMA_STATE
from keygrip.training.integrity import ChangedFileError, is_signed, refuse_unfit_weights, same_kind_of_number, verify
from keygrip.training.parts import (
    UntrustedPartError,
    build_stored,
    check_plain,
    external_settings,
    named_packages,
    without_omitted_parts,
)
from keygrip.training.run_folder import CHECKPOINT, kept_by_step
from keygrip.training.torch_files import (
    BROKEN,
    TorchFileError,
    copied_but_large,
    read_torch_file,
    refuse_missing_device,
)

log = logging.getLogger(__name__)

HEADER = "keygrip"
FORMAT = 3
WEIGHTS_ARE = "weights_are"  # in an export: a text that describes which weights it contains
EMA_WEIGHTS = "EMA of"  # how the text begins for EMA weights
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Header(Callback):
    """Write the ``keygrip`` part of every checkpoint.

    Args:
        config: the resolved config of the run.
        origin: see ``keygrip.training.metadata``.
    """

    def __init__(self, config: dict[str, Any], origin: dict[str, Any]) -> None:
        self.header = {"format": FORMAT, "config": config, **origin}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[HEADER] = self.of(pl_module)

    def of(self, module: LightningModule) -> dict[str, Any]:
        """Return the header of a module's checkpoint."""
        kind = getattr(module, "evaluation_kind", None)  # what `keygrip evaluate` measures; None: nothing
        return {**self.header, "evaluation_kind": kind}


def run_config(trainer: Trainer) -> dict[str, Any]:
    """Return the resolved configuration of the current run, as stored in its checkpoints.

    Raises:
        ValueError: the run writes no keygrip checkpoints.
    """
    config: dict[str, Any] = _header_of(trainer).header["config"]
    return config


def run_content(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Return the content of a checkpoint of the current run, without the weights and without training-only state.

    Raises:
        ValueError: as `run_config`.
    """
    content: dict[str, Any] = {"global_step": trainer.global_step}
    _header_of(trainer).on_save_checkpoint(trainer, module, content)
    module.on_save_checkpoint(content)
    return content


def _header_of(trainer: Trainer) -> Header:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Header):
            return callback
    raise ValueError("the trainer has no callback keygrip.training.checkpoints.Header, which holds the configuration")


def find_checkpoint(path: str | Path, step: int | None = None) -> Path:
    """Return the checkpoint file for a path: the file itself, or for a run folder the latest one or that of a step.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if step is not None:
        return _checkpoint_of_step(path, step)
    if path.is_file() or is_export(path):
        return path
    for candidate in (path / CHECKPOINT, path / CHECKPOINT.name):
        if candidate.is_file():
            return candidate
    if is_export(path / "transformer"):
        raise FileNotFoundError(f"{path} is a pipeline of diffusers: its checkpoint is {path / 'transformer'}")
    if path.is_dir():
        present, absent = sorted((CONFIG, WEIGHTS), key=lambda name: not (path / name).is_file())
        half = f"; of an export it has {present} and lacks {absent}" if (path / present).is_file() else ""
        raise FileNotFoundError(f"no checkpoint in {path}: looked for {CHECKPOINT} (has the run saved one yet?){half}")
    raise FileNotFoundError(f"no checkpoint at {path}: give a checkpoint file or a run folder")


def _checkpoint_of_step(path: Path, step: int) -> Path:
    by_step = kept_by_step(path / CHECKPOINT.parent)
    if step not in by_step:
        hint = (
            f"it has {', '.join(map(str, by_step))}" if by_step else "it has none by step (callbacks.checkpoint.keep)"
        )
        raise FileNotFoundError(f"{path} keeps no checkpoint of step {step}: {hint}")
    return by_step[step]


def read_checkpoint(path: str | Path, map_location: Any = "cpu", mapped: bool = False) -> dict[str, Any]:
    """Read the content of a keygrip checkpoint (file or run folder), without running any code in it.

    Args:
        mapped: see `read_torch_file`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is truncated or not written by keygrip.
    """
    file = find_checkpoint(path)
    if file.is_dir():
        return _checked_header(read_export(file), file)
    signed = is_signed(file)
    if signed:
        verify(file)
    try:
        content = read_torch_file(file, map_location, mapped)
    except TorchFileError as error:
        if error.is_archive:
            raise ValueError(f"not a keygrip checkpoint: {error}") from error
        others = [str(each) for each in kept_by_step(file.parent).values() if not each.samefile(file)]  # a hard link
        another = f"take another one, as {others[-1]}" if others else "take another one"
        raise ValueError(f"{file} is truncated or not a checkpoint ({file.stat().st_size} bytes): {another}") from error
    checked = _checked_header(content, file)
    if not signed:
        raise ChangedFileError(f"{file} has no hash at its end: it was changed, or not written by this keygrip")
    return checked


def refuse_other_format(content: Mapping[Any, Any], file: Path) -> None:
    """Raise ValueError if ``content`` is a keygrip checkpoint of another format; other content is accepted."""
    header = content.get(HEADER)
    if isinstance(header, Mapping) and header.get("format") != FORMAT:
        raise ValueError(
            f"{file} has format {header.get('format')} and this keygrip reads {FORMAT}: use the version that made it, "
            f"{_version_of(header)}"
        )


def _version_of(header: Mapping[str, Any]) -> str:
    packages = header.get("packages")
    return str(packages.get("keygrip", "unknown"))[:40] if isinstance(packages, Mapping) else "unknown"


def _checked_header(content: Any, file: Path) -> dict[str, Any]:
    parts = content if isinstance(content, dict) else {}
    if not isinstance(parts.get(HEADER), dict) or not isinstance(parts.get("state_dict"), dict):
        raise ValueError(
            f"{file} is not a keygrip checkpoint; weights of a backbone alone belong in backbone.weights_path"
        )
    refuse_other_format(content, file)
    try:
        check_plain(content[HEADER].get("config"), "config")
    except UntrustedPartError as error:
        raise UntrustedPartError(f"{file}: {error}") from error
    content[HEADER]["config"] = with_new_names(content[HEADER].get("config"))
    _model_config(content, file)
    if type(content.get("global_step", 0)) is not int:
        raise ValueError(f"{file} is not a keygrip checkpoint: its step is no number")
    _check_ema(content, file)
    return content


def _check_ema(content: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError if the stored EMA does not belong to the stored weights."""
    ema, state = content.get(EMA_STATE), content["state_dict"]
    if ema is None:
        return
    parts = ema.get("parameters") if isinstance(ema, Mapping) else None
    if not isinstance(parts, Mapping) or type(ema.get("updates")) is not int or (ema["updates"] and not parts):
        raise ValueError(f"{file} is not a keygrip checkpoint: its EMA is none")
    for name, value in parts.items():
        weight = state.get(name)
        if not isinstance(value, torch.Tensor) or not isinstance(weight, torch.Tensor) or value.shape != weight.shape:
            raise ValueError(f"{file} is not a keygrip checkpoint: the EMA of {name!r} does not fit its weights")
        if not same_kind_of_number(value, weight):
            raise ValueError(f"{file}: the EMA of {name} is {value.dtype}, and its weights are {weight.dtype}")


def load_module(
    path: str | Path,
    map_location: Any = "cpu",
    expected: type[LightningModule] | None = None,
    use_ema: bool = True,
    trust: Sequence[str] = (),
    external: Mapping[str, Any] | None = None,
    offered: Mapping[str, Any] | None = None,
    refuse: Callable[[Mapping[str, Any]], None] | None = None,
    dtype: str | torch.dtype | None = None,
) -> LightningModule:
    """Rebuild a trained module from its checkpoint only: no config, dataset or network access.

    The checkpoint is data: only declared model parts are built (see :mod:`keygrip.training.parts`), and no code in it
    is executed. The module's ``on_load_checkpoint`` restores what it stored, and the weights are loaded strictly. The
    module is returned in eval mode.

    Args:
        path: checkpoint file or run folder.
        map_location: device to which the module is moved after its weights are loaded. Other content of the file (the
            moments of an optimizer are twice as large as the weights) is not read into memory.
        expected: required class of the module.
        use_ema: use the EMA weights if the checkpoint has them (which is logged).
        trust: packages other than keygrip whose declared parts may be built.
        external: files that the model needs and the checkpoint does not contain, by dotted key of their setting.
        offered: as `external`, but used only for settings that the checkpoint has; others are ignored.
        refuse: called with the model's configuration before anything is built; it may raise to stop the loading.
        dtype: dtype of the module's weights, one of `DTYPES` or its name; "auto": that of the stored weights, if all
            have the same. None: as built by the code, which is float32.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: the checkpoint is truncated, not written by keygrip or of another model, its weights do not fit the
            code, it is an export of EMA weights and `use_ema` is False, this machine lacks the device, or there is no
            such dtype.
    """
    file = find_checkpoint(path)
    refuse_missing_device(map_location)
    requested_dtype = _checked_dtype(dtype)
    checkpoint = read_checkpoint(file, mapped=True)
    if not use_ema and EMA_STATE not in checkpoint and str(checkpoint.get(WEIGHTS_ARE)).startswith(EMA_WEIGHTS):
        raise ValueError(
            f"ema=false has no effect: {file} is an export of the EMA weights alone; give the run that it was exported "
            "from, or leave ema=false out"
        )
    config = _model_config(checkpoint, file)
    if refuse is not None:
        refuse(config)
    try:
        with at_most_stored(config, checkpoint["state_dict"], bool(external or offered)):
            module = build_stored(config, "model", trust, external, offered)
    except UntrustedPartError as error:
        raise UntrustedPartError(f"{file}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error} (it was made by keygrip {_version_of(checkpoint[HEADER])})") from error
    if hasattr(module, "network_settings"):
        module.network_settings = config.get("network", {})
    if not isinstance(module, LightningModule):
        raise ValueError(f"{file} does not hold a model: its configuration builds a {type(module).__name__}")
    if expected is not None and not isinstance(module, expected):
        raise ValueError(
            f"{file} holds a {type(module).__name__}, not a {expected.__name__}: give a checkpoint of that model"
        )
    _restore_module_state(module, checkpoint, file)
    state, weights_kind = weights_of(checkpoint, use_ema)
    refuse_unfit_weights(state, module.state_dict(), str(file))
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        mismatch = settings_of_other_sizes(config, state, module.state_dict())
        raise ValueError(f"the weights in {file} do not fit its model: {misfit(error)} ({mismatch})") from error
    log.info(
        "loaded %s from %s, weights %s (step %d)",
        type(module).__name__,
        file,
        weights_kind,
        checkpoint.get("global_step", 0),
    )
    kinds = dtypes_of(module, state) if requested_dtype == "auto" else {requested_dtype}
    if requested_dtype is not None and len(kinds) == 1 and kinds != dtypes_of(module, module.state_dict()):
        module.to(dtype=kinds.pop())
    return module.to(map_location).eval()


def _checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype | Literal["auto"] | None:
    """Return the requested dtype of the weights. Raises ValueError if it is not in `DTYPES`."""
    if dtype is None or dtype == "auto":
        return dtype  # type: ignore[return-value]  # "auto"
    torch_dtype = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if torch_dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype}: give auto (as the weights were saved) or one of {', '.join(DTYPES)}")
    return torch_dtype


def dtypes_of(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> set[torch.dtype]:
    """Return the dtypes of a module's weights in a state dictionary, without buffers (rotary periods are float32)."""
    return {state[name].dtype for name, weight in module.named_parameters() if weight.is_floating_point()}


def _restore_module_state(module: LightningModule, checkpoint: dict[str, Any], file: Path) -> None:
    """Let a module restore what it stored in addition to its weights. The data may come from other people.

    Raises:
        ValueError: the module cannot use the data.
    """
    try:
        module.on_load_checkpoint(copied_but_large(checkpoint))
    except BROKEN as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: what the model stored beside its weights cannot be used: {reason}") from error


def stored_beside_weights(checkpoint: Mapping[str, Any], model: str, *names: str) -> Mapping[str, Any]:
    """Return what a module's ``on_save_checkpoint`` stored under the key ``model``, with at least these parts.

    Raises:
        ValueError: parts are missing; the message lists them.
    """
    stored = checkpoint.get(model)
    missing = [name for name in names if not isinstance(stored, Mapping) or name not in stored]
    if missing:
        raise ValueError(
            f"the checkpoint has no {', '.join(missing)} ({model}): it was written by another model, or by another "
            "version of keygrip: load it with that one, or train again"
        )
    return checkpoint[model]


def weights_of(checkpoint: dict[str, Any], use_ema: bool = True) -> tuple[dict[str, torch.Tensor], str]:
    """Return the state dictionary to use, with the EMA instead of the last step's parameters if there is one, and a
    text that describes it."""
    state = dict(checkpoint["state_dict"])
    ema = checkpoint.get(EMA_STATE)
    if not use_ema or ema is None or ema["updates"] == 0:
        return state, str(checkpoint.get(WEIGHTS_ARE, "of the last step"))
    state.update({name: value.to(state[name].dtype) for name, value in ema["parameters"].items()})
    return state, f"{EMA_WEIGHTS} {ema['updates']} steps"


def build_module(config: dict[str, Any]) -> LightningModule:
    """Instantiate ``config["model"]`` of a resolved configuration that the user has composed, not of a checkpoint.

    The module's `own_files`, `own_packages` and `network_settings` are set to those of the configuration
    (`keygrip.training.system.System`)."""
    module = instantiate(OmegaConf.create(without_omitted_parts(config["model"])), _convert_="all")
    if hasattr(module, "own_files"):
        module.own_files = external_settings(config["model"])
        module.own_packages = named_packages(config["model"])
        module.network_settings = config["model"].get("network", {})
    return module


def external_files(cfg: Any) -> dict[str, Any]:
    """Return the setting ``external`` of a command with dotted keys: ``external.encoders.text.source=FOLDER``."""
    settings: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{key}.")
            else:
                settings[f"{prefix}{key}"] = value

    walk(OmegaConf.to_container(cfg.external) if OmegaConf.is_config(cfg.external) else cfg.external, "")
    return settings


def trusted_packages(cfg: Any) -> tuple[str, ...]:
    """Return the setting ``trust`` of a command. Raises ValueError if it is not a list."""
    if isinstance(cfg.trust, str) or not isinstance(cfg.trust, Sequence):
        raise ValueError(f"trust={cfg.trust} is no list of packages: trust=[my_lab] is one")
    return tuple(str(package) for package in cfg.trust)


def _model_config(checkpoint: dict[str, Any], file: Path) -> Any:
    config = checkpoint[HEADER].get("config")
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{file} has no model configuration: it was not written by keygrip.train")
    return config["model"]


def misfit(error: RuntimeError) -> str:
    """Return in one line what does not fit, from an error of `load_state_dict`."""
    return " ".join(line.strip() for line in str(error).splitlines()[1:3])[:300]
