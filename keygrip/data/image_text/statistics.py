"""Compute means and standard deviations of the features in image shards, per channel."""

from __future__ import annotations

import numpy as np

from keygrip.data.bad_samples import BadSample, raise_connection_error
from keygrip.data.image_text.bucket_samples import ImageTextSamples
from keygrip.data.shards.sampling import SampleKey
from keygrip.data.spacing import evenly
from keygrip.progress import Progress

MEASURED = 2048  # samples from which the statistics are computed
SMALLEST_STD = 1e-4  # of a channel that varies
# Shards store float16: values that differ only by rounding (by at most one step) have a standard deviation of at most
# half a step.
ROUNDING, SMALLEST_STEP = 2.0**-11, 2.0**-24


class Moments:
    """Accumulate the mean and the standard deviation of many rows of values."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, np.zeros(1), np.zeros(1)

    def add(self, rows: np.ndarray) -> None:
        """Add rows [n, D]."""
        values = rows.astype(np.float64)
        self.count += len(values)
        self.sum, self.squares = self.sum + values.sum(axis=0), self.squares + (values**2).sum(axis=0)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation, float32 [D] each. The standard deviation is 1 for channels that vary by
        no more than float16 rounding, since normalisation would magnify them in other images, and at least 1e-4 for all
        other channels."""
        mean = self.sum / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))
        varies = std > np.maximum(np.abs(mean) * ROUNDING, SMALLEST_STEP)
        return mean.astype(np.float32), np.where(varies, np.maximum(std, SMALLEST_STD), 1.0).astype(np.float32)


def measure(samples: ImageTextSamples, progress: bool = True) -> dict[str, np.ndarray]:
    """Compute means and standard deviations of latents, CLS vectors and patches, per channel, over evenly spaced
    samples.

    Raises:
        ConnectionError: samples of a remote set cannot be reached; without them the statistics, which are stored, would
            be those of another set. ValueError: none can be read.
    """
    latent, cls, patches = Moments(), Moments(), Moments()
    chosen = evenly(len(samples), MEASURED)
    for index in Progress(chosen, desc="statistics", unit="image", leave=False, shown=progress):
        try:
            sample = samples[SampleKey(index, 0)]
        except BadSample as error:
            raise_connection_error(error)
            continue  # counted when training reads it
        latent.add(sample.latent.reshape(len(sample.latent), -1).T)
        cls.add(sample.dino_cls[None])
        patches.add(sample.dino_patches)
    if not latent.count:
        raise ValueError("none of the samples can be read: run step=validate on the shards")
    all_moments = {"latent": latent, "cls": cls, "patch": patches}
    results = {name: moments.result() for name, moments in all_moments.items()}
    return {
        key: value
        for name, (mean, std) in results.items()
        for key, value in ((f"{name}_mean", mean), (f"{name}_std", std))
    }
