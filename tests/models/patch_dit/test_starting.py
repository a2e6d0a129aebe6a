"""Runs that start from another run: the loaded weights keep their meaning, and a student of few steps learns from
it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from dit_parts import SMALL, small_dit, write_images
from omegaconf import OmegaConf

from keygrip import export, train
from keygrip.config import compose
from keygrip.data.image_text.datamodule import ImageShards
from keygrip.models.nn.flow_matching import noise_levels, seeded_noise
from keygrip.models.nn.lora import merged_weights
from keygrip.models.patch_dit.context import ConditionDropout, Conditions
from keygrip.models.patch_dit.feature_statistics import NORMALISED, FeatureStatistics
from keygrip.models.patch_dit.few_steps import FewSteps
from keygrip.models.patch_dit.init_source import InitSource, StatisticsOf, normalise_as, read_source
from keygrip.models.patch_dit.module import PatchDiTModule
from keygrip.models.patch_dit.network import PatchDiT
from keygrip.models.patch_dit.sampler import Sampling, sample
from keygrip.training.checkpoints import build_module, load_module, read_checkpoint
from keygrip.training.memory import held
from keygrip.training.saving import AtomicCheckpointIO

VELOCITIES = ["model.network.prediction=v", "model.network.timestep_floor=null", "model.network.rotary=false"]
SETTLED = ["optimizer.lr=1e-12", "max_steps=1"]  # weights stay at their initial values


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of shards of different images, and runs on the first set that predict images and velocities."""
    root = tmp_path_factory.mktemp("runs")
    write_images(root / "images")
    write_images(root / "other_images", train=6)
    for name, options in (("base", []), ("of_velocities", VELOCITIES)):
        given = [*SMALL, *options, f"data.root={root / 'images'}", f"run_dir={root / name}", "max_steps=2"]
        train.run(compose("train", given))
    return root


@pytest.fixture
def started(runs: Path, tmp_path: Path) -> Callable[..., PatchDiTModule]:
    def start(name: str, *options: str) -> PatchDiTModule:
        given = [*SMALL, f"data.root={runs / 'other_images'}", f"run_dir={tmp_path / name}", *SETTLED]
        train.run(compose("train", [*given, *options]))
        module = load_module(tmp_path / name)
        assert isinstance(module, PatchDiTModule)
        return module

    return start


def buffers(statistics: FeatureStatistics) -> list[torch.Tensor]:
    return [getattr(statistics, f"{kind}_{part}") for part in ("mean", "std") for kind in NORMALISED]


@pytest.mark.slow
def test_features_are_normalised_as_in_the_run_that_gives_the_weights(
    runs: Path, tmp_path: Path, started: Callable[..., PatchDiTModule], caplog: pytest.LogCaptureFixture
) -> None:
    base = load_module(runs / "base")
    assert isinstance(base, PatchDiTModule)
    fresh = started("fresh").statistics
    assert fresh.normalisation != base.statistics.normalisation
    source = f"model.init_from={runs / 'base'}"
    kept = started("kept", source).statistics
    assert kept.normalisation == base.statistics.normalisation
    assert all(torch.equal(a, b) for a, b in zip(buffers(kept), buffers(base.statistics), strict=True))
    assert kept.fingerprint == fresh.fingerprint  # fingerprint of the shards
    assert started("data", source, "model.init_from_statistics=data").statistics.normalisation == fresh.normalisation
    plain = buffers(started("plain", source, "model.init_from_statistics=identity").statistics)
    assert all(not mean.any() for mean in plain[:3])
    assert all(bool((std == 1).all()) for std in plain[3:])

    torch.save(dict(base.network.state_dict()), tmp_path / "weights.pt")
    foreign = f"model.init_from={tmp_path / 'weights.pt'}"
    assert started("foreign", foreign).statistics.normalisation == fresh.normalisation
    assert "says nothing of how features were normalised" in caplog.text
    with pytest.raises(ValueError, match=r"init_from_statistics=source: .*weights\.pt says nothing"):
        started("refused", foreign, "model.init_from_statistics=source")


def test_a_model_of_the_hub_is_read_from_its_folder_or_the_index_of_its_files(tmp_path: Path) -> None:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, norm_num_groups=2
    )
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    model.save_pretrained(whole)
    model.save_pretrained(shards, max_shard_size="100KB")
    index = shards / "diffusion_pytorch_model.safetensors.index.json"
    assert len(list(shards.glob("*.safetensors"))) > 1
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "transformer").symlink_to(shards)
    for path in (whole, shards, index, tmp_path / "pipeline"):
        found = read_source(path).weights
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    for changed, error, said in (
        (
            {"weight_map": content["weight_map"] | {first: "../whole/diffusion_pytorch_model.safetensors"}},
            ValueError,
            "is no file beside it",
        ),
        (
            {"weight_map": content["weight_map"] | {first: "gone.safetensors"}},
            FileNotFoundError,
            "gone.safetensors, which is not beside it",
        ),
        (
            {"weight_map": content["weight_map"] | {"more": content["weight_map"][first]}},
            ValueError,
            "does not hold it",
        ),
        ({"weight_map": {first: ""}}, ValueError, "is no index of weights"),
        ({"weight_map": {}}, ValueError, "is no index of weights"),
    ):
        index.write_text(json.dumps(changed))
        with pytest.raises(error, match=said):
            read_source(shards)
    index.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_source(index)


@pytest.mark.parametrize("asked", ["data", "identity"])
def test_a_teacher_keeps_the_normalisation_of_its_training(asked: StatisticsOf, tmp_path: Path) -> None:
    source = InitSource(str(tmp_path), {}, statistics={"mean": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"init_from_statistics={asked}: the teacher in .* give source"):
        normalise_as(source, FeatureStatistics(4, 8), asked, student=True)


@pytest.mark.slow
def test_an_export_is_a_start_as_its_run_is(runs: Path, tmp_path: Path) -> None:
    export.run(compose("export", [f"checkpoint={runs / 'base'}", f"to={tmp_path / 'export'}"]))
    run, exported = read_source(runs / "base"), read_source(tmp_path / "export")
    assert run.weights.keys() == exported.weights.keys()
    assert all(torch.equal(value, exported.weights[name]) for name, value in run.weights.items())
    assert run.network == exported.network
    assert torch.equal(run.statistics["cls_std"], exported.statistics["cls_std"])
    assert run.encoders == exported.encoders != ""


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("model.network.rotary=false", r"\(rotary=false\).*Give model\.network\.rotary=true"),
        ("model.network.position_cells=32", r"\(position_cells=32\).*Give model\.network\.position_cells=16"),
        ("model.network.heads=4", r"Give model\.network\.heads=2"),
        ("model.network.qk_norm=false", r"\(qk_norm=false\).*Give model\.network\.qk_norm=true"),
        ("model.network.patch_attention=separate", r"Give model\.network\.patch_attention=joint"),
        ("model.network.latent_positions=cells", r"Give model\.network\.latent_positions=frame"),
        ("model.shift_tokens=4", r"other noise levels than model\.shift_tokens=4 .*Give model\.shift_tokens=null"),
    ],
)
@pytest.mark.quick_sets(4)
def test_weights_that_would_compute_something_else_are_refused(
    option: str, named: str, runs: Path, started: Callable[..., PatchDiTModule]
) -> None:
    """Names and shapes fit; only the stored settings show the difference."""
    with pytest.raises(ValueError, match=named):
        started("other", option, f"model.init_from={runs / 'base'}")


SOURCE_LIKE = {"latent_positions": "cells", "rotary": False, "patch_positions": False}


@pytest.mark.parametrize("reads", [{"latent_positions": "frame"}, {"rotary": True}, {"patch_positions": True}])
def test_position_cells_are_compared_where_they_are_read(reads: dict[str, object]) -> None:
    """As in model=patch_dit_source, whose positions are the cells' own rows and columns, they have no effect."""
    unread = small_dit(**SOURCE_LIKE, position_cells=16)
    InitSource("other", {}, {**stored(unread), "position_cells": 8}).refuse_other_meaning(unread)
    read = small_dit(**(SOURCE_LIKE | reads), position_cells=16)
    other = InitSource("other", {}, {**stored(read), "position_cells": 8})
    with pytest.raises(ValueError, match=r"\(position_cells=16\).*Give model\.network\.position_cells=8$"):
        other.refuse_other_meaning(read)


def test_position_cells_of_patches_alone_are_not_compared_with_a_network_without_patches() -> None:
    placed = small_dit(**(SOURCE_LIKE | {"patch_positions": True}), position_cells=16)
    without = {**stored(placed), "position_cells": 8, "use_dino_patches": False}
    InitSource("other", {}, without).refuse_other_meaning(placed)
    rotary = small_dit(**(SOURCE_LIKE | {"rotary": True, "patch_positions": True}), position_cells=16)
    with pytest.raises(ValueError, match="position_cells=8"):
        InitSource("other", {}, {**without, "rotary": True}).refuse_other_meaning(rotary)


def stored(network: PatchDiT) -> dict[str, object]:
    """Return the settings of a network as a run stores them."""
    return {"use_dino_patches": network.use_dino_patches, **network.meaning}


OTHER_NETWORKS = (
    (["model.network.adaln=gated"], "reshaped: blocks"),
    (["model.network.depth=2"], "left over: blocks"),
    (["model.network.depth=4"], "missing there: blocks"),
    (["model.network.final_modulation=false"], "left over: final_modulation"),
    (["model.network.use_dino_patches=false"], "left over: context_builder"),
)


@pytest.mark.parametrize(
    ("setting", "options", "named"),
    [
        *(("few_steps", *network) for network in OTHER_NETWORKS),
        ("lora", *OTHER_NETWORKS[0]),
        *(pytest.param("lora", *network, marks=pytest.mark.slow) for network in OTHER_NETWORKS[1:]),
    ],
)
def test_a_teacher_or_a_base_is_taken_whole_or_refused(
    options: list[str], named: str, setting: str, runs: Path, started: Callable[..., PatchDiTModule]
) -> None:
    """Both are frozen: newly initialised layers would never be trained."""
    asked = {
        "few_steps": ["experiment=dit_few_steps", "callbacks.images=null", "model.sampling.steps=4"],
        "lora": ["ablation=patch_dit/lora", "model.lora.rank=2"],
    }[setting]
    with pytest.raises(
        ValueError, match=rf"model\.{setting} keeps the network of .*base, and this one is another.*{named}"
    ):
        started("other", *asked, *options, f"model.init_from={runs / 'base'}")


def test_a_file_of_others_may_hold_more_than_the_network(
    runs: Path, tmp_path: Path, started: Callable[..., PatchDiTModule], caplog: pytest.LogCaptureFixture
) -> None:
    """Fixed positions and a text encoder are left out as always; a block too many makes it another network. The log
    reports the learning rate of low-rank differences too."""
    base = load_module(runs / "base")
    assert isinstance(base, PatchDiTModule)
    weights = dict(base.network.state_dict()) | {
        "pos_embed": torch.ones(1, 4, 32),
        "text_encoder.a.weight": torch.ones(2),
    }
    asked = ["ablation=patch_dit/lora", "model.lora.rank=2"]
    torch.save(weights, tmp_path / "more.pt")
    with caplog.at_level(logging.INFO):
        module = started("taken", *asked, f"model.init_from={tmp_path / 'more.pt'}")
    assert "training goes on from there at optimizer.lr=1e-12" in caplog.text
    merged = merged_weights(module.network.state_dict(), module.lora)
    for name, value in base.network.state_dict().items():
        torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=0)
    torch.save(weights | {"blocks.3.mlp.0.bias": torch.ones(128)}, tmp_path / "deeper.pt")
    with pytest.raises(ValueError, match=r"left over: blocks\.3\.mlp\.0\.bias"):
        started("refused", *asked, f"model.init_from={tmp_path / 'deeper.pt'}")


def test_a_shift_by_resolution_that_changes_nothing_at_the_sources_size_is_free() -> None:
    """`shift_tokens=64` is accepted from 64 tokens to larger images; going back to none from shifted images is refused;
    a file that is not from a keygrip run is not checked."""
    small = InitSource("small", {}, {}, {"shift_tokens": None}, ((8, 8),))
    small.refuse_other_shift(64, patch_size=1)
    with pytest.raises(ValueError, match=r"model\.shift_tokens=16 gives"):
        small.refuse_other_shift(16, patch_size=1)
    small.refuse_other_shift(16, patch_size=2)
    large = InitSource("large", {}, {}, {"shift_tokens": 64}, ((16, 16), (12, 20)))
    large.refuse_other_shift(64, patch_size=1)
    with pytest.raises(ValueError, match=r"shift_tokens=null gives .*Give model\.shift_tokens=64"):
        large.refuse_other_shift(None, patch_size=1)
    InitSource("weights.pt", {}).refuse_other_shift(16, patch_size=1, student=3.0)


def test_a_student_is_no_teacher() -> None:
    with pytest.raises(ValueError, match="is itself a student of few steps"):
        InitSource("few", {}, {}, {"few_steps": {}}).refuse_other_shift(None, 1, student=3.0)


def test_a_teacher_is_drawn_with_its_guide(runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its early weights are loaded with it if the student's settings request autoguidance."""
    settings = ["ablation=patch_dit/early_guide", "model.guide.at_step=2", "model.sampling.guide_scale=0.5"]
    place = [f"data.root={runs / 'images'}", f"run_dir={tmp_path / 'guided'}"]
    train.run(compose("train", [*SMALL, *settings, *place, "max_steps=4", "optimizer.lr=0.1"]))
    teacher, source = load_module(tmp_path / "guided"), read_source(tmp_path / "guided")
    assert isinstance(teacher, PatchDiTModule)
    assert teacher.guide_network is not None

    states, mask = teacher.encoders.encode_text(["a red thing", "a green thing"])
    conditions = Conditions(states, mask, torch.randn(2, 16), torch.randn(2, 9, 16), (3, 3))
    way = Sampling(2.0, 1.5, guidance="dino_then_text", guide_scale=0.5, steps=3)
    few = FewSteps(1, 3, replace(way, steps=Sampling.steps))
    few.take_teacher(teacher.network, source)
    wanted = sample(teacher.network, conditions, (4, 4), way, seeds=[1, 2], guide=teacher.guide_network)
    start = seeded_noise([1, 2], (48, 4, 4))
    torch.testing.assert_close(few.teacher_end(start, conditions, 1.0, 0.0), wanted, atol=1e-5, rtol=1e-4)
    alone = FewSteps(1, 3, replace(way, steps=Sampling.steps, guide_scale=0.0))
    alone.take_teacher(teacher.network, source)
    assert caplog.text.count("is drawn with guide_scale=0.5, and its student learns from it with guide_scale=0;") == 1
    assert float((alone.teacher_end(start, conditions, 1.0, 0.0) - wanted).abs().max()) > 1e-3
    assert alone.teacher_digest != few.teacher_digest
    with pytest.raises(ValueError, match=r"teacher\.guide_scale=0\.5: model\.init_from=.*base has no guide"):
        few.take_teacher(teacher.network, read_source(runs / "base"))


def test_normalisation_of_another_width_or_none_is_said() -> None:
    statistics = FeatureStatistics(3, 4)
    given = {f"{kind}_{part}": torch.full((5,), 2.0) for kind in NORMALISED for part in ("mean", "std")}
    given |= {"latent_mean": torch.ones(3), "latent_std": torch.ones(3)}
    assert statistics.take_normalisation(given, "there") == ["cls", "patch"]
    assert torch.equal(statistics.latent_mean, torch.ones(3))
    for broken in ({}, given | {"cls_std": torch.zeros(5)}, given | {"cls_mean": torch.tensor([float("nan")] * 5)}):
        with pytest.raises(ValueError, match="there holds no normalisation"):
            statistics.take_normalisation(broken, "there")
    assert InitSource("weights.pt", {}).statistics == {}


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ([], r"its latent_sizes are \[\]: pairs of whole numbers"),
        ([[0, 0]], "its latent_sizes are"),
        ([["4", "4"]], "its latent_sizes are"),
        ([[4.5, 4]], "its latent_sizes are"),
        ([[-4, -4]], "its latent_sizes are"),
        ([[10**6, 10**6]], "its latent_sizes are"),
        ([[4, 4, 4]], "its latent_sizes are"),
    ],
)
def test_stored_sizes_are_sizes(sizes: list[list[object]], named: str) -> None:
    statistics = FeatureStatistics(3, 4)
    plain = {"text_length": 6, "patch_grids": [[3, 3]], "fingerprint": "a", "encoders": "b"}
    with pytest.raises(ValueError, match=named):
        statistics.load_plain({**plain, "latent_sizes": sizes}, {})
    statistics.load_plain({**plain, "latent_sizes": [[4, 6]]}, {"statistics.latent_std": torch.ones(3)})
    assert statistics.latent_sizes == [(4, 6)]


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_stored_standard_deviations_are_above_0(std: float, runs: Path, tmp_path: Path) -> None:
    content = read_checkpoint(runs / "base")
    weights = content["state_dict"] | {
        "statistics.cls_std": torch.full_like(content["state_dict"]["statistics.cls_std"], std)
    }
    AtomicCheckpointIO().save_checkpoint(content | {"state_dict": weights}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"cls features have a standard deviation that is not above 0"):
        load_module(tmp_path / "last.ckpt")


def test_a_student_is_trained_validated_and_drawn(
    runs: Path, tmp_path: Path, started: Callable[..., PatchDiTModule]
) -> None:
    """With the experiment's own settings: the student starts as its teacher and is validated on its own loss; a teacher
    that predicts something else is refused."""
    options = ["experiment=dit_few_steps", "callbacks.images=null", "model.sampling.steps=4"]
    student = started("student", *options, f"model.init_from={runs / 'base'}")
    teacher = load_module(runs / "base")
    assert isinstance(teacher, PatchDiTModule)
    for name, value in teacher.network.state_dict().items():
        torch.testing.assert_close(student.network.state_dict()[name], value, atol=1e-6, rtol=0)
    assert student.statistics.normalisation == teacher.statistics.normalisation
    assert student.few_steps is not None

    student.few_steps.take_teacher(teacher.network, InitSource("teacher", {}))
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(2, 48, 4, 4, generator=generator)
    states, mask = student.encoders.encode_text(["a red thing", "a green thing"])
    conditions = Conditions(states, mask, torch.randn(2, 16), torch.randn(2, 9, 16), (3, 3))
    losses = [
        float(student.few_steps.validation_loss(student.network, data, conditions, torch.Generator().manual_seed(seed)))
        for seed in (3, 3, 4)
    ]
    assert losses[0] == losses[1] != losses[2]

    # every parameter has a gradient, whatever is dropped: processes that drop different conditions sum the same ones
    for shares in ((0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        student.network.zero_grad()
        dropout = ConditionDropout(*shares)
        student.few_steps.loss(student.network, data, conditions, dropout).backward()
        assert [name for name, value in student.network.named_parameters() if value.grad is None] == []

    # larger images than without a shift: the shift applies to windows and sampling alike
    student.shift_tokens = 4
    assert student.sampling_at((4, 4)).timestep_shift == 12
    few = student.few_steps
    assert few.levels(student.shift_of(data)) == noise_levels(4, 12.0) != few.levels() == noise_levels(4, 6.0)
    shifted = few.validation_loss(student.network, data, conditions, torch.Generator().manual_seed(3), 2.0)
    assert float(shifted) != losses[0]
    student.shift_tokens = None

    images = sample(student.network, conditions, (4, 4), student.sampling_at((4, 4)), seeds=[1, 2])
    assert images.isfinite().all()
    with pytest.raises(ValueError, match=r"drawn at timestep_shift=6\.0 .*Give model\.few_steps\.timestep_shift=6\.0"):
        started("steps", *options, "model.few_steps.timestep_shift=3", f"model.init_from={runs / 'base'}")
    beside = {"statistics": student.statistics.plain(), "teacher_digest": few.teacher_digest}
    beside |= {"view": None, "autoencoder": None}  # encoders without weights of their own
    stored = {"patch_dit": beside}  # sharded training resumes without the weights here
    student.on_load_checkpoint(stored)
    few.take_teacher(student.network, InitSource("teacher", {}))
    with pytest.raises(ValueError, match=r"model\.init_from holds other weights than the teacher"):
        student.on_load_checkpoint(stored)
    with pytest.raises(ValueError, match=r"Give model\.network\.prediction=v model\.network\.rotary=false"):
        started("wrong", *options, f"model.init_from={runs / 'of_velocities'}")


@pytest.mark.slow
def test_a_dry_run_of_a_student_counts_its_teacher(runs: Path) -> None:
    """The memory of the weights is that of student, teacher and the teacher's guide, and the step is that of the
    teacher's chord, in the window in which the teacher is guided."""
    options = ["experiment=dit_few_steps", "model.sampling.steps=4", "model.few_steps.teacher_steps=1"]
    options += ["model.init_from=RUN", "model.network.depth=1"]
    module = build_module(OmegaConf.to_container(compose("train", [*SMALL, *options]), resolve=True))  # type: ignore[arg-type]
    assert isinstance(module, PatchDiTModule)
    few, network = module.few_steps, module.network
    assert few is not None
    assert module.outside_modules() == []
    alone = held(module, ema=False)
    few.teacher = replace(few.teacher, guide_scale=0.5, interval=(0.0, 0.7))
    few.take_teacher(network, InitSource("RUN", {}, guide=network.state_dict()))
    teacher_bytes = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    both = held(module, ema=False)
    assert both == alone | {"weights": alone["weights"] + 2 * teacher_bytes, "undivided": 2 * teacher_bytes}

    data = ImageShards(batch_size=2, root=str(runs / "images"), num_workers=0)
    data.setup("fit")
    module.statistics.take(data.statistics)
    batch = next(iter(data.train_dataloader()))
    levels: list[list[float]] = []
    teacher_end = few.teacher_end

    def noted(start: torch.Tensor, kept: Conditions, high: float, low: float) -> torch.Tensor:
        levels.append([high, low])
        return teacher_end(start, kept, high, low)

    few.teacher_end = noted  # type: ignore[method-assign]
    parameters = sum(value.numel() for value in (*module.parameters(), *(2 * list(network.parameters()))))
    assert module.dry_run(batch)["parameters_m"]["all"]["all"] == round(parameters / 1e6, 3)
    memory = module.step_memory(batch, bf16=False, ema=False)
    assert levels == [few.levels()[-2:]] * 2  # the windows above are sampled without guidance
    assert (memory.weights, memory.undivided) == (both["weights"], 2 * teacher_bytes)


@pytest.mark.slow
def test_a_student_of_low_rank_differences_learns_from_a_teacher_with_a_guide(
    runs: Path, started: Callable[..., PatchDiTModule]
) -> None:
    options = ["experiment=dit_few_steps", "callbacks.images=null", "model.sampling.steps=4"]
    options += ["ablation=patch_dit/lora", "model.lora.rank=2", f"model.init_from={runs / 'base'}"]
    first, second = (started(name, *options).few_steps for name in ("first", "second"))
    assert first is not None
    assert second is not None
    assert first.teacher_digest == second.teacher_digest  # whatever the initial differences are
    student = started("guided", *options)
    base = load_module(runs / "base")
    assert isinstance(base, PatchDiTModule)
    guided = FewSteps(4, 2, Sampling(guide_scale=0.4), 6.0)
    guided.take_teacher(student.network, InitSource("teacher", {}, guide=base.network.state_dict()))
    with pytest.raises(ValueError, match="its guide is of another network than this one"):
        guided.take_teacher(student.network, InitSource("teacher", {}, guide={"a": torch.zeros(1)}))


@pytest.mark.parametrize("recipe", ["dit_few_steps", "dit_few_steps_512px", "dit_few_steps_latents_128px"])
def test_how_a_teacher_is_drawn_can_be_said_whole(recipe: str) -> None:
    """`guide_scale` is the setting that the warning for a guided teacher asks for."""
    teacher = compose(
        "train", [f"experiment={recipe}", "model.few_steps.teacher.guide_scale=0.5"]
    ).model.few_steps.teacher
    assert teacher.guide_scale == 0.5
    assert {field.name for field in fields(Sampling)} - {"steps", "timestep_shift"} <= set(teacher)
