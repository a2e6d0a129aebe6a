"""Load trained models from Python: ``keygrip.load`` and ``keygrip.load_policy``.

import keygrip

result = keygrip.train(["model=volume_query", "data=yam", "max_steps=500"])
policy = keygrip.load_policy(result["run_dir"])
plan = policy.plan(observation)
figures = keygrip.evaluate(result["run_dir"], ["episodes=20"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from keygrip.models.policy import Policy


def load(
    path: str | Path,
    *,
    trust: Sequence[str] = (),
    external: Mapping[str, Any] | None = None,
    device: str = "cpu",
    ema: bool = True,
) -> LightningModule:
    """Load a trained model, in eval mode.

    The file contains everything that the model needs. No code in it is executed (see :mod:`keygrip.training.parts`).

    Args:
        path: a run folder, a checkpoint file, or a folder that ``keygrip export`` wrote.
        trust: packages other than keygrip whose declared parts the file may name; their code is executed.
        external: files that the model needs and the checkpoint does not contain, by dotted setting.
        device: device of the weights. ema: whether to load the EMA weights, if there are any.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is damaged, written by another program, names parts that are not declared, or does
            not fit this version.
    """
    from keygrip.training.checkpoints import load_module

    return load_module(path, map_location=device, use_ema=ema, trust=trust, external=external)


def load_policy(
    path: str | Path,
    *,
    trust: Sequence[str] = (),
    external: Mapping[str, Any] | None = None,
    device: str = "cpu",
    **options: Any,
) -> Policy:
    """Load a robot policy: ``load_policy(path).plan(observation)`` returns poses in metres.

    Args:
        path, trust, external, device: as for :func:`load`.
        options: changes to how the policy plans, e.g. ``decoder="viterbi"`` (volume_query), ``temperature=1.0``
            (geometry_vla).

    Returns:
        A policy. Its ``needs`` lists the entries of an observation that it uses (:mod:`keygrip.models.policy`).

    Raises:
        FileNotFoundError, ValueError: as :func:`load`; also for a model that is not a robot policy, an unknown option,
            or a missing required option (`embodiment` of a model for several robots).
    """
    from keygrip.evaluation import trained_policy

    policy: Policy = trained_policy.load_policy(path, options, device, trust, external)
    return policy
