"""A model and a data module that train within a second and have all the features of real ones."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor, nn

from keygrip.training.distributed import global_mean, world_size
from keygrip.training.optimizers import AdamW
from keygrip.training.parts import data_part, model_part
from keygrip.training.system import System


class ToyNetwork(nn.Sequential):
    """Has its own `forward`, since torch 2.11 does not compile torch's own modules."""

    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = part(x)
        return x


@model_part
class ToyModule(System):
    """Masked regression with dropout; stores a statistic of the data in its checkpoint."""

    headline_metrics = ("train/loss", "val/loss", "val/error")

    def __init__(self, optimizer: AdamW, width: int = 8, dropout: float = 0.1, frozen: bool = False) -> None:
        super().__init__(optimizer)
        first = [nn.Linear(4, 4).requires_grad_(False)] if frozen else []
        self.network = ToyNetwork(*first, nn.Linear(4, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 1))
        self.scale: float | None = None

    def set_statistics(self, statistics: dict[str, float]) -> None:
        self.scale = statistics["scale"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["scale"] = self.scale

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("scale") is None:
            raise ValueError("the checkpoint has no scale")
        self.scale = checkpoint["scale"]

    def errors(self, batch: dict[str, Tensor]) -> Tensor:
        return self.network(batch["x"])[:, 0] - batch["y"] / self.scale

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return global_mean((self.errors(batch) ** 2 * batch["valid"]).sum(), batch["valid"].sum())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if str(self.trainer.global_step) == os.environ.get("TOY_STOP_AT"):
            os.kill(os.getpid(), getattr(signal, os.environ["TOY_SIGNAL"]))
        if folder := os.environ.get("TOY_RANKS"):
            Path(folder, f"rank_{self.global_rank}").touch()
        loss = self.loss(batch)
        self.log("train/loss", loss, sync_dist=world_size() > 1)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if f"{self.trainer.global_step} {batch_idx}" == os.environ.get("TOY_STOP_IN_VALIDATION"):
            os.kill(os.getpid(), getattr(signal, os.environ["TOY_SIGNAL"]))
        torch.rand(3)  # validation uses random numbers too; they must not affect training
        values = {"total": self.loss(batch), "error": self.errors(batch).abs().mean()}
        self.log_values("val", values, len(batch["x"]))

    def sharded_parts(self) -> list[nn.Module]:
        return [self.network]


@data_part
class ToyData(LightningDataModule):
    """Batches that are a function of (seed, epoch, step); rank r gets the r-th slice of each global batch.

    Validation has one sample less, so that two processes have different numbers of samples.
    """

    def __init__(self, samples: int = 40, batch_size: int = 8, seed: int = 0, fail: str = "") -> None:
        super().__init__()
        self.samples, self.batch_size, self.seed, self.fail = samples, batch_size, seed, fail
        self.position = 0

    @property
    def statistics(self) -> dict[str, float]:
        return {"scale": float(self.y.std())}

    def setup(self, stage: str) -> None:
        if self.fail:
            raise ValueError(self.fail)
        generator = torch.Generator().manual_seed(self.seed)
        self.x = torch.randn(self.samples, 4, generator=generator)
        self.y = 3.0 * self.x.sum(1) + 1.0
        self.valid = (torch.rand(self.samples, generator=generator) > 0.4).float()

    def batches(self, order: Tensor, start: int) -> Iterator[dict[str, Tensor]]:
        for first in range(start * self.batch_size, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            mine = batch.tensor_split(self.trainer.world_size)[self.trainer.global_rank]
            yield {"x": self.x[mine], "y": self.y[mine], "valid": self.valid[mine]}

    def train_dataloader(self) -> ToyLoader:
        return ToyLoader(self, shuffled=True)

    def val_dataloader(self) -> ToyLoader:
        return ToyLoader(self, shuffled=False)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.trainer.fit_loop.epoch_loop.total_batch_idx + 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = state_dict["position"]


class ToyLoader:
    """Iterates over the rest of an epoch after resuming, and over whole epochs afterwards."""

    def __init__(self, data: ToyData, shuffled: bool) -> None:
        self.data, self.shuffled = data, shuffled

    def __len__(self) -> int:
        return self.data.samples // self.data.batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        data = self.data
        if not self.shuffled:
            yield from data.batches(torch.arange(data.samples - 1), 0)
            return
        epoch, start = divmod(data.position, len(self))
        data.position = (epoch + 1) * len(self)
        order = torch.randperm(data.samples, generator=torch.Generator().manual_seed(1000 * data.seed + epoch))
        yield from data.batches(order, start)  # a generator: nothing moves before the first batch is requested
