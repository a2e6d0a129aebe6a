"""Health metrics on attention with known values, and warnings that are given once."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from keygrip.models.foveated_vlm.attention_maps import attention_on_target
from keygrip.models.foveated_vlm.monitor import ranges_of, relative_entropy
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.training.monitors import Range, RangeChecks


def test_entropy_is_one_for_uniform_attention_and_zero_for_a_single_token() -> None:
    uniform, single = torch.full((2, 8), 1 / 8), torch.eye(8)[:2]
    assert relative_entropy(uniform) == pytest.approx(1.0)
    assert relative_entropy(single) == pytest.approx(0.0, abs=1e-6)
    half = torch.tensor([[0.5, 0.5, 0, 0, 0, 0, 0, 0]])
    assert relative_entropy(half) == pytest.approx(math.log(2) / math.log(8))
    # rows after the end of a stream are zero and do not count
    assert relative_entropy(torch.cat([uniform, torch.zeros(5, 8)])) == pytest.approx(1.0)


def test_attention_on_a_thing_is_relative_to_uniform() -> None:
    patches = torch.zeros(4, 4)
    patches[1, 2] = 1.0
    # 64 px, patches of 16: the target fills the patch of row 1, column 2
    assert attention_on_target(patches, (40.0, 24.0), 256.0, 64) == pytest.approx(16.0)
    assert attention_on_target(patches, (8.0, 24.0), 256.0, 64) == 0.0
    assert attention_on_target(torch.ones(4, 4), (40.0, 24.0), 256.0, 64) == pytest.approx(1.0)
    # a target over two patches: half of the attention's peak
    assert attention_on_target(patches, (32.0, 24.0), 256.0, 64) == pytest.approx(8.0)
    # a tiny target still has the patch under its centre; a target at the edge is inside
    assert attention_on_target(patches, (33.0, 17.0), 1.0, 64) == pytest.approx(16.0)
    assert attention_on_target(torch.ones(4, 4), (64.0, 64.0), 4.0, 64) == pytest.approx(1.0)


def test_a_warning_comes_once_and_again_after_recovery(caplog: pytest.LogCaptureFixture) -> None:
    health = RangeChecks({"a": Range(0.0, 1.0, "too much"), "b": Range(0.5, math.inf, "too little")}, from_step=2)
    assert health.check({"a": 3.0}, 1) == []  # too early
    (line,) = health.check({"a": 3.0, "b": 0.6, "unknown": 9.0}, 2)
    assert "health/a is 3, healthy is below 1: too much" in line
    assert health.check({"a": 4.0}, 3) == []
    assert health.check({"a": 0.5}, 4) == []
    assert len(health.check({"a": 2.0, "b": 0.1}, 5)) == 2
    assert len(caplog.records) == 3


def test_figures_that_are_not_numbers_are_ill() -> None:
    assert RangeChecks({"a": Range(0.0, 1.0, "x")}).check({"a": math.nan}, 0)


@pytest.mark.parametrize(("query_start", "warnings"), [("random", 1), ("cls", 0)])
def test_the_scale_of_a_query_from_cls_is_the_encoders(
    build: Callable[..., FoveatedVLM], query_start: str, warnings: int
) -> None:
    health = RangeChecks(ranges_of(build(query_start=query_start)))
    assert len(health.check({"static_query_std": 0.02, "query_effect": 0.7}, 0)) == warnings
    assert len(health.check({"query_effect": 0.1}, 1)) == 1
