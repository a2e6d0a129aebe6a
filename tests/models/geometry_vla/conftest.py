"""A stand-in for MapAnything, and one small policy for all tests that only read it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from vla_parts import ready_module

from keygrip.models.geometry_vla.module import GeometryVLAModule

STAND_INS = Path(__file__).resolve().parents[2] / "support" / "stand_ins"


@pytest.fixture
def mapanything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of weights for the stand-in package, which the fixture makes importable."""
    monkeypatch.syspath_prepend(str(STAND_INS))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mapanything", "uniception")]:
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"width": 10, "dim": 24, "patch_size": 8}))
    (folder / "model.safetensors").touch()
    return folder


@pytest.fixture
def module(tmp_path: Path) -> GeometryVLAModule:
    return ready_module(tmp_path)
