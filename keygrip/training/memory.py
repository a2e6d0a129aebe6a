"""Memory of a training step: counted without computing anything, or measured on a GPU.

Counted means that the step's tensors have shapes and no content (torch's fake tensors): forward and backward pass run
as they would, and every storage is counted from its making to its end. Small tensors that depend on no parameter
(positions, masks, window indices) are computed, because a network's shapes may depend on them. Kernels' own scratch
space and what an allocator loses between blocks are not counted. Attention is counted as a GPU has it, by a fused
kernel in the step's precision; on a processor a step in bf16 keeps copies of its operands in float32 beside
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
# Gives the loss; its argument brings a tensor of the batch to where the step runs.
Step = Callable[[Callable[[Tensor], Tensor]], Tensor]
ADAM_STATES = 2  # float32 numbers that AdamW keeps of each trained one
SMALL = 2**20  # size up to which tensors that depend on no parameter are computed for real

_COUNTING: ContextVar[bool] = ContextVar("counting", default=False)


def is_counting() -> bool:
    """Whether a step is being counted: most tensors then have shapes alone, so that nothing can be looked up by their
    content, and what is computed of them must not be kept."""
    return _COUNTING.get()


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step.

    Attributes:
        weights: parameters and buffers, those of `outside_modules` among them. optimizer: its moments, AdamW's two
            where no recipe is known (`AdamW.moments`). ema: of the averaged weights. step: the most that activations,
            gradients and copies in lower precision take together. measured: on a GPU.
        undivided: of the weights, those that every process holds whole (`outside_modules`). cache: what the run may
            keep beside all this from step to step, at most.
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
        """Bytes of all parts together."""
        return self.weights + self.optimizer + self.ema + self.step + self.cache

    def divided(self, processes: int) -> StepMemory:
        """Of one of several processes that weights (but those of `outside_modules`), moments and EMA are divided over
        (FSDP). Gradients are counted whole, which is too much."""
        optimizer, ema = (math.ceil(part / processes) for part in (self.optimizer, self.ema))
        weights = self.undivided + math.ceil((self.weights - self.undivided) / processes)
        return replace(self, weights=weights, optimizer=optimizer, ema=ema)

    def report(self) -> dict[str, Any]:
        """In GiB, to a hundredth."""
        names = ("weights", "optimizer", "ema", "step", *(("cache",) if self.cache else ()), "total")
        parts = {name: getattr(self, name) for name in names}
        return {f"{name}_gib": round(value / GIB, 2) for name, value in parts.items()} | {
            "how": "measured on the GPU" if self.measured else "counted, as of a GPU"
        }


@runtime_checkable
class HoldsOutside(Protocol):
    """A module that computes with others that are no submodules of it, and that moves them where it computes only if
    they lie elsewhere (weights without content cannot be moved)."""

    def outside_modules(self) -> Sequence[nn.Module]:
        """Those: their weights are neither trained nor saved with this module, and no strategy divides them."""
        ...


def outside_modules(module: nn.Module) -> list[nn.Module]:
    """The modules that `module` and its submodules compute with, and which are no submodules (a frozen encoder of
    another project); each once."""
    holders = [part for part in module.modules() if isinstance(part, HoldsOutside)]
    return list({id(each): each for holder in holders for each in holder.outside_modules()}.values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is active, for as long as they live.

    Attributes:
        now: bytes alive. peak: the most so far.
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
            return  # a view, or changed in place
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end, size)

    def _end(self, size: int) -> None:
        self.now -= size

    def skip(self, tensors: Any) -> None:
        """Does not count tensors that were there before."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = 0


class SmallIsComputed(TorchDispatchMode):
    """Below `LiveBytes` and above fake tensors: operations on small real tensors alone are computed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        if all(not isinstance(tensor, FakeTensor) and tensor.numel() <= SMALL for tensor in tensors):
            if tensors or _numel(func(*args, **kwargs)) <= SMALL:
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
        elif func is torch.ops.aten.index.Tensor and isinstance(args[0], FakeTensor):
            value, where = args
            if len(where) == 1 and where[0].dtype == torch.bool and not isinstance(where[0], FakeTensor):
                with unset_fake_temporarily():
                    count = int(where[0].sum())
                return value.new_empty((count, *value.shape[where[0].ndim :]))
        return func(*args, **kwargs)


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those in arguments or results of an operation."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _numel(result: Any) -> int:
    return sum(tensor.numel() for tensor in _tensors(result))


def held(module: nn.Module, ema: bool) -> dict[str, int]:
    """Bytes that lie there between steps: `weights`, `undivided`, `optimizer`, `ema` (see `StepMemory`)."""
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
    """Counts a step of a module on the CPU, without computing it.

    Args:
        module: its parameters stay as they are; they may be on torch's device `meta`.
        step: gives the loss, with the module's own `forward` called through `torch.nn.Module.__call__`; it takes a
            function that turns a real tensor of the batch, if it is not small, into one of its shape alone.
        bf16: under autocast, as Lightning's: each use of a weight makes its own copy. ema: averaged weights are kept.
        accumulated: gradients of another batch are there already, as from the second batch of a step on
            (`accumulate_grad_batches`).
    """
    with _counted(module) as (live, change):
        if accumulated:
            for parameter in module.parameters():  # stand-ins
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            loss = step(change)
        loss.backward()
    return StepMemory(step=live.peak, measured=False, **held(module, ema))


def count_forward(module: nn.Module, forward: Step) -> StepMemory:
    """As `count_step`, without gradients: `forward` gives any tensor, and of a step there are activations alone."""
    with _counted(module) as (live, change), torch.no_grad():
        forward(change)
    weights = {name: size for name, size in held(module, False).items() if name in ("weights", "undivided")}
    return StepMemory(optimizer=0, ema=0, step=live.peak, measured=False, **weights)


@contextlib.contextmanager
def _counted(module: nn.Module) -> Iterator[tuple[LiveBytes, Callable[[Tensor], Tensor]]]:
    """What runs inside computes nothing, with a module, and those outside of it, of which only the shapes are left; the
    count, and what turns a real tensor, if it is not small, into one of its shape alone."""
    whole = nn.ModuleList([module, *outside_modules(module)])
    small = {name: b.cpu() for name, b in whole.named_buffers() if _is_small(b)}
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        stand_ins = {
            name: nn.Parameter(_shape_of(p), requires_grad=p.requires_grad) for name, p in whole.named_parameters()
        }
        buffers = {name: small[name] if name in small else _shape_of(b) for name, b in whole.named_buffers()}
        with _swapped(whole, stand_ins, buffers), torch.random.fork_rng([]), SmallIsComputed(), LiveBytes() as live:
            live.skip([*stand_ins.values(), *buffers.values()])
            before = _COUNTING.set(True)
            try:
                yield live, lambda tensor: tensor.detach() if _is_small(tensor) else fake.from_tensor(tensor.detach())
            finally:
                _COUNTING.reset(before)


def _is_small(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.numel() <= SMALL


def _shape_of(tensor: Tensor) -> Tensor:
    """A tensor of the CPU like another, which may lie on the device for shapes alone."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")


@contextlib.contextmanager
def _swapped(module: nn.Module, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor]) -> Any:
    """The module with other parameters and buffers, shared ones replaced everywhere."""
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
    """As `count_step`, by doing the step on the GPU on which the module lies; gradients are left out again after it.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    device = next(module.parameters()).device
    for each in outside_modules(module):
        each.to(device)  # before the step, which would otherwise bring them here and count them a second time
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        for _ in range(2 if accumulated else 1):
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16, cache_enabled=False):
                loss = step(lambda tensor: tensor.to(device))
            loss.backward()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    finally:
        module.zero_grad(set_to_none=True)
    return StepMemory(step=peak, measured=True, **held(module, ema))
