"""The data loader without a consumer of its batches."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from keygrip.benchmarks.demos import repeated_demos
from keygrip.config import compose
from keygrip.progress import Progress


@dataclass(frozen=True)
class Loader:
    """Samples per second from the training loader, augmented and batched, with the settings of the training config.

    Args:
        overrides: of ``keygrip.train``. demos, quick_demos: number of demos to record.
        batches, quick_batches: measured batches. skip_batches: batches before those, during which workers start.
    """

    overrides: Sequence[str]
    demos: int
    quick_demos: int
    batches: int
    quick_batches: int
    skip_batches: int

    def run(self, quick: bool) -> dict[str, float]:
        """Measure ``samples_per_s`` in batches of ``batch_size`` with decoded frames in the cache, and
        ``uncached_samples_per_s`` with decoding of every frame.

        ``one_process_...`` are the same figures without workers, which is the rate of one core.
        """
        config = compose("train", self.overrides)
        batches = self.quick_batches if quick else self.batches
        samples = (self.skip_batches + batches) * config.data.batch_size
        settings = {
            "": {"num_workers": config.data.num_workers, "cache_gb": config.data.cache_gb},
            "uncached_": {"num_workers": config.data.num_workers, "cache_gb": 0.0},
            "one_process_": {"num_workers": 0, "cache_gb": config.data.cache_gb},
            "one_process_uncached_": {"num_workers": 0, "cache_gb": 0.0},
        }
        figures: dict[str, float] = {"batch_size": config.data.batch_size}
        with tempfile.TemporaryDirectory(prefix="keygrip-bench-") as name:
            root = repeated_demos(config, Path(name), self.quick_demos if quick else self.demos, samples)
            for prefix, options in Progress(settings.items(), desc="loader", unit="setting", leave=False):
                rate, workers = self._rate(config, root, options, batches)
                figures[f"{prefix}samples_per_s"] = round(rate, 1)
                figures["workers"] = max(workers, figures.get("workers", 0))
        return figures

    def _rate(self, config: DictConfig, root: Path, options: dict[str, float], batches: int) -> tuple[float, int]:
        data = instantiate(config.data, root=str(root), max_demos=None, val_fraction=0.0, _convert_="all", **options)
        data.setup("fit")
        if options["cache_gb"]:
            for frames in data.train_samples.frames.values():
                for demo, reference in enumerate(data.train_samples.demos):
                    for frame in range(len(reference)):
                        frames.read(demo, frame)
        loader = iter(data.train_dataloader())
        for _ in range(self.skip_batches):
            next(loader)
        started = time.perf_counter()
        samples = sum(len(next(loader)) for _ in range(batches))
        return samples / (time.perf_counter() - started), data.num_workers
