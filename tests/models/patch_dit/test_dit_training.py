"""From shards to images with the command: train, logged values, resume in mid-epoch, warm start, checkpoints."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dit_parts import SMALL, write_images
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from keygrip import train
from keygrip.config import compose
from keygrip.data.batches import ImageTextBatch
from keygrip.data.image_text.datamodule import ImageShards
from keygrip.models.nn.flow_matching import noise_levels, shifted
from keygrip.models.patch_dit.context import ConditionDropout, Conditions
from keygrip.models.patch_dit.guide import EarlyGuide
from keygrip.models.patch_dit.module import PatchDiTModule
from keygrip.models.patch_dit.monitor import LossTable
from keygrip.models.patch_dit.network import DiTOutput, Tapped
from keygrip.training.checkpoints import build_module, load_module, read_checkpoint
from keygrip.training.results import read_result


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import keygrip.train  # noqa: F401  (registers the schema)

    return write_images(tmp_path_factory.mktemp("images"))


FLUX = "{_target_: keygrip.models.patch_dit.autoencoders.FluxAutoencoder, source: /no_flux, channels: 48, stride: 4}"
WITH_FLUX = [*(option for option in SMALL if option != "encoders.autoencoder.edge=4"), "~encoders.autoencoder"]
WITH_FLUX += [f"+encoders.autoencoder={FLUX}"]


@pytest.fixture
def flux_shards(shards: Path, tmp_path: Path) -> Path:
    """Return shards that name FLUX's autoencoder, with latents of an equal-sized packing."""
    root = tmp_path / "flux_shards"
    shutil.copytree(shards, root)
    info = json.loads((root / "images.json").read_text())
    info["encoders"]["description"]["autoencoder"] = {"kind": "AutoencoderKL"}
    (root / "images.json").write_text(json.dumps(info))
    return root


@pytest.fixture
def overrides(shards: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def make(name: str, *more: str) -> list[str]:
        return [*SMALL, f"data.root={shards}", f"run_dir={tmp_path / name}", *more]

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    content = read_checkpoint(folder)
    averaged = {f"ema.{name}": value for name, value in content["ema"]["parameters"].items()}
    return {**content["state_dict"], **averaged}


EVERYTHING = [
    "model.alignment={_target_: keygrip.models.patch_dit.alignment.FeatureAlignment, _partial_: true, block: 2,"
    " hidden: 16, decay_share: null}",
    "model.network.routing={_target_: keygrip.models.patch_dit.routing.TokenRouting, share: 0.5, start: 1, stop: -1}",
    "optimizer=muon",
    "optimizer.schedule=constant",
]
GUIDED = ["ablation=patch_dit/early_guide", "model.guide.at_step=3", "callbacks.ema.decay=0.9"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="plain", marks=pytest.mark.slow),
        pytest.param(EVERYTHING, id="alignment, routing and Muon"),
        pytest.param(GUIDED, id="a guide, taken at the step of the interruption", marks=pytest.mark.slow),
    ],
)
def test_a_run_resumed_in_mid_epoch_ends_with_the_weights_of_an_uninterrupted_one(
    options: list[str], overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 6: data position, noise, timesteps and dropped conditions all depend on the step alone."""
    monkeypatch.setattr(EarlyGuide, "check", lambda *_: None)  # a first part of 3 steps replaces an interruption
    options = [*options, "val_every_n_steps=2", "model.monitor_every_n_steps=2"]
    train.run(compose("train", overrides("whole", "max_steps=5", *options)))
    train.run(compose("train", overrides("parts", "max_steps=3", *options)))
    assert read_checkpoint(tmp_path / "parts")["global_step"] == 3
    train.run(compose("train", overrides("parts", "max_steps=5", *options, "resume=true")))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_the_guide_is_the_ema_of_its_step_and_drawn_with(
    overrides: Callable[..., list[str]], tmp_path: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The guide is stored, it is neither trained nor averaged, and guidance moves samples away from it."""
    train.run(compose("train", overrides("early", "max_steps=2", "callbacks.ema.decay=0.9")))
    guided = [*GUIDED, "model.guide.at_step=2", "val_every_n_steps=1", "model.log_images_every_n_steps=1"]
    train.run(compose("train", overrides("run", "max_steps=4", *guided)))
    early, content = read_checkpoint(tmp_path / "early")["ema"]["parameters"], read_checkpoint(tmp_path / "run")
    stored = {name: v for name, v in content["state_dict"].items() if name.startswith("guide.network.")}
    ours = {name: value for name, value in early.items() if name.startswith("network.")}
    assert {f"guide.{name}" for name in ours} == stored.keys()
    for name, value in ours.items():
        assert torch.equal(stored[f"guide.{name}"], value), name
    assert not any(name.startswith("guide.") for name in content["ema"]["parameters"])
    module = load_module(tmp_path / "run", expected=PatchDiTModule)
    assert isinstance(module, PatchDiTModule)
    data = ImageShards(batch_size=2, root=str(shards), num_workers=0)
    data.setup("fit")
    batch = next(iter(data.held_out("val")))
    conditions = module.statistics.conditions(batch)
    size = (batch.latents.shape[2], batch.latents.shape[3])
    usual = module.draw(conditions, size, [0, 1], module.sampling_with({"guide_scale": 0.0}))
    assert (module.draw(conditions, size, [0, 1]) - usual).abs().max() > 1e-5
    assert module.guide is not None
    module.guide.taken.fill_(False)  # as in a run that was stopped before that step
    with pytest.raises(ValueError, match="its step has not come"):
        module.draw(conditions, size, [0, 1])
    caplog.set_level("WARNING")
    assert torch.equal(module.draw(conditions, size, [0, 1], module.sampling_with({"guide_scale": None})), usual)
    assert "this model has no guide yet, and its own guide_scale=0.4 is left out" in caplog.text
    with pytest.raises(ValueError, match="this model has no guide"):
        module.sampling_with({"guide_scale": 0.4})
    plain = load_module(tmp_path / "early", expected=PatchDiTModule)
    assert isinstance(plain, PatchDiTModule)
    with pytest.raises(ValueError, match="this model has no guide"):
        plain.sampling_with({"guide_scale": 1.0})


@pytest.mark.slow
def test_a_guide_is_the_same_under_fsdp(
    command: Callable[..., Any], overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    """FSDP processes, which hold half of the weights each, take the same guide as DDP processes, which hold all of
    them, and sample with it in validation. Compared with two DDP processes, because noise depends on the number of
    processes."""
    guided = [*GUIDED, "max_steps=5", "val_every_n_steps=4", "model.log_images_every_n_steps=1"]
    two_processes = ("strategy.accelerator=cpu", "strategy.devices=2", "strategy.precision=32-true")
    for kind in ("ddp", "fsdp"):
        done = command("keygrip.train", *overrides(kind, *guided), f"strategy={kind}", *two_processes)
        assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "ddp"), weights(tmp_path / "fsdp")
    assert one.keys() == two.keys()
    assert any(name.startswith("guide.network.") for name in one)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5, msg=name)


def test_guides_that_cannot_be_are_refused(overrides: Callable[..., list[str]]) -> None:
    with pytest.raises(ValueError, match=r"at_step=3 is not reached in max_steps=3"):
        train.run(compose("train", overrides("short", "max_steps=3", *GUIDED)))
    with pytest.raises(ValueError, match=r"at_step=3 is not reached in max_steps=3"):
        train.run(compose("train", overrides("dry", "max_steps=3", "dry_run=true", *GUIDED)))
    with pytest.raises(InstantiationException, match=r"guide_scale=1\.0 has no effect without model\.guide"):
        train.run(compose("train", overrides("none", "max_steps=3", "model.sampling.guide_scale=1.0")))
    with pytest.raises(InstantiationException, match=r"at_step=0: must be at least 1"):
        train.run(compose("train", overrides("zero", "max_steps=3", *GUIDED, "model.guide.at_step=0")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["model.network.use_dino_patches=false", "model.dropout.cls_alone=0.5"],
            "dropout.cls_alone .*without patches",
        ),
        (["model.network.use_dino_patches=false", "model.dropout.patches_alone=1"], "patches_alone .*without patches"),
        (
            ["experiment=dit_few_steps", "model.init_from=run", "model.dropout.cls_alone=0.5"],
            "cls_alone has no effect with model.few_steps",
        ),
        (
            ["model.network.use_dino_patches=false", "model.sampling.cls_scale=2"],
            r"model\.sampling\.cls_scale=2(\.0)? has no effect without patches",
        ),
        (
            [
                *("experiment=dit_few_steps", "model.init_from=run"),
                *("model.network.use_dino_patches=false", "model.few_steps.teacher.cls_scale=2"),
            ],
            r"model\.few_steps\.teacher\.cls_scale=2(\.0)? has no effect without patches",
        ),
    ],
)
def test_dropout_and_scales_without_effect_are_refused(options: list[str], message: str) -> None:
    experiment = [] if options[0].startswith("experiment") else ["experiment=dit_robot_images"]
    with pytest.raises(InstantiationException, match=message):
        build_module(OmegaConf.to_container(compose("train", [*experiment, *options]), resolve=True))  # type: ignore[arg-type]


class Recorded:
    """Stand-in for a logger and its TensorBoard writer."""

    def __init__(self) -> None:
        self.experiment = self
        self.figures: dict[str, float] = {}
        self.images: dict[str, np.ndarray] = {}
        self.texts: dict[str, str] = {}

    def log_metrics(self, figures: dict[str, float], step: int) -> None:
        self.figures |= figures

    def add_image(self, name: str, picture: np.ndarray, step: int, dataformats: str) -> None:
        self.images[f"{name}@{step}"] = picture

    def add_text(self, name: str, text: str, step: int) -> None:
        self.texts[name] = text


def test_what_a_run_logs_and_shows(overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, Any] = {}
    log = PatchDiTModule.log

    def noted(self: PatchDiTModule, name: str, value: Any, *arguments: Any, **options: Any) -> None:
        logged[name] = float(value)
        log(self, name, value, *arguments, **options)

    recorded = Recorded()
    monkeypatch.setattr(PatchDiTModule, "log", noted)
    monkeypatch.setattr(PatchDiTModule, "logger", recorded)
    monkeypatch.setattr(PatchDiTModule, "loggers", [recorded])
    options = [
        "max_steps=6",
        "val_every_n_steps=3",
        "model.monitor_every_n_steps=2",
        "model.log_images_every_n_steps=3",
    ]
    options.append("callbacks.learning_rate=null")
    result = train.run(compose("train", overrides("run", *options)))
    assert {"train/loss", "val/loss", "val/loss_text", "val/loss_dino", "val/loss_none"} <= result.keys()
    assert "val/shuffled_over_both" in result
    assert sum(logged[f"train/share_{name}"] for name in ("none", "text", "dino", "both")) == pytest.approx(1)
    assert any(name.startswith("train/loss_timestep_") for name in logged)
    for name in ("velocity_norm", "grad_norm", "patch_gradient", "attention_text", "attention_patches_block_02"):
        assert np.isfinite(recorded.figures[f"health/{name}"]), name
    assert recorded.figures["health/grad_norm"] > 0
    shares = [recorded.figures[f"health/attention_{group}_block_01"] for group in ("text", "cls", "patches")]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert set(recorded.images) == {"val/samples@3", "val/samples@6"}
    assert recorded.images["val/samples@3"].dtype == np.uint8
    assert "thing" in recorded.texts["val/captions"]
    assert not np.array_equal(recorded.images["val/samples@3"], recorded.images["val/samples@6"])


def recorded_run(monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> Recorded:
    """Run a training that draws samples, with a logger that records them."""
    recorded = Recorded()
    monkeypatch.setattr(PatchDiTModule, "logger", recorded)
    monkeypatch.setattr(PatchDiTModule, "loggers", [recorded])
    options = ["model.log_images_every_n_steps=2", "val_every_n_steps=2", "callbacks.learning_rate=null"]
    train.run(compose("train", [*overrides, *options]))
    return recorded


@pytest.mark.slow
def test_samples_of_batches_of_one_image_fill_a_row(
    overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row of swapped features needs two images; captions of different lengths are padded."""
    options = ["data.batch_size=1", "max_steps=2", "limit_val_batches=8", "model.shown=3", "data.trim_text=true"]
    recorded = recorded_run(monkeypatch, overrides("run", *options))
    one, more = "val/samples@2", recorded.images["val/samples@2"]
    assert recorded.texts["val/captions"].count("thing") == 3
    alone = recorded_run(monkeypatch, overrides("alone", *options, "limit_val_batches=1")).images[one]
    assert more.shape[1] > 2 * alone.shape[1]
    assert more.shape[0] * 4 == alone.shape[0] * 5  # one row more


def test_one_image_is_shown_with_as_many_draws_as_several(
    overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of FSDP may show different numbers of images, and wait for each other in every draw."""
    drawn: list[int] = []
    draw = PatchDiTModule.draw

    def noted(self: PatchDiTModule, conditions: Conditions, size: Any, seeds: Any, *more: Any) -> torch.Tensor:
        drawn.append(len(seeds))
        return draw(self, conditions, size, seeds, *more)

    monkeypatch.setattr(PatchDiTModule, "draw", noted)
    for count in (1, 2):
        recorded_run(monkeypatch, overrides(f"{count}", f"data.batch_size={count}", "max_steps=2"))
    assert drawn == [1] * 4 + [2] * 4


def test_sizes_that_do_not_divide_are_refused_at_the_start(shards: Path) -> None:
    """Of training and of validation images: a size of neither has no effect."""
    config: Any = OmegaConf.to_container(compose("train", [*SMALL, "model.network.patch_size=2"]), resolve=True)
    module = build_module(config)
    assert isinstance(module, PatchDiTModule)
    data = ImageShards(batch_size=2, root=str(shards), num_workers=0)
    data.setup("fit")
    module.set_statistics(data.statistics)
    for place in ("latent_sizes", "val_latent_sizes"):
        with pytest.raises(ValueError, match="Latents of 5 x 4 do not divide"):
            module.set_statistics(replace(data.statistics, **{place: [(4, 4), (5, 4)]}))


def test_joined_batches_are_one(shards: Path) -> None:
    from hydra.utils import instantiate

    data = instantiate(compose("train", [*SMALL, f"data.root={shards}"]).data)
    data.setup("fit")
    batches = {size: list(data.held_out("val", batch_size=size)) for size in (1, 4)}
    whole = batches[4][0]
    parts = {part.keys[0]: part for part in batches[1]}
    joined = ImageTextBatch.joined([parts[key] for key in whole.keys])
    for name, value in vars(whole).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(joined, name), value), name
        else:
            assert getattr(joined, name) == value, name
    cut = replace(parts[whole.keys[0]], text_states=whole.text_states[:1, :4], text_mask=whole.text_mask[:1, :4])
    padded = ImageTextBatch.joined([cut, parts[whole.keys[1]]])
    assert padded.text_states.shape == whole.text_states[:2].shape
    assert not padded.text_mask[0, 4:].any()


def test_without_the_autoencoder_training_goes_on_without_samples(
    flux_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """FLUX's autoencoder is not on the training machine; the shards contain its latents."""
    given = [f"data.root={flux_shards}", f"run_dir={tmp_path / 'run'}", "max_steps=4"]
    with caplog.at_level(logging.WARNING):
        recorded = recorded_run(monkeypatch, [*WITH_FLUX, *given])
    assert not recorded.images
    assert caplog.text.count("no samples are drawn in training") == 1
    assert "no_flux" in caplog.text
    assert read_checkpoint(tmp_path / "run")["global_step"] == 4


def test_sparse_figures_reach_the_event_files(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    """A value that is computed every n steps is written at exactly these steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["logger=tensorboard", "log_every_n_steps=3", "model.monitor_every_n_steps=2", "max_steps=6"]
    train.run(compose("train", overrides("run", *options)))
    (events,) = (tmp_path / "run").rglob("events*")
    written = EventAccumulator(str(events)).Reload()
    assert [event.step for event in written.Scalars("train/share_both")] == [2, 5]
    assert [event.step for event in written.Scalars("health/grad_norm")] == [1, 3, 5]


def test_monitors_see_every_batch_of_accumulated_steps_once(
    overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The four images of a step come in four batches: shares and losses cover all of them, norms are computed once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    counted: list[int] = []
    looked: list[str] = []
    report, told = LossTable.report, PatchDiTModule._report

    def counting(self: LossTable) -> dict[str, float]:
        assert self._sums is not None
        counted.append(int(self._sums[1, self.bins :].sum()))
        return report(self)

    def looking(self: PatchDiTModule, figures: dict[str, torch.Tensor]) -> None:
        looked.append(next(iter(figures)))
        told(self, figures)

    monkeypatch.setattr(LossTable, "report", counting)
    monkeypatch.setattr(PatchDiTModule, "_report", looking)
    options = ["data.batch_size=1", "accumulate_grad_batches=4", "max_steps=4", "model.monitor_every_n_steps=2"]
    train.run(compose("train", overrides("run", *options, "log_every_n_steps=2", "logger=tensorboard")))
    assert counted == [8, 8]
    assert looked == ["velocity_norm", "attention_text", "grad_norm"] * 2
    (events,) = (tmp_path / "run").rglob("events*")
    written = EventAccumulator(str(events)).Reload()
    assert [event.step for event in written.Scalars("train/share_both")] == [1, 3]


def test_the_checkpoint_draws_alone_and_refuses_other_encoders(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    train.run(compose("train", overrides("run", "max_steps=2")))
    module = load_module(tmp_path / "run")
    assert isinstance(module, PatchDiTModule)
    assert module.statistics.latent_sizes
    encoders = module.ready_encoders()
    states, mask = encoders.encode_text(["a red thing"])
    from keygrip.models.patch_dit.context import Conditions

    pictures = module.draw(Conditions(states, mask, None, None, (3, 3)), (4, 4), seeds=[3])
    assert pictures.shape == (1, 3, 16, 16)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    other = load_module(tmp_path / "run")
    assert isinstance(other, PatchDiTModule)
    other.encoders.dino_view = "colour"
    with pytest.raises(ValueError, match="fingerprint"):
        other.ready_encoders()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("encoders.dino_view=colour", r'encoders\.dino_view is "grey" there and "colour" here'),
        ("encoders.view.size=64", "encoders.view.size is 48 there and 64 here"),
        ("encoders.view.shape=aspect", r'encoders\.view\.shape is "square" there and "aspect" here'),
        ("encoders.text.length=7", "encoders.text.length is 6 there and 7 here"),
        ("T5", r'encoders\.text is "random word vectors" there and "T5" here'),
    ],
)
def test_shards_of_large_encoders_with_other_options_are_refused_before_training(
    option: str, said: str, flux_shards: Path
) -> None:
    """Training does not load FLUX's autoencoder or T5: of these, the options are compared with those of the shards."""

    def built(options: list[str]) -> PatchDiTModule:
        module = build_module(OmegaConf.to_container(compose("train", options), resolve=True))  # type: ignore[arg-type]
        assert isinstance(module, PatchDiTModule)
        return module

    data = ImageShards(batch_size=2, root=str(flux_shards), num_workers=0)
    data.setup("fit")
    statistics = data.statistics
    module = built(WITH_FLUX)
    assert module.encoders.quick_fingerprint is None
    module.set_statistics(statistics)
    if option == "T5":
        t5 = "{_target_: keygrip.models.patch_dit.text_encoders.T5Text, source: /no_t5, length: 6, width: 8}"
        rest = [each for each in WITH_FLUX if not each.startswith("encoders.text.")]
        other = built([*rest, "~encoders.text", f"+encoders.text={t5}"])
    else:
        other = built([*WITH_FLUX, option])
    with pytest.raises(ValueError, match=rf"made with other encoders than these \({said}\): choose the encoders="):
        other.set_statistics(statistics)
    other.set_statistics(replace(statistics, encoders="unknown"))
    other.set_statistics(replace(statistics, encoder_settings={}))


def test_statistics_normalise_and_restore(overrides: Callable[..., list[str]], tmp_path: Path, shards: Path) -> None:
    from hydra.utils import instantiate

    train.run(compose("train", overrides("run", "max_steps=1")))
    module = load_module(tmp_path / "run")
    assert isinstance(module, PatchDiTModule)
    data = instantiate(compose("train", overrides("x")).data)
    data.setup("fit")
    batches = list(data.val_dataloader())
    latents = torch.cat([batch.latents.flatten(2).mT.flatten(0, 1) for batch in batches])
    normalised = torch.cat(
        [module.statistics.normalised("latent", b.latents).flatten(2).mT.flatten(0, 1) for b in batches]
    )
    assert normalised.std() == pytest.approx(1, abs=0.1)
    assert latents.std() != pytest.approx(1, abs=0.2)
    first = batches[0].latents
    torch.testing.assert_close(module.statistics.restored(module.statistics.normalised("latent", first)), first)
    conditions = module.statistics.conditions(batches[0])
    assert conditions.patches is not None
    assert conditions.patches.std() == pytest.approx(1, abs=0.2)


def test_without_statistics_nothing_is_drawn() -> None:
    from keygrip.models.patch_dit.feature_statistics import FeatureStatistics

    with pytest.raises(ValueError, match="no statistics of its training images"):
        FeatureStatistics(3, 4).restored(torch.zeros(1, 3, 2, 2))


def test_warm_start_from_the_baseline(
    overrides: Callable[..., list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A CLS-only checkpoint fills all layers that it contains; patch projection and null patches are reported as
    new."""
    train.run(compose("train", overrides("cls", "max_steps=2", "model.network.use_dino_patches=false")))
    frozen = ["max_steps=1", "optimizer.warmup_steps=0", "optimizer.lr=1e-12"]
    with caplog.at_level(logging.INFO):
        train.run(compose("train", overrides("warm", *frozen, f"model.init_from={tmp_path / 'cls'}")))
    assert "3 new, initialised afresh" in caplog.text
    assert "from there at optimizer.lr=1e-12; half the rate of random weights is a first choice" in caplog.text
    assert "with model.network.patch_attention=separate it is the same at step 0" in caplog.text
    assert "context_builder.null_dino_patches" in caplog.text
    average = read_checkpoint(tmp_path / "cls")["ema"]["parameters"]
    now = read_checkpoint(tmp_path / "warm")["state_dict"]
    for name, value in average.items():
        torch.testing.assert_close(now[name], value, atol=1e-6, rtol=0, msg=name)
    assert now["network.context_builder.null_dino_patches"].abs().max() < 1e-9


def test_noise_levels_are_shifted_by_the_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and sampling, 16 tokens have a shift of two towards noise if 4 tokens are unshifted."""
    config = OmegaConf.to_container(
        compose("train", [*SMALL, "model.shift_tokens=4", "model.sampling.timestep_shift=1"]), resolve=True
    )
    module = build_module(config)  # type: ignore[arg-type]
    assert isinstance(module, PatchDiTModule)
    assert module.sampling_at((2, 2)).timestep_shift == 1
    assert module.sampling_at((4, 4)).timestep_shift == 2
    assert module.sampling_at((4, 4), replace(module.sampling, timestep_shift=3.0)).timestep_shift == 6
    twice = [shifted(torch.tensor(level), 3.0) for level in noise_levels(4, 2.0)]
    torch.testing.assert_close(torch.stack(twice), torch.tensor(noise_levels(4, 6.0)))

    module.statistics.known.fill_(True)
    module._trainer = SimpleNamespace(global_step=0, log_every_n_steps=10**9)  # type: ignore[assignment]
    module.monitor_every_n_steps = 0
    levels: list[torch.Tensor] = []
    plain = module.noised

    def noised(data: torch.Tensor, noise: torch.Tensor, level: torch.Tensor, context: Any) -> Any:
        levels.append(level)
        return plain(data, noise, level, context)

    monkeypatch.setattr(module, "noised", noised)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "timesteps", lambda count, device: torch.full((count,), 0.5))
    features = (torch.rand(2, 6, 8), torch.ones(2, 6, dtype=torch.bool), torch.rand(2, 16), torch.rand(2, 9, 16))
    for edge, level in ((2, 0.5), (4, 2 / 3)):
        batch = ImageTextBatch(torch.rand(2, 48, edge, edge), *features, (3, 3), [""] * 2, ["a", "b"], [{}, {}])
        module.training_step(batch, 0)
        torch.testing.assert_close(levels.pop(), torch.full((2,), level))
    with pytest.raises(InstantiationException, match=r"model\.shift_tokens counts latent tokens"):
        build_module(OmegaConf.to_container(compose("train", [*SMALL, "model.shift_tokens=0"]), resolve=True))  # type: ignore[arg-type]


def aligned_module(only: bool) -> PatchDiTModule:
    """Return a module whose alignment has the weight 0.5; 40 % of its training samples have no patches."""
    given = ["ablation=patch_dit/repa", f"model.alignment.only_without_patches={str(only).lower()}"]
    module = build_module(OmegaConf.to_container(compose("train", [*SMALL, *given]), resolve=True))  # type: ignore[arg-type]
    assert isinstance(module, PatchDiTModule)
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=0, estimated_stepping_batches=10, lr_scheduler_configs=[]
    )
    return module


def alignment_loss(
    module: PatchDiTModule, split: str, losses: torch.Tensor, has_patches: torch.Tensor, patch: pytest.MonkeyPatch
) -> torch.Tensor:
    count = len(losses)
    patch.setattr(module.alignment, "forward", lambda *_: losses)
    tapped = DiTOutput(torch.zeros(count, 48, 4, 4), Tapped(torch.zeros(count, 16, 32), None))
    conditions = Conditions(None, None, torch.zeros(count, 16), torch.zeros(count, 9, 16), (3, 3))
    return module._alignment_loss(split, tapped, torch.zeros(count, 48, 4, 4), conditions, has_patches)


@pytest.mark.parametrize("only", [False, True])
def test_the_alignment_loss_is_of_the_samples_that_are_asked_for(only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `only_without_patches`, the loss ignores samples with patches; it is 0 if there are no others. What is
    logged is the mean over the samples that count, of all batches."""
    module, losses, logged = aligned_module(only), torch.tensor([3.0, 1.0, 5.0]), []
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.append((name, float(value))))
    for has_patches, total in (((True, False, True), 1.0), ((False, False, True), 4.0), ((True, True, True), 0.0)):
        found = alignment_loss(module, "train", losses, torch.tensor(has_patches), monkeypatch)
        torch.testing.assert_close(found, torch.tensor(0.5 * (total / (0.4 * 3) if only else 3.0)))
    assert logged == []
    of_flow = torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([3])
    module.losses.add(*of_flow)
    assert module.losses.report()["alignment"] == pytest.approx((1 + 4) / 3 if only else 3.0)
    module.losses.add(*of_flow)
    alignment_loss(module, "train", losses, torch.tensor((True, True, True)), monkeypatch)
    assert ("alignment" in module.losses.report()) is not only
    alignment_loss(module, "val", losses, torch.tensor((False, True, False)), monkeypatch)
    assert logged == [("val/alignment", 4.0 if only else 3.0)]


def test_the_alignment_loss_does_not_depend_on_the_batches_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 samples of a step weigh the same as one batch and as 32 accumulated batches, most of which have no sample
    without patches; on average they weigh as the mean over those samples."""
    module = aligned_module(only=True)
    assert module.alignment is not None
    losses, category = torch.rand(32), module.dropout.draw(32)
    has_patches = module.dropout.kept(category)[2]
    whole = alignment_loss(module, "train", losses, has_patches, monkeypatch)
    single = [
        alignment_loss(module, "train", losses[i : i + 1], has_patches[i : i + 1], monkeypatch) for i in range(32)
    ]
    torch.testing.assert_close(whole, torch.stack(single).mean())
    cls_alone = ConditionDropout(cls_alone=0.5, patches_alone=0.2)
    for dropout, share in ((ConditionDropout(), 0.4), (cls_alone, 0.7), (ConditionDropout(0, 0, 0.2, 0.8), 0.0)):
        assert module.alignment.counted_share(dropout) == pytest.approx(share)
        without = ~dropout.kept(dropout.draw(20000))[2]
        assert float(without.float().mean()) == pytest.approx(share, abs=0.02)


def test_the_logged_alignment_is_of_the_samples_that_count(
    overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With batches of one image, no step is logged as 0 because its last image has patches."""
    added: list[tuple[float, int]] = []
    add = LossTable.add_alignment

    def noted(self: LossTable, loss: torch.Tensor, counted: torch.Tensor) -> None:
        added.append((float((loss * counted).sum()), int(counted.sum())))
        add(self, loss, counted)

    monkeypatch.setattr(LossTable, "add_alignment", noted)
    options = ["ablation=patch_dit/repa_without_patches", "data.batch_size=1", "accumulate_grad_batches=4"]
    options += ["max_steps=2", "log_every_n_steps=2", "model.dropout={none: 0, text: 0.5, dino: 0, both: 0.5}"]
    train.run(compose("train", overrides("run", *options)))
    totals, counts = (sum(column) for column in zip(*added, strict=True))
    assert 0 < counts < len(added) == 8
    assert read_result(tmp_path / "run")["metrics"]["train/alignment"] == pytest.approx(totals / counts)


def test_masks_of_patches_reach_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OmegaConf.to_container(compose("train", [*SMALL, "ablation=patch_dit/masked_patches"]), resolve=True)
    module = build_module(config)  # type: ignore[arg-type]
    assert isinstance(module, PatchDiTModule)
    assert module.dropout.masked_patches == 0.3
    seen: list[torch.Tensor | None] = []
    builder = module.network.context_builder.forward

    def built(conditions: Any, *rest: Any) -> Any:
        seen.append(conditions.patch_mask)
        return builder(conditions, *rest)

    monkeypatch.setattr(module.network.context_builder, "forward", built)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    module.statistics.known.fill_(True)
    module._trainer = SimpleNamespace(global_step=0, log_every_n_steps=10**9)  # type: ignore[assignment]
    module.monitor_every_n_steps = 0
    features = (torch.rand(64, 6, 8), torch.ones(64, 6, dtype=torch.bool), torch.rand(64, 16), torch.rand(64, 9, 16))
    batch = ImageTextBatch(torch.rand(64, 48, 2, 2), *features, (3, 3), ["a"] * 64, ["a"] * 64, [{}] * 64)
    module.training_step(batch, 0)
    assert seen[0] is not None
    assert 5 < int((~seen[0].all(dim=1)).sum()) < 40
    with pytest.raises(InstantiationException, match="masked_patches has no effect without patches"):
        options = ["ablation=patch_dit/masked_patches", "model.network.use_dino_patches=false"]
        build_module(OmegaConf.to_container(compose("train", [*SMALL, *options]), resolve=True))  # type: ignore[arg-type]


def test_headline_recipes() -> None:
    """The learning rate is 3e-4 at the reference size, and half of that from other weights."""
    optimizer = compose("train", ["model=patch_dit_base", "data=image_shards"]).optimizer
    assert (optimizer.lr, optimizer.warmup_steps, list(optimizer.betas)) == (3e-4, 1000, [0.9, 0.99])
    for recipe in ("dit_512px", "dit_512px_8gpu"):
        rates = {
            given: compose("train", [f"experiment={recipe}", *given]).optimizer.lr
            for given in ((), ("model.init_from=RUN",), ("model.init_from=RUN", "optimizer.lr=2e-4"))
        }
        assert list(rates.values()) == [3e-4, 1.5e-4, 2e-4]
