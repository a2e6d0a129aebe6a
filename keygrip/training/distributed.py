"""Sums and means over the global batch, so that several processes compute the same gradient as a single one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """Return the number of processes that train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def global_sum(value: Tensor) -> Tensor:
    """Return the sum of ``value`` over all processes, without gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        distributed.all_reduce(value)
    return value


def total_of(number: float, device: torch.device) -> float:
    """Return the sum of a number over all processes. It is computed on their devices and waits for them; every process
    must call this function."""
    if world_size() == 1:
        return number
    return float(global_sum(torch.tensor(number, dtype=torch.float64, device=device)))


def maximum_over_processes(number: float) -> float:
    """Return the maximum of a number over all processes, in one reduction; every process must call this function."""
    if world_size() == 1:
        return number
    value = torch.tensor(number, dtype=torch.float64, device=_device_of_reductions())
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return float(value)


def _device_of_reductions() -> torch.device:
    """Return the device whose tensors the processes can reduce: the CPU if gloo connects them, also beside NCCL."""
    if "gloo" in distributed.get_backend():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def global_mean(total: Tensor, count: Tensor | float) -> Tensor:
    """Return ``sum(total) / sum(count)`` over all processes, scaled so that DDP's averaging gives its exact gradient.

    A mean over the local batch weights samples wrongly if processes have different numbers of valid samples. Here each
    process returns ``total * processes / global_count``: the mean over processes of the values, and of the gradients,
    is that of one process with the whole batch. Every process must call this function the same number of times; without
    any valid element the result is 0. If no gradient is computed, as in validation, each process returns the global
    mean itself, so that a mean weighted by the samples of each process is also the global mean.

    Args:
        total: [] or any shape, the local sum of losses, with gradient.
        count: local number of terms in the sum (a mask's sum), without gradient.
    """
    dtype = torch.float64 if total.dtype == torch.float64 else torch.float32
    if isinstance(count, Tensor):
        counted = count.to(total.device, dtype)
    else:
        counted = torch.full((), count, dtype=dtype, device=total.device)  # no copy, which would wait for a GPU
    everywhere = global_sum(counted)
    if not torch.is_grad_enabled():
        return global_sum(total) / everywhere.clamp(min=1e-12) * (everywhere > 0)
    return total * (world_size() / everywhere.clamp(min=1e-12)) * (everywhere > 0)


def mean_over_processes(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean of each value over all processes, without gradient. Losses from `global_mean` are logged as this
    mean, because in training a process has only its own share of them.

    Args:
        values: scalars; every process must give the same names, in the same order.
    """
    if world_size() == 1 or not values:
        return {name: value.detach() for name, value in values.items()}
    means = global_sum(torch.stack([value.float() for value in values.values()])) / world_size()
    return dict(zip(values, means.unbind(), strict=True))


def check_weights(weights: Mapping[str, float]) -> None:
    """Reject weights of losses with which nothing would be learned, or a loss would be maximised.

    Args:
        weights: by setting, e.g. ``{"model.gripper_weight": 0.5}``.

    Raises:
        ValueError: one of them is negative or not finite, or all are 0.
    """
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}={weight}: a loss weighs 0 (it is left out) or more")
    if not any(weights.values()):
        raise ValueError(f"{', '.join(weights)} are all 0: nothing would be learned; set at least one of them above 0")


def weighted_means(losses: Mapping[str, Tensor], counted: Tensor, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the mean of each loss over the counted elements of the global batch (`global_mean`), and their weighted
    ``total``.

    Args:
        losses: by name, each with the shape of ``counted``. counted: bool. weights: by the same names.
    """
    count = counted.sum()
    means = {name: global_mean(loss.masked_fill(~counted, 0.0).sum(), count) for name, loss in losses.items()}
    total = sum((weights[name] * mean for name, mean in means.items()), start=torch.zeros((), device=counted.device))
    return means | {"total": total}
