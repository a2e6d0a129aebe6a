"""Tables of the page about robots."""

from __future__ import annotations

from doc_tables.base import markdown, read, table


@table
def wild_arm() -> str:
    """Excesses of an arm's limits under random plans, by their cause."""
    record = read("control_loop_wild_arm")
    limits = {
        "speed_m_s": "speed, m/s",
        "acceleration_m_s2": "acceleration, m/s²",
        "turn_rad_s": "turn, rad/s",
        "turn_acceleration_rad_s2": "turn acceleration, rad/s²",
    }
    causes = ("command_refused", "slowed_by_joint_speed", "reached_within_tolerance", "otherwise")
    rows = [
        (words, f"{found['limit']:g}", f"{found['largest']:.2f}", *(found["periods_over"][cause] for cause in causes))
        for words, found in ((words, record["limits"][key]) for key, words in limits.items())
    ]
    header = ["", "limit", "largest", "command refused", "slowed by joint speed", "reached within tolerance", "other"]
    return markdown(header, rows)
