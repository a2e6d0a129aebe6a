"""The base class of keygrip's data modules: an order of samples that can be resumed from a checkpoint."""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning import LightningDataModule
from torch.utils.data import Dataset

from keygrip.cores import allow_many_files
from keygrip.data.changes import named_changes
from keygrip.data.shards.sampling import GlobalBatchSampler, start_worker
from keygrip.training.lightning_loops import batches_done

FILES_OF_A_WORKER = 40  # a worker's pipes, shared memory, queues and input files
FILES_OF_A_RUN = 60


def ensure_enough_files(workers: int) -> None:
    """Raise this process's limit of open files to the system's maximum if there are loader workers: without enough file
    descriptors they would wait forever.

    Raises:
        OSError: the limit is too low for this number of workers; the message has the limit and the number needed.
    """
    if not workers:
        return
    allow_many_files()  # keygrip's commands do this too; training started from Python needs it here
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_OF_A_RUN + FILES_OF_A_WORKER * workers
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise OSError(
            f"this process may open {limit} files, and {workers} loader workers need about {needed}: raise the limit "
            "(ulimit -n), or lower data.num_workers"
        )


class ResumableData(LightningDataModule):
    """A data module whose position is one number: the count of finished training batches.

    A subclass has the attributes named in ``order_depends_on`` (a checkpoint with other values cannot be continued),
    ``num_workers`` and ``prefetch_batches``.

    Attributes:
        compares_contents: whether checkpoints contain hashes of all training data, so that a resumed run may read the
            data from another place (`data.root`).
        spares_copies: whether copies of remote shards made by other processes are never removed (`ShardCache`).
        processes: number of processes over which batches are divided, if there is no trainer (in `setup`, or in a dry
            run).
        accumulated: batches per optimizer step, if there is no trainer.
        max_steps, max_epochs: optimizer steps and epochs after which training stops, if there is no trainer; -1: not
            limited.
    """

    order_depends_on: ClassVar[tuple[str, ...]] = ("batch_size", "seed")
    compares_contents: ClassVar[bool] = False
    spares_copies: bool = False
    num_workers: int
    prefetch_batches: int

    def __init__(self) -> None:
        super().__init__()
        self._batches_done = 0
        self.processes, self.accumulated = 1, 1
        self.max_steps, self.max_epochs = -1, -1

    @property
    def ranks(self) -> tuple[int, int]:
        """This process's rank, and the number of ranks."""
        return (0, self.processes) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    @property
    def batches_per_step(self) -> int:
        """Number of batches whose gradients are accumulated for one optimizer step."""
        return self.accumulated if self.trainer is None else int(self.trainer.accumulate_grad_batches)

    def last_step(self, batches: int) -> float:
        """Return the optimizer step at which training stops, with `batches` batches per epoch; infinity if neither
        steps nor epochs limit it."""
        limits = self if self.trainer is None else self.trainer
        steps, epochs = limits.max_steps, limits.max_epochs
        per_epoch = math.ceil(batches / self.batches_per_step)
        return min(steps if steps >= 0 else math.inf, epochs * per_epoch if epochs and epochs > 0 else math.inf)

    def loader_options(self, samples: Dataset[Any], sampler: GlobalBatchSampler) -> dict[str, Any]:
        """Return the DataLoader options that all loaders share, without the collate function.

        Raises:
            OSError: the process may not open enough files for this number of workers. ValueError: invalid numbers.
        """
        if self.num_workers < 0 or self.prefetch_batches < 1:
            raise ValueError(
                f"data.num_workers={self.num_workers} must be at least 0 and data.prefetch_batches="
                f"{self.prefetch_batches} at least 1"
            )
        ensure_enough_files(self.num_workers)
        return {
            "dataset": samples,
            "batch_sampler": sampler,
            "num_workers": self.num_workers,
            "worker_init_fn": start_worker,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
            "prefetch_factor": self.prefetch_batches if self.num_workers else None,
        }

    def shard_hashes(self) -> dict[str, str]:
        """Return a hash of each training shard by name. Checkpoints store them to find shards that changed later."""
        return {}

    def batches_done(self) -> int:
        """Return the position in the order of samples: finished batches, counted from the start of training.

        This is the trainer's count, since the loader has no information on how many of its batches were used.
        """
        if self.trainer is None:
            return self._batches_done
        return max(self._batches_done, batches_done(self.trainer))

    def begin_from(self, state_dict: Mapping[str, Any]) -> None:
        """Set the position before the trainer restores it: with sharded parameters, Lightning makes the first iterator
        of a run that is limited by epochs before it reads the checkpoint."""
        self._batches_done = int(state_dict["batches_done"])

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what the order of samples depends on."""
        order = {name: getattr(self, name) for name in self.order_depends_on}
        return {"batches_done": self.batches_done(), "shards": self.shard_hashes(), **order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the position of the checkpoint.

        Raises:
            ValueError: the order of samples cannot be continued.
        """
        hashes = self.shard_hashes()
        if changed := named_changes(state_dict.get("shards", hashes), hashes):
            raise ValueError(
                f"the data are not those of the checkpoint: {changed}; the order of samples cannot be continued: "
                "restore them, or start a new run"
            )
        for name in self.order_depends_on:
            if state_dict[name] != getattr(self, name):
                raise ValueError(
                    f"the checkpoint was trained with data.{name}={state_dict[name]}, this run has "
                    f"{getattr(self, name)}; the order of samples cannot be continued"
                )
        self._batches_done = int(state_dict["batches_done"])
