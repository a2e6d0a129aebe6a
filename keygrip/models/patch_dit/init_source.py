"""Weights to start from: read from a file of any known kind, with the settings that a keygrip checkpoint contains.

A file of weights alone can only be matched by names and shapes. A keygrip checkpoint also contains how the weights are
used: whether the output is a velocity or an image, where positions are used, how features were normalised.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from keygrip.data.bad_samples import BadSample
from keygrip.data.untrusted_files import read_json
from keygrip.models.nn.flow_matching import resolution_shift
from keygrip.models.nn.lora import merged_checkpoint
from keygrip.models.patch_dit.feature_statistics import STATE, UNKNOWN, FeatureStatistics
from keygrip.models.patch_dit.foreign_settings import as_overrides, other_settings, plain
from keygrip.models.patch_dit.network import PatchDiT
from keygrip.training.checkpoints import HEADER, find_checkpoint, read_checkpoint, refuse_other_format, weights_of
from keygrip.training.integrity import is_signed, load_tensors
from keygrip.training.run_folder import CHECKPOINT

log = logging.getLogger(__name__)

StatisticsOf = Literal["auto", "source", "data", "identity"]
GUIDE, GUIDE_TAKEN = "guide.network.", "guide.taken"  # of an `EarlyGuide`, in a module's state dictionary
HUB_WEIGHTS, INDEX = "diffusion_pytorch_model.safetensors", ".index.json"  # in a folder of diffusers
STATISTICS = "statistics."  # a module's normalisation of features, in its state dictionary


@dataclass(frozen=True)
class InitSource:
    """Content of a file to start from.

    Args:
        path: as given in the setting. weights: of the network, by name; those of the EMA if there is one, with LoRA
            differences merged.
        network: stored settings of the network; None: the file is not a keygrip checkpoint of such a model.
        model: stored settings of the whole model. latent_sizes: (h, w) of its training images' latents.
        statistics: buffers of its `FeatureStatistics` by name; empty: the file has none.
        encoders: fingerprint of the encoders of its training images; "": not known.
        guide: weights of the network that it is guided away from, by name; empty: there is none, or its step was not
            reached.
    """

    path: str
    weights: dict[str, Tensor]
    network: Mapping[str, Any] | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    latent_sizes: tuple[tuple[int, int], ...] = ()
    statistics: dict[str, Tensor] = field(default_factory=dict)
    encoders: str = ""
    guide: dict[str, Tensor] = field(default_factory=dict)

    def refuse_other_meaning(self, network: PatchDiT) -> None:
        """Refuse weights that fit by name and shape but would compute something else in this network.

        Raises:
            ValueError: settings that no weight shows differ; the message gives their values in the source.
        """
        if self.network is None:
            return
        usual = inspect.signature(PatchDiT).parameters
        source_meaning = {name: self.network.get(name, usual[name].default) for name in network.meaning}
        both_have_patches = bool(self.network.get("use_dino_patches", True)) and network.use_dino_patches
        other = other_settings(network.meaning, source_meaning, both_have_patches)
        if other:
            values = ", ".join(f"{name}={plain(network.meaning[name])}" for name in other)
            raise ValueError(
                f"model.init_from={self.path} was trained with other settings than this network's ({values}), by which "
                f"the same weights compute something else. Give {as_overrides(other)}"
            )

    def refuse_other_shift(self, shift_tokens: int | None, patch_size: int, student: float | None = None) -> None:
        """Refuse other noise levels than in the source, for images of the sizes that the weights were trained on.

        Args:
            shift_tokens: of the module, see there; patch_size: of its network.
            student: `timestep_shift` of the windows of a few-steps student, which divide its teacher's sampling; None:
                there is no student.

        Raises:
            ValueError: the timesteps are shifted in another way than in the run of the weights.
        """
        if self.network is None:
            return
        source_base = self.model.get("shift_tokens")
        tokens = [(h // patch_size) * (w // patch_size) for h, w in self.latent_sizes]
        shifts = [
            [1.0 if base is None else resolution_shift(n, base) for n in tokens] for base in (source_base, shift_tokens)
        ]
        if source_base != shift_tokens and (not tokens or shifts[0] != shifts[1]):
            raise ValueError(
                f"model.init_from={self.path} was trained with other noise levels than model.shift_tokens="
                f"{'null' if shift_tokens is None else shift_tokens} gives for images of its size. Give "
                f"model.shift_tokens={'null' if source_base is None else plain(source_base)}"
            )
        if student is not None and self.model.get("few_steps") is not None:
            raise ValueError(
                f"model.init_from={self.path} is itself a student of few steps, drawn without guidance: name its "
                "teacher's run"
            )
        sampling = self.model.get("sampling")
        shift = sampling.get("timestep_shift", 1.0) if isinstance(sampling, Mapping) else 1.0
        if student is not None and shift != student:
            raise ValueError(
                f"model.init_from={self.path} is drawn at timestep_shift={plain(shift)} and model.few_steps cuts its "
                f"windows at {student:g}: a student's windows are its teacher's steps. Give "
                f"model.few_steps.timestep_shift={plain(shift)} model.sampling.timestep_shift={plain(shift)}"
            )


def read_source(path: str | Path) -> InitSource:
    """Read a checkpoint, run folder or export of keygrip, a torch.save file, a .safetensors file, or a folder or an
    index of a diffusers model, on the CPU.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it cannot be read as weights.
    """
    if (hub_file := _hub_file(Path(path))) is not None:
        return InitSource(str(path), _load_hub_file(hub_file))
    file = find_checkpoint(path)
    if file.is_dir() or is_signed(file):
        return _keygrip_source(str(path), read_checkpoint(file))
    if file.suffix == ".safetensors":
        return InitSource(str(path), _load_safetensors(file))
    try:
        content = load_tensors(file)
    except ValueError as error:
        raise ValueError(f"init_from={file} cannot be read as weights: {str(error).splitlines()[0]}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"init_from={file} holds a {type(content).__name__}, not weights by name")
    refuse_other_format(content, file)
    if isinstance(content.get(HEADER), Mapping):
        return _keygrip_source(str(path), read_checkpoint(file))  # raises an error: its hash is missing
    key, weights = _select_weights(content)
    if key:
        log.info("init_from=%s: its weights are those under %r, of %s", file, key, ", ".join(map(str, content)))
    return InitSource(str(path), _network_weights(weights))


def _load_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"init_from={file} is not a safetensors file, or is cut off: {error}") from error


def _hub_file(path: Path) -> Path | None:
    """Return the file of weights of a model as diffusers writes it, or of a pipeline's transformer, or the index of its
    files; None for anything else."""
    if path.name.endswith(INDEX) and path.is_file():
        return path
    if not path.is_dir() or (path / CHECKPOINT.parent).is_dir():  # a run
        return None
    files = (folder / f"{HUB_WEIGHTS}{ending}" for folder in (path, path / "transformer") for ending in ("", INDEX))
    return next((file for file in files if file.is_file()), None)


def _load_hub_file(file: Path) -> dict[str, Tensor]:
    """Load the weights of a file, or of all files that an index names.

    Raises:
        FileNotFoundError: a file that the index names is missing. ValueError: a file is damaged, the index names files
            outside of its folder, or a weight is not in its file.
    """
    if not file.name.endswith(INDEX):
        return _load_safetensors(file)
    try:
        content = read_json(file)
    except BadSample as error:
        raise ValueError(f"init_from={file} is damaged ({error})") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(name, str) and name for name in places.values())
    ):
        raise ValueError(f"init_from={file} is no index of weights: it has no weight_map of names and files")
    if outside := next((name for name in places.values() if Path(name).name != name), None):
        raise ValueError(f"init_from={file} names {outside!r}, which is no file beside it")
    if missing := next((name for name in places.values() if not (file.parent / name).is_file()), None):
        raise FileNotFoundError(f"init_from={file} names {missing}, which is not beside it: download all its files")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        part = _load_safetensors(file.parent / name)
        for weight in (weight for weight, place in places.items() if place == name):
            if weight not in part:
                raise ValueError(f"init_from={file} names {weight} in {name}, which does not hold it")
            weights[weight] = part[weight]
    return weights


def checked_statistics_of(asked: StatisticsOf) -> StatisticsOf:
    """Return a value of `model.init_from_statistics`. Raise ValueError if it is not one of the choices."""
    if asked not in get_args(StatisticsOf):
        raise ValueError(f"model.init_from_statistics={asked} is not one of {', '.join(get_args(StatisticsOf))}")
    return asked


def normalise_as(source: InitSource, statistics: FeatureStatistics, asked: StatisticsOf, student: bool = False) -> None:
    """Set the normalisation of features that the weights were trained with, as far as it is known or asked for.

    Args:
        student: the weights are those of a teacher, which samples with this normalisation and is not trained.
    """
    has_statistics = bool(source.statistics)
    if student and has_statistics and asked in ("data", "identity"):
        raise ValueError(
            f"model.init_from_statistics={asked}: the teacher in {source.path} was trained on features that were "
            "normalised otherwise, and its samples would be wrong; give source"
        )
    if asked == "source" and not has_statistics:
        raise ValueError(
            f"model.init_from_statistics=source: {source.path} says nothing of how features were normalised; give "
            "data or identity"
        )
    if asked == "identity":
        statistics.set_identity()
    elif has_statistics and asked != "data":
        other = statistics.take_normalisation(source.statistics, source.path)
        log.info("features are normalised as in %s", source.path)
        if other:
            log.warning(
                "features of %s have other widths in %s: normalised by these shards", ", ".join(other), source.path
            )
        source_encoders, own_encoders = source.encoders, statistics.encoders
        if UNKNOWN not in (source_encoders, own_encoders) and source_encoders not in ("", own_encoders):
            log.warning(
                "%s was trained with the encoders %s, these shards were made with %s: features mean other things",
                *(source.path, source_encoders, own_encoders),
            )
    elif asked == "auto":
        log.warning(
            "%s says nothing of how features were normalised: they are, by these shards; if it was trained on "
            "features as they are, give model.init_from_statistics=identity",
            source.path,
        )


def _select_weights(content: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The key of the weights in a foreign file, and the weights; "": they are at the top level. The EMA is preferred,
    since such models are sampled with it, if it contains all weights under the same names."""
    sets = {key: value for key, value in content.items() if isinstance(value, Mapping) and _tensor_names(value)}
    trained = next((key for key in ("state_dict", "model") if key in sets), "")
    for key in ("ema", "ema_state_dict", "model_ema"):
        if key in sets and _tensor_names(sets.get(trained, {})) <= _tensor_names(sets[key]):
            return key, sets[key]
        if key in sets:
            log.warning("the EMA under %r is left out: it lacks weights of %r, or names them otherwise", key, trained)
    return (trained, sets[trained]) if trained else ("", content)


def _tensor_names(weights: Mapping[str, Any]) -> set[str]:
    """Names of tensors without the prefixes of wrappers."""
    names = {str(name) for name, value in weights.items() if isinstance(value, Tensor)}
    return {re.sub(r"^((module|_orig_mod|model|network)\.)+", "", name) for name in names}


def _keygrip_source(path: str, content: Mapping[str, Any]) -> InitSource:
    content, weights = merged_checkpoint(content, weights_of(dict(content))[0])
    model = content[HEADER]["config"]["model"]
    network = model.get("network")
    ours = isinstance(network, Mapping) and network.get("_target_") == f"{PatchDiT.__module__}.{PatchDiT.__qualname__}"
    if not ours:
        return InitSource(path, _network_weights(weights))
    statistics = {n.removeprefix(STATISTICS): value for n, value in weights.items() if n.startswith(STATISTICS)}
    if not bool(statistics.get("known", torch.tensor(False)).all()):
        statistics = {}
    stored = content.get(STATE)
    plain_statistics = stored.get("statistics") if isinstance(stored, Mapping) else None
    encoders = plain_statistics.get("encoders") if isinstance(plain_statistics, Mapping) else None
    sizes = plain_statistics.get("latent_sizes", ()) if isinstance(plain_statistics, Mapping) else ()
    guide = {n.removeprefix(GUIDE): value for n, value in weights.items() if n.startswith(GUIDE)}
    return InitSource(
        path,
        _network_weights(weights),
        guide=guide if bool(weights.get(GUIDE_TAKEN, torch.tensor(False))) else {},
        network=network,
        model=model,
        latent_sizes=tuple((int(h), int(w)) for h, w in sizes),
        statistics=statistics,
        encoders=encoders if isinstance(encoders, str) else "",
    )


def _network_weights(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the network only, without a module's statistics and other parts."""
    inside = {name: value for name, value in weights.items() if name.startswith("network.")}
    return {name: value for name, value in (inside or weights).items() if isinstance(value, torch.Tensor)}
