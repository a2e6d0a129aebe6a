"""The fused kernel gives the loss and gradients of the chunked loss, both in Triton's interpreter and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from keygrip.models.foveated_vlm import loss as losses
from keygrip.models.foveated_vlm.loss import check_liger, fused_cross_entropy, token_cross_entropy
from keygrip.training.compute import OPERATIONS

ROOT = Path(__file__).parents[3]
Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def installed() -> bool:
    try:
        metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        return False
    return True


def computed(function: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """Return the losses, which predictions are right, and the gradients of a loss with a different weight per token."""
    inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss, right = function(*inputs, targets)
    importance = torch.linspace(0, 1, len(targets), device=loss.device)
    (loss * importance).sum().backward()
    return [loss.detach(), right.float(), *(part.grad for part in inputs if part.grad is not None)]


def assert_same(device: str, tokens: int, width: int, vocabulary: int, rtol: float, atol: float) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, width, device=device), torch.randn(vocabulary, width, device=device)
    # some targets are the most probable token, most are not
    targets = torch.randint(vocabulary, (tokens,), device=device)
    targets[::3] = (hidden @ weight.T).argmax(-1)[::3]
    found = computed(fused_cross_entropy, hidden, weight, targets)
    expected = computed(lambda *parts: token_cross_entropy(*parts, chunk=7), hidden, weight, targets)
    assert len(found) == len(expected) == 4
    assert 0 < expected[1].mean() < 1
    for name, one, other in zip(("loss", "right", "hidden", "weight"), found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=name)


@pytest.mark.skipif(not installed(), reason="needs liger-kernel")
@pytest.mark.slow
def test_the_kernel_by_triton_s_interpreter() -> None:
    """Runs in a separate process, because Triton chooses its backend on import. Covers as much of the kernel as can run
    without a GPU."""
    program = "import test_fused_loss as t; t.assert_same('cpu', 9, 16, 50, 1e-4, 1e-5)"
    paths = [str(ROOT), str(ROOT / "tests" / "support"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    variables = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not installed(), reason="needs a GPU and liger-kernel")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_the_kernel_on_a_gpu(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    rtol, atol = (5e-2, 5e-2) if bf16 else (1e-3, 1e-4)
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        assert_same("cuda", 300, 64, 5000, rtol, atol)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not installed(), reason="needs a GPU and liger-kernel")
def test_its_products_are_counted() -> None:
    """torch 2.11's own FLOP counts raise an error at these products."""
    hidden = torch.randn(30, 64, device="cuda", requires_grad=True)
    weight, targets = torch.randn(500, 64, device="cuda", requires_grad=True), torch.arange(30, device="cuda")
    with (
        torch.autocast("cuda", torch.bfloat16),
        FlopCounterMode(display=False, custom_mapping=OPERATIONS) as counter,
    ):
        fused_cross_entropy(hidden, weight, targets)[0].sum().backward()
    assert counter.get_total_flops() >= 3 * 2 * 30 * 64 * 500


def test_nothing_to_predict_needs_no_kernel() -> None:
    hidden = torch.zeros(0, 5, requires_grad=True)
    loss, right = fused_cross_entropy(hidden, torch.randn(11, 5), torch.zeros(0, dtype=torch.int64))
    assert loss.shape == right.shape == (0,)
    loss.sum().backward()
    assert hidden.grad is not None


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    with pytest.raises(ValueError, match=r"computes on a GPU and this run is on the CPU: choose .*=chunked"):
        check_liger(torch.device("cpu"))

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(losses.metadata, "version", missing)
    with pytest.raises(ValueError, match=r"pip install 'keygrip\[liger\]'"):
        check_liger(gpu)
    monkeypatch.setattr(losses.metadata, "version", lambda name: "0.8.1")
    with pytest.raises(ValueError, match=r"0\.8\.1 gives wrong gradients here: pip install 'liger-kernel>=0\.8\.2'"):
        check_liger(gpu)
    monkeypatch.setattr(losses.metadata, "version", lambda name: "0.10.0")
    check_liger(gpu)
