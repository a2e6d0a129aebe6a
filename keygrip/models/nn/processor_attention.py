"""Attention of a training step on a CPU: in bf16 training, torch's fused kernel is faster in float32, on rows of up to
`FLOAT32_KEYS` positions (`attention_ms_*` of ``python -m keygrip.bench case=cpu_precision``).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from keygrip.models.nn.precision import without_autocast
from keygrip.training.memory import is_counting

# Largest number of keys for float32. On a CPU with AMX (benchmarks/cpu_precision_amx.json) float32 is faster on shorter
# rows; on longer rows it is slower with heads of width 64 (`attention_ms_*_wide`), somewhat faster with width 32.
FLOAT32_KEYS = 512

_thread = threading.local()


def training_attention(queries: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
    """`F.scaled_dot_product_attention`, computed in float32 if it is trained in bf16 on a CPU and has no more than
    `FLOAT32_KEYS` keys.

    Args:
        queries: ``[..., N, d]``; keys: ``[..., M, d]``; values: ``[..., M, e]``, of any type.
        options: options of torch's function; an additive mask is converted to float32 too.

    Returns ``[..., N, e]`` in the type of torch's own function, bf16 under autocast. Compiled graphs use torch's
    function, and so does the counting of memory, which is that of a GPU.
    """
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    bf16 = queries.device.type == "cpu" and (autocast or queries.dtype == torch.bfloat16)
    bypass = not torch.is_grad_enabled() or torch.compiler.is_compiling() or is_counting()
    if not bf16 or bypass or keys.shape[-2] > FLOAT32_KEYS:
        return F.scaled_dot_product_attention(queries, keys, values, **options)
    return float32_attention(queries, keys, values, **options)


def float32_attention(queries: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
    """As `training_attention`, in float32 for rows of any length; the result ``[..., N, e]`` is always bf16."""
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options = {**options, "attn_mask": mask.float()}
    with without_autocast(queries):
        attended = F.scaled_dot_product_attention(queries.float(), keys.float(), values.float(), **options)
    return attended.to(torch.bfloat16)


class _TrainingAttention(TorchFunctionMode):
    """In this context every attention, also in models of other libraries, is `training_attention`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        arguments = dict(zip(names, args, strict=False)) | dict(kwargs or {})
        return training_attention(arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments)

    def __enter__(self) -> _TrainingAttention:
        self.before = within()
        _thread.within = True
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        _thread.within = self.before
        super().__exit__(*raised)


def within() -> bool:
    """Return whether this thread is inside a context of `trained_on` for a CPU under autocast."""
    return getattr(_thread, "within", False)


def trained_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context for the forward pass of a training step: under autocast on a CPU, `training_attention`."""
    if device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return _TrainingAttention()
    return contextlib.nullcontext()


def recompute_contexts() -> tuple[contextlib.AbstractContextManager[object], contextlib.AbstractContextManager[object]]:
    """`context_fn` for torch.utils.checkpoint: activations are recomputed as in the forward pass.

    The backward pass runs outside of `trained_on`. Without this context, recomputed tensors would have another type
    than the saved ones, which torch refuses.
    """
    return contextlib.nullcontext(), _TrainingAttention() if within() else contextlib.nullcontext()
