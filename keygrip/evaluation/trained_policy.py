"""Trained modules as policies that plan as a user says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keygrip.evaluation.kinds import changed
from keygrip.models.policy import robot_number
from keygrip.training.checkpoints import load_module
from keygrip.training.torch_files import refuse_missing_device


def load_policy(
    path: str | Path,
    changes: Mapping[str, Any],
    device: str = "cpu",
    trust: Sequence[str] = (),
    external: Mapping[str, Any] | None = None,
) -> Any:
    """The policy in a checkpoint, with some of its settings changed.

    It is made ready in the processor's memory: a GPU never holds more of it than what plans are made with, be that a
    quarter of the weights' size (`vlm_precision=int8`).

    Args:
        path, trust, external: see `load_module`. changes, device: see `policy_of`.

    Raises:
        FileNotFoundError, ValueError: as `load_module` and `policy_of`.
    """
    refuse_missing_device(device)
    policy = policy_of(load_module(path, trust=trust, external=external), path, changes, device)
    if hasattr(policy, "make_ready"):
        policy.make_ready()  # before a robot waits for the first plan
    return policy


def policy_of(module: Any, source: object, changes: Mapping[str, Any], device: str | None = None) -> Any:
    """The policy of a trained module, with some of its settings changed.

    Args:
        module: a LightningModule. source: where it is from, for messages. changes: by the names of the policy's fields.
        device: where it plans; None: where the module is.

    Raises:
        ValueError: the model drives no robot, the policy has no such setting, or one that it cannot do without is not
            given.
    """
    if not hasattr(module, "policy"):
        raise ValueError(
            f"{source} holds a {type(module).__name__}, which drives no robot: give a run of a robot policy "
            "(keygrip.load loads any model)"
        )
    policy = changed(module.policy(), changes)
    # Said here, since an episode counts what a plan raises as an episode that failed.
    robot_number(getattr(module, "embodiments", ()), getattr(policy, "embodiment", None))
    if device is None or device == "cpu":
        return policy
    module.to(device)
    return changed(module.policy(), changes)  # again: a policy may keep parts of its own on the module's device
