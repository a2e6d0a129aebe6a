"""Trained modules as policies with the user's planning settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from keygrip.evaluation.kinds import changed, refuse_invalid
from keygrip.models.policy import robot_number
from keygrip.training.checkpoints import load_module
from keygrip.training.torch_files import refuse_missing_device


def default_device() -> str:
    """Return the device of a policy for which none is given: the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def advise_on_memory(device: str | None) -> Iterator[None]:
    """In this context a policy's lack of GPU memory becomes a ValueError that says what to do, also if another process
    reports it in a ValueError, because it received it from the policy's server."""
    try:
        yield
        return
    except torch.OutOfMemoryError as error:
        cause: Exception = error
    except ValueError as error:
        if f"the policy failed: {torch.OutOfMemoryError.__name__}" not in str(error):
            raise
        cause = error
    raise ValueError(
        f"the policy, or a plan of it, does not fit into the free memory of device={device}: give device=cpu (in "
        "training callbacks.closed_loop.closed_loop.device=cpu), or for a geometry_vla policy.vlm_precision=int8"
    ) from cause


def load_policy(
    path: str | Path,
    changes: Mapping[str, Any],
    device: str = "cpu",
    trust: Sequence[str] = (),
    external: Mapping[str, Any] | None = None,
) -> Any:
    """Load the policy of a checkpoint, with some of its settings changed.

    It is prepared in CPU memory, so that a GPU never holds more than what planning needs, which may be a quarter of the
    weights' size (`vlm_precision=int8`).

    Args:
        path, trust, external: see `load_module`. changes, device: see `policy_of`.

    Raises:
        FileNotFoundError, ValueError: as in `load_module` and `policy_of`.
    """
    refuse_missing_device(device)
    policy = policy_of(load_module(path, trust=trust, external=external), path, changes, device)
    if hasattr(policy, "make_ready"):
        policy.make_ready()  # before a robot waits for the first plan
    return policy


def check_policy(module: Any, source: object, changes: Mapping[str, Any]) -> None:
    """Raise ValueError as `policy_of` does, and leave the module's weights as they are: settings that convert them
    (a policy's `converting`) are checked by name and type only."""
    converting = getattr(type(module.policy()), "converting", ()) if hasattr(module, "policy") else ()
    policy = policy_of(module, source, {name: value for name, value in changes.items() if name not in converting})
    if converted := {name: changes[name] for name in converting if name in changes}:
        refuse_invalid(converted, type(policy))


def policy_of(module: Any, source: object, changes: Mapping[str, Any], device: str | None = None) -> Any:
    """Return the policy of a trained module, with some of its settings changed.

    Args:
        module: a LightningModule. source: its origin, for messages. changes: by the names of the policy's fields.
        device: where it plans; None: on the module's device.

    Raises:
        ValueError: The model is not a robot policy, the policy has no such setting, or a required setting is not
            given.
    """
    if not hasattr(module, "policy"):
        raise ValueError(
            f"{source} holds a {type(module).__name__}, which drives no robot: give a run of a robot policy "
            "(keygrip.load loads any model)"
        )
    policy = changed(module.policy(), changes)
    # Checked here, because in an episode an error while planning counts as a failed episode.
    robot_number(getattr(module, "embodiments", ()), getattr(policy, "embodiment", None))
    if device is None or device == "cpu":
        return policy
    module.to(device)
    # again, because a policy may store parts of its own on the module's device
    return changed(module.policy(), changes)
