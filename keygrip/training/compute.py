"""Count the floating-point operations of training steps, every few steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.flop_counter import FlopCounterMode

from keygrip.training.distributed import total_of
from keygrip.training.lightning_loops import batches_begun
from keygrip.training.loss_curves import STEP_TFLOP
from keygrip.training.sharding import is_sharded

log = logging.getLogger(__name__)

TERA = 1e12
FIRST = 1  # first batch whose FLOPs are counted; batch 0 also logs images and fills caches


def attention_operations(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Return the operations of fused attention for shapes [B, heads, tokens, width]; keys and values may have fewer
    heads."""
    batch, heads, asking, width = query
    return 2 * batch * heads * asking * key[-2] * (width + value[-1])


def attention_backward_operations(
    gradient: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """Return the operations of the backward pass of fused attention, in which the scores are computed again."""
    batch, heads, asking, width = query
    return 2 * batch * heads * asking * key[-2] * (3 * width + 2 * value[-1])


def product_operations(*shapes: Any, **_: Any) -> int:
    """Return the operations of a product [..., M, K] with [..., K, N], the first two arguments, which have two or three
    dimensions; the dtype of the result may be a further argument."""
    first, second = [shape for shape in shapes if isinstance(shape, torch.Size)][:2]
    return 2 * math.prod(first) * second[-1]


def added_product_operations(added: Sequence[int], *shapes: Any, **_: Any) -> int:
    """Return the operations of a product that is added to another tensor."""
    return product_operations(*shapes)


_aten = torch.ops.aten
_KERNELS = ("efficient_attention", "flash_attention", "flash_attention_for_cpu", "cudnn_attention")
# Own counts for operations at which torch 2.11's counter raises an error: attention whose heads share keys and values,
# as in SmolLM2, and products with a given dtype of their result, as in Liger.
OPERATIONS: dict[Any, Callable[..., int]] = {
    _aten.mm: product_operations,
    _aten.bmm: product_operations,
    _aten.addmm: added_product_operations,
    _aten.baddbmm: added_product_operations,
} | {
    getattr(_aten, f"_scaled_dot_product_{kernel}{direction}"): operations
    for kernel in _KERNELS
    for direction, operations in (("", attention_operations), ("_backward", attention_backward_operations))
}


class _NoModules:
    """Replacement for torch's module tracker: all operations are counted for the whole model."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *args: object) -> None: ...


class Compute(Callback):
    """Log ``compute/step_tflop``: 10^12 floating-point operations per optimizer step, all processes together.

    torch counts them from the shapes of one batch, in forward and backward pass: products and attention, two operations
    per multiplication with its addition; attention is counted without masks. The counted batch is also trained on, with
    the same resulting weights, but takes longer, and compiled blocks run uncompiled. Kernels that torch does not know
    (Triton's own) are not counted. With sharded parameters nothing is counted.

    Args:
        every_n_steps: batches between counts; several counts are needed, because batches differ in length and the
            operations of a step may depend on its number.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        if every_n_steps < 1:
            raise ValueError(f"callbacks.compute.every_n_steps={every_n_steps}: must be at least 1")
        self.every_n_steps = every_n_steps
        self._counted, self._counts = 0.0, 0  # sum and number of all counts, including those before a resume
        self._steps = 0
        self._counter: FlopCounterMode | None = None

    @property
    def summary(self) -> dict[str, float]:
        """``tflop`` of the whole run, from the mean of the counts; empty if there are none."""
        return {"tflop": self._steps * self._counted / self._counts} if self._counts else {}

    def state_dict(self) -> dict[str, Any]:
        return {"counted": self._counted, "counts": self._counts, "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counted, self._counts = float(state_dict["counted"]), int(state_dict["counts"])
        self._steps = int(state_dict.get("steps", 0))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        batch_index = batches_begun(trainer) - 1
        if (batch_index - FIRST) % self.every_n_steps or is_sharded(pl_module):
            return
        torch.compiler.set_stance("force_eager")
        self._counter = FlopCounterMode(display=False, custom_mapping=OPERATIONS)
        # The module of an operation is not needed, and torch's way to determine it, hooks on every module, fails on
        # views of parameters that were created without gradient.
        self._counter.mod_tracker = _NoModules()  # type: ignore[assignment]
        self._counter.__enter__()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counter = self._stop()
        if counter is None:
            return
        flops = total_of(counter.get_total_flops(), pl_module.device)  # processes have unequal parts of a batch
        step_tflop = flops * trainer.accumulate_grad_batches / TERA
        self._counted, self._counts = self._counted + step_tflop, self._counts + 1
        for logger in trainer.loggers:
            logger.log_metrics({STEP_TFLOP: step_tflop}, step=trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._stop()  # a step without a backward pass
        self._steps = trainer.global_step

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> FlopCounterMode | None:
        counter, self._counter = self._counter, None
        if counter is not None:
            counter.__exit__(None, None, None)
            torch.compiler.set_stance("default")
        return counter
