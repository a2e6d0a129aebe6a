"""The order of samples: a pure function of (seed, epoch, step), whatever the number of ranks and workers.

An epoch is one permutation of the data set, cut into global batches; a rank takes its consecutive part of each. Each
sample travels as a `SampleKey` with its epoch, from which the data set derives the augmentation, so that nothing
depends on who loads it. Resuming needs one number, the count of batches done.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler


class SampleKey(NamedTuple):
    """A sample and an epoch: beside the seed, all that a sample's random augmentation depends on."""

    sample: int
    epoch: int


def sample_generator(seed: int, key: SampleKey) -> np.random.Generator:
    """The generator of one sample's augmentation."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, key.epoch, key.sample))))


class GlobalBatchSampler(Sampler[list[SampleKey]]):
    """Yields this rank's part of each global batch.

    With `drop_last` (training) the incomplete batch at the end of an epoch is left out: every step then averages over
    the same number of samples on every rank, and shuffling leaves out others each epoch. Without it (validation) the
    last batch is divided as evenly as it goes, and what is left for fewer samples than there are ranks is added to the
    batch before it: every sample counts once, whatever the number of ranks. Only a data set of fewer samples than ranks
    repeats its first ones, so that no rank waits forever.

    Args:
        samples: how many the data set holds.
        batch_size: over all ranks together.
        rank, ranks: this process and how many there are.
        seed: of the order.
        shuffle: a new permutation each epoch; otherwise one fixed permutation (validation: a limited number of batches
            then still sees every demo).
        drop_last: see above.
        groups: int [samples], the group of each sample: every epoch holds equally many of each group, so that samples
            of small groups come several times and those of large ones not all. None: every sample once.
        weights: of the groups, in the order of their numbers: their shares of an epoch in place of equal ones.

    Raises:
        ValueError: another number of weights than of groups, the batch does not divide over the ranks, or the data set
            is smaller than one batch with `drop_last`.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        groups: np.ndarray | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % ranks:
            raise ValueError(
                f"data.batch_size={batch_size} is the global batch and must divide by the {ranks} processes; "
                f"{max(1, batch_size // ranks) * ranks} would"
            )
        if drop_last and samples < batch_size:
            raise ValueError(
                f"the training split holds {samples} samples, fewer than one batch of {batch_size}; lower "
                "data.batch_size"
            )
        self.samples, self.batch_size, self.rank, self.ranks = samples, batch_size, rank, ranks
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.groups = None if groups is None else [np.flatnonzero(groups == group) for group in np.unique(groups)]
        self.weights = None if weights is None else np.asarray(weights, dtype=np.float64)
        if self.weights is not None and (self.groups is None or len(self.groups) != len(self.weights)):
            held = 0 if self.groups is None else len(self.groups)
            raise ValueError(f"{len(self.weights)} weights for {held} groups that have training samples")
        self.epoch = 0
        self.position: Callable[[], int] | None = None

    @property
    def sampler(self) -> GlobalBatchSampler:
        """Lightning looks here for `set_epoch`."""
        return self

    def __len__(self) -> int:
        """Batches of a full epoch, also while one is being resumed."""
        whole, rest = divmod(self.samples, self.batch_size)
        return whole if self.drop_last or not rest or (whole and rest < self.ranks) else whole + 1

    def set_epoch(self, epoch: int) -> None:
        """The next iteration starts this epoch, unless a `position` is followed."""
        self.epoch = epoch

    def follow(self, position: Callable[[], int]) -> None:
        """Each iteration begins after `position()` batches, counted from the start of training.

        The trainer's own epoch number is not used: when training resumes, its first iterator is made before the epoch
        is named, and a checkpoint written at the end of an epoch makes it count that epoch's end twice.
        """
        self.position = position

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation, [samples] int64; with groups an even draw from each, or one by their weights."""
        seed = (self.seed, epoch) if self.shuffle else (self.seed,)
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
        if self.groups is None:
            return generator.permutation(self.samples)
        if self.weights is None:
            shares = np.full(len(self.groups), self.samples // len(self.groups))
            shares[generator.permutation(len(self.groups))[: self.samples % len(self.groups)]] += 1
        else:
            exact = self.samples * self.weights / self.weights.sum()
            shares = np.floor(exact).astype(np.int64)
            shares[np.argsort(shares - exact, kind="stable")[: self.samples - shares.sum()]] += 1
        drawn = []
        for group, share in zip(self.groups, shares, strict=True):
            rounds = [generator.permutation(group) for _ in range(-(-int(share) // len(group)))]
            drawn.append(np.concatenate(rounds)[:share] if rounds else group[:0])
        return generator.permutation(np.concatenate(drawn))

    def global_batch(self, order: np.ndarray, step: int) -> np.ndarray:
        """All ranks' sample indices of one step."""
        stop = None if not self.drop_last and step + 1 == len(self) else (step + 1) * self.batch_size
        batch = order[step * self.batch_size : stop]
        return np.concatenate([batch, np.resize(order, self.ranks - len(batch))]) if len(batch) < self.ranks else batch

    def parts_of(self, epoch: int, first: int = 0) -> Iterator[Sequence[np.ndarray]]:
        """The sample indices of each global batch of an epoch, from the batch `first` on: an array for each rank."""
        order = self.order(epoch)
        for step in range(first, len(self)):
            yield np.array_split(self.global_batch(order, step), self.ranks)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, first = (self.epoch, 0) if self.position is None else divmod(self.position(), max(1, len(self)))
        for parts in self.parts_of(epoch, first):
            yield [SampleKey(int(index), epoch) for index in parts[self.rank]]


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that raises the errors which workers hand over, and tells Lightning that it can resume in mid-epoch.

    The position itself travels in the data module's state, which reads it from the trainer's count of finished batches:
    a loader cannot know how much of what it handed out was used.
    """

    def __iter__(self) -> Any:
        return map(_batch_or_raise, _shared_memory_is_named(super().__iter__()))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore here: see the class."""


def _shared_memory_is_named(batches: Any) -> Iterator[Any]:
    """Passes batches on; replaces torch's errors about too little shared memory by one that says what to do.

    Raises:
        OSError: workers could not hand over a batch.
    """
    try:
        yield from batches
    except (RuntimeError, OSError) as error:
        text = str(error)
        if "shared memory" not in text and "Bus error" not in text and "/torch_" not in text:
            raise
        raise OSError(
            "the loader's workers ran out of shared memory (/dev/shm): give it more (docker run --shm-size=8g), or "
            "lower data.num_workers, data.prefetch_batches or data.batch_size"
        ) from error


def _batch_or_raise(batch: Any) -> Any:
    if isinstance(batch, Exception):
        raise batch
    return batch


def start_worker(worker: int) -> None:
    """Prepares a loader worker: one thread for torch, and none of the signals that are meant for the trainer, which
    needs its workers until it has saved, ends it.

    Ctrl-C and `timeout` signal the trainer's process group, so a worker gets a group of its own. Slurm and systemd
    signal every process, so a worker obeys SIGTERM from the trainer alone and ignores SIGHUP and the warning SIGUSR1.

    Args:
        worker: its number, which torch passes.
    """
    torch.set_num_threads(1)
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_trainer, args=(os.getppid(),), daemon=True).start()


def _obey_trainer(trainer: int) -> None:
    """Ends this process when the process `trainer` sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
