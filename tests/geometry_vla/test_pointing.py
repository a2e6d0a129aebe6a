"""Where the gripper will be in the pictures: the maps' layout, the targets, and that the loss reaches the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vla_parts import V, ready_module, small_batch

from keygrip.geometry.cameras import project
from keygrip.geometry_vla.pointing import Pointing, pointing_losses

A, T, P, C, H = 1, 4, 3, 2, 8


def test_cells_lie_where_their_tokens_are() -> None:
    pointing = Pointing(H, A, T, C)
    places = torch.zeros(2, 2 + V * P * P + 1, 3)
    places[:, 2:-1, 0] = torch.arange(V).repeat_interleave(P * P) + 1.0
    hidden = torch.randn(2, places.shape[1], H)
    before = pointing(hidden, places, V)
    assert before.shape == (2, V, A, T, P * C, P * C)
    row, column = 2, 1
    hidden[1, 2 + P * P + row * P + column] += 1  # of the second sample's second view
    changed = (pointing(hidden, places, V) != before).any(dim=(2, 3)).nonzero().tolist()
    assert all(sample == 1 and view == 1 for sample, view, _, _ in changed)
    assert {(r // C, c // C) for _, _, r, c in changed} == {(row, column)}


def test_the_loss_is_least_at_the_gripper_and_counts_what_is_seen() -> None:
    batch = small_batch()
    batch.repeated[0, 0, 2:] = True
    size, cells = batch.images.shape[-1], 8
    cameras = batch.view_intrinsics[:, :, None, None], batch.view_world_to_camera[:, :, None, None]
    pixels, _ = project(batch.position[:, None], *cameras)
    batch.position[1, 0, 1] = torch.tensor([50.0, 0.0, 0.1])  # far outside of both pictures
    logits = torch.full((2, V, 1, T, cells, cells), -20.0)
    for sample, view, step in torch.cartesian_prod(torch.arange(2), torch.arange(V), torch.arange(T)).tolist():
        x, y = (pixels[sample, view, 0, step] * cells / size - 0.5).tolist()
        for column, across in ((int(x), 1 - x % 1), (int(x) + 1, x % 1)):
            for row, down in ((int(y), 1 - y % 1), (int(y) + 1, y % 1)):
                logits[sample, view, 0, step, row, column] = torch.tensor(across * down).clamp(min=1e-9).log()
    logits.requires_grad_()
    losses = pointing_losses(logits, batch)
    # A map that equals the target: no gradient, and its mean is the pixel itself.
    (gradient,) = torch.autograd.grad(losses["pointing"], logits)
    assert gradient.abs().max() < 1e-5
    assert losses["pointing_px"] < 0.01
    shifted = pointing_losses(logits.detach().roll(1, dims=-1), batch)
    assert shifted["pointing"] > losses["pointing"] + 1
    assert shifted["pointing_px"] == pytest.approx(size / cells, rel=0.01)
    spoilt = logits.detach().clone()
    spoilt[0, :, :, 2:] = torch.randn(V, 1, 2, cells, cells)  # padding
    spoilt[1, :, :, 1] = torch.randn(V, 1, cells, cells)  # outside
    torch.testing.assert_close(pointing_losses(spoilt, batch)["pointing"], losses["pointing"].detach())


def test_it_trains_the_language_model_and_not_the_head(tmp_path: Path) -> None:
    module = ready_module(tmp_path, pointing_cells=2)
    batch = small_batch()
    scene = module(batch)
    assert scene.pointing is not None
    pointing_losses(scene.pointing, batch)["pointing"].backward()
    language = module.network.vlm.model.language_model.layers[0].mlp.gate_proj.weight
    assert language.grad is not None
    assert language.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in module.network.head.parameters())
    losses = module.losses(replace(module(batch), pointing=None), batch)
    assert "pointing" not in losses


def test_bad_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="pointing_cells"):
        Pointing(H, A, T, -1)
