"""The benchmark case of the server, small."""

from __future__ import annotations

import json

import pytest

from keygrip.bench import run
from keygrip.config import compose

SMALL = [
    "backbone.image_size=48", "backbone.width=32", "backbone.depth=1", "backbone.heads=2", "model.network.pred_size=12",
]  # fmt: skip


@pytest.mark.slow
def test_the_server_is_measured_from_outside() -> None:
    figures = run(
        compose(
            "bench",
            [
                "case=server",
                "quick=true",
                f"cases.server.overrides={json.dumps(SMALL)}",
                "cases.server.quick_requests=12",
                "cases.server.clients=2",
                "cases.server.warm_up=1",
            ],
        )
    )
    assert 0 < figures["plan_p50_ms"] < figures["p50_ms"] <= figures["p95_ms"]
    assert figures["requests_per_s"] > 0
    assert figures["batched_requests_per_s"] > 0
    assert figures["clients"] == 2


@pytest.mark.slow
def test_every_plan_of_a_crowd_is_the_policys_own() -> None:
    figures = run(
        compose(
            "bench",
            [
                "case=server_load",
                "quick=true",
                "cases.server_load.quick_requests=24",
                "cases.server_load.clients=4",
                "cases.server_load.batch=1",
            ],
        )
    )
    assert (figures["requests"], figures["different"], figures["not_finite"]) == (24, 0, 0)
    assert figures["attackers"] == 4
    assert figures["attacks_sent"] >= 4 * 18  # each attacker sends every attack, over both protocols
    assert figures["attacks_refused"] == figures["attacks_sent"]
    assert figures["attacks_answered"] == figures["attacks_not_finite"] == figures["attacks_unnamed"] == 0
    assert figures["health_requests"] > 0
