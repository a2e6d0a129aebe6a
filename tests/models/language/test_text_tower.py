"""Frozen text towers of CLIP and SigLIP, against transformers' own models, saved as on the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from keygrip.models.language.text_tower import PretrainedTextTower

transformers = pytest.importorskip("transformers")

from tiny_text_tower import tokenizer, write_text_tower  # noqa: E402


@pytest.fixture(params=["clip", "siglip"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_text_tower(tmp_path, request.param)


def test_states_are_transformers_own(folder: Path) -> None:
    tower = PretrainedTextTower(str(folder), width=16, length=8)
    sentences = ["open the drawer", "push the red cube"]
    states = tower(tower.tokens(sentences))
    assert states.words.shape == (2, 8, 16)
    assert states.mask.sum(-1).tolist() == [5, 6]
    kind = transformers.AutoConfig.from_pretrained(folder).model_type
    model = transformers.CLIPTextModel if kind.startswith("clip") else transformers.SiglipTextModel
    theirs = model.from_pretrained(folder)
    trained_with = 12  # tokens; SigLIP pads to this length, whatever instruction.length is
    padded = tokenizer()(sentences, padding="max_length", max_length=trained_with, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = theirs.eval()(input_ids=padded)
    whole = torch.nn.functional.layer_norm(expected.pooler_output, (16,))
    torch.testing.assert_close(states.whole, whole)
    words = torch.nn.functional.layer_norm(expected.last_hidden_state[:, :8], (16,))
    torch.testing.assert_close(states.words[states.mask], words[states.mask])
    assert not states.words[~states.mask].any()


class Executed:
    """A pickled call, as a pickle may contain; here it writes a file."""

    def __init__(self, at: Path) -> None:
        self.at = at

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.at,)


def test_weights_in_a_file_of_pytorch_are_read_and_what_else_it_holds_is_not_executed(
    folder: Path, tmp_path: Path
) -> None:
    """openai/clip-vit-base-patch32 has its weights in this form on the hub."""

    def read() -> Tensor:
        tower = PretrainedTextTower(str(folder), width=16, length=8)
        return tower(tower.tokens(["open the drawer"])).words

    expected, weights = read(), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(read(), expected)
    torch.save(weights | {"more": Executed(tmp_path / "executed")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors, which keygrip does not execute"):
        read()
    assert not (tmp_path / "executed").exists()


def test_it_is_neither_trained_nor_saved(folder: Path) -> None:
    tower = PretrainedTextTower(str(folder), width=16, length=8)
    tower(tower.tokens(["open the drawer"]))
    assert not list(tower.parameters())
    assert list(tower.state_dict()) == ["_digest"]


def test_weights_are_refused_with_another_tower_than_theirs(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    trained = PretrainedTextTower(str(folder), width=16, length=8)
    trained.prepare(["open the drawer"])
    stored = trained.state_dict()
    moved = tmp_path_factory.mktemp("moved") / "tower"
    shutil.copytree(folder, moved)
    again = PretrainedTextTower(str(moved), width=16, length=8)
    again.load_state_dict(stored)
    assert torch.equal(again.digest(), trained.digest())

    kind = transformers.AutoConfig.from_pretrained(folder).model_type.split("_")[0]
    seeded = write_text_tower(tmp_path_factory.mktemp("seeded"), kind, seed=1)
    reworded = tmp_path_factory.mktemp("reworded") / "tower"
    shutil.copytree(folder, reworded)
    content = json.loads((reworded / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["open"], words["push"] = words["push"], words["open"]
    (reworded / "tokenizer.json").write_text(json.dumps(content))
    names = bytes(stored["_digest"][:8].tolist()).hex()
    for other in (seeded, reworded):
        tower = PretrainedTextTower(str(other), width=16, length=8)
        said = rf"{other} is another text tower.*hash \w{{16}}, in the checkpoint it is {names}"
        with pytest.raises(ValueError, match=said):
            nn.Sequential(tower).load_state_dict({f"0.{name}": value for name, value in stored.items()})
    untrained = PretrainedTextTower(str(folder), width=16, length=8).state_dict()
    PretrainedTextTower(str(seeded), width=16, length=8).load_state_dict(untrained)  # not trained with any


def test_a_checkpoint_older_than_the_hash_is_loaded_and_saved_with_it(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), PretrainedTextTower(str(folder), width=16, length=8))
    older = {name: value for name, value in model.state_dict().items() if not name.endswith("_digest")}
    model.load_state_dict(older, strict=True)
    assert f"instruction.source={folder} is the tower that it was trained with" in caplog.text
    assert set(older) == {"0.weight", "0.bias"}  # the caller's dictionary is unchanged
    saved = model.state_dict()["1._digest"]
    assert torch.equal(saved, model[1].digest())
    assert saved.any()


def test_what_does_not_fit_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    tower = PretrainedTextTower(str(folder), width=16, length=4)
    with pytest.raises(ValueError, match=r"has 5 tokens, instruction\.length=4"):
        tower.prepare(["open the drawer"])
    with pytest.raises(ValueError, match="empty"):
        tower.tokens([" "])
    with pytest.raises(ValueError, match=r"states of 16 numbers.*instruction\.width=32"):
        PretrainedTextTower(str(folder), width=32, length=4).tokens(["open"])
    with pytest.raises(FileNotFoundError, match="no folder"):
        PretrainedTextTower(str(tmp_path_factory.mktemp("none") / "absent"), width=16).tokens(["open"])
    other = tmp_path_factory.mktemp("t5")
    transformers.T5Config().save_pretrained(other)
    with pytest.raises(ValueError, match="must be CLIP or SigLIP"):
        PretrainedTextTower(str(other), width=16).tokens(["open"])
