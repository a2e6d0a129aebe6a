"""Limit what a stored configuration may build: a few bytes could request a million layers or a table of gigabytes.

The weights of a model are also in the file, so the stored tensors limit the size of those that the model may build.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

EXTERNAL_PARAMETERS = 20_000  # number of tensors of parts that no checkpoint contains, such as a large text encoder
EXTERNAL_NUMBERS = 2**31  # values per tensor of such a part
OWN_PARAMETERS = 1000  # parameters beside ten times the stored tensors
OWN_NUMBERS = 2**24  # values per tensor that is not stored: a table of rotary angles, a mask
TIMES = 4  # factor by which one tensor, and all together, may exceed the stored ones while parts are assembled


class _Counters(threading.local):
    """Functions that are called with each parameter that the current thread registers."""

    def __init__(self) -> None:
        self.active: list[Callable[[Tensor], None]] = []


_COUNTERS = _Counters()


def _count_parameter(module: torch.nn.Module, name: str, parameter: Tensor) -> None:
    for count in _COUNTERS.active:
        count(parameter)


# PyTorch calls the hook in every thread. It is never removed: another thread may be iterating over the hooks.
torch.nn.modules.module.register_module_parameter_registration_hook(_count_parameter)


@contextlib.contextmanager
def at_most_stored(config: Any, stored: Mapping[str, Any], external: bool) -> Iterator[None]:
    """Stop the building of a module that creates many more or much larger tensors than its file contains, before memory
    is allocated for them. What other threads build meanwhile is not limited.

    Args:
        config: the stored configuration, to name the setting. stored: tensors by name. external: whether parts are
            built that the file does not contain.

    Raises:
        ValueError: the module exceeds the limits.
    """
    sizes = [value.numel() for value in stored.values() if isinstance(value, Tensor)]
    largest = max(sizes, default=0)
    tensor_limit = max(TIMES * largest, EXTERNAL_NUMBERS if external else OWN_NUMBERS)
    total_limit = math.inf if external else TIMES * (sum(sizes) + OWN_NUMBERS)
    parameters = (EXTERNAL_PARAMETERS if external else OWN_PARAMETERS) + 10 * len(stored)
    registered, total = 0, 0

    def count(parameter: Tensor) -> None:
        nonlocal registered, total
        registered += 1
        total += 0 if parameter.is_meta else parameter.numel()
        if registered > parameters:
            raise ValueError(f"its configuration builds more than {parameters} parameters, far more than it holds")
        if total > total_limit:
            raise ValueError(
                f"its configuration builds parameters of {total} numbers, and those that are stored have {sum(sizes)}"
            )

    def check(shape: tuple[int, ...]) -> None:
        if math.prod(shape) > tensor_limit:
            raise ValueError(
                f"{settings_of(config, shape)} builds a tensor of {list(shape)}, and the largest one that is stored "
                f"has {largest} numbers"
            )

    _COUNTERS.active.append(count)
    try:
        with _CheckedCalls(check):
            yield
    finally:
        _COUNTERS.active.remove(count)


def settings_of_other_sizes(config: Any, stored: Mapping[str, Any], built: Mapping[str, Tensor]) -> str:
    """Return the settings of the first tensor whose stored shape differs from the one that the configuration builds."""
    for name, value in built.items():
        stored_value = stored.get(name)
        if isinstance(stored_value, Tensor) and stored_value.shape != value.shape:
            return settings_of(config, tuple(set(value.shape) - set(stored_value.shape)))
    return "its configuration"


def settings_of(config: Any, sizes: tuple[int, ...]) -> str:
    """Return the settings of a model's configuration with one of these values, largest first: "model.width=64"."""
    matches: list[tuple[int, str]] = []
    waiting: list[tuple[str, Any]] = [("model", config)]
    while waiting:
        path, node = waiting.pop()
        if isinstance(node, Mapping):
            waiting += [(f"{path}.{key}", child) for key, child in node.items()]
        elif type(node) is int and node in sizes and node > 1:
            matches.append((-node, f"{path}={node}"))
    return ", ".join(text for _, text in sorted(matches)[:3]) or "its configuration"


class _CheckedCalls(TorchFunctionMode):
    """Call `check` with the shape of every tensor before PyTorch creates it."""

    def __init__(self, check: Callable[[tuple[int, ...]], None]) -> None:
        super().__init__()
        self.check = check

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in ("__get__", "__set__"):  # attributes
            outputs = _run_on_meta_device(func, args, kwargs)
            for each in outputs if isinstance(outputs, list | tuple) else [outputs]:
                if isinstance(each, Tensor):
                    self.check(tuple(each.shape))
        return func(*args, **kwargs)


def _run_on_meta_device(func: Any, args: Any, kwargs: Any) -> Any:
    """Return a function's result on the meta device; None if it has none there, or if it depends on values."""
    tensors: list[Tensor] = []

    def there(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return value.detach().to("meta")
        return type(value)(map(there, value)) if type(value) in (list, tuple) else value

    try:
        placed = there(args), {name: there(value) for name, value in kwargs.items() if name != "generator"}
        device = kwargs.get("device")
        if any(each.is_meta for each in tensors) or (device is not None and torch.device(device).type == "meta"):
            return None
        if device is not None or not tensors:
            placed[1]["device"] = "meta"
        return func(*placed[0], **placed[1])
    except Exception:  # functions raise many kinds of errors
        return None
