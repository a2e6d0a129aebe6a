"""Parts next to the network: alignment with DINO features, warm start, monitoring, the grid of images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dit_parts import small_dit
from safetensors.torch import save_file
from torch import Tensor

from keygrip.models.patch_dit.alignment import FeatureAlignment
from keygrip.models.patch_dit.context import ConditionDropout
from keygrip.models.patch_dit.figures import TITLE, image_grid
from keygrip.models.patch_dit.init_source import read_source
from keygrip.models.patch_dit.monitor import RANGES, LossTable, attention_figures, velocity_norm
from keygrip.models.patch_dit.network import Tapped
from keygrip.models.patch_dit.warm_start import rename_rules, take, warm_start
from keygrip.training.monitors import RangeChecks, gradient_norm

# ---- alignment -------------------------------------------------------------------------------------------------------


class Through(torch.nn.Module):
    """An identity projector."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture
def alignment() -> FeatureAlignment:
    made = FeatureAlignment(width=4, dino_dim=4, depth=2, block=1, hidden=8)
    made.projector = Through()  # type: ignore[assignment]
    return made


def test_alignment_is_zero_where_tokens_are_the_features(alignment: FeatureAlignment) -> None:
    patches = torch.randn(2, 6, 4)
    torch.testing.assert_close(alignment(Tapped(3 * patches, None), (2, 3), patches, (2, 3)), torch.zeros(2))
    torch.testing.assert_close(alignment(Tapped(-patches, None), (2, 3), patches, (2, 3)), torch.full((2,), 2.0))


@pytest.mark.parametrize("grid", [(2, 2), (8, 8)])
def test_alignment_compares_the_same_places(alignment: FeatureAlignment, grid: tuple[int, int]) -> None:
    """Features that differ left from right: tokens of another grid over the same image align, mirrored tokens do
    not."""

    def sides(rows: int, columns: int) -> Tensor:
        left = (torch.arange(columns) < columns // 2).float().expand(rows, -1).flatten()
        return torch.stack([left, 1 - left, torch.zeros_like(left), torch.zeros_like(left)], dim=-1)[None]

    tokens, patches = sides(*grid), sides(4, 4)
    same = alignment(Tapped(tokens, None), grid, patches, (4, 4))
    mirrored = alignment(Tapped(1 - tokens, None), grid, patches, (4, 4))
    assert same < 0.05
    assert mirrored > 0.2 + same


def test_alignment_of_routed_tokens(alignment: FeatureAlignment) -> None:
    patches = torch.randn(2, 6, 4)
    index = torch.tensor([[0, 4], [2, 5]])
    chosen = patches.gather(1, index[..., None].expand(-1, -1, 4))
    torch.testing.assert_close(alignment(Tapped(chosen, index), (2, 3), patches, (2, 3)), torch.zeros(2))


def test_alignment_weight_decays() -> None:
    made = FeatureAlignment(4, 4, 2, block=1, hidden=8, weight=0.5, decay_share=0.5)
    assert [made.weight_at(progress) for progress in (0.0, 0.25, 0.5, 0.9)] == [0.5, 0.25, 0.0, 0.0]
    assert FeatureAlignment(4, 4, 2, block=1, hidden=8, decay_share=None).weight_at(1.0) == 0.5
    with pytest.raises(ValueError, match="counts blocks"):
        FeatureAlignment(4, 4, 2, block=3)
    with pytest.raises(ValueError, match="decay_share"):
        FeatureAlignment(4, 4, 2, block=1, decay_share=0.0)


def test_alignment_of_the_samples_without_patches_alone() -> None:
    """Samples that are given the features with which they are compared have no weight."""
    has_patches = torch.tensor([True, False, True])
    every, without = (FeatureAlignment(4, 4, 2, block=1, only_without_patches=only) for only in (False, True))
    assert every.counted(has_patches).tolist() == [True, True, True]
    assert without.counted(has_patches).tolist() == [False, True, False]
    without.check(ConditionDropout(), use_dino_patches=True)
    without.check(ConditionDropout(0.0, 0.0, 0.0, 1.0, cls_alone=0.1), use_dino_patches=True)
    every.check(ConditionDropout(0.0, 0.0, 0.0, 1.0), use_dino_patches=False)
    with pytest.raises(ValueError, match=r"only_without_patches=true has no effect with .*use_dino_patches=false"):
        without.check(ConditionDropout(), use_dino_patches=False)
    with pytest.raises(ValueError, match=r"only_without_patches=true finds no sample"):
        without.check(ConditionDropout(0.0, 0.0, 0.0, 1.0), use_dino_patches=True)


# ---- warm start ------------------------------------------------------------------------------------------------------


def test_everything_that_fits_is_taken_and_the_rest_is_listed() -> None:
    source, target = small_dit(seed=1, adaln="gated"), small_dit(seed=2)
    weights = {f"module._orig_mod.{name}": value for name, value in source.state_dict().items()}
    weights["module._orig_mod.extra"] = torch.zeros(1)
    weights["model.level_embedding.mlp.0.weight"] = weights.pop("module._orig_mod.level_embedding.mlp.0.weight")
    del weights["module._orig_mod.latent_in.bias"]
    report = take(target, weights, "there")
    assert report.missing == ["latent_in.bias"]
    assert report.unexpected == ["module._orig_mod.extra"]
    assert "blocks.0.modulation.linear.weight (288x32 -> 192x32)" in report.reshaped
    assert len(report.reshaped) == 6
    own = dict(target.named_parameters())
    assert len(report.loaded) + 1 + 6 == len(own)
    torch.testing.assert_close(own["blocks.1.mlp.0.weight"], dict(source.named_parameters())["blocks.1.mlp.0.weight"])
    assert report.zeroed == ["latent_in.bias"]  # the file has its layer but no bias for it
    assert not target.latent_in.bias.any()
    lines = report.describe()
    assert len(lines) == 4
    assert "6 of another shape" in lines[3]


def test_two_sets_of_weights_in_a_file_are_refused() -> None:
    """Otherwise their order would decide which of them is loaded."""
    network = small_dit(seed=1)
    both = {f"model.{name}": value for name, value in network.state_dict().items()}
    take(small_dit(seed=2), both | {f"ema.{name}": value for name, value in network.state_dict().items()}, "there")
    both |= {f"ema.{name}": value + 1 for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"model\..* and ema\..* of the file are both .* leave one set of weights"):
        take(small_dit(seed=2), both, "there")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: (127 * value).to(torch.int8), "latent_in.weight holds numbers of int8: .* not quantised"),
        (lambda value: value.to(torch.float8_e4m3fn), "latent_in.weight holds numbers of float8_e4m3fn"),
        (lambda value: value * float("nan"), "latent_in.weight holds NaN or infinite numbers"),
    ],
)
def test_weights_that_are_no_plain_numbers_are_refused(change: Callable[[Tensor], Tensor], message: str) -> None:
    weights = dict(small_dit(seed=1).state_dict())
    weights["latent_in.weight"] = change(weights["latent_in.weight"])
    target = small_dit(seed=2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        take(target, weights, "there")
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_rules_of_renaming_are_pairs_that_rename() -> None:
    weights = {name.replace("latent_in", "entry"): v for name, v in small_dit(seed=1).state_dict().items()}
    target = small_dit(seed=2)
    report = take(target, weights, "there", rename_rules([["^entry", "latent_in"]]))
    assert report.missing == []
    assert torch.equal(target.latent_in.weight, weights["entry.weight"])
    with pytest.raises(ValueError, match=r"init_from_renames: '\^exit' changes no name"):
        take(small_dit(), weights, "there", rename_rules({"^entry": "latent_in", "^exit": "latent_out"}))
    for none in (["ab"], [["a"]], [["a", 1]]):
        with pytest.raises(ValueError, match="give pairs"):
            rename_rules(none)  # type: ignore[arg-type]
    for name in (r"\2", r"\g<stem>", "\\", r"\q"):
        with pytest.raises(ValueError, match=r"init_from_renames: in \['\^\(a\)', .*\] the name cannot be put"):
            rename_rules([["^(a)", name]])
    with pytest.raises(ValueError, match=r"init_from_renames: '\(a' is no regular expression"):
        rename_rules([["(a", "b"]])
    assert rename_rules([["^(a)", r"\1\g<0>"]]) == {"^(a)": r"\1\g<0>"}


def test_nothing_that_fits_is_an_error(tmp_path: Path) -> None:
    torch.save({"other.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="none of its 1 tensors fits"):
        warm_start(small_dit(), read_source(tmp_path / "other.pt"))
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_source(tmp_path / "broken.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"broken\.safetensors is not a safetensors file, or is cut off"):
        read_source(tmp_path / "broken.safetensors")
    with pytest.raises(FileNotFoundError):
        read_source(tmp_path / "nowhere.pt")


def test_of_several_sets_of_weights_the_ema_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training scripts of DiT and SiT save both and sample with the EMA."""
    caplog.set_level("INFO")
    first, second = {"a.weight": torch.zeros(3)}, {"a.weight": torch.ones(3)}
    torch.save({"model": first, "ema": second, "opt": {"step": 3}}, tmp_path / "both.pt")
    assert torch.equal(read_source(tmp_path / "both.pt").weights["a.weight"], torch.ones(3))
    assert "its weights are those under 'ema'" in caplog.text
    others = {"initted": torch.tensor(True), "ema_model.a.weight": torch.ones(3)}  # from a class that stores an EMA
    for number, ema in enumerate(({"decay": 0.9}, others)):
        torch.save({"model": first, "ema": ema}, tmp_path / f"{number}.pt")
        assert torch.equal(read_source(tmp_path / f"{number}.pt").weights["a.weight"], torch.zeros(3))


def test_kinds_of_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = small_dit(seed=1)
    weights = {name: value.clone() for name, value in source.state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    torch.save({"model": weights}, tmp_path / "weights.pt")
    for name in ("weights.safetensors", "weights.pt"):
        target = small_dit(seed=2)
        with caplog.at_level(logging.INFO):
            report = warm_start(target, read_source(tmp_path / name))
        assert not report.missing
        assert not report.reshaped
        for key, value in target.state_dict().items():
            assert torch.equal(value, weights[key])
    assert f"{len(weights)} parameters taken over" in caplog.text


# ---- monitoring ------------------------------------------------------------------------------------------------------


def test_losses_by_level_and_category() -> None:
    table = LossTable(bins=2)
    table.add(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 1.0]), torch.tensor([0, 3]))
    table.add(torch.tensor([5.0]), torch.tensor([0.4]), torch.tensor([3]))
    assert table.report() == pytest.approx(
        {
            "loss_timestep_0.0_0.5": 3.0,
            "loss_timestep_0.5_1.0": 3.0,
            "loss_none": 1.0,
            "loss_both": 4.0,
            "share_none": 1 / 3,
            "share_text": 0.0,
            "share_dino": 0.0,
            "share_both": 2 / 3,
        }
    )
    assert table.report() == {}


def test_norms_and_attention_figures() -> None:
    assert velocity_norm(torch.full((2, 3, 2, 2), -2.0)) == pytest.approx(2.0)
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))]
    assert gradient_norm(parameters) == 0
    parameters[0].grad = torch.tensor([3.0, 4.0])
    assert gradient_norm(parameters) == pytest.approx(5.0)
    shares = torch.tensor([[[0.5, 0.1, 0.4]], [[0.3, 0.1, 0.6]]])
    figures = attention_figures(shares)
    assert figures["attention_text"] == pytest.approx(0.4)
    assert figures["attention_patches_block_01"] == pytest.approx(0.6)
    shares[..., 2] = 0
    assert "attention_patches" not in attention_figures(shares)


def test_unhealthy_figures_are_said() -> None:
    health = RangeChecks(RANGES)
    fine = {"velocity_norm": 1.4, "grad_norm": 0.3, "patch_gradient": 1e-3, "attention_text": 0.2}
    assert health.check(fine | {"attention_patches": 0.5, "shuffled_over_both": 1.2}, 1) == []
    ill = {"velocity_norm": 9.0, "grad_norm": 7.0, "patch_gradient": 0.0, "attention_text": 0.0}
    lines = health.check(ill | {"attention_patches": 0.0, "shuffled_over_both": 0.99}, 2)
    assert len(lines) == len(RANGES) == 6
    assert any("their places are not used" in line for line in lines)


# ---- images --------------------------------------------------------------------------------------------------------


def test_grid_of_images() -> None:
    red = torch.zeros(3, 3, 48, 64)
    red[:, 0] = 1.0
    grid = image_grid([("red", red), ("black", torch.zeros(2, 3, 48, 64))])
    assert grid.dtype == np.uint8
    assert grid.shape == (2 * (TITLE + 96 + 2), 3 * (128 + 2), 3)
    assert (grid[TITLE + 50, 60] == [255, 0, 0]).all()
    assert (grid[-50, 60] == 0).all()
    assert (grid[-50, -60] == 255).all()  # no image there: white
