"""Kinds of tasks that `keygrip evaluate` knows, each with its settings and the function that evaluates it.

A LightningModule names its kind by a class attribute, ``evaluation_kind = "policy"``; models import nothing of this
package. To add a kind: a schema and a line in `KINDS` here, its settings in ``conf/evaluate/<kind>.yaml``, and a module
with the function.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf

from keygrip.config import EntrySchema, SettingError, leaves_of, nearest, register
from keygrip.override_values import values_of
from keygrip.setting_types import hints_of, wanted
from keygrip.training.parts import build_stored

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


log = logging.getLogger(__name__)

# Settings that a kind reads only where another one has not a certain value: (kind, other, value, settings, those of
# them that it reads all the same).
IDLE = (
    (
        "policy",
        "simulate",
        "false",
        ("episodes", "suites", "conditions", "first_seed", "processes", "videos", "env", "task", "control", "policy"),
        (),
    ),
    ("policy", "open_loop", "false", ("data",), ("data.root",)),
    ("video_text", "split", "none", ("limit_batches", "data"), ()),
)
Options = TypeVar("Options", bound=Any)  # a dataclass
# What a checkpoint's data settings may take of the machine, unless the caller names them: at most what they have by
# default (of several kinds of data, the most), and none of what only training uses.
MOST_TAKEN = {"num_workers": 4, "prefetch_batches": 4, "memory_gb": 0.0, "cache_gb": 200.0}
KIND = "evaluation_kind"  # attribute of a module's class, and its name in a checkpoint's header


@dataclass
class EvaluateSchema(EntrySchema):
    """Settings of every kind; the values are in ``conf/evaluate.yaml``."""

    checkpoint: str = MISSING
    run_dir: str | None = None
    checkpoint_step: int | None = MISSING
    trust: Any = MISSING
    external: dict[str, Any] = field(default_factory=dict)
    tf32: bool = MISSING


@dataclass
class PolicySchema(EvaluateSchema):
    """Robot policies; the values are in ``conf/evaluate/policy.yaml``."""

    open_loop: bool = MISSING
    simulate: bool = MISSING
    data: dict[str, Any] = field(default_factory=dict)
    episodes: int = MISSING
    suites: Any = MISSING
    conditions: Any = MISSING
    first_seed: int = MISSING
    processes: int | None = MISSING
    videos: int = MISSING
    env: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    control: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)


@dataclass
class VideoTextSchema(EvaluateSchema):
    """Video-language models; the values are in ``conf/evaluate/video_text.yaml``."""

    mode: Any = MISSING
    split: str = MISSING
    data: dict[str, Any] = field(default_factory=dict)
    limit_batches: int | None = MISSING
    max_frames: int | None = MISSING
    max_new_tokens: int = MISSING
    vqa_benchmarks: dict[str, Any] = field(default_factory=dict)
    vqa_answers: str | None = MISSING


@dataclass
class ImageTextSchema(EvaluateSchema):
    """Models that generate images; the values are in ``conf/evaluate/image_text.yaml``."""

    cases: Any = MISSING
    split: str = MISSING
    data: dict[str, Any] = field(default_factory=dict)
    images: int = MISSING
    batch_size: int | None = MISSING
    text_scales: Any = MISSING
    dino_scales: Any = MISSING
    step_counts: Any = MISSING
    grid_images: int = MISSING
    sampling: Any = MISSING
    precision: str = MISSING
    lpips: str = MISSING
    replace_words: Any = MISSING
    shown: int = MISSING
    clip: str | None = MISSING
    features: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """How models of one kind are evaluated.

    Args:
        run: dotted name of a function from `Evaluated` and the composed settings to a dictionary of figures. A name, so
            that the simulator, torch and the metrics are imported only for the kind that is evaluated.
        schema: the settings and their types.
    """

    run: str
    schema: type[EvaluateSchema]

    def settings(self) -> list[str]:
        """Names of the settings that this kind adds to the common ones."""
        common = {setting.name for setting in fields(EvaluateSchema)}
        return [setting.name for setting in fields(self.schema) if setting.name not in common]


KINDS = {
    "policy": Kind("keygrip.evaluation.policy.evaluate_policy", PolicySchema),
    "video_text": Kind("keygrip.evaluation.video_text.evaluate_answers", VideoTextSchema),
    "image_text": Kind("keygrip.evaluation.image_text.evaluate_images", ImageTextSchema),
}
for _name, _kind in KINDS.items():
    register(f"evaluate_{_name}_schema", _kind.schema)


@dataclass(frozen=True)
class Evaluated:
    """What is evaluated, and where the files of the evaluation go.

    Args:
        module: with the weights of the checkpoint. config: of the run that trained it. checkpoint: its file.
        output: a folder, made by what writes into it. trust: packages beside keygrip whose parts may be built.
        external: files that the model needs and the checkpoint does not hold, by dotted setting.
    """

    module: LightningModule
    config: DictConfig
    checkpoint: Path
    output: Path
    trust: tuple[str, ...] = ()
    external: Mapping[str, Any] = field(default_factory=dict)

    def stored_data(self, changes: Mapping[str, Any] | None = None) -> Any:
        """The data module of the run, built from the stored configuration; it makes nothing that is missing, fetches
        nothing from an address that `changes` do not name, and takes no more of the machine than `MOST_TAKEN`. Where
        `changes` do not name ``cache_gb``, copies of remote shards that a training made stay: it may be running.

        Args:
            changes: settings that take the place of stored ones, nested as these are.

        Raises:
            UntrustedPartError: the configuration names what may not be built or fetched. ValueError: the data have no
                such setting, or no such part: a source that is not there has nothing that could be changed; or a value
                of another type.
        """
        stored = OmegaConf.create(_within_limits(plain(self.config.data), changes or {}))
        _refuse_unknown_parts(stored, changes or {}, "data")
        try:
            merged = plain(OmegaConf.merge(stored, dict(changes or {})))
            named = {".".join(path): value for path, value in leaves_of(changes or {}, ())}
            if stored.get("cache_dir") is not None and "cache_dir" not in named:
                log.warning(
                    "the run's data.cache_dir=%s is left aside: nothing is written where a checkpoint says; name it, "
                    "or another folder, with data.cache_dir=FOLDER",
                    stored.cache_dir,
                )
            built = build_stored(merged, "data", self.trust, offered=named)
        except (TypeError, AttributeError) as error:
            if not changes:
                raise
            raise ValueError(f"data: the run's data cannot be made with these settings: {error}") from error
        if hasattr(built, "spares_copies"):
            built.spares_copies = "cache_gb" not in named
        return built


def _within_limits(stored: Any, named: Mapping[str, Any]) -> Any:
    """Stored data settings that take no more of this machine than `MOST_TAKEN`, but for those that are named."""
    if not isinstance(stored, Mapping):
        return stored
    lowered = {}
    for name, most in MOST_TAKEN.items():
        value = stored.get(name)
        if name not in named and isinstance(value, int | float) and value > most:
            lowered[name] = most
            log.info("the run's data.%s=%s is lowered to %s: name it to have more", name, value, most)
    return {**stored, **lowered}


def _refuse_unknown_parts(stored: Any, changes: Mapping[str, Any], place: str) -> None:
    """Raises ValueError: `changes` set something of a part that the stored mapping of parts does not have, or
    leave it out."""
    for name, value in changes.items():
        if value is not None and not isinstance(value, Mapping):
            continue
        parts = {str(key): node for key, node in stored.items()} if isinstance(stored, DictConfig) else {}
        of_parts = [node for node in parts.values() if isinstance(node, DictConfig) and "_target_" in node]
        known = name in parts if value is None else "_target_" in value  # a new part of its own; null leaves one out
        if value is not None and parts.get(name) is not None:
            _refuse_unknown_parts(parts[name], value, f"{place}.{name}")
        elif of_parts and "_target_" not in parts and not known:
            close = nearest(f"{place}.{name}", [f"{place}.{key}" for key in parts])
            hint = f"the nearest is {close!r}" if close else f"it has {', '.join(parts)}"
            raise ValueError(f"the run's {place} has no {name!r}: {hint}")


def checked_kind(name: str | None, what: str) -> str:
    """``name`` if it is a kind of `KINDS`.

    Args:
        name: `evaluation_kind` of a module's class; None where it has none. what: is evaluated, for messages.

    Raises:
        ValueError: it is not.
    """
    if name is None:
        raise ValueError(f"{what}, which has no evaluation")
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"{what} of the kind {name!r}: kinds are {', '.join(KINDS)}")
    return name


def choose_kind(overrides: Sequence[str]) -> list[str]:
    """The override that selects the settings of the checkpoint that ``overrides`` name; none where they name no
    checkpoint, or a kind. The checkpoint's header is read as data: nothing of it is imported.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, one of a model without evaluation, or checkpoints of several
            kinds in one sweep.
        SettingError: a setting of another kind.
    """
    given = {key.lstrip("+~"): value for key, _, value in (override.partition("=") for override in overrides)}
    paths = values_of("checkpoint", given.get("checkpoint", ""))
    if not paths or "evaluate" in given:
        return []
    from keygrip.training.checkpoints import HEADER, find_checkpoint, read_checkpoint

    found: dict[str, str] = {}
    for path in paths:
        file = find_checkpoint(path)
        header = read_checkpoint(file, mapped=True)[HEADER]
        what = f"{file} holds a {str(header['config']['model'].get('_target_')).rpartition('.')[2]}"
        found[checked_kind(header.get(KIND), what)] = what
    if len(found) > 1:
        raise ValueError(f"{'; '.join(found.values())}: models of different kinds are evaluated in separate commands")
    ((name, what),) = found.items()
    own = KINDS[name].settings()
    for key in given:
        root = key.partition(".")[0]
        other = next((kind for kind in KINDS if root in KINDS[kind].settings()), None)
        if root not in own and other is not None:
            close = nearest(key, own)
            hint = f"the nearest is {close!r}" if close else f"settings are {', '.join(own)}"
            raise SettingError(f"{what}, and {key!r} is a setting of evaluate={other}; in evaluate={name} {hint}")
    for kind, other, value, settings, still_read in IDLE:
        idle = [key for key in given if key.partition(".")[0] in settings and key not in still_read]
        if kind == name and given.get(other, "").lower() == value and idle:
            raise SettingError(f"nothing reads {idle[0]!r} with {other}={value}: leave one of them out")
    return [f"evaluate={name}"]


def plain(node: Any) -> Any:
    """A config node as dictionaries, lists and scalars."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def changed(options: Options, overrides: Mapping[str, Any]) -> Options:
    """A dataclass of options with some of them changed.

    Raises:
        ValueError: an option that does not exist or a value that it cannot have.
    """
    if not overrides:
        return options
    refuse_unknown(overrides, type(options))
    hints = hints_of(type(options))
    for name, value in overrides.items():
        problem = wanted(value, hints.get(name, Any))
        if problem is not None:
            raise ValueError(f"{type(options).__name__}.{name}={value!r}: must be {problem}")
    return replace(options, **overrides)


def refuse_unknown(names: Iterable[str], kind: type) -> None:
    """Raise ValueError, naming the nearest, where ``kind`` (a dataclass) has no such setting."""
    hints = hints_of(kind)
    known = [option.name for option in fields(kind) if option.init and not _is_given(option, hints.get(option.name))]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(known) or 'none'}."
            raise ValueError(f"{kind.__name__} has no setting {name!r}; {hint}")


def _is_given(option: Field[Any], hint: Any) -> bool:
    """Whether a field is no setting, but a part that whoever makes the object gives it: a policy's network."""
    required = option.default is option.default_factory  # both are missing
    return required and isinstance(hint, type) and hint.__module__ != "builtins"
