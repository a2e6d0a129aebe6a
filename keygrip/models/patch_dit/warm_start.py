"""Warm start: a partial load of another checkpoint. Unmatched weights are listed; too few matches are an error.

Names of other implementations are translated: by the user's rules, then by the usual rules below. Weights in another
order are reordered, because a layer of the right name and shape with its rows in another order would be loaded without
an error. If a user's rule leads to a usual name (``^head\\.`` to ``final_proj.``), the rows are assumed to be in the
usual order of that name and are reordered. If it leads to our name (``latent_out.``), the rows are assumed to be in our
order and are not changed. In detail:

- ``qkv`` is split into query and key_value, separate keys and values are joined;
- ``adaLN_modulation.1`` contains shift and scale (and gate) of one branch after the other, ours all shifts, then all
  scales; six vectors are three shifts and scales only in the source's own transformer, elsewhere shift, scale and gate
  of two branches, and are left out with a warning;
- ``final_proj`` and ``final_layer.linear`` order a token's values by (row, column, channel), ours by channel first;
- null embeddings in the features' own space, before the projection, are projected;
- a layer without a bias in the file gets a bias of zeros here; parameters that differ only by axes of length 1 are
  loaded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

import torch
from torch import Tensor, nn

from keygrip.models.nn.lora import is_difference, plain_name
from keygrip.models.patch_dit.foreign_settings import (
    SOURCE_CONFIG,
    as_overrides,
    foreign_settings,
    has_source_names,
    other_settings,
    plain,
)
from keygrip.models.patch_dit.init_source import InitSource
from keygrip.models.patch_dit.network import PatchDiT

log = logging.getLogger(__name__)

# Prefixes that wrappers add to a network's own names; removed if a name does not fit with them.
PREFIXES = ("network.", "model.", "module.", "ema.", "_orig_mod.")
SHOWN = 12
# Usual names of diffusion transformers, as regular expressions, and ours. Each rule is applied once, in this order.
USUAL = {
    r"^transformer_blocks\.": "blocks.",
    r"^pos_embed\.proj\.": "latent_in.",
    r"\.(attn|self_attn|attn1)\.": ".self_attention.",
    r"\.(cross_attn|attn2)\.": ".cross_attention.",
    r"\.(to_q|q_proj|q)\.": ".query.",
    r"\.kv\.": ".key_value.",
    r"attention\.(proj|out_proj|to_out\.0|to_out)\.": "attention.output.",
    r"\.(q_norm|norm_q)\.": ".query_norm.",
    r"\.(k_norm|norm_k)\.": ".key_norm.",
    r"\.mlp\.fc1\.": ".mlp.0.",
    r"\.mlp\.fc2\.": ".mlp.2.",
    r"\.(ff\.net\.0\.proj)\.": ".mlp.0.",
    r"\.(ff\.net\.2)\.": ".mlp.2.",
    r"^final_layer\.(adaLN_modulation\.1|adaln_modulation\.1|modulation\.1)\.": "final_modulation.linear.",
    r"\.(adaLN_modulation\.1|adaln_modulation\.1|modulation\.1)\.": ".modulation.linear.",
    r"^(x_embedder|patch_embed)\.(proj\.)?": "latent_in.",
    r"^(t_embedder|time_embed|timestep_embedder)\.mlp\.": "level_embedding.mlp.",
    r"^(final_proj|final_layer\.linear|proj_out)\.": "latent_out.",
    r"^output_conv\.": "output_convolution.",
    r"^null_dino_patch_token$": "null_dino_patches",
    r"^(context_builder\.)?((text|dino|dino_patch)_proj\.|null_(text|dino|dino_patches)$)": r"context_builder.\2",
}
BUILDER = "context_builder."
PROJECTED = {"null_text": "text_proj", "null_dino": "dino_proj", "null_dino_patches": "dino_patch_proj"}
PARTS = (6, 9)  # vectors of a block's modulation: shift and scale of three branches, with or without gates
KEYS, VALUES = ("to_k", "k_proj", "k"), ("to_v", "v_proj", "v")  # of attention, if they are separate layers


@dataclass(frozen=True)
class WarmStart:
    """Result of a partial state-dict load.

    Args:
        loaded: loaded parameters. unexpected: in the file and not in the network. missing: in the network and not in
            the file. reshaped: in both, with different shapes, as "name (file -> network)". zeroed: biases of layers
            without a bias in the file, also listed as missing. Other missing or reshaped ones stay as initialised.
    """

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    zeroed: list[str] = field(default_factory=list)

    def describe(self) -> list[str]:
        """One line for each list; long lists are cut off."""
        lines = [f"{len(self.loaded)} parameters taken over"]
        for title, names in (
            ("new, initialised afresh", [name for name in self.missing if name not in self.zeroed]),
            ("biases set to zero, the file has none", self.zeroed),
            ("not of this network, left out", self.unexpected),
            ("of another shape, initialised afresh", self.reshaped),
        ):
            if names:
                suffix = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                lines.append(f"{len(names)} {title}: {', '.join(names[:SHOWN])}{suffix}")
        return lines

    def refuse_partial(self, setting: str, source: InitSource, network: nn.Module) -> None:
        """Refuse a start from another network than this one.

        Args:
            setting: the setting that requires the whole network. network: this one; other content of a foreign file
                (fixed positions, a text encoder) is not part of it.

        Raises:
            ValueError: parameters are missing, left over or of another shape.
        """
        parts = {name for name, _ in network.named_children()}
        left = [name for name in self.unexpected if source.network is not None or name.split(".")[0] in parts]
        new = [name for name in self.missing if name not in self.zeroed and not is_difference(f"{name}.")]
        issues = [
            f"{kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for kind, names in (("missing there", new), ("left over", left), ("reshaped", self.reshaped))
            if names
        ]
        if issues:
            raise ValueError(
                f"{setting} keeps the network of model.init_from={source.path}, and this one is another "
                f"({'; '.join(issues)}): give the settings that it was trained with (its ablation=..., model.network.*)"
            )


def warm_start(
    network: PatchDiT,
    source: InitSource,
    renames: Mapping[str, str] | None = None,
    min_share: float = 0.0,
    whole_for: str | None = None,
) -> WarmStart:
    """Copy matching weights into the network and log those that do not match.

    Args:
        renames: regular expressions and their replacements, for names that are not the network's; applied before the
            usual ones. min_share: share of the network's weights that must be loaded.
        whole_for: a setting that requires exactly this network in the source.

    Raises:
        ValueError: the source's weights compute something else (see `refuse_other_function`), nothing or too little
            matches, or a rule is not a regular expression.
    """
    source.refuse_other_meaning(network)
    report = take(network, source.weights, source.path, renames, min_share)
    for line in report.describe():
        log.info("warm start from %s: %s", source.path, line)
    if whole_for is not None:
        report.refuse_partial(whole_for, source, network)
    new_patches = any(name.startswith("context_builder.dino_patch_proj") for name in report.missing)
    if new_patches and not network.separate_patches:
        log.warning(
            "model.init_from=%s has no patches: in the joint context the new tokens change its output at once; with "
            "model.network.patch_attention=separate it is the same at step 0",
            source.path,
        )
    return report


@torch.no_grad()
def take(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    renames: Mapping[str, str] | None = None,
    min_share: float = 0.0,
) -> WarmStart:
    """As `warm_start`, from weights by name."""
    own = {plain_name(name): parameter for name, parameter in network.named_parameters()}
    found = translated(weights, own, renames or {}, int(getattr(network, "patch_size", 1)))
    for name, value in found.items():  # for example a null embedding of shape [1, 1, D]
        if name in own and value.shape != own[name].shape and _squeezed_shape(value) == _squeezed_shape(own[name]):
            found[name] = value.reshape(own[name].shape)
    if isinstance(network, PatchDiT):
        refuse_other_function(network, weights, found, source)
    loaded = [name for name in own if name in found and found[name].shape == own[name].shape]
    reshaped = [
        f"{name} ({_format_shape(found[name])} -> {_format_shape(own[name])})"
        for name in own
        if name in found and found[name].shape != own[name].shape
    ]
    if not loaded:
        raise ValueError(
            f"init_from={source}: none of its {len(weights)} tensors fits this network by name and shape "
            f"(it has {', '.join(list(weights)[:3]) or 'none'}; the network {', '.join(list(own)[:3])}). "
            "Translate names with model.init_from_renames=[[PATTERN,NAME]]"
        )
    # Low-rank differences are always new, so they are left out of the share.
    counted = {name: value.numel() for name, value in own.items() if not is_difference(name)}
    share = sum(counted.get(name, 0) for name in loaded) / sum(counted.values())
    missing = [name for name in own if name not in found]
    if share < min_share:
        raise ValueError(
            f"init_from={source}: {share:.1%} of the network's numbers fit by name and shape, fewer than "
            f"model.init_from_min_share={min_share:g}. Not found: {', '.join(missing[:6]) or 'none'}; left over: "
            f"{', '.join(sorted(set(found) - set(own))[:6]) or 'none'}; of another shape: "
            f"{', '.join(reshaped[:3]) or 'none'}. Translate names with model.init_from_renames=[[PATTERN,NAME]]"
        )
    _refuse_unfit_numbers({name: found[name] for name in loaded}, source)
    for name in loaded:
        own[name].copy_(found[name])
    layers = {f"{name}.bias" for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    layers = {plain_name(name) for name in layers}
    zeroed = [name for name in missing if name in layers and f"{name.removesuffix('bias')}weight" in loaded]
    for name in zeroed:
        own[name].zero_()
    unexpected = sorted(name for name in found if name not in own)
    return WarmStart(loaded, missing, unexpected, reshaped, zeroed)


def refuse_other_function(
    network: PatchDiT, weights: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str
) -> None:
    """Refuse weights of the source's own transformer if this network computes something else with them; for other
    files, warn if names and shapes show such a difference.

    Patches without positions are a shortcoming of the source: a network that adds positions causes only a warning.

    Args:
        weights: under the file's names. found: under ours. source: for messages.

    Raises:
        ValueError: the message gives the settings with which the network computes the same.
    """
    foreign = foreign_settings(weights, found)
    has_patches = f"{BUILDER}dino_patch_proj.weight" in found
    other = other_settings(network.meaning, foreign.known or foreign.shown, has_patches and network.use_dino_patches)
    adds_positions = other.pop("patch_positions", None) is not None
    ours = ", ".join(f"{name}={plain(network.meaning[name])}" for name in other)
    if other and foreign.is_source:
        raise ValueError(
            f"init_from={source} holds weights of the source's own transformer, with which this network ({ours}) "
            f"computes something else. Give {as_overrides(other)}; model={SOURCE_CONFIG} has all of them"
        )
    if other:
        log.warning(
            "init_from=%s comes from a network with other settings than this one's (%s): its layers are left out or "
            "initialised afresh, and the output is another. The same is %s",
            *(source, ours, as_overrides(other)),
        )
    if adds_positions:
        log.warning(
            "patches have no positions in init_from=%s and have some here: the output is another at step 0. The same "
            "is model.network.patch_positions=false, by which the layout of patches is lost",
            source,
        )


def rename_rules(given: Mapping[str, str] | Sequence[Sequence[str]] | None) -> dict[str, str]:
    """Rules of `model.init_from_renames`, given as ordered pairs or as a mapping.

    Raises:
        ValueError: a rule is not a pair of strings, its pattern is not a regular expression, or its name refers to a
            group that the pattern does not have.
    """
    pairs: list[Sequence[str]] = list(given.items() if isinstance(given, Mapping) else given or ())
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"model.init_from_renames holds {pair!r}: give pairs, [[PATTERN,NAME],...]")
        try:
            pattern = re.compile(pair[0])
        except re.error as error:
            raise ValueError(f"model.init_from_renames: {pair[0]!r} is no regular expression ({error})") from error
        try:
            pattern.sub(pair[1], "")  # checks the name, whether or not the pattern matches
        except (re.error, IndexError) as error:
            raise ValueError(
                f"model.init_from_renames: in {list(pair)!r} the name cannot be put in place of the pattern ({error}): "
                "its groups are \\1, \\2, ... or \\g<NAME>"
            ) from error
    return {pair[0]: pair[1] for pair in pairs}


def translated(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], renames: Mapping[str, str], patch_size: int = 1
) -> dict[str, Tensor]:
    """Weights under the network's names and in its order, if rules lead to such a name; other weights keep their names,
    without a wrapper's prefix.

    Args:
        patch_size: of the network, used to reorder the output layer's rows.

    Raises:
        ValueError: a rule is invalid (see `rename_rules`) or changes no name, or two tensors get the same name.
    """
    renames = rename_rules(renames)
    entries: list[_Entry] = []
    idle = set(renames)
    wrapper = _common_prefix(weights)
    for name, value in weights.items():
        plain = start = _strip_wrappers(name.removeprefix(wrapper), own)
        for pattern, replacement in renames.items():
            renamed = plain if plain in own else re.sub(pattern, replacement, plain)
            if wrapper and renamed == plain and plain not in own:  # the rule may be written for the file's own names
                full_name = re.sub(pattern, replacement, wrapper + plain)
                idle -= {pattern} if full_name != wrapper + plain else set()
                renamed = full_name.removeprefix(wrapper)
            idle -= {pattern} if renamed != plain else set()
            plain = renamed
        entries.append(_Entry(name, plain, value, by_rule=_name_within_block(plain) != _name_within_block(start)))
    if idle:
        raise ValueError(f"model.init_from_renames: {sorted(idle)[0]!r} changes no name of the file")
    of_source = has_source_names(weights) or has_source_names(entry.plain for entry in entries)
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    gates: list[str] = []
    for entry in _join_keys_values(entries, own):
        name, plain, value = entry.name, entry.plain, entry.value
        if plain not in own:
            for pattern, replacement in USUAL.items():
                plain = plain if plain in own else re.sub(pattern, replacement, plain)
            unsure = plain in own and not of_source and not entry.by_rule and value.shape == own[plain].shape
            if unsure and _count_modulation_vectors(plain, value, own) == PARTS[0]:
                gates.append(name)
                plain = name
            value = _reorder_rows(plain, value, own, patch_size) if plain in own else value
        parts = _split_qkv(plain, value)
        fits = plain in own or any(part in own for part in parts)
        new = parts if fits else {_strip_wrappers(name, own): value}
        for part in new.keys() & tensors.keys():
            if not torch.equal(tensors[part], new[part]):
                _refuse_ambiguous(origin[part], name, part)
        tensors |= new
        origin |= dict.fromkeys(new, name)
    if gates:
        log.warning(
            "%s and %d more of the file are left out: six vectors of a block are usually shift, scale and gate of two "
            "branches, and this network's are shift and scale of three. Where the file's are these, say how they stand "
            "with model.init_from_renames: [[PATTERN,modulation.1]] one branch after the other, "
            "[[PATTERN,modulation.linear]] all shifts, then all scales",
            *(gates[0], len(gates) - 1),
        )
    return _project_null_embeddings(tensors, own)


def _refuse_unfit_numbers(weights: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError if weights are quantised (their scales are not known here) or not finite."""
    for name, value in weights.items():
        if not value.is_floating_point() or value.element_size() < 2:
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(f"init_from={source}: {name} holds numbers of {kind}: give weights that are not quantised")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"init_from={source}: {name} holds NaN or infinite numbers: the file is damaged")


def _reorder_rows(name: str, value: Tensor, own_weights: Mapping[str, Tensor], patch_size: int) -> Tensor:
    """A parameter of another implementation, under our name, with its rows in our order."""
    cells = patch_size**2
    if name.startswith("latent_out.") and not value.shape[0] % cells:
        return value.unflatten(0, (cells, -1)).transpose(0, 1).flatten(0, 1)
    count = _count_modulation_vectors(name, value, own_weights)
    return value.unflatten(0, (3, count // 3, -1)).transpose(0, 1).flatten(0, 2) if count in PARTS else value


def _count_modulation_vectors(name: str, value: Tensor, own_weights: Mapping[str, Tensor]) -> int:
    """Number of vectors of the network's width in a block's modulation; 0: the parameter is not a modulation."""
    if not name.startswith("blocks.") or ".modulation.linear." not in name:
        return 0
    count, remainder = divmod(value.shape[0], own_weights[f"{name.rpartition('.')[0]}.weight"].shape[1])
    return 0 if remainder else count


def _project_null_embeddings(weights: dict[str, Tensor], own_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Project null embeddings that are in the features' space, in the same way as features."""
    for null, projection in PROJECTED.items():
        weight = weights.get(f"{BUILDER}{projection}.weight")
        value, bias = weights.get(BUILDER + null), weights.get(f"{BUILDER}{projection}.bias")
        if value is None or weight is None or BUILDER + null not in own_weights or weight.ndim != 2:
            continue
        if value.numel() == weight.shape[1] and value.numel() != own_weights[BUILDER + null].numel():
            projected = weight.float() @ value.float().flatten()
            weights[BUILDER + null] = (projected if bias is None else projected + bias.float()).to(value)
    return weights


def _split_qkv(name: str, value: Tensor) -> dict[str, Tensor]:
    """Split a fused layer of queries, keys and values into the two layers of our attention."""
    stem, fused, part = name.rpartition(".qkv.")
    if not fused or value.shape[0] % 3:
        return {name: value}
    width = value.shape[0] // 3
    return {f"{stem}.query.{part}": value[:width], f"{stem}.key_value.{part}": value[width:]}


@dataclass(frozen=True)
class _Entry:
    """A parameter of a file: its name there, the name after the user's rules, and whether these rules changed its name
    within its block."""

    name: str
    plain: str
    value: Tensor
    by_rule: bool


def _name_within_block(name: str) -> str:
    """A parameter's name within its block; the whole name if it is not in a block."""
    return re.sub(r"^(.*\.)?blocks\.\d+\.", "", name)


def _refuse_ambiguous(first: str, second: str, own_name: str) -> NoReturn:
    raise ValueError(
        f"{first} and {second} of the file are both {own_name} of the network, and differ: leave one set of weights "
        "(such as the EMA) in the file"
    )


def _join_keys_values(entries: Sequence[_Entry], own_weights: Mapping[str, Tensor]) -> list[_Entry]:
    """Join separate layers of keys and values into one layer, ``kv``."""
    by_name: dict[str, _Entry] = {}
    for entry in entries:
        if entry.plain not in own_weights:
            first = by_name.setdefault(entry.plain, entry)
            if not torch.equal(first.value, entry.value):
                _refuse_ambiguous(first.name, entry.name, entry.plain)
    joined, used_names = list[_Entry](), set[str]()
    for name, entry in by_name.items():
        stem, _, part = name.rpartition(".")
        parent, _, layer = stem.rpartition(".")
        other = by_name.get(f"{parent}.{VALUES[KEYS.index(layer)]}.{part}") if layer in KEYS else None
        if other is not None and other.value.shape == entry.value.shape:
            stacked = torch.cat([entry.value, other.value])
            joined.append(replace(entry, plain=f"{parent}.kv.{part}", value=stacked))
            used_names |= {name, other.plain}
    return [*(entry for entry in entries if entry.plain not in used_names), *joined]


def _squeezed_shape(value: Tensor) -> list[int]:
    """The lengths of its axes without those of 1; for kernels over patches [D, C, p, p] the last three are joined."""
    shape = [size for size in value.shape if size != 1]
    return [shape[0], shape[1] * shape[2] * shape[3]] if len(shape) == 4 else shape


def _common_prefix(weights: Mapping[str, Tensor]) -> str:
    """The prefix that wrappers added to all names; may be empty."""
    wrapper = ""
    while prefix := next((p for p in PREFIXES if weights and all(n.startswith(wrapper + p) for n in weights)), ""):
        wrapper += prefix
    return wrapper


def _strip_wrappers(name: str, own_weights: Mapping[str, Tensor]) -> str:
    """A name as in the network, without the prefixes of wrappers."""
    shorter = name
    while shorter not in own_weights:
        prefix = next((prefix for prefix in PREFIXES if shorter.startswith(prefix)), None)
        if prefix is None:
            return name.removeprefix("network.")
        shorter = shorter.removeprefix(prefix)
    return shorter


def _format_shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
