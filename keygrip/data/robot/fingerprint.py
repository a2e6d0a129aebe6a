"""Fingerprints of the demos that a run trained on, so that a resumed run can report which of them changed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from keygrip.data.bad_samples import join_first_names
from keygrip.data.changes import named_changes
from keygrip.data.robot.schema import ArmTrajectory, Demo
from keygrip.data.robot.split import SEED, VAL_FRACTION, split_demos

log = logging.getLogger(__name__)


def demo_fingerprint(demo: Demo) -> str:
    """Return a hash of a demo's poses, calibration, instruction and number of frames, not of its pixels or location."""
    digest = hashlib.sha256(str(len(demo)).encode())
    for name, values in hashed_arrays(demo):
        digest.update(name.encode())
        if values is not None:
            digest.update(np.ascontiguousarray(values, dtype=np.float64).tobytes())
    digest.update(repr(demo.instruction).encode())
    return digest.hexdigest()[:16]


def hashed_arrays(demo: Demo) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yield a demo's poses and calibration by name, [N, ...] each; None for values that were not recorded."""
    for name in sorted(demo.arms):
        yield from _named_pose_arrays(name, demo.arms[name])
    for name in sorted(demo.cameras):
        camera = demo.cameras[name]
        yield f"{name}/intrinsics", camera.intrinsics
        yield f"{name}/world_to_camera", camera.world_to_camera


def _named_pose_arrays(name: str, arm: ArmTrajectory) -> Iterator[tuple[str, np.ndarray | None]]:
    for part in ("position", "quaternion", "gripper", "joints"):
        yield f"{name}/{part}", getattr(arm, part)
    if arm.controller is not None:
        yield f"{name}/controller", arm.controller
    if arm.commanded is not None:
        yield from _named_pose_arrays(f"{name}/commanded", arm.commanded)


def timing_fingerprint(demo: Demo) -> str:
    """Return a hash of a demo's frame rate, its time stamps from the first one on, and its corrected frames.

    It is apart from `demo_fingerprint`, so that the fingerprints in checkpoints from before it stay comparable.
    """
    digest = hashlib.sha256(repr(float(demo.fps)).encode())
    digest.update((demo.timestamps - demo.timestamps[0]).astype(np.int64).tobytes())
    if demo.intervention is not None:  # flags that are all false are the same as none
        digest.update(np.flatnonzero(demo.intervention).astype(np.int64).tobytes())
    return digest.hexdigest()[:16]


def fingerprints(demos: Sequence[Demo]) -> dict[str, str]:
    """Return the fingerprint of each demo by its name."""
    return {demo.name: demo_fingerprint(demo) for demo in demos}


class DataHashes:
    """What checkpoints hold of the demonstrations: hashes by name, in the order in which samples are numbered.

    They are computed once, at first use: with many demonstrations this takes seconds, and each checkpoint holds them.

    Args:
        demos: are not changed afterwards.
        contents: hashes of the recordings' whole content; empty if they were not verified.
    """

    def __init__(self, demos: Sequence[Demo], contents: Mapping[str, str]) -> None:
        self.demos, self.contents = demos, contents

    @cached_property
    def by_kind(self) -> dict[str, dict[str, str]]:
        """The hashes, by their key in a checkpoint."""
        timing = {demo.name: timing_fingerprint(demo) for demo in self.demos}
        return {"demonstrations": fingerprints(self.demos), "timing": timing, "recordings": dict(self.contents)}

    def refuse_changed(self, state: Mapping[str, Any], allowed: bool = False) -> None:
        """Raise an error if the demonstrations are not those of a checkpoint; see the function `refuse_changed`.

        Args:
            state: of the run's data, from the checkpoint.
        """
        for key, current in self.by_kind.items():
            saved = state.get(key)
            if saved and current:  # older checkpoints hold not all, those with data.verify=false none of recordings
                refuse_changed(saved, current, allowed)


def refuse_changed(before: Mapping[str, str], now: Mapping[str, str], allowed: bool = False) -> None:
    """Raise an error if the demonstrations are not those that a checkpoint was trained on.

    Args:
        before, now: a hash of each demonstration by its name, in the order in which samples are numbered.
        allowed: log a warning instead of raising an error.

    Raises:
        ValueError: demonstrations were removed, added or changed (the message lists them), or their order, which is the
            order of the samples, changed.
    """
    changed = named_changes(before, now) or ("they come in another order" if list(before) != list(now) else "")
    if not changed:
        return
    message = f"the demonstrations are not those of the checkpoint: {changed}"
    if not allowed:
        raise ValueError(f"{message}; restore them, start a new run, or go on with data.allow_changed=true")
    log.warning("%s; going on with them (data.allow_changed=true)", message)


def refuse_trained(demos: Sequence[Demo], before: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """Raise an error if a run was trained on demonstrations whose errors would be reported as those of held-out ones.

    A demonstration was trained on if its fingerprint is one of the run's training part, also under another name: names
    depend on the folder that `data.root` names. Another demonstration with the name of a trained one is accepted.

    Args:
        demos: the demonstrations for validation.
        before: fingerprints of all demonstrations of the run, by name. settings: the run's data settings.

    Raises:
        ValueError: the message lists the demonstrations.
    """
    train, val = split_demos(list(before), settings.get("val_fraction", VAL_FRACTION), settings.get("split_seed", SEED))
    hashes = list(before.items())
    trained = {hashes[index][1] for index in train}
    held_out = {hashes[index] for index in val}
    again = [item for item in fingerprints(demos).items() if item[1] in trained and item not in held_out]
    if again:
        own = f" (the run's own: {join_first_names([name for name, _ in sorted(held_out)])})" if held_out else ""
        raise ValueError(
            f"{len(again)} of {len(demos)} demonstrations that would be validated on were trained on by this run: "
            f"{join_first_names([name for name, _ in again])}. Errors on them are not those of held-out "
            f"demonstrations: restore the held-out ones{own} and leave out data.val_fraction, data.split_seed and "
            "data.max_demos, or name with data.root=FOLDER a folder without demonstrations of the training"
        )
