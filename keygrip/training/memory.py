"""Memory of a training step: counted without computing anything, or measured on a GPU.

Counted means that the step's tensors have shapes but no content (torch's fake tensors): forward and backward pass run
as usual, and every storage is counted from its creation to its deletion. Small tensors that do not depend on parameters
(positions, masks, window indices) are computed, because a network's shapes may depend on them. Scratch space of kernels
and fragmentation of the allocator are not counted. Attention is counted as on a GPU, with a fused kernel in the step's
precision; on a processor a step in bf16 also keeps float32 copies of its operands
(`keygrip.models.nn.processor_attention`).
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

GIB = 2**30
# Returns the loss; its argument moves a tensor of the batch to the device of the step.
Step = Callable[[Callable[[Tensor], Tensor]], Tensor]
ADAM_STATES = 2  # float32 values in AdamW's state per trained parameter
SMALL = 2**20  # size up to which tensors that depend on no parameter are computed for real

_COUNTING: ContextVar[bool] = ContextVar("counting", default=False)


def is_counting() -> bool:
    """Return whether a step is being counted. Most tensors then have only shapes, so their content must not be used for
    look-ups, and values computed from them must not be cached."""
    return _COUNTING.get()


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step.

    Attributes:
        weights: parameters and buffers, including those of `outside_modules`. optimizer: its moments; without a recipe
            the two of AdamW (`AdamW.moments`). ema: the EMA of the weights. step: the maximum of activations,
            gradients and copies in lower precision together. measured: whether it was measured on a GPU.
        undivided: the part of the weights that is not sharded (`outside_modules`). cache: the maximum that the run
            additionally keeps from step to step.
    """

    weights: int
    optimizer: int
    ema: int
    step: int
    measured: bool
    undivided: int = 0
    cache: int = 0

    @property
    def total(self) -> int:
        """Total number of bytes."""
        return self.weights + self.optimizer + self.ema + self.step + self.cache

    def divided(self, processes: int) -> StepMemory:
        """Return the memory of one of several processes over which weights (except those of `outside_modules`), moments
        and EMA are sharded (FSDP). Gradients are counted in full, which is too much."""
        optimizer, ema = (math.ceil(part / processes) for part in (self.optimizer, self.ema))
        weights = self.undivided + math.ceil((self.weights - self.undivided) / processes)
        return replace(self, weights=weights, optimizer=optimizer, ema=ema)

    def report(self) -> dict[str, Any]:
        """Return the memory in GiB, rounded to two decimals."""
        names = ("weights", "optimizer", "ema", "step", *(("cache",) if self.cache else ()), "total")
        parts = {name: getattr(self, name) for name in names}
        return {f"{name}_gib": round(value / GIB, 2) for name, value in parts.items()} | {
            "how": "measured on the GPU" if self.measured else "counted, as of a GPU"
        }


@runtime_checkable
class HoldsOutside(Protocol):
    """A module that computes with modules which are not its submodules. It moves them to its device only if they are on
    another one (weights without content cannot be moved)."""

    def outside_modules(self) -> Sequence[nn.Module]:
        """Return these modules. Their weights are not trained, not saved with this module and never sharded."""
        ...


def outside_modules(module: nn.Module) -> list[nn.Module]:
    """Return, each once, the modules with which `module` and its submodules compute and which are not submodules (a
    frozen encoder of another project)."""
    holders = [part for part in module.modules() if isinstance(part, HoldsOutside)]
    return list({id(each): each for holder in holders for each in holder.outside_modules()}.values())


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages that are created while this mode is active, for as long as they exist.

    Attributes:
        now: current bytes. peak: maximum so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return  # a view, or a tensor changed in place
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end, size)

    def _end(self, size: int) -> None:
        self.now -= size

    def skip(self, tensors: Any) -> None:
        """Exclude tensors that existed before."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = 0


class SmallIsComputed(TorchDispatchMode):
    """A mode between `LiveBytes` and fake tensors that computes operations on small real tensors only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        if all(not isinstance(tensor, FakeTensor) and tensor.numel() <= SMALL for tensor in tensors):
            if tensors or _count_elements(func(*args, **kwargs)) <= SMALL:
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
        elif func is torch.ops.aten.index.Tensor and isinstance(args[0], FakeTensor):
            value, indices = args
            if len(indices) == 1 and indices[0].dtype == torch.bool and not isinstance(indices[0], FakeTensor):
                with unset_fake_temporarily():
                    count = int(indices[0].sum())
                return value.new_empty((count, *value.shape[indices[0].ndim :]))
        return func(*args, **kwargs)


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results of an operation."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _count_elements(result: Any) -> int:
    return sum(tensor.numel() for tensor in _tensors(result))


def held(module: nn.Module, ema: bool) -> dict[str, int]:
    """Return the bytes that are in use between steps: `weights`, `undivided`, `optimizer`, `ema` (see `StepMemory`)."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    undivided = sum(_bytes_of(each) for each in outside_modules(module))
    return {
        "weights": _bytes_of(module) + undivided,
        "undivided": undivided,
        "optimizer": ADAM_STATES * 4 * trained,
        "ema": 4 * trained if ema else 0,
    }


def _bytes_of(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def count_step(module: nn.Module, step: Step, bf16: bool, ema: bool, accumulated: bool = False) -> StepMemory:
    """Count the memory of a module's step on the CPU, without computing it.

    Args:
        module: its parameters do not change; they may be on torch's device `meta`.
        step: returns the loss, with the module's own `forward` called through `torch.nn.Module.__call__`; its argument
            is a function that replaces a real tensor of the batch, unless it is small, by a tensor without content.
        bf16: whether to use autocast as Lightning does: each use of a weight creates a copy. ema: whether there is
            an EMA of the weights. accumulated: whether gradients of another batch already exist, as from the second
            batch of a step on (`accumulate_grad_batches`).
    """
    with _count_live_bytes(module) as (live, change):
        if accumulated:
            for parameter in module.parameters():  # fake tensors
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            loss = step(change)
        loss.backward()
    return StepMemory(step=live.peak, measured=False, **held(module, ema))


def count_forward(module: nn.Module, forward: Step) -> StepMemory:
    """As `count_step`, without gradients: `forward` returns any tensor, and `step` counts activations only."""
    with _count_live_bytes(module) as (live, change), torch.no_grad():
        forward(change)
    weights = {name: size for name, size in held(module, False).items() if name in ("weights", "undivided")}
    return StepMemory(optimizer=0, ema=0, step=live.peak, measured=False, **weights)


@contextlib.contextmanager
def _count_live_bytes(module: nn.Module) -> Iterator[tuple[LiveBytes, Callable[[Tensor], Tensor]]]:
    """Replace the tensors of a module, and of its outside modules, by tensors without content, so that the block
    computes nothing. Yield the counter, and a function that does the same for a real tensor unless it is small."""
    all_modules = nn.ModuleList([module, *outside_modules(module)])
    small = {name: b.cpu() for name, b in all_modules.named_buffers() if _is_small(b)}
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        stand_ins = {
            name: nn.Parameter(_shape_of(p), requires_grad=p.requires_grad)
            for name, p in all_modules.named_parameters()
        }
        buffers = {name: small[name] if name in small else _shape_of(b) for name, b in all_modules.named_buffers()}
        with (
            _swap_tensors(all_modules, stand_ins, buffers),
            torch.random.fork_rng([]),
            SmallIsComputed(),
            LiveBytes() as live,
        ):
            live.skip([*stand_ins.values(), *buffers.values()])
            token = _COUNTING.set(True)
            try:
                yield live, lambda tensor: tensor.detach() if _is_small(tensor) else fake.from_tensor(tensor.detach())
            finally:
                _COUNTING.reset(token)


def _is_small(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.numel() <= SMALL


def _shape_of(tensor: Tensor) -> Tensor:
    """Return an empty CPU tensor with the shape, strides and dtype of another tensor, which may be on device `meta`."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")


@contextlib.contextmanager
def _swap_tensors(module: nn.Module, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor]) -> Any:
    """Replace the parameters and buffers of a module during the block, shared ones everywhere."""
    stand_ins: dict[int, Tensor] = {id(p): parameters[name] for name, p in module.named_parameters()}
    stand_ins |= {id(b): buffers[name] for name, b in module.named_buffers()}
    owners = [
        (part, name, value)
        for part in module.modules()
        for kind in (part.named_parameters, part.named_buffers)
        for name, value in kind(recurse=False, remove_duplicate=False)
    ]
    for part, name, value in owners:
        setattr(part, name, stand_ins[id(value)])
    try:
        yield
    finally:
        for part, name, value in owners:
            setattr(part, name, value)


def measure_step(module: nn.Module, step: Step, bf16: bool, ema: bool, accumulated: bool = False) -> StepMemory:
    """As `count_step`, but run the step on the module's GPU; gradients are removed again after it.

    Raises:
        torch.OutOfMemoryError: the step does not fit into memory.
    """
    device = next(module.parameters()).device
    for each in outside_modules(module):
        each.to(device)  # before the step, which would otherwise move them and count them a second time
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    memory_before = torch.cuda.memory_allocated(device)
    try:
        for _ in range(2 if accumulated else 1):
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16, cache_enabled=False):
                loss = step(lambda tensor: tensor.to(device))
            loss.backward()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - memory_before
    finally:
        module.zero_grad(set_to_none=True)
    return StepMemory(step=peak, measured=True, **held(module, ema))
