"""Split of demonstrations into training and validation, by their names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

VAL_FRACTION, SEED = 0.1, 0  # of a data set whose settings name none


def split_demos(names: Sequence[str], val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split demos into training and validation.

    The split of a demo depends only on its name and the seed, so that demos added later do not move the others.
    Exceptions: with at least two demos and a fraction above 0, each split gets at least one, so that in a small set one
    demo may be in the other split than in a larger or smaller set. A single demo is for training, or for validation if
    the fraction is above one half: by its name, a tenth of all sets of one demo could not be trained on.

    Returns:
        Indices of training and of validation demos, both ascending.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, not {val_fraction}")
    draws = np.array(
        [int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64 for name in names]
    )
    held_out = draws < val_fraction
    if len(names) == 1:
        held_out[0] = val_fraction > 0.5
    elif val_fraction > 0 and len(names) >= 2:
        if not held_out.any():
            held_out[draws.argmin()] = True
        if held_out.all():
            held_out[draws.argmax()] = False
    return np.flatnonzero(~held_out).tolist(), np.flatnonzero(held_out).tolist()
