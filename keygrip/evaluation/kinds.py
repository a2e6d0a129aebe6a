"""Kinds of tasks that `keygrip evaluate` supports, each with its settings and the function that evaluates it.

A LightningModule names its kind by a class attribute, ``evaluation_kind = "policy"``; models import nothing from this
package. To add a kind, add a schema and a line in `KINDS` here, its settings in ``conf/evaluate/<kind>.yaml``, and a
module with the function.
"""

from __future__ import annotations

import difflib
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf

from keygrip.config import EntrySchema, SettingError, leaves_of, register
from keygrip.nearest_setting import nearest
from keygrip.override_values import values_of
from keygrip.setting_types import hints_of, type_problem
from keygrip.training.parts import build_stored

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


log = logging.getLogger(__name__)

# Settings that a kind does not use if another setting has a certain value: (kind, other setting, value, unused
# settings, those of them that are used nevertheless).
IDLE = (
    (
        "policy",
        "simulate",
        "false",
        ("episodes", "suites", "conditions", "first_seed", "processes", "videos", "env", "task", "control", "policy"),
        (),
    ),
    ("policy", "open_loop", "false", ("data",), ("data.root",)),
    (
        "video_text",
        "split",
        "none",
        ("limit_batches", "data"),
        ("data.max_frames", "data.fit", "data.image_frames"),  # the benchmarks are read like the split
    ),
)
Options = TypeVar("Options", bound=Any)  # a dataclass
# Machine resources that a checkpoint's data settings may use unless the caller sets them: at most the defaults (of
# several kinds of data, the largest), and none of those used only in training.
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
    device: str | None = MISSING


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
    """What is evaluated, and where the files of the evaluation are written.

    Args:
        module: with the weights of the checkpoint. config: of the run that trained it. checkpoint: its file.
        output: a folder, created when something is written into it. trust: packages besides keygrip whose parts may be
            built. external: files that the model needs and the checkpoint does not hold, by dotted setting.
    """

    module: LightningModule
    config: DictConfig
    checkpoint: Path
    output: Path
    trust: tuple[str, ...] = ()
    external: Mapping[str, Any] = field(default_factory=dict)

    def stored_data(self, changes: Mapping[str, Any] | None = None) -> Any:
        """Build the data module of the run from the stored configuration. It creates nothing that is missing, downloads
        nothing from an address that is not in `changes`, and uses no more machine resources than `MOST_TAKEN`. If
        `changes` do not contain ``cache_gb``, copies of remote shards made by a training are kept, because it may be
        running.

        Args:
            changes: settings that replace stored ones, nested like them.

        Raises:
            UntrustedPartError: The configuration names parts that must not be built or downloaded. ValueError: The data
                have no such setting or part (a source that does not exist has nothing to change), or a value has
                another type.
        """
        stored = OmegaConf.create(_limit_resources(plain(self.config.data), changes or {}))
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


def _limit_resources(stored: Any, explicit: Mapping[str, Any]) -> Any:
    """Limit stored data settings to the resources of `MOST_TAKEN`, except for settings in `explicit`."""
    if not isinstance(stored, Mapping):
        return stored
    lowered = {}
    for name, limit in MOST_TAKEN.items():
        value = stored.get(name)
        if name not in explicit and isinstance(value, int | float) and value > limit:
            lowered[name] = limit
            log.info("the run's data.%s=%s is lowered to %s: name it to have more", name, value, limit)
    return {**stored, **lowered}


def _refuse_unknown_parts(stored: Any, changes: Mapping[str, Any], path: str) -> None:
    """Raise ValueError if `changes` set or remove a part that the stored mapping of parts does not have."""
    for name, value in changes.items():
        if value is not None and not isinstance(value, Mapping):
            continue
        parts = {str(key): node for key, node in stored.items()} if isinstance(stored, DictConfig) else {}
        of_parts = [node for node in parts.values() if isinstance(node, DictConfig) and "_target_" in node]
        known = name in parts if value is None else "_target_" in value  # a complete new part; null removes a part
        if value is not None and parts.get(name) is not None:
            _refuse_unknown_parts(parts[name], value, f"{path}.{name}")
        elif of_parts and "_target_" not in parts and not known:
            close = nearest(f"{path}.{name}", [f"{path}.{key}" for key in parts])
            hint = f"the nearest is {close!r}" if close else f"it has {', '.join(parts)}"
            raise ValueError(f"the run's {path} has no {name!r}: {hint}")


def checked_kind(name: str | None, what: str) -> str:
    """Return ``name`` if it is a kind of `KINDS`.

    Args:
        name: `evaluation_kind` of a module's class; None if it has none. what: the evaluated object, for messages.

    Raises:
        ValueError: It is not a kind.
    """
    if name is None:
        raise ValueError(f"{what}, which has no evaluation")
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"{what} of the kind {name!r}: kinds are {', '.join(KINDS)}")
    return name


def choose_kind(overrides: Sequence[str]) -> list[str]:
    """Return the override that selects the settings for the checkpoint in ``overrides``; none if they contain no
    checkpoint, or already a kind. The checkpoint's header is read as data; nothing from it is imported.

    Raises:
        FileNotFoundError, ValueError: The checkpoint does not exist or its model has no evaluation, or a sweep has
            checkpoints of several kinds.
        SettingError: A setting belongs to another kind.
    """
    given_values = {key.lstrip("+~"): value for key, _, value in (override.partition("=") for override in overrides)}
    paths = values_of("checkpoint", given_values.get("checkpoint", ""))
    if not paths or "evaluate" in given_values:
        return []
    from keygrip.training.checkpoints import HEADER, find_checkpoint, read_checkpoint

    steps = values_of("checkpoint_step", given_values.get("checkpoint_step", "")) or [""]
    descriptions: dict[str, str] = {}
    for path, step in itertools.product(paths, steps):
        file = find_checkpoint(path, int(step) if step.isdecimal() else None)  # Hydra reports what is no number
        header = read_checkpoint(file, mapped=True)[HEADER]
        description = f"{file} holds a {str(header['config']['model'].get('_target_')).rpartition('.')[2]}"
        descriptions[checked_kind(header.get(KIND), description)] = description
    if len(descriptions) > 1:
        raise ValueError(
            f"{'; '.join(descriptions.values())}: models of different kinds are evaluated in separate commands"
        )
    ((name, description),) = descriptions.items()
    own_settings = KINDS[name].settings()
    for key in given_values:
        root = key.partition(".")[0]
        other = next((kind for kind in KINDS if root in KINDS[kind].settings()), None)
        if root not in own_settings and other is not None:
            close = nearest(key, own_settings)
            hint = f"the nearest is {close!r}" if close else f"settings are {', '.join(own_settings)}"
            raise SettingError(
                f"{description}, and {key!r} is a setting of evaluate={other}; in evaluate={name} {hint}"
            )
    for kind, other, value, settings, still_read in IDLE:
        idle = [key for key in given_values if key.partition(".")[0] in settings and key not in still_read]
        if kind == name and given_values.get(other, "").lower() == value and idle:
            raise SettingError(f"nothing reads {idle[0]!r} with {other}={value}: leave one of them out")
    return [f"evaluate={name}"]


def plain(node: Any) -> Any:
    """Convert a config node to dictionaries, lists and scalars."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def changed(options: Options, overrides: Mapping[str, Any], place: str | None = None) -> Options:
    """Return a dataclass of options with some of them changed.

    Args:
        place: see `refuse_invalid`.

    Raises:
        ValueError: An option does not exist or cannot have the value.
    """
    if not overrides:
        return options
    refuse_invalid(overrides, type(options), place)
    return replace(options, **overrides)


def refuse_invalid(overrides: Mapping[str, Any], kind: type, place: str | None = None) -> None:
    """Raise ValueError if ``kind`` (a dataclass) has no such option, or one cannot have a value of this type.

    Args:
        place: where the options stand among the settings of the command, for the error: "" at the top, "features";
            None: unknown, the error then names the class.
    """
    refuse_unknown(overrides, kind)
    hints = hints_of(kind)
    for name, value in overrides.items():
        problem = type_problem(value, hints.get(name, Any))
        if problem is not None:
            setting = ".".join(filter(None, (kind.__name__ if place is None else place, name)))
            raise ValueError(f"{setting}={value!r}: must be {problem}")


def refuse_unknown(names: Iterable[str], kind: type) -> None:
    """Raise ValueError, with the nearest name, if ``kind`` (a dataclass) has no such setting."""
    hints = hints_of(kind)
    known = [option.name for option in fields(kind) if option.init and not _is_given(option, hints.get(option.name))]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(known) or 'none'}."
            raise ValueError(f"{kind.__name__} has no setting {name!r}; {hint}")


def _is_given(option: Field[Any], hint: Any) -> bool:
    """Return whether a field is not a setting but a part that the creator of the object passes: a policy's network."""
    required = option.default is option.default_factory  # both are MISSING
    return required and isinstance(hint, type) and hint.__module__ != "builtins"
