"""Training configs inside of another command."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from keygrip.config import compose


def training_config(overrides: Sequence[str]) -> DictConfig:
    """Composes ``conf/train.yaml`` while Hydra may be running another command; that one's state is left as it was."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton

    running = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        return compose("train", list(overrides))
    finally:
        Singleton.set_state(running)
