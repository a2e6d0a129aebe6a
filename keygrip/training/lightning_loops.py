"""The position of a run in Lightning's training loops. Lightning does not document these attributes, so that each is
used here alone; `tests/training/test_lightning_loops.py` fails when one of them changes."""

from __future__ import annotations

import sys

from lightning.pytorch import Trainer

NEVER = sys.maxsize  # larger than any batch number; Lightning reads infinity as the end of every epoch


def completes_step(trainer: Trainer) -> bool:
    """Return whether the training batch that is running or has just ended completes an optimizer step."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def batches_begun(trainer: Trainer) -> int:
    """Return the number of training batches since the start of training, with the one that is running."""
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


def batches_done(trainer: Trainer) -> int:
    """Return the number of training batches since the start of training, without the one that is running."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]


def is_last_batch(trainer: Trainer) -> bool:
    """Return whether the training batch that is running or has just ended is the last one of its epoch."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def training_is_done(trainer: Trainer) -> bool:
    """Return whether no step and no epoch is left to train."""
    return trainer.fit_loop.done


def plan_validation(trainer: Trainer, now: bool) -> None:
    """Validate after the training batch that is running or has just ended, or after none."""
    trainer.val_check_batch = batches_begun(trainer) if now else NEVER


def count_resumed_epoch(trainer: Trainer) -> None:
    """Count the epoch that begins if a run resumes from the last batch of an epoch. Lightning counts it as the epoch
    that has ended; the next resume would then take its batches for those of a finished epoch."""
    loop = trainer.fit_loop
    progress, counts = loop.epoch_progress, vars(loop.epoch_progress.current)
    if not loop.done and loop.restarted_mid_epoch and counts["ready"] == counts["processed"]:
        progress.increment_ready()
        progress.increment_started()


def undo_validation(trainer: Trainer) -> None:
    """Restore the progress to the end of the last training batch, from where Lightning resumes exactly. From the middle
    of a validation it would continue with a part of that validation."""
    loop = trainer.fit_loop.epoch_loop
    loop.val_loop.batch_progress.reset()
    for progress in (loop.batch_progress.total, loop.batch_progress.current):
        progress.completed -= 1
