"""PyTorch files from untrusted sources: nothing is executed, unpacked or expanded, and every refusal is one
sentence."""

from __future__ import annotations

import codecs
import io
import random
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from keygrip.training.checkpoints import load_module, read_checkpoint
from keygrip.training.saving import AtomicCheckpointIO
from keygrip.training.torch_files import TorchFileError, read_torch_file, refuse_missing_device

CONTENT: dict[str, Any] = {
    "keygrip": {"format": 3, "config": {"model": {"a": 1}}},
    "state_dict": {"a": torch.zeros(4)},
    "global_step": 3,
}


def repacked(content: Any, file: Path, method: int = zipfile.ZIP_STORED, **changed: bytes) -> Path:
    """Write a file of torch with an archive from another program and some members changed; return it."""
    whole = io.BytesIO()
    torch.save(content, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(file, "w", method) as target:
        for member in source.infolist():
            name = member.filename.partition("/")[2]
            target.writestr(member.filename, changed.get(name, source.read(member.filename)))
    return file


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    bomb = repacked({"a": torch.zeros(1 << 20)}, tmp_path / "bomb.pth", zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 14
    with pytest.raises(TorchFileError, match=r"bomb\.pth holds compressed records \('.*, which torch does not write"):
        read_torch_file(bomb)
    assert read_torch_file(repacked({"a": torch.ones(3)}, tmp_path / "plain.pth"))["a"].sum() == 3


def test_an_archive_that_only_torch_reads_is_not_read(tmp_path: Path) -> None:
    bomb = repacked({"a": torch.zeros(1 << 20)}, tmp_path / "x.pth", zipfile.ZIP_DEFLATED)
    content = bytearray(bomb.read_bytes())
    content[content.index(b"PK\1\2") + 6] = 64  # the version of zip that is needed to read the first record
    bomb.write_bytes(content)
    assert torch.load(bomb, weights_only=True)["a"].numel() == 1 << 20
    with pytest.raises(TorchFileError, match=r"x\.pth holds more than tensors and plain values, or is damaged"):
        read_torch_file(bomb)


def test_a_file_that_is_an_archive_at_its_end_alone_is_not_read(tmp_path: Path) -> None:
    torch.save({"a": Call(bytearray, 9)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    archive = repacked({"a": torch.zeros(2)}, tmp_path / "plain.pth").read_bytes()
    with (tmp_path / "x.pth").open("ab") as file:
        file.write(archive)
    assert torch.load(tmp_path / "x.pth", weights_only=True)["a"] == bytearray(9)
    with pytest.raises(TorchFileError, match=r"x\.pth is truncated or no file of torch"):
        read_torch_file(tmp_path / "x.pth")


def own_memory() -> int:
    """Return the memory of this process, in bytes, that is not backed by a file."""
    found = Path("/proc/self/status")
    if not found.is_file():
        pytest.skip("this system does not say what memory a process has of its own")
    return 1024 * next(int(line.split()[1]) for line in found.read_text().splitlines() if line.startswith("RssAnon"))


def lies_in(tensor: torch.Tensor, file: Path) -> bool:
    """Return whether the memory of a tensor is that of a mapped file."""
    mappings = Path("/proc/self/maps")
    if not mappings.is_file():
        pytest.skip("this system does not say which files a process has mapped")
    for line in mappings.read_text().splitlines():
        first, last = (int(address, 16) for address in line.split(maxsplit=1)[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line.endswith(str(file))
    raise AssertionError("the memory of a tensor is mapped")


@pytest.mark.parametrize("mapped", [True, False])
def test_what_is_not_read_stays_in_a_mapped_file(mapped: bool, tmp_path: Path) -> None:
    content = {"few": torch.arange(5.0), "many": torch.zeros(1 << 20)}
    torch.save(content, tmp_path / "x.pth")
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = read_torch_file(tmp_path / "x.pth", mapped=mapped)
    assert lies_in(found["many"], tmp_path / "x.pth") == mapped
    assert torch.equal(found["few"], content["few"])
    assert torch.equal(found["many"], content["many"])
    assert torch.equal(read_torch_file(tmp_path / "old.pth", mapped=mapped)["few"], content["few"])


def test_a_resumed_run_maps_the_large_parts_of_its_checkpoint_and_copies_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "last.ckpt"
    large = {"state_dict": {"a": torch.ones(1 << 24)}, "optimizer_states": [{"state": {0: {"m": torch.ones(1 << 24)}}}]}
    AtomicCheckpointIO().save_checkpoint(CONTENT | large | {"other": torch.arange(3.0)}, file)
    found = AtomicCheckpointIO().load_checkpoint(file)
    assert lies_in(found["state_dict"]["a"], file)
    assert lies_in(found["optimizer_states"][0]["state"][0]["m"], file)
    assert not lies_in(found["other"], file)
    mapped = read_checkpoint(file, mapped=True)
    found["state_dict"]["a"].zero_()
    found["optimizer_states"][0]["state"][0]["m"].zero_()
    assert torch.equal(read_checkpoint(file)["state_dict"]["a"], large["state_dict"]["a"])
    assert mapped["optimizer_states"][0]["state"][0]["m"].min() == 1
    AtomicCheckpointIO().save_checkpoint(CONTENT | {"global_step": 4}, file)
    assert (mapped["state_dict"]["a"] == 1).all()  # of the file that was replaced
    assert read_checkpoint(file)["global_step"] == 4
    monkeypatch.setattr("keygrip.training.saving.read_checkpoint", lambda *_, **__: mapped)
    found = AtomicCheckpointIO().load_checkpoint(file)
    assert found["state_dict"]["a"].data_ptr() == mapped["state_dict"]["a"].data_ptr()
    assert found["other"].data_ptr() != mapped["other"].data_ptr()
    assert torch.equal(found["other"], torch.arange(3.0))


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(1).expand(1 << 40), r"holds a tensor of \d+ bytes in 4 of storage"),
        (torch.sparse_coo_tensor([[0]], [1.0], (1 << 40,)), r"names torch\._utils\._rebuild_sparse_tensor"),
        (torch.empty(1 << 40, device="meta"), r"names torch\._utils\._rebuild_meta_tensor_no_storage"),
    ],
)
def test_tensors_larger_than_their_file_are_refused(tensor: torch.Tensor, said: str, tmp_path: Path) -> None:
    torch.save([{"inside": (tensor,)}], tmp_path / "x.pth")
    for mapped in (False, True):
        with pytest.raises(TorchFileError, match=rf"x\.pth {said}"):
            read_torch_file(tmp_path / "x.pth", mapped=mapped)


class Call:
    """Is pickled as a call with these arguments, and unpickled as its result."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "legacy"])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(bytearray, 1 << 30), "bytearray"),
        (Call(torch.FloatTensor, 1 << 28), r"torch\.FloatTensor"),
        (Call(codecs.encode, b"a" * 9, "hex"), r"_codecs\.encode"),  # doubles its input, and calls can be nested
        (
            Call(torch._utils._rebuild_device_tensor_from_cpu_tensor, torch.zeros(1), torch.float64, "cpu", False),
            "torch",
        ),
    ],
)
def test_what_takes_any_size_is_not_called(call: Call, name: str, archive: bool, tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(2), "b": call}, file, _use_new_zipfile_serialization=archive)
    torch.load(file, weights_only=True)  # torch alone calls it
    before = own_memory()
    with pytest.raises(TorchFileError, match=rf"x\.pth names \S*{name}\S*: it holds more than tensors"):
        read_torch_file(file)
    assert own_memory() - before < 1 << 24


def test_every_type_of_plain_tensors_is_read(tmp_path: Path) -> None:
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16)
    types += (
        torch.int32,
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.complex128,
    )
    content = {str(kind): torch.ones(3).to(kind) for kind in types}
    plain = {"size": torch.Size([2, 3]), "device": torch.device("cpu"), "type": torch.bfloat16, "set": {1, 2}, "c": 1j}
    plain["counter"] = Counter({30: 1})  # as in MultiStepLR
    parameter = torch.nn.Parameter(torch.ones(2))
    torch.save({"tensors": content, **plain, "p": parameter}, tmp_path / "x.pth")
    found = read_torch_file(tmp_path / "x.pth")
    assert found["tensors"].keys() == content.keys()
    assert all(
        torch.equal(found["tensors"][key].to(torch.complex128), content[key].to(torch.complex128)) for key in content
    )
    assert {key: found[key] for key in plain} == plain
    assert isinstance(found["p"], torch.nn.Parameter)


def test_containers_without_an_end_are_refused(tmp_path: Path) -> None:
    loop: list[Any] = [torch.zeros(2)]
    loop.append(loop)
    many: list[Any] = [torch.zeros(2)]
    for _ in range(60):  # 2^60 paths to the tensor
        many = [many, many]
    for content in (loop, many):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(TorchFileError, match="holds more than 10000000 values, or a container inside itself"):
            read_torch_file(tmp_path / "x.pth")
    torch.save([shared := [torch.zeros(2)], shared], tmp_path / "x.pth")
    assert len(read_torch_file(tmp_path / "x.pth")) == 2


def test_whatever_is_wrong_inside_is_one_sentence(tmp_path: Path) -> None:
    whole = io.BytesIO()
    torch.save(CONTENT, whole)
    with zipfile.ZipFile(whole) as archive:
        content = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    generator = random.Random(0)
    said: list[str] = []
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        file = repacked(CONTENT, tmp_path / "x.pth", **{"data.pkl": bytes(changed)})
        for mapped in (False, True):
            try:
                read_torch_file(file, mapped=mapped)
            except TorchFileError as error:
                said.append(str(error))
    assert len(said) > 100
    assert all(text.startswith(str(tmp_path / "x.pth")) and "\n" not in text for text in said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ema": [1]}, "its EMA is none"),
        ({"ema": {"updates": "3", "parameters": {}}}, "its EMA is none"),
        ({"ema": {"updates": 3, "parameters": {"b": torch.zeros(1)}}}, "the EMA of 'b' does not fit its weights"),
        ({"ema": {"updates": 3, "parameters": {"a": torch.zeros(5)}}}, "the EMA of 'a' does not fit its weights"),
        ({"global_step": "many"}, "its step is no number"),
        ({"keygrip": {"format": 3, "config": {}}}, "has no model configuration"),
        ({"keygrip": {"format": 3, "config": None}}, "has no model configuration"),
    ],
)
def test_signed_checkpoints_of_odd_content_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT | changes, file)
    with pytest.raises(ValueError, match=rf"last\.ckpt .*{said}"):
        read_checkpoint(file)


def test_state_that_a_module_cannot_take_back_is_named(tmp_path: Path) -> None:
    config = {"format": 3, "config": {"model": {"_target_": "toy_parts.ToyModule"}}}
    config["config"]["model"]["optimizer"] = {"_target_": "keygrip.training.optimizers.AdamW", "lr": 1.0}  # type: ignore
    AtomicCheckpointIO().save_checkpoint(CONTENT | {"keygrip": config}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt: what the model stored .* the checkpoint has no scale"):
        load_module(tmp_path / "last.ckpt", trust=["toy_parts"])


def test_a_device_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / "last.ckpt")
    for device, said in (
        ("cuda", "this machine has none"),
        ("cuda:3", "this machine has none"),
        ("gpu", "no such device"),
    ):
        with pytest.raises(ValueError, match=rf"device={device}: .*{said}"):
            load_module(tmp_path / "last.ckpt", map_location=device)
    refuse_missing_device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    refuse_missing_device(torch.device("cuda", 1))
    with pytest.raises(ValueError, match="device=cuda:2: this machine has 2, numbered from 0"):
        refuse_missing_device("cuda:2")
