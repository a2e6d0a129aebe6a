"""Changed bytes and unfit weights are found before a model is used."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from keygrip.artifacts import sha256_of
from keygrip.models.backbone.weights import read_file
from keygrip.models.patch_dit.init_source import read_source
from keygrip.training.checkpoints import read_checkpoint
from keygrip.training.integrity import (
    COMMENT_BYTES,
    ChangedFileError,
    is_signed,
    load_tensors,
    refuse_unfit_weights,
    sign,
    verify,
)
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


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by the hash of each file that is checked."""
    hashes: list[str] = []

    def record(parts: Any) -> str:
        hashes.append(sha256_of(parts))
        return hashes[-1]

    monkeypatch.setattr("keygrip.training.integrity.sha256_of", record)
    return hashes


def test_a_file_is_hashed_again_only_if_it_was_changed(
    file: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keygrip.training.integrity.SETTLED_S", -60.0)
    for mapped in (True, True, False):
        assert torch.equal(read_checkpoint(file, mapped=mapped)["state_dict"]["a"], CONTENT["state_dict"]["a"])
    assert len(hashed) == 1
    status, content = file.stat(), file.read_bytes()
    flipped(file, CONTENT["state_dict"]["a"])  # of the same size
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    for _ in range(2):  # a damaged file is not remembered
        with pytest.raises(ChangedFileError, match="is damaged"):
            read_checkpoint(file)
    assert len(hashed) == 3
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 2))
    read_checkpoint(file)
    AtomicCheckpointIO().save_checkpoint(CONTENT | {"global_step": 5}, file)  # another file takes its place
    del hashed[:]
    for _ in range(2):
        assert read_checkpoint(file)["global_step"] == 5
    assert len(hashed) == 1


def test_a_file_that_was_just_written_is_hashed_each_time(
    file: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may change again without another time stamp."""
    monkeypatch.setattr("keygrip.training.integrity.SETTLED_S", 3600.0)
    for _ in range(2):
        verify(file)
    assert len(hashed) == 2


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
        sign(file, "0" * 64)  # it has a comment already
    (tmp_path / "text").write_text("x" * 100)
    with pytest.raises(ValueError, match="does not end like a zip"):
        sign(tmp_path / "text", "0" * 64)


def test_a_checkpoint_is_hashed_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a large file back would double the time of a save."""
    with monkeypatch.context() as patch:
        patch.setattr("keygrip.training.integrity.read_blocks", lambda *_: pytest.fail("the file is read back"))
        AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / "last.ckpt")
    whole = (tmp_path / "last.ckpt").read_bytes()
    plain = whole[:-COMMENT_BYTES][:-2] + b"\0\0"  # as torch wrote it
    assert whole[-64:].decode() == hashlib.sha256(plain).hexdigest()
    verify(tmp_path / "last.ckpt")


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
