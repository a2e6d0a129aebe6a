"""Counting does not change a run, the count is right, and sweeps plot losses against it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from keygrip import train
from keygrip.config import compose
from keygrip.training.checkpoints import read_checkpoint
from keygrip.training.compute import OPERATIONS as COUNTS
from keygrip.training.compute import STEP_TFLOP, Compute
from keygrip.training.figures import figure_to_image
from keygrip.training.loss_curves import Curves, Job, draw, read_curves, smoothed

# The toy's step: 8 samples through Linear(4, 8) and Linear(8, 1). The forward pass; in the backward pass the gradients
# of both weights and of the second layer's input (the first layer's input has none).
OPERATIONS = 2 * 8 * (4 * 8 + 8 * 1) + 2 * 8 * (4 * 8 + 8 * 1 + 8 * 1)


def test_counting_changes_no_bit_of_a_run_and_counts_its_operations(
    toy_overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The run has dropout, whose random numbers counting could consume."""
    counted = [*toy_overrides("counted"), "callbacks.compute.every_n_steps=3", "logger=tensorboard"]
    metrics = train.run(compose("train", counted))
    train.run(compose("train", [*toy_overrides("plain"), "callbacks.compute=null"]))
    with_count, without = (read_checkpoint(tmp_path / name) for name in ("counted", "plain"))
    for name, value in without["state_dict"].items():
        assert torch.equal(with_count["state_dict"][name], value), name
        average = without["ema"]["parameters"][name]
        assert torch.equal(with_count["ema"]["parameters"][name], average), name
    board = EventAccumulator(str(tmp_path / "counted" / "tensorboard")).Reload()
    figures = board.Scalars(STEP_TFLOP)
    assert [event.step for event in figures] == [1, 4, 7, 10]
    assert [event.value for event in figures] == pytest.approx([OPERATIONS / 1e12] * 4)
    assert metrics["tflop"] == pytest.approx(13 * OPERATIONS / 1e12)


@pytest.mark.parametrize("kernel", ["flash_attention", "efficient_attention", "cudnn_attention"])
def test_heads_that_share_keys_and_values_count_as_if_each_had_its_own(kernel: str) -> None:
    """The kernels of GPUs, by shape alone; torch 2.11's own counts reject such shapes."""
    forward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")
    query, key, value = (torch.empty(2, heads, 5, 8, device="meta") for heads in (6, 2, 2))
    options: dict[str, Any] = {} if kernel == "flash_attention" else {"attn_bias": None, "compute_log_sumexp": True}
    with FlopCounterMode(display=False, custom_mapping=COUNTS) as counter:
        forward(query, key, value, **options)
    expanded = [each.repeat_interleave(3, dim=1) for each in (key, value)]
    with FlopCounterMode(display=False) as by_torch:
        forward(query, *expanded, **options)
    products = 2 * 2 * 6 * 5 * 5 * 8  # of queries and keys; there are as many with the values
    assert counter.get_total_flops() == by_torch.get_total_flops() == 2 * products
    backward = COUNTS[getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_backward")]
    assert backward(query.shape, query.shape, key.shape, value.shape) == 5 * products


@pytest.mark.parametrize("product", ["mm", "addmm", "bmm", "baddbmm"])
def test_products_that_are_told_the_type_of_their_result_are_counted(product: str) -> None:
    first, second = torch.empty(4, 8, dtype=torch.bfloat16), torch.empty(8, 6, dtype=torch.bfloat16)
    operands, added = [first, second], torch.empty(4, 6, dtype=torch.bfloat16)
    if product.startswith("b"):
        operands, added = [each.expand(3, -1, -1) for each in operands], added.expand(3, -1, -1)
    if "add" in product:
        operands = [added, *operands]
    with FlopCounterMode(display=False, custom_mapping=COUNTS) as counter:
        getattr(torch, product)(*operands)
    expected = 2 * 4 * 8 * 6 * (3 if product.startswith("b") else 1)
    assert counter.get_total_flops() == expected
    count = COUNTS[getattr(torch.ops.aten, product)]  # called as by a counter
    shapes = [operand.shape for operand in operands]
    assert count(*shapes, torch.float32, out_shape=torch.Size([4, 6])) == expected
    assert count(*shapes, beta=1, alpha=1, out_shape=torch.Size([4, 6])) == expected


def test_training_counts_shared_keys_and_values() -> None:
    """The backward pass is counted too, through the kernel for CPUs."""
    query, key, value = (torch.randn(2, heads, 5, 8, requires_grad=True) for heads in (6, 2, 2))
    with FlopCounterMode(display=False, custom_mapping=COUNTS) as counter:
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        attended.sum().backward()
    assert counter.get_total_flops() == 7 * 2 * 2 * 6 * 5 * 5 * 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "CUDNN_ATTENTION", "MATH"])
def test_attention_on_a_gpu_is_counted(backend: str) -> None:
    """Each kernel, with keys and values that three heads share. With plain products, the backward pass does not compute
    the scores a second time."""
    query, key, value = (
        torch.randn(2, heads, 16, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (6, 2, 2)
    )
    with (
        FlopCounterMode(display=False, custom_mapping=COUNTS) as counter,
        sdpa_kernel(getattr(SDPBackend, backend)),
    ):
        attend = torch.nn.functional.scaled_dot_product_attention
        attend(query, key, value, is_causal=True, enable_gqa=True).sum().backward()
    passes = 6 if backend == "MATH" else 7
    assert counter.get_total_flops() == passes * 2 * 2 * 6 * 16 * 16 * 32


def test_accumulated_batches_count_together(toy_overrides: Callable[..., list[str]]) -> None:
    options = ["accumulate_grad_batches=2", "max_steps=4", "limit_val_batches=0"]
    metrics = train.run(compose("train", [*toy_overrides("run"), *options]))
    assert metrics["tflop"] == pytest.approx(4 * 2 * OPERATIONS / 1e12)


def test_a_resumed_run_keeps_what_was_counted_before(toy_overrides: Callable[..., list[str]]) -> None:
    """In a curriculum, the count of the resumed part would otherwise be used for all steps."""
    train.run(compose("train", [*toy_overrides("run"), "max_steps=4"]))
    later = ["max_steps=8", "resume=true", "callbacks.compute.every_n_steps=1000"]  # counts no further step
    metrics = train.run(compose("train", [*toy_overrides("run"), *later]))
    assert metrics["tflop"] == pytest.approx(8 * OPERATIONS / 1e12)


def test_a_failing_step_leaves_no_counter_behind(
    toy_overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy_parts
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    def failing_step(self: toy_parts.ToyModule, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx:
            assert _get_current_dispatch_mode() is not None
            raise RuntimeError("power cut")
        return self.loss(batch)

    monkeypatch.setattr(toy_parts.ToyModule, "training_step", failing_step)
    with pytest.raises(RuntimeError, match="power cut"):
        train.run(compose("train", toy_overrides("run")))
    assert _get_current_dispatch_mode() is None
    with pytest.raises(ValueError, match="every_n_steps"):
        Compute(every_n_steps=0)


def curves(steps: list[int], losses: list[float], cost: dict[int, float], seconds: bool = True) -> Curves:
    at = {"train/loss": np.array(steps), STEP_TFLOP: np.array(list(cost))}
    values = {"train/loss": np.array(losses), STEP_TFLOP: np.array(list(cost.values()))}
    if not cost:
        at.pop(STEP_TFLOP), values.pop(STEP_TFLOP)
    return Curves(at, values, {name: 2.0 * found for name, found in at.items()} if seconds else None)


def test_compute_adds_up_over_what_steps_cost_at_the_time() -> None:
    found = curves([0, 9, 10, 19], [4, 3, 2, 1], {1: 2.0, 10: 5.0})
    # 10 steps at 2, then at 5; the second count is of the eleventh step
    assert found.tflop("train/loss") == pytest.approx([2, 20, 25, 70])
    assert curves([0, 9], [4, 3], {}).tflop("train/loss") is None
    assert found.minutes("train/loss", None) == pytest.approx([0, 0.3, 1 / 3, 19 / 30])
    silent = curves([0, 9, 19], [4, 3, 2], {}, seconds=False)
    assert silent.minutes("train/loss", 120.0) == pytest.approx([0.1, 1.0, 2.0])
    assert silent.minutes("train/loss", None) is None


def test_smoothing_keeps_the_level_and_the_beginning() -> None:
    level = np.full(200, 3.0)
    np.testing.assert_allclose(smoothed(level), level)
    noise = np.random.default_rng(0).normal(size=400)
    found = smoothed(noise)
    assert found.shape == noise.shape
    assert found[0] == pytest.approx(noise[0])
    assert found[-1] == pytest.approx(noise[-(79 + 2 + 1) :].mean())  # over a fifth of the steps so far, and two
    assert found[50:].std() < 0.5 * noise.std()


def test_one_job_that_counted_nothing_puts_all_on_wall_time() -> None:
    counted, not_counted = curves([0, 9], [4, 3], {1: 2.0}), curves([0, 9], [4, 3], {})
    both = [Job({"a.lr": "1"}, counted), Job({"a.lr": "2"}, not_counted, wall_s=20.0)]
    figure = draw(both)
    assert figure is not None
    assert figure.axes[0].get_xlabel() == "wall time (minutes)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["lr=1", "lr=2"]
    alone = draw(both[:1])
    assert alone is not None
    assert alone.axes[0].get_xlabel() == "training compute (TFLOP)"
    assert alone.axes[0].get_xscale() == alone.axes[0].get_yscale() == "log"
    assert draw([]) is None
    negative = draw([Job({}, curves([0, 9], [-4, 3], {1: 2.0}))])
    assert negative is not None
    assert negative.axes[0].get_yscale() == "linear"
    assert figure_to_image(negative).std() > 0


def test_accuracy_has_a_panel_where_a_run_logged_one() -> None:
    """Its scale is 0 to 1, and its horizontal axis is the same compute."""
    found = curves([0, 9, 19], [4, 3, 2], {1: 2.0})
    steps, values = dict(found.steps), dict(found.values)
    steps["val/accuracy"], values["val/accuracy"] = np.array([10, 20]), np.array([0.25, 0.75])
    figure = draw([Job({"a": "1"}, Curves(steps, values, None)), Job({"a": "2"}, found)])
    assert figure is not None
    losses, accuracy = figure.axes
    assert (losses.get_title(), accuracy.get_title()) == ("training loss", "validation accuracy")
    assert (accuracy.get_yscale(), accuracy.get_ylim()) == ("linear", (0, 1.02))
    np.testing.assert_allclose(accuracy.lines[0].get_data(), [[20, 40], [0.25, 0.75]])
    assert len(accuracy.lines) == 2  # the first job's curve and its points


@pytest.mark.parametrize("logger", ["tensorboard", pytest.param("csv", marks=pytest.mark.slow)])
def test_a_sweep_leaves_a_figure_of_losses_against_compute(cli: Callable[..., Any], logger: str) -> None:
    """A failed job has no curve, and does not prevent those of the others."""
    conf = str(Path(__file__).parents[1] / "support" / "conf")
    toy = ["--config-dir", conf, "-m", "model=toy", "data=toy", "strategy=cpu", f"logger={logger}", "max_steps=6"]
    options = ["val_every_n_steps=2", "log_every_n_steps=1", "hydra.sweep.dir=sweep", "optimizer.lr=0.01,-1,0.1"]
    done = cli(*toy, *options)
    assert done.code == 1
    assert "No path found" not in "".join(done[1:])  # tensorboard's message on reading a folder
    assert Path("sweep/loss_against_compute.png").read_bytes().startswith(b"\x89PNG")
    board = EventAccumulator("sweep/tensorboard/sweep").Reload()
    assert board.Tags()["images"] == ["loss_against_compute"]
    found = read_curves(Path("sweep/0"))
    assert found is not None
    compute = found.tflop("train/loss")
    assert compute is not None
    assert compute == pytest.approx((found.steps["train/loss"] + 1) * OPERATIONS / 1e12)
    assert len(found.values["val/loss"]) == 3
    with Path("sweep/summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["tflop"]) == pytest.approx(6 * OPERATIONS / 1e12, rel=1e-3)
    assert rows[1]["tflop"] == ""
    assert read_curves(Path("sweep/1")) is None
