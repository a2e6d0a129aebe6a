"""The order of samples: a pure function of (seed, epoch, step), independent of the number of ranks and workers.

An epoch is one permutation of the data set, cut into global batches; each rank uses a consecutive part of each batch. A
sample is identified by a `SampleKey` with its epoch, from which the data set derives the augmentation, so that nothing
depends on which process loads it. Resuming needs one number, the count of finished batches.
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
    """A sample and an epoch; together with the seed they determine a sample's random augmentation.

    `repeat`: how often the sample occurred in the epoch before, so that it is not augmented alike each time.
    """

    sample: int
    epoch: int
    repeat: int = 0


def sample_generator(seed: int, key: SampleKey) -> np.random.Generator:
    """Return the random generator for one sample's augmentation."""
    repeat = (key.repeat,) if key.repeat else ()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, key.epoch, key.sample, *repeat))))


class GlobalBatchSampler(Sampler[list[SampleKey]]):
    """Yield this rank's part of each global batch.

    With `drop_last` (training), the incomplete batch at the end of an epoch is left out. Every step then averages over
    the same number of samples on every rank, and shuffling leaves out different samples in each epoch. Without
    `drop_last` (validation), the last batch is divided as evenly as possible; if it has fewer samples than there are
    ranks, they are added to the previous batch. Every sample then counts once, for any number of ranks. Only a data set
    with fewer samples than ranks repeats its first samples, so that no rank waits forever.

    Args:
        samples: number of samples in the data set.
        batch_size: over all ranks together.
        rank, ranks: this process and the number of processes.
        seed: of the order.
        shuffle: True: a new permutation in each epoch; False: one fixed permutation (validation: a limited number of
            batches then still includes samples of every demo).
        drop_last: see above.
        groups: int [samples], the group of each sample: every epoch has the same number of samples from each group, so
            that samples of small groups occur several times and some samples of large groups not at all. None: every
            sample once.
        weights: of the groups, sorted by group number: their shares of an epoch, in place of equal shares.

    Raises:
        ValueError: the number of weights differs from the number of groups, the batch size is not a multiple of the
            number of ranks, or the data set is smaller than one batch with `drop_last`.
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
            group_count = 0 if self.groups is None else len(self.groups)
            raise ValueError(f"{len(self.weights)} weights for {group_count} groups that have training samples")
        self.epoch = 0
        self.position: Callable[[], int] | None = None

    @property
    def sampler(self) -> GlobalBatchSampler:
        """Lightning calls `set_epoch` on this attribute."""
        return self

    def __len__(self) -> int:
        """Return the number of batches of a full epoch, also in a resumed epoch."""
        whole, rest = divmod(self.samples, self.batch_size)
        return whole if self.drop_last or not rest or (whole and rest < self.ranks) else whole + 1

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; has no effect after `follow`, nor without `shuffle`: then all iterations
        are the same, and so is what is drawn for a sample."""
        if self.shuffle:
            self.epoch = epoch

    def follow(self, position: Callable[[], int]) -> None:
        """Begin each iteration after `position()` batches, counted from the start of training.

        The trainer's own epoch number is not used: when training resumes, the trainer creates its first iterator before
        it sets the epoch, and after a checkpoint at the end of an epoch it counts the end of that epoch twice.
        """
        self.position = position

    def order(self, epoch: int) -> np.ndarray:
        """Return the epoch's permutation, [samples] int64; with groups, sampled evenly or by the groups' weights."""
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
        selected = []
        for group, share in zip(self.groups, shares, strict=True):
            rounds = [generator.permutation(group) for _ in range(-(-int(share) // len(group)))]
            selected.append(np.concatenate(rounds)[:share] if rounds else group[:0])
        return generator.permutation(np.concatenate(selected))

    def global_batch(self, order: np.ndarray, step: int) -> np.ndarray:
        """Return the sample indices of one step, for all ranks together."""
        stop = None if not self.drop_last and step + 1 == len(self) else (step + 1) * self.batch_size
        batch = order[step * self.batch_size : stop]
        return np.concatenate([batch, np.resize(order, self.ranks - len(batch))]) if len(batch) < self.ranks else batch

    def parts_of(self, epoch: int, first: int = 0) -> Iterator[Sequence[np.ndarray]]:
        """Yield the sample indices of each global batch of an epoch, from batch `first` on: an array for each rank."""
        return self._split(self.order(epoch), first)

    def _split(self, order: np.ndarray, first: int) -> Iterator[Sequence[np.ndarray]]:
        for step in range(first, len(self)):
            yield np.array_split(self.global_batch(order, step), self.ranks)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, first = (self.epoch, 0) if self.position is None else divmod(self.position(), max(1, len(self)))
        if self.groups is None:
            for parts in self.parts_of(epoch, first):
                yield [SampleKey(int(index), epoch) for index in parts[self.rank]]
            return
        order = self.order(epoch)
        for parts, repeats in zip(self._split(order, first), self._split(_repeats(order), first), strict=True):
            pairs = zip(parts[self.rank], repeats[self.rank], strict=True)
            yield [SampleKey(int(index), epoch, int(repeat)) for index, repeat in pairs]


def _repeats(order: np.ndarray) -> np.ndarray:
    """Return, for each place of an order [n], how often its sample occurs at earlier places."""
    places = np.argsort(order, kind="stable")
    ascending = order[places]
    repeats = np.empty_like(order)
    repeats[places] = np.arange(len(order)) - np.searchsorted(ascending, ascending)
    return repeats


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that raises the errors passed on by workers, and indicates to Lightning that it can resume in
    mid-epoch.

    The position itself is in the data module's state, which reads it from the trainer's count of finished batches: the
    loader has no information on how many of its batches were used.
    """

    def __iter__(self) -> Any:
        return map(_batch_or_raise, _explain_shared_memory_errors(super().__iter__()))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore here: see the class."""


def _explain_shared_memory_errors(batches: Any) -> Iterator[Any]:
    """Pass batches on; replace torch's errors about too little shared memory by an error with the remedy.

    Raises:
        OSError: workers could not pass on a batch.
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
    """Prepare a loader worker: torch uses one thread, and signals for the trainer do not end the worker, since the
    trainer needs its workers until it has saved a checkpoint.

    Ctrl-C and `timeout` signal the trainer's process group, so a worker gets its own process group. Slurm and systemd
    signal every process, so a worker obeys SIGTERM only from the trainer, and ignores SIGHUP and the warning SIGUSR1.

    Args:
        worker: the worker's number, which torch passes.
    """
    torch.set_num_threads(1)
    os.setpgid(0, 0)
    for signal_number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signal_number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_trainer, args=(os.getppid(),), daemon=True).start()


def _end_with_trainer(trainer_pid: int) -> None:
    """End this process when the process `trainer_pid` sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer_pid:
        pass
    os._exit(0)
