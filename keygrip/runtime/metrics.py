"""Counts and times of a policy server, in the text format that Prometheus reads (version 0.0.4)."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
PLANS_REMEMBERED = 1000  # number of plan times stored for the quantiles


class Metrics:
    """Counters of a server. Written from the event loop; only `computed` is called from the policy's thread."""

    def __init__(self) -> None:
        self.answers: Counter[tuple[str, int]] = Counter()  # by protocol and status
        self.disconnects = 0
        self._seconds: deque[float] = deque(maxlen=PLANS_REMEMBERED)
        self._buckets = [0] * (len(BUCKETS_S) + 1)
        self._total_s, self._batches, self._plans = 0.0, 0, 0

    def computed(self, seconds: float, plans: int) -> None:
        """Count one computation of `plans` plans."""
        self._seconds.append(seconds)
        self._buckets[bisect_left(BUCKETS_S, seconds)] += 1
        self._total_s, self._batches, self._plans = self._total_s + seconds, self._batches + 1, self._plans + plans

    def statuses(self) -> dict[str, int]:
        """Return the number of answers by status, over all protocols."""
        counts: Counter[int] = Counter()
        for (_, status), count in self.answers.items():
            counts[status] += count
        return {str(status): count for status, count in sorted(counts.items())}

    def quantiles(self) -> dict[str, float]:
        """Return median and 95th percentile of the last computations, milliseconds; empty for fewer than two."""
        seconds = list(self._seconds)
        if len(seconds) < 2:
            return {}
        cuts = statistics.quantiles(seconds, n=20, method="inclusive")
        return {"plan_p50_ms": round(1e3 * cuts[9], 3), "plan_p95_ms": round(1e3 * cuts[18], 3)}

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Return all metrics as text.

        Args:
            gauges: further current values, by name: help and value.
        """
        lines = ["# HELP keygrip_answers_total Answers by protocol and status.", "# TYPE keygrip_answers_total counter"]
        for (protocol, status), count in sorted(self.answers.items()):
            lines.append(f'keygrip_answers_total{{protocol="{protocol}",status="{status}"}} {count}')
        lines += [
            "# HELP keygrip_disconnects_total Clients that went away before their answer.",
            "# TYPE keygrip_disconnects_total counter",
            f"keygrip_disconnects_total {self.disconnects}",
            "# HELP keygrip_plans_total Plans that the policy computed.",
            "# TYPE keygrip_plans_total counter",
            f"keygrip_plans_total {self._plans}",
            "# HELP keygrip_compute_seconds Time of one computation of the policy, of one plan or a batch.",
            "# TYPE keygrip_compute_seconds histogram",
        ]
        count = 0
        for bound, inside in zip((*map(str, BUCKETS_S), "+Inf"), self._buckets, strict=True):
            count += inside
            lines.append(f'keygrip_compute_seconds_bucket{{le="{bound}"}} {count}')
        lines += [f"keygrip_compute_seconds_sum {self._total_s:.6f}", f"keygrip_compute_seconds_count {count}"]
        for name, (help_text, value) in gauges.items():
            lines += [f"# HELP keygrip_{name} {help_text}", f"# TYPE keygrip_{name} gauge", f"keygrip_{name} {value:g}"]
        return "\n".join([*lines, ""])
