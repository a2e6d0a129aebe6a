"""Muon for the matrices of hidden layers, AdamW for everything else: one optimizer, one schedule."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from keygrip.training.optimizers import AdamW, Schedule, ScheduledRates, belongs_to
from keygrip.training.parts import model_part
from keygrip.training.strategies import is_faster_in_bf16

log = logging.getLogger(__name__)

MATRICES, REST = "matrices", "rest"


@model_part
@dataclass(frozen=True)
class MuonAndAdamW(AdamW):
    """Muon on the weight matrices of the named parts, AdamW on all other parameters.

    Muon replaces a matrix's averaged gradient by the nearest orthogonal matrix. Its steps are scaled to the size of
    AdamW's (``adjust_lr_fn="match_rms_adamw"`` in torch), so that one learning rate and one weight decay can be used
    for both.

    Args:
        matrices_of: prefixes of the parts whose matrices Muon trains: hidden layers, not embeddings and outputs.
        momentum: momentum of Muon. matrix_lr_multiplier: factor on ``lr`` for Muon's parameters.
        iteration: dtype of the orthogonalisation: "bfloat16", as in torch, or "float32", ten times as fast on a
            processor without bfloat16; "auto": bfloat16 if the parameters' device is faster with it.

    Papers: Jordan et al., "Muon: An Optimizer for Hidden Layers in Neural Networks" (2024); Liu et al., "Muon is
    Scalable for LLM Training" (2025) for the scale.
    """

    not_divided: ClassVar = "Muon needs whole matrices and strategy=fsdp divides them: use strategy=ddp, or AdamW."
    matrices_of: tuple[str, ...] = ("blocks",)
    momentum: float = 0.95
    matrix_lr_multiplier: float = 1.0
    iteration: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iteration not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"optimizer.iteration={self.iteration!r}: must be auto, bfloat16 or float32")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum={self.momentum}: must lie in [0, 1)")
        if not 0 < self.matrix_lr_multiplier < math.inf:
            raise ValueError(f"optimizer.matrix_lr_multiplier={self.matrix_lr_multiplier}: must be above 0")

    def configure(self, module: nn.Module, total_steps: int | float) -> dict[str, Any]:
        """As `AdamW.configure`.

        Raises:
            ValueError: none of the named parts has a matrix, or the parameters are sharded (orthogonalisation needs
                complete matrices).
        """
        self.check_end(total_steps)
        if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            raise ValueError(self.not_divided)
        groups = self._groups(module)
        betas = (self.betas[0], self.betas[1])
        optimizer = MuonWithAdamW(groups, self.lr, self.momentum, betas, float32=self._iterates_in_float32(groups))
        rates = ScheduledRates(optimizer, Schedule(self, total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    def check(self, module: nn.Module, endless: bool) -> None:
        super().check(module, endless)
        self._groups(module)

    def _groups(self, module: nn.Module) -> list[dict[str, Any]]:
        hidden = self._ids_of_hidden_parameters(module)
        groups = [group for each in self.parameter_groups(module) for group in self._split(each, hidden)]
        if not any(group["kind"] == MATRICES for group in groups):
            raise ValueError(
                f"optimizer.matrices_of={list(self.matrices_of)}: no trainable matrix belongs to these parts: give "
                "those of this model's hidden layers, or choose optimizer=adamw"
            )
        return groups

    def moments(self, module: nn.Module) -> int:
        """As `AdamW.moments`, but with one value per parameter of Muon's matrices."""
        hidden = self._ids_of_hidden_parameters(module)
        matrices = sum(p.numel() for p in module.parameters() if p.requires_grad and id(p) in hidden)
        return super().moments(module) - matrices

    def _iterates_in_float32(self, groups: list[dict[str, Any]]) -> bool:
        if self.iteration != "auto":
            return self.iteration == "float32"
        devices = {p.device.type for group in groups if group["kind"] == MATRICES for p in group["params"]}
        slower = not all(is_faster_in_bf16(device) for device in devices)
        if slower:
            log.info("Muon's iteration in float32: this %s is no faster in bfloat16", "/".join(sorted(devices)))
        return slower

    def _ids_of_hidden_parameters(self, module: nn.Module) -> set[int]:
        """Return the ids of Muon's parameters."""
        return {
            id(parameter)
            for name, parameter in module.named_parameters()
            if parameter.ndim == 2 and any(belongs_to(name, part) for part in self.matrices_of)
        }

    def _split(self, group: dict[str, Any], hidden: set[int]) -> list[dict[str, Any]]:
        parts = []
        for kind in (MATRICES, REST):
            parameters = [p for p in group["params"] if (id(p) in hidden) == (kind == MATRICES)]
            if parameters:
                lr = group["lr"] * (self.matrix_lr_multiplier if kind == MATRICES else 1.0)
                name = f"{group['name']}_{kind}"  # Lightning's monitor of learning rates needs unique names
                parts.append({**group, "params": parameters, "kind": kind, "lr": lr, "name": name})
        return parts


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW over groups of one optimizer, so that schedules, checkpoints and clipping use only one.

    Args:
        groups: parameter groups, each with ``kind`` "matrices" or "rest", ``lr`` and ``weight_decay``.
        float32: whether Muon's iteration uses float32 instead of bfloat16.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float = 1e-8,
        float32: bool = False,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        # Both optimizers add their options to the group objects of this one, where schedules and checkpoints find them.
        by_kind = {kind: [group for group in self.param_groups if group["kind"] == kind] for kind in (MATRICES, REST)}
        self._parts: dict[str, torch.optim.Optimizer] = {}
        if by_kind[MATRICES]:
            muon: type[torch.optim.Muon] = Float32Muon if float32 else torch.optim.Muon
            self._parts[MATRICES] = muon(by_kind[MATRICES], lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        if by_kind[REST]:
            self._parts[REST] = torch.optim.AdamW(by_kind[REST], lr=lr, betas=betas, eps=eps)
        self._share()

    def _share(self) -> None:
        """Share groups and state with the parts again, because loading a state replaces these dictionaries."""
        for kind, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if group["kind"] == kind]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share()
        for part in self._parts.values():
            part.step()
        return loss


class Float32Muon(torch.optim.Muon):
    """torch's Muon with the Newton-Schulz iteration in float32, for processors without bfloat16.

    torch computes the iteration in bfloat16, which on a processor without that type takes ten times as long as the
    model itself. State and options are those of torch, so a run can be resumed with either. ``adjust_lr_fn`` must be
    "match_rms_adamw".
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step. Raises ValueError for another ``adjust_lr_fn``."""
        loss = None
        if any(group["adjust_lr_fn"] != "match_rms_adamw" for group in self.param_groups):
            raise ValueError('Float32Muon scales its steps to AdamW\'s alone: adjust_lr_fn="match_rms_adamw"')
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
        step = orthogonalised(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(step, alpha=-0.2 * group["lr"] * max(parameter.shape) ** 0.5)  # AdamW's size


def orthogonalised(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7
) -> torch.Tensor:
    """Return approximately the nearest matrix with orthonormal rows or columns, by the quintic Newton-Schulz iteration.

    Args:
        matrix: [M, N]. coefficients: a, b, c of ``x <- a x + b (x x^T) x + c (x x^T)^2 x``. steps: of the iteration.

    Returns:
        [M, N] float32; the singular values are near one but not exactly one.
    """
    x = matrix.float()
    if x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=eps)
    if steps and x.shape[1] >= 2 * x.shape[0]:
        x = _polynomial_of_gram(x @ x.T, coefficients, steps) @ x
    else:
        a, b, c = coefficients
        for _ in range(steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def _polynomial_of_gram(gram: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """Return the symmetric matrix [M, M] by which the iteration multiplies x, computed only from ``gram`` = x x^T.

    Every step multiplies x from the left by p = a + b g + c g^2 of its Gram matrix g, and g by p^2. All of them are
    polynomials of the first g and commute, so that a wide x is needed only twice: at the start and at the end.
    """
    a, b, c = coefficients
    product = None
    for step in range(steps):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if step + 1 < steps:
            gram = factor @ (factor @ gram)
    assert product is not None, "steps is at least one"
    return product
