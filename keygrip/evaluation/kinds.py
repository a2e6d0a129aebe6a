"""What `python -m keygrip.evaluate` asks of a model: each LightningModule names its evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


@dataclass(frozen=True)
class Evaluated:
    """What is evaluated, and where the files of the evaluation go.

    Args:
        module: with the weights of the checkpoint. config: of the run that trained it. checkpoint: its file.
        output: a folder, made by whoever writes into it.
    """

    module: LightningModule
    config: DictConfig
    checkpoint: Path
    output: Path


@dataclass(frozen=True)
class Evaluation:
    """How a kind of model is evaluated.

    Args:
        run: from what is evaluated and the config of `conf/evaluate.yaml` to what is printed and written.
        settings: of `conf/evaluate.yaml` that ``run`` reads; a setting of another kind of model is refused.
    """

    run: Callable[[Any, DictConfig], dict[str, Any]]
    settings: frozenset[str]


class Evaluable(Protocol):
    """A LightningModule that can be evaluated."""

    def evaluation(self) -> Evaluation: ...


def plain(node: Any) -> Any:
    """A config node as dictionaries, lists and scalars."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
