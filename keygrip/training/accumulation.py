"""Optimiser steps over several batches (`accumulate_grad_batches`)."""

from __future__ import annotations

from lightning.pytorch import Trainer


def completes_step(trainer: Trainer) -> bool:
    """Whether the training batch that runs or just ended completes an optimiser step."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()
