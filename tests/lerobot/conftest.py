"""Tests with LeRobot's own code: `make lerobot` runs them in an environment of their own (.venv-lerobot).

In other runs they are deselected, and pytest reports how many. With `-m lerobot` but without lerobot, they fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from keygrip import train
from keygrip.config import compose
from keygrip.data.robot.lerobot_export.export import export_lerobot

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "lerobot" in config.getoption("markexpr"):
        return
    chosen = [item for item in items if HERE in item.path.parents]
    if chosen:
        config.hook.pytest_deselected(items=chosen)
        items[:] = [item for item in items if HERE not in item.path.parents]


class Made(NamedTuple):
    """A keygrip run of one step, its recordings, and the data set exported from them."""

    run: Path
    demos: Path
    dataset: Path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("lerobot")
    metrics = train.run(
        compose(
            "train",
            [
                "model=volume_query", "model.network.pred_size=12", "model.log_images_every_n_steps=0",
                "data=yam_language", "data.record.demos=2", "data.record.image_size=72", "data.record.processes=1",
                "data.batch_size=4", "data.num_workers=0", "data.cache_gb=0", "backbone.image_size=48",
                "backbone.width=32", "backbone.depth=1", "backbone.heads=2", "strategy=cpu",
                "strategy.precision=32-true", "logger=none", "max_steps=1", "val_every_n_steps=1",
                "limit_val_batches=1", f"data.record.folder={folder / 'demos'}", f"run_dir={folder / 'run'}",
            ],
        )
    )  # fmt: skip
    assert all(np.isfinite(value) for value in metrics.values())
    export_lerobot(folder / "demos", folder / "dataset", progress=False)
    return Made(folder / "run", folder / "demos", folder / "dataset")
