"""Loading trained models from Python: ``keygrip.load`` and ``keygrip.load_policy``.

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
    """Loads a trained model, in eval mode.

    Everything that it needs lies in the file; nothing in it is executed (see :mod:`keygrip.training.parts`).

    Args:
        path: a run folder, a checkpoint file, or a folder that ``keygrip export`` wrote.
        trust: packages beside keygrip whose declared parts the file may name; their code is run.
        external: files that the model needs and the checkpoint does not hold, by dotted setting.
        device: of the weights. ema: the EMA weights where there are any.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, of another program, names parts that are not declared, or does not fit this version.
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
    """Loads a robot policy: ``load_policy(path).plan(observation)`` gives poses in metres.

    Args:
        path, trust, external, device: as for :func:`load`.
        options: changes to how it plans, e.g. ``decoder="viterbi"`` (volume_query), ``temperature=1.0`` (geometry_vla).

    Returns:
        A policy; its ``needs`` says which entries of an observation it reads (:mod:`keygrip.models.policy`).

    Raises:
        FileNotFoundError, ValueError: as :func:`load`, a model that drives no robot, an unknown option, or one
            that is missing (`embodiment` of a model of several robots).
    """
    from keygrip.evaluation import trained_policy

    policy: Policy = trained_policy.load_policy(path, options, device, trust, external)
    return policy
