"""`prepare step=record`: what belongs to evaluations, and environments without an expert, are refused by name."""

from __future__ import annotations

import pytest

from keygrip.config import compose
from keygrip.prepare import run


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["env=metaworld", "env.cameras=[corner2,topview]"], "env.cameras is for evaluations"),
        (["env.hz=20"], "env.hz is for evaluations"),
        (["env=gymnasium"], "env=gymnasium has no scripted expert"),
        (["env=recorded"], "env=recorded has no scripted expert"),
        (["env=metaworld", "depth=true"], "depth is no setting of the recordings of env=metaworld"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: object, overrides: list[str], said: str) -> None:
    with pytest.raises(Exception, match=said):
        run(compose("prepare", ["step=record", f"root={tmp_path}/new", "demos=1", *overrides]))
    assert not list(tmp_path.iterdir())  # type: ignore[attr-defined]
