"""Means and standard deviations of the features in image shards, channel by channel."""

from __future__ import annotations

import numpy as np

from keygrip.data.bad_samples import BadSample
from keygrip.data.image_text.bucket_samples import ImageTextSamples
from keygrip.data.shards.sampling import SampleKey
from keygrip.data.spacing import evenly
from keygrip.progress import Progress

MEASURED = 2048  # samples from which the statistics are computed
SMALLEST_STD = 1e-4  # of a channel that varies
# Shards hold float16: numbers that differ by their rounding alone, one step at most, have half a step for a standard
# deviation.
ROUNDING, SMALLEST_STEP = 2.0**-11, 2.0**-24


class Moments:
    """Mean and standard deviation of many rows of numbers."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, np.zeros(1), np.zeros(1)

    def add(self, rows: np.ndarray) -> None:
        """rows: [n, D]."""
        values = rows.astype(np.float64)
        self.count += len(values)
        self.sum, self.squares = self.sum + values.sum(axis=0), self.squares + (values**2).sum(axis=0)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 [D] each. The standard deviation is 1 for channels that do not vary by more than float16 rounds,
        which normalisation would blow up in every other image, and at least 1e-4 for the others."""
        mean = self.sum / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))
        varies = std > np.maximum(np.abs(mean) * ROUNDING, SMALLEST_STEP)
        return mean.astype(np.float32), np.where(varies, np.maximum(std, SMALLEST_STD), 1.0).astype(np.float32)


def measure(samples: ImageTextSamples, progress: bool = True) -> dict[str, np.ndarray]:
    """Means and standard deviations of latents, CLS vectors and patches, channel by channel, over evenly chosen
    samples."""
    latent, cls, patches = Moments(), Moments(), Moments()
    chosen = evenly(len(samples), MEASURED)
    for number in Progress(chosen, desc="statistics", unit="image", leave=False, shown=progress):
        try:
            sample = samples[SampleKey(number, 0)]
        except BadSample:
            continue  # counted when it is trained on
        latent.add(sample.latent.reshape(len(sample.latent), -1).T)
        cls.add(sample.dino_cls[None])
        patches.add(sample.dino_patches)
    if not latent.count:
        raise ValueError("none of the samples can be read: run step=validate on the shards")
    found = {"latent": latent, "cls": cls, "patch": patches}
    results = {name: moments.result() for name, moments in found.items()}
    return {
        key: value
        for name, (mean, std) in results.items()
        for key, value in ((f"{name}_mean", mean), (f"{name}_std", std))
    }
