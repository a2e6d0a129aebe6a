"""Settings of the network that a file of weights was trained in, as far as names and shapes show them.

A file of weights alone contains no settings. Some can be inferred (from the presence of a layer or the width of
another). If the names are those of the source's own transformer, NanoDiT, the other settings are known too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

SOURCE_CONFIG = "patch_dit_source"  # the option of the group model with all of these settings at the published size
# Names in the source's own transformer; no other implementation that we know has all of these.
SOURCE_NAMES = ("t_embedder.mlp.0.weight", "x_embedder.proj.weight", "dino_proj.weight", "text_proj.weight")
# Its settings that no name or shape of its weights shows. Its patches have no positions.
SOURCE_SETTINGS: dict[str, Any] = {
    "prediction": "v",
    "rotary": False,
    "patch_positions": False,
    "patch_attention": "joint",
    "timestep_frequencies": "exclusive",
    "latent_positions": "cells",
}


@dataclass(frozen=True)
class ForeignSettings:
    """Settings of `PatchDiT` by name, under which it computes what the network of a file computes.

    Args:
        shown: settings inferred from names and shapes. known: all settings, if the file is of the source's own
            transformer; else empty.
    """

    shown: dict[str, Any]
    known: dict[str, Any]

    @property
    def is_source(self) -> bool:
        """Whether the file is of the source's own transformer."""
        return bool(self.known)


def foreign_settings(names: Iterable[str], found: Mapping[str, Tensor]) -> ForeignSettings:
    """Infer settings from a file.

    Args:
        names: of its tensors, as in the file. found: its tensors under our names, as far as these are known.
    """
    settings: dict[str, Any] = {}
    level, latent = found.get("level_embedding.mlp.0.weight"), found.get("latent_in.weight")
    if level is not None:
        settings["timestep_hidden"] = len(level)
    # For layers that this network lacks, `found` contains the file's own names.
    if any(".self_attention.query.weight" in name for name in found):
        settings["qk_norm"] = any(norm in name for name in found for norm in (".query_norm.", ".q_norm.", ".norm_q."))
    names = list(names)
    settings["output_convolution"] = any(
        name.endswith(f"{layer}.weight") for name in names for layer in ("output_conv", "output_convolution")
    )
    as_wide = level is not None and latent is not None and len(level) == len(latent)  # the MLP of its noise level
    if not has_source_names(names) or not as_wide:
        return ForeignSettings(settings, {})
    return ForeignSettings(settings, settings | SOURCE_SETTINGS)


def has_source_names(names: Iterable[str]) -> bool:
    """Whether a file has the names of the source's own transformer, which no other implementation that we know has."""
    names = list(names)
    return all(any(name == known or name.endswith(f".{known}") for name in names) for known in SOURCE_NAMES)


def other_settings(meaning: Mapping[str, Any], theirs: Mapping[str, Any], both_have_patches: bool) -> dict[str, Any]:
    """Known settings of other weights that differ, so that this network would compute something else with the weights.

    Args:
        meaning: `PatchDiT.meaning` of this network. theirs: settings of the other.
        both_have_patches: if False, one of the two has no patches, and settings of patches are ignored.
    """
    other = {name: value for name, value in theirs.items() if name in meaning and value != meaning[name]}
    if not both_have_patches:
        ignored = {"patch_positions", "patch_attention"}
        if meaning["latent_positions"] == "cells" and not meaning["rotary"]:
            ignored.add("position_cells")  # read for patches only
        other = {name: value for name, value in other.items() if name not in ignored}
    if other.get("output_convolution") is False:
        del other["output_convolution"]  # a new one initially has no effect
    return other


def as_overrides(settings: Mapping[str, Any]) -> str:
    """Settings in the form of the command line: ``model.network.rotary=true ...``."""
    return " ".join(f"model.network.{name}={plain(value)}" for name, value in settings.items())


def plain(value: Any) -> str:
    """A setting in the form of the command line, cut off because a stored setting may have any length."""
    return (str(value).lower() if isinstance(value, bool) else str(value))[:40]
