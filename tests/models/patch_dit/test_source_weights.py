"""Weights of the source's own transformer compute the same here, or are refused with the setting that is missing."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dit_parts import CHANNELS, DINO_DIM, TEXT_DIM, conditions_of, flags, small_dit, stir
from torch import Tensor, nn

from keygrip.config import compose
from keygrip.models.nn.flow_matching import seeded_noise
from keygrip.models.patch_dit.context import Conditions
from keygrip.models.patch_dit.init_source import InitSource
from keygrip.models.patch_dit.network import PatchDiT
from keygrip.models.patch_dit.warm_start import rename_rules, take, warm_start

WIDTH, DEPTH, HEADS, CELL = 32, 3, 2, 2
SIZE = (6, 8)  # size of the latents; not square, to distinguish rows from columns
SETTINGS: dict[str, Any] = {
    "qk_norm": False,
    "timestep_hidden": WIDTH,
    "timestep_frequencies": "exclusive",
    "latent_positions": "cells",
    "output_convolution": True,
    "patch_positions": False,
}


class SourceLayers(nn.Module):
    """Parameters under the source's names: `parts` are layers by name; dots in a name create submodules."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in parts.items():
            owner: nn.Module = self
            *path, last = name.split(".")
            for step in path:
                if not hasattr(owner, step):
                    owner.add_module(step, nn.Module())
                owner = getattr(owner, step)
            owner.add_module(last, layer)


class SourceDiT(nn.Module):
    """The source's transformer, built from its description: names, layers without bias, order of rows and arithmetic.

    Args:
        patches: with patch tokens; otherwise text and CLS alone.
    """

    def __init__(self, patches: bool = True) -> None:
        super().__init__()
        wide = {
            "t_embedder.mlp.0": nn.Linear(256, WIDTH),
            "t_embedder.mlp.2": nn.Linear(WIDTH, WIDTH),
            "x_embedder.proj": nn.Conv2d(CHANNELS, WIDTH, CELL, CELL),
            "text_proj": nn.Linear(TEXT_DIM, WIDTH),
            "dino_proj": nn.Linear(DINO_DIM, WIDTH),
            "final_proj": nn.Linear(WIDTH, CELL * CELL * CHANNELS),
            "output_conv": nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        }
        if patches:
            wide["dino_patch_proj"] = nn.Linear(DINO_DIM, WIDTH)
        for number in range(DEPTH):
            block = {
                "attn.qkv": nn.Linear(WIDTH, 3 * WIDTH, bias=False),
                "attn.proj": nn.Linear(WIDTH, WIDTH, bias=False),
                "cross_attn.q": nn.Linear(WIDTH, WIDTH, bias=False),
                "cross_attn.kv": nn.Linear(WIDTH, 2 * WIDTH, bias=False),
                "cross_attn.proj": nn.Linear(WIDTH, WIDTH, bias=False),
                "mlp.fc1": nn.Linear(WIDTH, 4 * WIDTH, bias=False),
                "mlp.fc2": nn.Linear(4 * WIDTH, WIDTH, bias=False),
                "adaLN_modulation.1": nn.Linear(WIDTH, 6 * WIDTH),
            }
            wide |= {f"blocks.{number}.{name}": layer for name, layer in block.items()}
        self.layers, self.layer = SourceLayers(wide), wide
        self.nulls = nn.ParameterDict({"null_dino": torch.randn(1, DINO_DIM), "null_text": torch.randn(1, 1, TEXT_DIM)})
        if patches:
            self.nulls["null_dino_patch_token"] = torch.randn(1, 1, DINO_DIM)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights as in the source's own file."""
        return dict(self.layers.state_dict()) | {name: value.data for name, value in self.nulls.items()}

    @torch.no_grad()
    def forward(self, x: Tensor, level: Tensor, text: Tensor, mask: Tensor, cls: Tensor, patches: Tensor) -> Tensor:
        batch, rows, columns = len(x), x.shape[2] // CELL, x.shape[3] // CELL
        turns = 1000 * level[:, None] * 10000.0 ** (-torch.arange(128) / 128)
        waves = torch.cat([turns.cos(), turns.sin()], dim=1)
        time = self.layer["t_embedder.mlp.2"](F.silu(self.layer["t_embedder.mlp.0"](waves)))
        condition = time + self.layer["dino_proj"](cls)
        tokens = [self.layer["text_proj"](text), condition[:, None]]
        if "dino_patch_proj" in self.layer:
            tokens.append(self.layer["dino_patch_proj"](patches))
        context = torch.cat(tokens, dim=1)
        seen = torch.cat([mask, mask.new_ones(batch, context.shape[1] - mask.shape[1])], dim=1)
        hidden = self.layer["x_embedder.proj"](x).flatten(2).mT + self.places(rows, columns)
        for number in range(DEPTH):
            hidden = self.block(f"blocks.{number}", hidden, condition, context, seen)
        cells = self.layer["final_proj"](F.layer_norm(hidden, (WIDTH,), eps=1e-6))
        cells = cells.reshape(batch, rows, columns, CELL, CELL, CHANNELS)
        image = torch.einsum("brcyxk->bkrycx", cells).reshape(batch, CHANNELS, rows * CELL, columns * CELL)
        return image + self.layer["output_conv"](image)

    @staticmethod
    def places(rows: int, columns: int) -> Tensor:
        """Return the position of each cell: sines and cosines of its row, then of its column."""
        rates = 10000.0 ** (-torch.arange(WIDTH // 4) / (WIDTH // 4))
        found = []
        for row in range(rows):
            for column in range(columns):
                angles = [row * rates, column * rates]
                found.append(torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())]))
        return torch.stack(found)

    def block(self, name: str, x: Tensor, condition: Tensor, context: Tensor, seen: Tensor) -> Tensor:
        def layer(part: str, value: Tensor) -> Tensor:
            found: Tensor = self.layer[f"{name}.{part}"](value)
            return found

        def heads(value: Tensor) -> Tensor:
            return value.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
            logits = heads(queries) @ heads(keys).mT / (WIDTH // HEADS) ** 0.5
            if mask is not None:
                logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
            return (logits.softmax(-1) @ heads(values)).transpose(1, 2).flatten(2)

        changes = layer("adaLN_modulation.1", F.silu(condition))[:, None].chunk(6, dim=-1)

        def normed(branch: int, value: Tensor) -> Tensor:
            shift, scale = changes[2 * branch], changes[2 * branch + 1]
            return F.layer_norm(value, (WIDTH,), eps=1e-6) * (1 + scale) + shift

        queries, keys, values = layer("attn.qkv", normed(0, x)).chunk(3, dim=-1)
        x = x + layer("attn.proj", attend(queries, keys, values))
        keys, values = layer("cross_attn.kv", context).chunk(2, dim=-1)
        x = x + layer("cross_attn.proj", attend(layer("cross_attn.q", normed(1, x)), keys, values, seen))
        return x + layer("mlp.fc2", F.gelu(layer("mlp.fc1", normed(2, x)), approximate="tanh"))


def outputs(source: SourceDiT, network: PatchDiT, conditions: Conditions) -> tuple[Tensor, Tensor]:
    """Return the outputs of both for the same latents, timesteps and features."""
    x, level = seeded_noise([1, 2], (CHANNELS, *SIZE)), torch.tensor([0.3, 0.8])
    assert conditions.text is not None
    assert conditions.text_mask is not None
    assert conditions.cls is not None
    assert conditions.patches is not None
    expected = source(x, level, conditions.text, conditions.text_mask, conditions.cls, conditions.patches)
    context = network.context_builder(conditions, flags(True, True), flags(True, True), SIZE[1] / SIZE[0])
    with torch.no_grad():
        return network(x, level, context).velocity, expected


def source_dit(patches: bool = True) -> SourceDiT:
    torch.manual_seed(5)
    return SourceDiT(patches)


def test_the_sources_weights_compute_here_what_they_compute_there() -> None:
    source, network = source_dit(), small_dit(seed=4, stirred=False, depth=DEPTH, heads=HEADS, **SETTINGS)
    report = warm_start(network, InitSource("there", source.weights()), min_share=0.9)
    assert not report.unexpected
    assert not report.reshaped
    assert set(report.missing) - set(report.zeroed) == {"final_norm.weight", "final_norm.bias"}  # the source has none
    found, expected = outputs(source, network, conditions_of())
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    builder = network.context_builder
    projected = source.layer["dino_patch_proj"](source.nulls["null_dino_patch_token"])[0, 0]
    torch.testing.assert_close(builder.null_dino_patches, projected)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "ema.", "module._orig_mod."])
def test_a_wrapper_s_prefix_before_the_source_s_names_changes_nothing(prefix: str) -> None:
    weights = source_dit().weights()
    plain, wrapped = (small_dit(seed=4, depth=DEPTH, heads=HEADS, **SETTINGS) for _ in range(2))
    take(plain, weights, "there")
    take(wrapped, {f"{prefix}{name}": value for name, value in weights.items()}, "there", min_share=0.9)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True))
    rules = rename_rules([[f"^{prefix.replace('.', chr(92) + '.')}", ""]])  # for the names as written in the file
    take(wrapped, {f"{prefix}{name}": value for name, value in weights.items()}, "there", rules, min_share=0.9)


def test_weights_without_patches_compute_the_same_beside_patches_of_their_own() -> None:
    """With an attention of their own, patches that are not in the file leave the output unchanged."""
    source = source_dit(patches=False)
    settings = SETTINGS | {"patch_attention": "separate", "patch_positions": True}
    network = small_dit(seed=4, stirred=False, depth=DEPTH, heads=HEADS, **settings)
    report = take(network, source.weights(), "there", min_share=0.6)
    assert "context_builder.dino_patch_proj.weight" in report.missing
    found, expected = outputs(source, network, conditions_of())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    other, _ = outputs(source, network, conditions_of(seed=7).with_dino_of(torch.tensor([1, 0])))
    assert not torch.equal(found, other)  # CLS and text do matter
    stir(network)
    assert not torch.allclose(outputs(source, network, conditions_of())[0], expected, atol=1e-2)


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("qk_norm", True, "qk_norm=false"),
        ("timestep_hidden", 16, "timestep_hidden=32"),
        ("timestep_frequencies", "inclusive", "timestep_frequencies=exclusive"),
        ("latent_positions", "frame", "latent_positions=cells"),
        ("output_convolution", False, "output_convolution=true"),
        ("rotary", True, "rotary=false"),
        ("patch_attention", "separate", "patch_attention=joint"),
    ],
)
def test_the_sources_weights_are_refused_where_they_would_compute_something_else(
    setting: str, value: Any, named: str
) -> None:
    """Each setting changes the output; the message names the missing setting and no other; no weights are
    overwritten."""
    source = source_dit()
    network = small_dit(seed=4, depth=DEPTH, heads=HEADS, **SETTINGS | {setting: value})
    before = network.latent_in.weight.clone()
    with pytest.raises(ValueError, match=rf"Give model\.network\.{named}; model=patch_dit_source has all") as error:
        take(network, source.weights(), "there")
    assert str(error.value).count("model.network.") == 1
    assert torch.equal(network.latent_in.weight, before)


def test_places_for_the_sources_patches_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    source = source_dit()
    network = small_dit(seed=4, depth=DEPTH, heads=HEADS, **SETTINGS | {"patch_positions": True})
    take(network, source.weights(), "there")
    assert "is model.network.patch_positions=false" in caplog.text
    found, expected = outputs(source, network, conditions_of())
    assert not torch.allclose(found, expected, atol=1e-3)


def test_other_files_are_warned_of_by_what_their_names_and_shapes_show(caplog: pytest.LogCaptureFixture) -> None:
    there = small_dit(seed=3, qk_norm=False, timestep_hidden=40, output_convolution=True)
    with caplog.at_level(logging.WARNING):
        take(small_dit(seed=4), there.state_dict(), "there")
    for named in ("timestep_hidden=40", "qk_norm=false", "output_convolution=true"):
        assert f"model.network.{named}" in caplog.text
    caplog.clear()
    take(small_dit(seed=4, qk_norm=False, timestep_hidden=40, output_convolution=True), there.state_dict(), "there")
    take(small_dit(seed=4, output_convolution=True), small_dit(seed=3).state_dict(), "there")  # starts at zero
    assert not caplog.text


def test_the_sources_config_has_the_sources_settings() -> None:
    """At the published size; the experiment for large images does not change them."""
    for given in (["data=image_shards"], ["experiment=dit_512px"]):
        network = compose("train", [*given, "model=patch_dit_source"]).model.network
        assert {name: network[name] for name in SETTINGS} == SETTINGS | {"timestep_hidden": network.width}
        assert (network.prediction, network.rotary, network.final_modulation) == ("v", False, False)
