"""A simulated GPU: its tensors report the device `cuda:0`, compute on the CPU, and must not be mixed with CPU tensors.

Most errors that occur only on a GPU come from a tensor, an index or a generator that was left on the CPU. Here such a
mixture raises `MixedDevices` on any machine, by the rules of CUDA: CPU scalars may be mixed in, CPU indices may read
and write a GPU tensor, a copy may go from one device to the other, numpy cannot read from the GPU. The random numbers
are those of the CPU, so that a run computes the same as on the CPU.

It also records each place where the CPU would wait until the GPU is done: where Python reads a value, and where the
size of a result depends on a value.

Speed, memory, kernels and streams of CUDA are not simulated. Autocast follows the rules of the CPU. What it computes in
bf16, a GPU computes in bf16 too, except norms and softmax, which return float32 there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten
# x[indices] = scalar becomes index_fill_ on the CPU only
READ = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_fill_.int_Scalar}
WRITE = {
    *(aten.index_put.default, aten.index_put_.default),
    *(aten._index_put_impl_.default, aten._unsafe_index_put.default),
}
SIZED_BY_VALUES = {
    *(aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default),
    *(aten.repeat_interleave.Tensor, aten._local_scalar_dense.default, aten.equal.default),
}
autocast, inference_mode = torch.autocast, torch.inference_mode
is_autocast_enabled, get_autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
Generator = torch.Generator


waits: list[str] = []  # file and line of each wait since the simulated GPU was started


class MixedDevices(RuntimeError):
    """An operation that CUDA would refuse."""


class OnGPU(Tensor):
    """A tensor that reports the GPU as its device; `held` is the CPU tensor that it computes with."""

    held: Tensor
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[OnGPU], held: Tensor) -> OnGPU:
        # C++ treats it as a CPU tensor: with the other device it would request streams from the driver.
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=CPU,
        )
        made.held = held
        return made

    def get_device(self) -> int:
        return 0

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnGPU({self.held})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _compute(operation, args, kwargs or {})


def _wait() -> None:
    """Record the innermost line of the package, or for other callers the innermost line outside torch."""
    frame, found = sys._getframe(1), None
    while frame is not None:
        name = frame.f_code.co_filename
        if "/keygrip/" in name:
            found = frame
            break
        if found is None and "/torch/" not in name and name != __file__:
            found = frame
        frame = frame.f_back  # type: ignore[assignment]
    assert found is not None
    waits.append(f"{found.f_code.co_filename}:{found.f_lineno}")


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnGPU) else value


def _pretended(value: Any) -> Any:
    return OnGPU(value) if isinstance(value, Tensor) and not isinstance(value, OnGPU) else value


def _compute(operation: Any, args: Any, kwargs: Any) -> Any:
    if torch.is_inference_mode_enabled():
        with inference_mode(mode=False):  # a wrapper made in inference mode could not be viewed
            return _checked(operation, args, kwargs)
    return _checked(operation, args, kwargs)


def _checked(operation: Any, args: Any, kwargs: Any) -> Any:
    if torch._C._current_autograd_node() is not None:  # autograd fills gaps with zeros, which it makes on the CPU
        args, kwargs = tree_map(_pretended, (args, kwargs))
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    outside = [each for each in tensors if not isinstance(each, OnGPU)]
    if operation in READ:
        mixed = not isinstance(args[0], OnGPU)
    elif operation in WRITE:
        mixed = not isinstance(args[0], OnGPU) or (not isinstance(args[2], OnGPU) and args[2].ndim > 0)
    elif operation is aten.copy_.default:
        mixed = False
    else:
        mixed = any(each.ndim for each in outside)
    if mixed:
        places = ", ".join(f"{'cuda' if isinstance(each, OnGPU) else 'cpu'} {list(each.shape)}" for each in tensors)
        raise MixedDevices(f"{operation} is given tensors of two devices: {places}")
    if operation in SIZED_BY_VALUES and kwargs.get("output_size") is None:
        _wait()
    if operation in READ | WRITE and any(
        isinstance(each, OnGPU) and each.dtype == torch.bool for each in tree_leaves(args[1])
    ):
        _wait()
    found = operation(*tree_map(_held, args), **tree_map(_held, kwargs))
    if operation is aten.copy_.default:
        return args[0]
    if operation is aten._local_scalar_dense.default:
        return found
    return return_and_correct_aliasing(operation, args, kwargs, tree_map(_pretended, found))


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return OnGPU(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _held(gradient)


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _held(x).detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _pretended(gradient)


def moved(x: Tensor, device: Any) -> Tensor:
    """Return a tensor on another device, differentiably; the tensor itself if it is there already."""
    kind = x.device.type if device is None else torch.device(device).type
    if kind == x.device.type or kind == "meta":
        return x
    if kind != "cuda":
        _wait()
    return (_Up if kind == "cuda" else _Down).apply(x)


class _GPUGenerator(Generator):
    device = property(lambda self: CUDA)

    def manual_seed(self, seed: int) -> Generator:
        super().manual_seed(seed)
        return self


class _GeneratorKind(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Generator)

    def __call__(cls, device: Any = "cpu") -> Generator:
        return _GPUGenerator() if torch.device(device).type == "cuda" else Generator(device)


class _Autocast(autocast):  # type: ignore[misc, valid-type]
    """Autocast on the GPU by the rules of the CPU."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


class _AnyGenerator(metaclass=_GeneratorKind):
    """Replaces torch.Generator, which would call the driver."""


class _Calls(TorchFunctionMode):
    """Calls from Python that move a tensor, or make one on a given device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name, first = getattr(function, "__name__", ""), args[0] if args else None
        generator = kwargs.get("generator")
        if isinstance(first, Tensor):
            if name in ("cpu", "cuda"):
                return moved(first, name)
            if name == "pin_memory":
                return first
            if name == "to":
                return _to(function, first, args[1:], kwargs)
            if name == "new_tensor":
                made = torch.tensor(args[1], dtype=kwargs.get("dtype", first.dtype))
                return moved(made, kwargs.get("device", first.device))
            if isinstance(first, OnGPU) and name == "tolist":
                _wait()
                return _held(first.detach()).tolist()
            if isinstance(first, OnGPU) and name in ("numpy", "__array__"):
                raise MixedDevices("numpy cannot read a tensor of the GPU: copy it to the CPU first")
            if generator is not None and isinstance(generator, _GPUGenerator) != isinstance(first, OnGPU):
                raise MixedDevices(f"{name}: the generator lies on another device than the tensor")
        device = kwargs.get("device")
        if device is None or torch.device(device).type not in ("cpu", "cuda"):
            return function(*args, **kwargs)
        on_gpu = torch.device(device).type == "cuda"
        if generator is not None and isinstance(generator, _GPUGenerator) != on_gpu:
            raise MixedDevices(f"{name}: the generator lies on another device than what is drawn")
        kwargs |= {"device": CPU}
        kwargs.pop("pin_memory", None)
        trained = kwargs.pop("requires_grad", False)
        if isinstance(first, OnGPU) and name in ("tensor", "as_tensor", "asarray"):
            args = (_held(first.detach()), *args[1:])
        found = moved(function(*args, **kwargs), CUDA if on_gpu else CPU)
        return found.detach().requires_grad_() if trained else found


def _to(function: Any, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
    device, dtype, other = (kwargs.pop(name, None) for name in ("device", "dtype", "other"))
    for value in args:
        if isinstance(value, Tensor):
            other = value
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, str | torch.device):
            device = value
    if other is not None:
        device, dtype = other.device, other.dtype
    if dtype is not None and dtype != x.dtype:
        x = function(x, dtype)
    if kwargs.get("copy"):
        x = x.clone()
    return moved(x, device)


class _Operations(TorchDispatchMode):
    """Operations below Python that make a tensor on the GPU."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        asked = device is not None and torch.device(device).type == "cuda"
        if asked:
            kwargs["device"] = CPU
        if any(isinstance(each, OnGPU) for each in tree_leaves((args, kwargs))):
            return _compute(operation, args, kwargs)
        found = operation(*args, **kwargs)
        return tree_map(_pretended, found) if asked else found


def _apply_to(parameters: dict[Any, tuple[Tensor, Tensor]]) -> Callable[..., nn.Module]:
    """Return an `nn.Module._apply` that replaces a module's parameters if their class changes: torch's own sets their
    data, which cannot change the class. Tied parameters stay tied."""

    def apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            child._apply(function)
        for name, old in module._parameters.items():
            if old is None:
                continue
            with torch.no_grad():
                new = function(old.detach())
            if isinstance(new, OnGPU) == isinstance(old, OnGPU) and new.dtype == old.dtype:
                continue
            key = (id(old), isinstance(new, OnGPU), new.dtype)
            if key not in parameters:
                if isinstance(new, OnGPU):
                    made: Any = new.detach().requires_grad_(old.requires_grad)
                    made._is_param = True
                else:
                    made = nn.Parameter(new, old.requires_grad)
                if old.grad is not None:
                    made.grad = function(old.grad)
                parameters[key] = (old, made)  # keeps the old one alive, so that its id is not reused
            module._parameters[name] = parameters[key][1]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
        return module

    return apply


@contextmanager
def pretended_gpu(bf16: bool = False) -> Iterator[None]:
    """Within this context torch has one GPU, with or without bf16."""
    load, save = torch.load, torch.save
    waits.clear()

    def load_there(file: Any, map_location: Any = None, **options: Any) -> Any:
        there = map_location is not None and torch.device(map_location).type == "cuda"
        found = load(file, map_location="cpu" if there else map_location, **options)
        return tree_map(lambda x: moved(x, CUDA) if isinstance(x, Tensor) else x, found) if there else found

    def save_from(content: Any, *args: Any, **options: Any) -> None:
        save(tree_map(lambda x: moved(x.detach(), CPU) if isinstance(x, OnGPU) else x, content), *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda _: None,
            "get_device_name": lambda *_: "a pretended GPU",
            "get_device_capability": lambda *_: (7, 0),
            "empty_cache": lambda: None,
            "is_bf16_supported": lambda *_, **__: bf16,
            "is_current_stream_capturing": lambda: False,
            "synchronize": lambda *_: None,
            "reset_peak_memory_stats": lambda *_: None,
            "memory_allocated": lambda *_: 0,
            "max_memory_allocated": lambda *_: 0,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.accelerator, "current_accelerator", lambda **_: CUDA)
        patch.setattr(torch.accelerator, "device_count", lambda: 1)
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # torch 2.10: cuda
            patch.setattr(torch.optim.Optimizer, name, lambda _: None, raising=False)
        patch.setattr(nn.Module, "_apply", _apply_to({}))
        patch.setattr(torch, "Generator", _AnyGenerator)
        patch.setattr(torch, "autocast", _Autocast)
        patch.setattr(torch, "is_autocast_enabled", lambda device_type="cuda": is_autocast_enabled("cpu"))
        patch.setattr(torch, "get_autocast_dtype", lambda device_type: get_autocast_dtype("cpu"))
        patch.setattr(torch, "load", load_there)
        patch.setattr(torch, "save", save_from)
        with _Operations(), _Calls():
            yield
