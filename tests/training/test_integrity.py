"""Changed bytes and unfit weights are found before a model is used."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from keygrip.models.backbone.weights import read_file
from keygrip.models.patch_dit.init_source import read_source
from keygrip.training.checkpoints import read_checkpoint
from keygrip.training.integrity import ChangedFileError, is_signed, load_tensors, refuse_unfit_weights, sign, verify
from keygrip.training.saving import AtomicCheckpointIO

CONTENT = {
    "keygrip": {"format": 3, "config": {"model": {"a": 1}}},
    "state_dict": {"a": torch.randn(400), "b": torch.arange(3)},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_a_signed_file_loads_as_any_other(file: Path) -> None:
    verify(file)
    assert torch.equal(torch.load(file, weights_only=True)["state_dict"]["a"], CONTENT["state_dict"]["a"])
    assert torch.equal(read_checkpoint(file)["state_dict"]["a"], CONTENT["state_dict"]["a"])


def test_every_flipped_bit_is_found(file: Path) -> None:
    whole, generator = file.read_bytes(), random.Random(0)
    places = {0, len(whole) - 1, *(generator.randrange(len(whole)) for _ in range(198))}
    for place in sorted(places | set(range(len(whole) - 110, len(whole)))):  # including the end record and the hash
        changed = bytearray(whole)
        changed[place] ^= 1 << generator.randrange(8)
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"last\.ckpt (is damaged|has no hash|is truncated)"):
            read_checkpoint(file)


def test_other_changes_are_found_too(file: Path) -> None:
    whole = file.read_bytes()
    for changed in (whole[:-1], whole + b"\0", whole[:100] + whole[101:], whole[:50] + b"x" + whole[50:]):
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"last\.ckpt "):
            read_checkpoint(file)
    torch.save(CONTENT, file)
    assert not is_signed(file)
    with pytest.raises(ChangedFileError, match="has no hash at its end"):
        read_checkpoint(file)


def flipped(file: Path, tensor: torch.Tensor) -> Path:
    """Change one bit of a tensor in the file, which torch.load accepts without an error; return the file."""
    content = bytearray(file.read_bytes())
    content[content.index(tensor.numpy().tobytes()) + 5] ^= 4
    file.write_bytes(content)
    return file


def test_weights_to_start_from_are_checked_too(file: Path, tmp_path: Path) -> None:
    tensor = CONTENT["state_dict"]["a"]
    plain = tmp_path / "plain.pth"
    torch.save({"a": tensor, "b": 3}, plain)
    assert torch.equal(load_tensors(plain)["a"], tensor)
    assert torch.equal(read_source(file).weights["a"], tensor)
    assert torch.equal(read_file(file)["a"], tensor)
    for damaged in (flipped(file, tensor), flipped(plain, tensor)):
        torch.load(damaged, weights_only=True)
        with pytest.raises(ChangedFileError, match="is damaged"):
            load_tensors(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            read_source(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            read_file(damaged)


def test_only_a_plain_zip_is_signed(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not end like a zip"):
        sign(file)  # it has a comment already
    (tmp_path / "text").write_text("x" * 100)
    with pytest.raises(ValueError, match="does not end like a zip"):
        sign(tmp_path / "text")


def test_unfit_weights_are_named() -> None:
    expected = {f"layer{i}.weight": torch.zeros(2) for i in range(5)} | {"count": torch.tensor(0)}
    refuse_unfit_weights(expected, expected, "x")
    refuse_unfit_weights(
        {name: value.to(torch.float64) for name, value in expected.items() if name != "count"}, expected, "x"
    )
    with pytest.raises(ValueError, match=r"x: layer1.weight has numbers of another kind \(torch.int64, .*float32\)"):
        refuse_unfit_weights(expected | {"layer1.weight": torch.zeros(2).long()}, expected, "x")
    bad = {f"layer{i}.weight": torch.tensor([0.0, float("nan")]) for i in range(5)}
    with pytest.raises(ValueError, match=r"layer0.weight, layer1.weight, layer2.weight and 2 more holds NaN"):
        refuse_unfit_weights(expected | bad, expected, "x")
    with pytest.raises(ValueError, match="count is no tensor"):
        refuse_unfit_weights({"count": 3}, expected, "x")  # type: ignore[dict-item]
