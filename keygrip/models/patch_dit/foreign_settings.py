"""Settings of the network that a file of weights was trained in, as far as names and shapes show them.

A file of weights alone says nothing of settings. Some of them leave a trace (a layer that is there or not, the width of
another); and the names of the source's own transformer, NanoDiT, say the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

SOURCE_CONFIG = "patch_dit_source"  # the option of the group model with all of these settings at the published size
# Of the source's own transformer, by its names; no other implementation that we know has all of these.
SOURCE_NAMES = ("t_embedder.mlp.0.weight", "x_embedder.proj.weight", "dino_proj.weight", "text_proj.weight")
# What it computes and no name or shape of its weights shows. Its patches have no positions.
SOURCE_SETTINGS: dict[str, Any] = {
    "prediction": "v",
    "rotary": False,
    "patch_positions": False,
    "patch_attention": "joint",
    "level_frequencies": "exclusive",
    "latent_positions": "cells",
}


@dataclass(frozen=True)
class ForeignSettings:
    """Settings of `PatchDiT` by name, under which it computes what the network of a file computes.

    Args:
        shown: what names and shapes show. known: all, where the file is of the source's own transformer; else empty.
    """

    shown: dict[str, Any]
    known: dict[str, Any]

    @property
    def is_source(self) -> bool:
        """Whether the file is of the source's own transformer."""
        return bool(self.known)


def foreign_settings(names: Iterable[str], found: Mapping[str, Tensor]) -> ForeignSettings:
    """Settings that a file shows.

    Args:
        names: of its tensors, as they stand there. found: its tensors under our names, as far as these are known.
    """
    shown: dict[str, Any] = {}
    level, latent = found.get("level_embedding.mlp.0.weight"), found.get("latent_in.weight")
    if level is not None:
        shown["level_hidden"] = len(level)
    # Of layers that this network lacks, `found` has the file's own names.
    if any(".self_attention.query.weight" in name for name in found):
        shown["qk_norm"] = any(norm in name for name in found for norm in (".query_norm.", ".q_norm.", ".norm_q."))
    names = list(names)
    shown["output_convolution"] = any(
        name.endswith(f"{layer}.weight") for name in names for layer in ("output_conv", "output_convolution")
    )
    as_wide = level is not None and latent is not None and len(level) == len(latent)  # its noise level's MLP
    if not has_source_names(names) or not as_wide:
        return ForeignSettings(shown, {})
    return ForeignSettings(shown, shown | SOURCE_SETTINGS)


def has_source_names(names: Iterable[str]) -> bool:
    """Whether a file has the names of the source's own transformer, which no other implementation that we know has."""
    names = list(names)
    return all(any(name == known or name.endswith(f".{known}") for name in names) for known in SOURCE_NAMES)


def other_settings(meaning: Mapping[str, Any], theirs: Mapping[str, Any], both_have_patches: bool) -> dict[str, Any]:
    """Settings of other weights, among those that are known, by which this network computes something else with them.

    Args:
        meaning: `PatchDiT.meaning` of this network. theirs: settings of the other.
        both_have_patches: without, the settings of patches say nothing: one of the two has none.
    """
    other = {name: value for name, value in theirs.items() if name in meaning and value != meaning[name]}
    if not both_have_patches:
        other = {name: value for name, value in other.items() if name not in ("patch_positions", "patch_attention")}
    if other.get("output_convolution") is False:
        del other["output_convolution"]  # a new one starts as nothing
    return other


def as_overrides(settings: Mapping[str, Any]) -> str:
    """As the command line takes them: ``model.network.rotary=true ...``."""
    return " ".join(f"model.network.{name}={plain(value)}" for name, value in settings.items())


def plain(value: Any) -> str:
    """A setting as the command line takes it; a stored one may be of any length."""
    return (str(value).lower() if isinstance(value, bool) else str(value))[:40]
