"""Loading of frozen encoders of other projects (diffusers, transformers), from a folder or the hub.

Their packages are optional and imported when an encoder is first used. Apart from `keygrip.models.language`, only the
encoders here use transformers: a frozen T5 is a fixed part of the data, not a language model that is trained.
"""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from keygrip.artifacts import sha256_of
from keygrip.hub_network import cache_only_without_network, unreachable
from keygrip.models.language.hub import ForeignCodeError, foreign_code_errors

INSTALL = "pip install 'keygrip[dit]'"


def subfolder_of(source: str, subfolder: str | None) -> str | None:
    """The subfolder to load from; None if the source is a folder without it, and thus the part's own folder.

    Raises:
        ValueError: it leads out of the source. A checkpoint may name a subfolder, and must not choose other folders.
    """
    if subfolder and (PurePath(subfolder).is_absolute() or ".." in PurePath(subfolder).parts):
        raise ValueError(f"subfolder={subfolder!r} leads out of {source}: give a folder inside of it")
    if subfolder and Path(source).is_dir() and not (Path(source) / subfolder).is_dir():
        return None
    return subfolder


def from_source(loader: Any, source: str, what: str, arguments: dict[str, Any]) -> Any:
    """`loader.from_pretrained(source)`, with a one-line error that states what to do if the source is not available.

    Args:
        loader: a class. what: name of what it loads, for messages. arguments: for `from_pretrained`; for classes of
            transformers with trust_remote_code=False, for weights with weights_only=True: only tensors are read from a
            pickle file (the default in diffusers).

    Raises:
        FileNotFoundError: the folder lacks the files, or the hub cannot be reached and there is no cached copy.
        ForeignCodeError: the source needs its own Python code.
    """
    load_arguments = cache_only_without_network(source, arguments)
    try:
        with foreign_code_errors(source):
            return loader.from_pretrained(source, **load_arguments)
    except ForeignCodeError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        if load_arguments is not arguments:
            reason = f"{unreachable()}; and the files in its cache: {reason}"
        raise FileNotFoundError(
            f"{what} cannot be loaded from {source} ({reason}): name a local folder that holds it as the hub ships it, "
            "or download it once with `hf download`"
        ) from error


def named_dtype(name: str) -> torch.dtype:
    """The dtype of a name. Raise ValueError if it is not a known floating-point type."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype {name!r} is not known; choose one of {', '.join(known)}")
    return known[name]


def sample_of(module: nn.Module) -> dict[str, Any]:
    """Hash of a few values of a large model's weights: distinguishes two trainings without reading all weights."""
    parameters = dict(module.named_parameters())
    names = sorted(parameters)[:: max(1, len(parameters) // 16)]
    digest = sha256_of(
        name.encode() + parameters[name].detach().flatten()[:64].float().cpu().numpy().tobytes() for name in names
    )
    return {"parameters": sum(p.numel() for p in parameters.values()), "sample": digest[:16]}
