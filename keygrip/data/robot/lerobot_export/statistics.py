"""Statistics of LeRobot data sets, as LeRobot 0.6 defines them: of one episode, and of several episodes together.

Mean and standard deviation are those of the population. A quantile is read from a histogram of 5000 bins over the
episode's range, linear within the bin. Over several episodes, it is the mean of their quantiles, weighted by their
counts. Images are counted at some frames (all of up to 100, length^0.75 of more) and pixels (every n-th of large
images), in 0 to 1. LeRobot 0.4.4 squares images as bytes, which overflow: its standard deviation of images is wrong
and is not reproduced.

Legend of shapes: N frames, F values per frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keygrip.data.spacing import evenly

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
BINS = 5000
Statistics = dict[str, np.ndarray]


def of_numbers(values: np.ndarray) -> Statistics:
    """Return statistics over the frames of [N, F]: each [F]; `count` is [1]."""
    columns = [
        _statistics_of_counted(column, np.ones(len(column))) for column in np.asarray(values, dtype=np.float64).T
    ]
    return {key: np.array([column[key] for column in columns]) for key in columns[0]} | {
        "count": np.array([len(values)])
    }


def sampled_frames(frames: int) -> list[int]:
    """Return the frames of an episode that are used for its image statistics."""
    count = max(min(100, frames), min(int(frames**0.75), 10_000))
    return evenly(frames, count)


class ImageCounter:
    """Counts of the pixel values of an episode's sampled frames, [3, 256]."""

    def __init__(self) -> None:
        self.frames = 0
        self._counts = np.zeros((3, 256), dtype=np.int64)

    def add(self, image: np.ndarray) -> None:
        """Count the pixels of `image`, H x W x 3 uint8."""
        height, width = image.shape[:2]
        if max(height, width) >= 300:
            step = int((width if width > height else height) / 150)
            image = image[::step, ::step]
        for channel in range(3):
            self._counts[channel] += np.bincount(image[..., channel].reshape(-1), minlength=256)
        self.frames += 1

    def statistics(self) -> Statistics:
        """Return the statistics, each [3, 1, 1], in 0 to 1; `count` is [1], frames."""
        channels = [_statistics_of_counted(np.arange(256.0), counts) for counts in self._counts]
        result = {key: np.array([channel[key] for channel in channels]).reshape(3, 1, 1) / 255 for key in channels[0]}
        return result | {"count": np.array([self.frames])}


def _statistics_of_counted(values: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Return statistics of `values` that occur `counts` times, both [N]."""
    values, counts = values[counts > 0], counts[counts > 0]
    low, high, total = float(values.min()), float(values.max()), float(counts.sum())
    mean = float(values @ counts) / total
    result = {"min": low, "max": high, "mean": mean, "std": float(np.sqrt((values - mean) ** 2 @ counts / total))}
    if total < 2 or low == high:
        return result | dict.fromkeys(QUANTILES, mean)
    histogram, edges = np.histogram(values, bins=np.linspace(low - 1e-10, high + 1e-10, BINS + 1), weights=counts)
    cumulative = np.cumsum(histogram)
    for name, share in QUANTILES.items():
        index = min(int(np.searchsorted(cumulative, share * total)), BINS - 1)
        if index == 0:
            result[name] = float(edges[0])
            continue
        fraction = (share * total - cumulative[index - 1]) / (cumulative[index] - cumulative[index - 1])
        result[name] = float(edges[index] + fraction * (edges[index + 1] - edges[index]))
    return result


def of_episodes(episodes: Sequence[Statistics]) -> Statistics:
    """Return the statistics of one feature over several episodes, computed from those of each episode."""
    counts = np.concatenate([each["count"] for each in episodes]).astype(np.float64)
    stacked = {key: np.stack([each[key] for each in episodes]) for key in episodes[0] if key != "count"}

    def weighted(values: np.ndarray) -> np.ndarray:
        return np.einsum("e,e...->...", counts / counts.sum(), values)

    mean = weighted(stacked["mean"])
    return {
        "min": stacked["min"].min(axis=0),
        "max": stacked["max"].max(axis=0),
        "mean": mean,
        "std": np.sqrt(weighted(stacked["std"] ** 2 + (stacked["mean"] - mean) ** 2)),
        "count": np.array([int(counts.sum())]),
        **{name: weighted(stacked[name]) for name in QUANTILES},
    }
