"""Autoguidance: guide samples away from the predictions of a worse version of the network.

This module holds that version; `keygrip.models.patch_dit.guidance` combines its prediction with those of the text and
the image.

Errors that a trained network still makes are larger early in its training. So the difference between its prediction
and that of its own early weights points away from such errors: bent edges, melted objects. A text scale strengthens
what the text describes; this strengthens what the training images have in common, without reducing variety.

Source: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself" (2024).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from keygrip.models.patch_dit.network import PatchDiT
from keygrip.training.ema import EMA
from keygrip.training.parts import model_part
from keygrip.training.sharding import local, reshard


@model_part
class EarlyGuide(nn.Module):
    """The network as it was after ``at_step`` steps of its own training (the EMA of its weights, where one is kept).

    It is stored with the network, which doubles the stored weights; training takes no longer.

    Args:
        network: a network like the one that is trained; its weights are unused until `take` replaces them.
        at_step: a sixth of the run is a good value if no other is known; at least 1.

    Attributes:
        taken: whether ``at_step`` has been reached.

    Raises:
        ValueError: at_step below 1.
    """

    network: PatchDiT
    taken: Tensor

    def __init__(self, network: PatchDiT, at_step: int) -> None:
        super().__init__()
        if at_step < 1:
            raise ValueError(f"model.guide.at_step={at_step}: must be at least 1")
        self.at_step = at_step
        self.network: PatchDiT = network.requires_grad_(False)
        self.register_buffer("taken", torch.tensor(False))

    def check(self, max_steps: int) -> None:
        """Raise ValueError if the run ends before the weights are taken."""
        if 0 <= max_steps <= self.at_step:
            raise ValueError(
                f"model.guide.at_step={self.at_step} is not reached in max_steps={max_steps}: give less, a sixth of "
                "the run for instance"
            )

    @torch.no_grad()
    def take(self, network: nn.Module, module: LightningModule) -> None:
        """Copy the network's weights if ``at_step`` is reached; called before a step, so that a run that resumes there
        copies the same weights.

        Args:
            network: that of `module`, which is being trained.
        """
        if module.global_step != self.at_step or self.taken:  # in this order: the flag may be on a GPU
            return
        callbacks: list[Callback] = module.trainer.callbacks  # type: ignore[attr-defined]
        ema = next((callback for callback in callbacks if isinstance(callback, EMA)), None)
        reshard(module)
        with nullcontext() if ema is None else ema.applied(module):
            for parameter, trained_parameter in zip(self.network.parameters(), network.parameters(), strict=True):
                local(parameter).copy_(local(trained_parameter))
            for buffer, current in zip(self.network.buffers(), network.buffers(), strict=True):
                buffer.copy_(current)
        self.taken.fill_(True)
