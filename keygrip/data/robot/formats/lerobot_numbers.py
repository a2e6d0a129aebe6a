"""Values of a LeRobot data set: those that an entry of the calibration file refers to, and the frame rate."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.data.robot.calibration import refuse_unknown_keys


def stated_rate(info: dict[str, Any], root: Path) -> float:
    """Return the frames per second of the data set.

    Raises:
        ValueError: `meta/info.json` states no rate above 0.
    """
    try:
        rate = float(info.get("fps"))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        rate = math.nan
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(
            f"{root}/meta/info.json: fps is {info.get('fps')!r}; the data set's frames per second, above 0, are "
            "needed: correct it there"
        )
    return rate


def numbers(
    table: dict[str, Any], info: dict[str, Any], where: str, entry: Any, path: Path, also: Collection[str] = ()
) -> np.ndarray:
    """Return the values [N, n] of an episode's N rows that an entry of the calibration file refers to.

    Args:
        table: columns of the rows. where: the entry's place in the file. path: the file, for messages.
        also: further keys of the entry, which the caller reads.

    Raises:
        ValueError: the entry has an unknown key or is incomplete; the data set lacks the feature or the values, or some
            rows lack them.
    """
    refuse_unknown_keys(path, where, entry, {"feature", "index", "names", *also})
    if "feature" not in entry or len({"index", "names"} & entry.keys()) != 1:
        raise ValueError(
            f"{path}: {where} must be {{feature: NAME, index: [...]}} or {{feature: NAME, names: [...]}}: give one of "
            "the two"
        )
    feature = entry["feature"]
    if feature not in table:
        raise ValueError(f"{path}: {where} names the feature {feature!r}; the data set has {', '.join(table)}")
    values = _stack_column(table[feature], feature, where, path)
    if "names" in entry:
        feature_names = flat_names(info["features"][feature].get("names"))
        names = [entry["names"]] if isinstance(entry["names"], str) else entry["names"]
        absent = [str(item) for item in names if item not in feature_names]
        if absent:
            raise ValueError(f"{path}: {where} names {', '.join(absent)}; {feature} has {', '.join(feature_names)}")
        several = [str(item) for item in names if feature_names.count(item) > 1]
        if several or len(feature_names) != values.shape[1]:
            reason = (
                f"{feature} has several numbers of the name {several[0]}"
                if several
                else f"{feature} has {len(feature_names)} names for {values.shape[1]} numbers"
            )
            raise ValueError(f"{path}: {where}: {reason}: give index instead of names")
        return values[:, [feature_names.index(item) for item in names]]
    index = entry["index"] if isinstance(entry["index"], list) else [entry["index"]]
    invalid = [item for item in index if type(item) is not int or item < 0]
    if invalid:
        raise ValueError(f"{path}: {where}.index is {invalid[0]!r}: {feature} is counted by whole numbers from 0")
    if index and max(index) >= values.shape[1]:
        raise ValueError(f"{path}: {where} asks for number {max(index)} of {feature}, which has {values.shape[1]}")
    return values[:, index]


def _stack_column(column: list[Any], feature: str, location: str, path: Path) -> np.ndarray:
    """Return a column as [N, n], whatever its feature's shape."""
    sizes = [0 if row is None else np.size(row) for row in column]
    usual_size = max(sizes, default=0)
    if short_rows := [frame for frame, size in enumerate(sizes) if size != usual_size]:
        defect = "is empty" if sizes[short_rows[0]] == 0 else f"has {sizes[short_rows[0]]} numbers"
        raise ValueError(
            f"{feature} {defect} at frame {short_rows[0]} of the episode, where others have {usual_size} ({location} "
            f"in {path} reads it): leave the episode out, or name another feature"
        )
    return np.asarray(column, dtype=np.float64).reshape(len(column), -1)


def flat_names(names: Any) -> list[str]:
    """Return names as one list. LeRobot stores them as a list, or as a mapping from a group to a list."""
    if isinstance(names, dict):
        return [str(item) for group in names.values() for item in (group if isinstance(group, list) else [group])]
    return [str(item) for item in names or []]
