"""A missing source of a run is reported before weights are fetched from a hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from keygrip import train
from keygrip.config import compose
from keygrip.models.foveated_vlm.module import FoveatedVLMModule


@pytest.fixture
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the model is built, since that would fetch an encoder and a language model."""

    def build(self: FoveatedVLMModule, *args: object, **kwargs: object) -> None:
        raise AssertionError("the model was built first")

    monkeypatch.setattr(FoveatedVLMModule, "__init__", build)


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["experiment=vlm_stage1"], r"no shards at .*gone.*: prepare them first"),
        (["experiment=vlm_stage2", "model.init_from={gone}"], r"model\.init_from=.*gone: there is no run folder"),
        (["experiment=vlm_stage3", "model.init_from={here}"], r"no shards at .*gone.*: prepare them first"),
    ],
)
def test_missing_sources_are_said_first(overrides: list[str], said: str, tmp_path: Path) -> None:
    gone, here = tmp_path / "gone", tmp_path / "here"
    here.mkdir()
    given = [text.format(gone=gone, here=here) for text in overrides]
    composed = compose("train", [*given, "strategy=cpu", f"run_dir={tmp_path / 'run'}"])
    for source in composed.data.sources.values():
        source.root = str(gone)
    with pytest.raises(FileNotFoundError, match=said):
        train.run(composed)


def test_a_backbone_to_start_from_is_said_too(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    given = ["model=volume_query", "data=yam", f"data.root={tmp_path}", f"backbone.init_from={gone}"]
    with pytest.raises(FileNotFoundError, match=r"backbone\.init_from=.*gone: there is no run folder"):
        train.run(compose("train", [*given, f"run_dir={tmp_path / 'run'}"]))
