"""Compiled action heads and geometry encoders give the same plans; nothing is compiled while a robot waits.

All but one test need no compiler: where plans are compared, the graphs are those that inductor receives (`aot_eager`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vla_parts import INSTRUCTIONS, observation, ready_module

from keygrip.evaluation import trained_policy
from keygrip.models.geometry_vla import policy as policies
from keygrip.models.geometry_vla.network import GeometryVLA
from keygrip.models.policy import Plan
from keygrip.training import compilation


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the graphs that torch captures without compiling them: a third of the time, for tests that only count
    graphs."""
    monkeypatch.setattr(GeometryVLA, "compile_parts", partialmethod(GeometryVLA.compile_parts, backend="eager"))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GeometryVLA, "compile_parts", partialmethod(GeometryVLA.compile_parts, backend="aot_eager"))


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def assert_equal_plans(found: Plan, expected: Plan) -> None:
    np.testing.assert_allclose(found.position, expected.position, atol=1e-5)
    np.testing.assert_allclose(found.quaternion, expected.quaternion, atol=1e-4)
    np.testing.assert_allclose(found.gripper, expected.gripper, atol=1e-4)


@pytest.mark.usefixtures("traced")
@pytest.mark.slow
def test_compiled_plans_are_those_without_and_nothing_is_compiled_after_the_first(tmp_path: Path) -> None:
    plain = ready_module(tmp_path, pointing_cells=2, pointed_tokens=True).policy()
    words = (*INSTRUCTIONS, "put it where it was before all of this began")
    expected = []
    for text in words:
        plain.reset(3)
        expected.append(plain.plan(observation(instruction=text)))
    two = [observation(1, words[0]), observation(2, words[2])]
    plain.reset(4)
    of_two = plain.plan_batch(two, [plain, plain])
    plain.reset(5)
    shifted = replace(expected[0], position=expected[0].position + 0.02, time_s=9.9)
    continued = plain.plan_continuing(observation() | {"time_s": 10.0}, shifted, 0.3)
    assert graphs() == 0

    policy = replace(plain, compiled=True)
    policy.make_ready()
    traced = graphs()
    assert traced > 0
    policy.make_ready()
    for text, plan in zip(words, expected, strict=True):
        policy.reset(3)
        assert_equal_plans(policy.plan(observation(instruction=text)), plan)
    policy.reset(4)
    for found, plan in zip(policy.plan_batch(two, [policy, policy]), of_two, strict=True):
        assert_equal_plans(found, plan)
    policy.reset(5)
    assert_equal_plans(policy.plan_continuing(observation() | {"time_s": 10.0}, shifted, 0.3), continued)
    assert graphs() == traced, "lengths, several observations and continued plans compile nothing more"


@pytest.mark.slow
def test_compiled_graphs_are_used_for_instructions_of_every_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            calls.append(len(given))
            return graph(*given)

        return run

    monkeypatch.setattr(GeometryVLA, "compile_parts", partialmethod(GeometryVLA.compile_parts, backend=counting))
    policy = replace(ready_module(tmp_path, pointing_cells=2, pointed_tokens=True).policy(), compiled=True)
    policy.make_ready()
    for text in (*INSTRUCTIONS, "put it where it was before all of this began"):
        calls.clear()
        policy.plan(observation(instruction=text))
        assert len(calls) == 1 + policy.module.sampling.steps, "the encoder once, the head once a step"


@pytest.mark.usefixtures("captured")
@pytest.mark.slow
def test_making_ready_leaves_the_noise_of_plans_as_it_is(tmp_path: Path) -> None:
    plain = replace(ready_module(tmp_path).policy(), temperature=1.0)
    plain.reset(3)
    expected = plain.plan(observation())
    policy = replace(plain, compiled=True)
    policy.reset(3)
    assert_equal_plans(policy.plan(observation()), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("captured")
def test_what_failed_to_compile_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = replace(ready_module(tmp_path).policy(), compiled=True)

    def fails(*given: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(policies.GeometryVLAPolicy, "_plans", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            policy.make_ready()
    assert not policy.module.network.compiled
    policy.make_ready()
    assert graphs() > 0


@pytest.mark.slow
@pytest.mark.usefixtures("captured")
def test_a_policy_that_is_loaded_compiles_before_its_first_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ready_module(tmp_path)
    monkeypatch.setattr(trained_policy, "load_module", lambda *given, **options: module)
    policy = trained_policy.load_policy(tmp_path, {"compiled": True})
    traced = graphs()
    assert traced > 0
    policy.plan(observation())
    assert graphs() == traced


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "missing_compiler", lambda on_gpu: "a C++ compiler: apt-get install g++")
    policy = replace(ready_module(tmp_path).policy(), compiled=True)
    with pytest.raises(ValueError, match=r"policy\.compiled=true needs a C\+\+ compiler: .*policy\.compiled=false"):
        policy.make_ready()
    assert not policy.module.network.compiled


@pytest.mark.slow
@pytest.mark.skipif(bool(compilation.missing_compiler(False)), reason="no C++ compiler here")
def test_a_real_compiler_gives_the_same_plans(tmp_path: Path) -> None:
    policy = ready_module(tmp_path, pointing_cells=2, pointed_tokens=True).policy()
    policy.reset(3)
    expected = policy.plan(observation())
    fast = replace(policy, compiled=True)
    fast.reset(3)
    assert_equal_plans(fast.plan(observation()), expected)
    assert graphs() > 0
