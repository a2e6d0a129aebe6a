"""Low-rank adaptation: what is trained, what is computed, and the content of its files; compared with peft."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vla_parts import INSTRUCTIONS, small_batch, small_vlm

from keygrip.inference.adapters import CONFIG, INPUTS, PREFIX, WEIGHTS, load_lora, write_adapter, write_lora
from keygrip.models.nn.lora import Adapter, LoRA, add_lora, merge, merged_weights, without_lora
from keygrip.models.nn.low_precision import lower_precision

LORA = LoRA(rank=2, alpha=3.0, targets=["query", "output"])
TARGET = {"_target_": "keygrip.models.nn.lora.LoRA", "rank": 2, "alpha": 3.0, "targets": ["query", "output"]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.output = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.tanh(self.query(x) * self.key(x)))


def plain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(Block(), Block())


def adapted() -> nn.Sequential:
    """Return a network with LoRA whose differences are not zero."""
    pytest.importorskip("peft")
    network = plain()
    add_lora(network, LORA)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return network


def files(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None] = lambda *_: None) -> None:
    """Write a hand-made adapter in peft's layout."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name in ("0.query", "1.output"):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(2, 6, generator=generator)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(6, 2, generator=generator)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3.0, "target_modules": ["query", "output"]}
    change(config, tensors)
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)


def test_differences_are_added_to_the_weights(tmp_path: Path) -> None:
    files(tmp_path)
    network, before = plain(), plain().state_dict()
    assert sorted(load_lora(network, tmp_path)) == ["0.query", "1.output"]
    tensors = load_file(tmp_path / WEIGHTS)
    for name, value in network.state_dict().items():
        layer = f"{PREFIX}{name.removesuffix('.weight')}"
        change = torch.zeros(())
        if f"{layer}.lora_A.weight" in tensors:
            change = 1.5 * tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(value, before[name] + change)


def test_an_adapter_is_merged_only_where_inputs_are_normalised_as_it_learned(tmp_path: Path) -> None:
    """Its metadata states the normalisation; other adapters have no such metadata and are accepted."""
    files(tmp_path)
    for said, known, fits in ((None, "b", True), ("b", "b", True), ("b", None, True), ("a", "b", False)):
        tensors = load_file(tmp_path / WEIGHTS)
        save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"} | ({} if said is None else {INPUTS: said}))
        network, before = plain(), plain().state_dict()
        if fits:
            load_lora(network, tmp_path, known)
        else:
            with pytest.raises(ValueError, match=r"normalised otherwise than this checkpoint's \(a, not b\)"):
                load_lora(network, tmp_path, known)
        assert torch.equal(network.state_dict()["0.query.weight"], before["0.query.weight"]) != fits


def test_an_adapter_for_other_weights_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also if it is already merged into the weights; for adapters without this information there is no warning."""
    write_lora(Adapter(adapted(), LORA), tmp_path)
    said = "was trained on other weights than this checkpoint's"
    network = plain()
    load_lora(network, tmp_path)
    assert said not in caplog.text
    load_lora(network, tmp_path)
    assert caplog.text.count(said) == 1
    load_lora(plain(seed=1), tmp_path)
    assert caplog.text.count(said) == 2
    files(tmp_path / "theirs")
    load_lora(plain(seed=1), tmp_path / "theirs")
    assert caplog.text.count(said) == 2


def _of_another_size(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}0.query.lora_A.weight"] = torch.ones(2, 5)


def _without_half(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors[f"{PREFIX}0.query.lora_B.weight"]


def _not_finite(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}0.query.lora_B.weight"][0, 0] = float("nan")


def _of_whole_numbers(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}0.query.lora_B.weight"] = tensors[f"{PREFIX}0.query.lora_B.weight"].to(torch.int32)


def _too_large(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for part in ("lora_A", "lora_B"):
        tensors[f"{PREFIX}0.query.{part}.weight"].fill_(1e30)


def _elsewhere(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for part in ("lora_A", "lora_B"):
        tensors[f"{PREFIX}9.query.{part}.weight"] = tensors[f"{PREFIX}0.query.{part}.weight"].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, _: config.update(use_dora=True), "use_dora=True is not supported"),
        (lambda config, _: config.update(rank_pattern={"query": 4}), "rank_pattern"),
        (lambda config, _: config.update(kasa_config={"beta": 1e-4}), "kasa_config"),
        (lambda config, _: config.update(r=0), "r=0 is not a positive number"),
        (lambda config, _: config.update(lora_alpha=True), "lora_alpha=True"),
        (lambda config, _: config.update(r=3), "of rank 3"),
        (lambda config, _: config.update(peft_type="IA3"), "not the configuration of a LoRA"),
        (_elsewhere, "no linear layer 9.query"),
        (_of_another_size, r"0.query is \[6, 6\]"),
        (_without_half, "has lora_A and not both"),
        (_not_finite, "not finite"),
        (_of_whole_numbers, "lora_B.weight holds int32, no weights"),
        (_too_large, "becomes infinite by its difference"),
        (lambda config, _: config.update(layer_replication=[[0, 2]]), "layer_replication"),
        (lambda config, _: config.update(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_and_change_nothing(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None], message: str
) -> None:
    files(tmp_path, change)
    network, before = plain(), plain().state_dict()
    with pytest.raises(ValueError, match=message):
        load_lora(network, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(FileNotFoundError, match="there is no adapter_model"):
        load_lora(network, tmp_path / "nowhere")


def test_names_that_fit_no_layer_are_refused() -> None:
    for targets in (["query", "nothing"], ["0"]):  # the second is a block
        with pytest.raises(ValueError, match="no linear layer named"):
            add_lora(plain(), LoRA(2, 1.0, targets))
    with pytest.raises(ValueError, match="rank=0"):
        LoRA(0, 1.0, ["query"])
    with pytest.raises(ValueError, match="trainable=language"):
        small_vlm(lora=LORA)
    with pytest.raises(ValueError, match="without LoRA"):
        write_adapter(Path("nowhere"), nn.Linear(1, 1))


def test_a_stored_configuration_loses_its_lora_and_nothing_else() -> None:
    config = {"model": {"network": [{"lora": TARGET, "width": 6}]}, "data": {"root": None}}
    expected = {"model": {"network": [{"lora": None, "width": 6}]}, "data": {"root": None}}
    assert without_lora(config) == (expected, LORA)
    assert without_lora(expected) == (expected, None)


def test_training_changes_the_differences_alone() -> None:
    network, x = adapted(), torch.randn(4, 6)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name


def test_a_difference_starts_at_nothing_and_merged_it_computes_the_same() -> None:
    pytest.importorskip("peft")
    x, network = torch.randn(4, 6), plain()
    add_lora(network, LORA)
    assert torch.equal(network(x), plain()(x))
    network = adapted()
    expected, weights = network(x), merged_weights(network.state_dict(), LORA)
    assert not torch.allclose(expected, plain()(x))
    again = plain(seed=1)
    again.load_state_dict(weights)
    torch.testing.assert_close(again(x), expected, atol=1e-5, rtol=1e-5)
    rounded = copy.deepcopy(network)
    merge(network)
    assert {type(module) for module in network.modules()} == {nn.Sequential, Block, nn.Linear}
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)
    lower_precision(rounded, "int8")
    assert (rounded(x) - expected).abs().max() < 0.1 * expected.abs().max()


def test_peft_reads_what_is_written_and_its_own_is_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    network, x = adapted(), torch.randn(4, 6)
    write_lora(Adapter(network, LORA, inputs="a"), tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain(), str(tmp_path))
    torch.testing.assert_close(theirs(x), network(x), atol=1e-5, rtol=1e-5)
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["key", "output"], init_lora_weights=False)
    theirs = peft.get_peft_model(plain(), config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = plain()
    load_lora(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga", "loftq", "newer", ["pissa"]]
)
def test_adapters_of_changed_base_weights_are_refused(tmp_path: Path, start: Any) -> None:
    files(tmp_path, lambda config, _: config.update(init_lora_weights=start))
    network, before = plain(), plain().state_dict()
    with pytest.raises(ValueError, match=f"init_lora_weights={re.escape(repr(start))} is not supported"):
        load_lora(network, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_adapters_of_unchanged_base_weights_are_taken(tmp_path: Path, start: bool | str | None) -> None:
    files(tmp_path, lambda config, _: config.update(init_lora_weights=start))
    assert len(load_lora(plain(), tmp_path)) == 2


@pytest.mark.parametrize("start", ["orthogonal", "mica", "gaussian"])
def test_peft_leaves_the_base_weights_alone_where_adapters_are_taken(tmp_path: Path, start: str) -> None:
    peft = pytest.importorskip("peft")
    x = torch.randn(4, 6)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["query", "output"], init_lora_weights=start)
    theirs = peft.get_peft_model(plain(), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(str(tmp_path))
    ours = plain()
    load_lora(ours, tmp_path)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_an_adapter_of_changed_base_weights_is_taken_once_peft_has_converted_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    x = torch.randn(4, 6)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["query", "output"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(plain(), config)
    theirs.peft_config["default"].init_lora_weights = True  # as in peft's guide, so that it is loaded unchanged
    theirs.save_pretrained(str(tmp_path / "start"))
    theirs.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = theirs(x)
    theirs.save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa' is not supported: .* converted to a plain LoRA"):
        load_lora(plain(), tmp_path / "plain")
    converted = str(tmp_path / "converted")
    theirs.save_pretrained(converted, path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = plain()
    load_lora(ours, tmp_path / "converted")
    torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_language_model_is_adapted_alone(tmp_path: Path) -> None:
    """From a folder of weights as on the hub: the start is the same, only the differences are trained, and the adapter
    can be loaded into the hub's own class."""
    peft = pytest.importorskip("peft")
    from transformers import Qwen2_5_VLForConditionalGeneration

    lora = LoRA(4, 8.0, ["q_proj", "v_proj", "gate_proj"])
    batch, vlm = small_batch(), small_vlm()
    vlm.prepare(tmp_path / "tokens", INSTRUCTIONS)
    vlm.model.config.tie_word_embeddings = True
    whole = Qwen2_5_VLForConditionalGeneration(vlm.model.config)
    whole.model.load_state_dict(vlm.model.state_dict())
    whole.save_pretrained(tmp_path / "hub")
    options = {"weights": str(tmp_path / "hub"), "trainable": "language", "gradient_checkpointing": True}
    network = small_vlm(lora=lora, **options)
    with torch.no_grad():  # `small_vlm` scales word embeddings up
        network.model.language_model.embed_tokens.weight.div_(25)
    assert vlm.tokenizer is not None
    network.set_tokenizer(vlm.tokenizer)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 3 * 2
    assert all("lora_" in name and "visual" not in name for name in trained)
    expected = vlm.eval()(batch.images, batch.instruction, 2).layers[-1]
    found = network.train()(batch.images, batch.instruction, 2).layers[-1]
    torch.testing.assert_close(found, expected)
    found.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        changed = network.eval()(batch.images, batch.instruction, 2).layers[-1]
        assert (changed - expected).abs().max() > 1e-3
        # A checkpoint rebuilds it without the hub; int8 weights include the differences too.
        again = small_vlm(trainable="language", lora=lora).eval()
        again.load_state_dict(network.state_dict())
        again.set_tokenizer(vlm.tokenizer)
        assert torch.equal(again(batch.images, batch.instruction, 2).layers[-1], changed)
        write_lora(Adapter(again.model.language_model, lora, "model.language_model."), tmp_path)
        theirs = peft.PeftModel.from_pretrained(whole, str(tmp_path))
        own, hub = again.model.language_model.state_dict(), theirs.base_model.model.model.language_model.state_dict()
        assert own.keys() == hub.keys()
        assert all(torch.equal(hub[name], value) for name, value in own.items() if "lora_" in name)
        assert not [name for name in theirs.base_model.model.model.visual.state_dict() if "lora_" in name]
        again.lower_precision("int8")
        rounded = again(batch.images, batch.instruction, 2).layers[-1].float()
    assert (rounded - changed).abs().mean() < 0.2 * (expected - changed).abs().mean()
