"""A trained autoencoder: sizes, what it learns, its use as one of the encoders, and its weights in checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dit_parts import SMALL
from fake_ranks import logged_by, on_two_ranks
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from image_sets import SQUARE, drawn, small_encoders, write_images
from omegaconf import OmegaConf
from torch import Tensor

from keygrip import train
from keygrip.config import compose
from keygrip.data.image_text.datamodule import ImageShards
from keygrip.data.image_text.sources.encoding import as_tensor
from keygrip.models.patch_dit.autoencoder_module import AutoencoderModule
from keygrip.models.patch_dit.encoders import Encoders
from keygrip.models.patch_dit.module import PatchDiTModule
from keygrip.models.patch_dit.trained_autoencoder import ConvAutoencoder, TrainedAutoencoder
from keygrip.training.checkpoints import load_module, read_checkpoint
from keygrip.training.optimizers import AdamW
from keygrip.training.parts import UntrustedPartError
from keygrip.training.pretraining import PretrainingStage, with_run_folders

NETWORK = "keygrip.models.patch_dit.trained_autoencoder.ConvAutoencoder"
SIZES = {"channels": 4, "stride": 4, "width": 8}


def images(count: int = 8) -> Tensor:
    return as_tensor([drawn(number, SQUARE, 1)[0] for number in range(count)]) / 127.5 - 1


@pytest.mark.parametrize(("stride", "packing"), [(2, 1), (4, 1), (8, 1), (8, 2), (4, 2), (8, 4)])
def test_latents_are_smaller_by_the_stride_and_come_back_in_size(stride: int, packing: int) -> None:
    network = ConvAutoencoder(5, stride, 8, packing=packing)
    pixels = torch.rand(2, 3, 16, 24)
    mean, log_variance = network.posterior(pixels)
    assert mean.shape == log_variance.shape == (2, 5, 16 // stride, 24 // stride)
    assert network(pixels).shape == pixels.shape


@pytest.mark.parametrize(
    "options",
    [{"stride": 6}, {"stride": 1}, {"width": 10}, {"channels": 0}, {"packing": 4}, {"packing": 3, "stride": 8}],
)
def test_sizes_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="autoencoder's"):
        ConvAutoencoder(**options)


def test_it_learns_and_its_losses_are_what_they_are_named() -> None:
    torch.manual_seed(0)
    module = AutoencoderModule(ConvAutoencoder(**SIZES), small_encoders(), AdamW(1e-3), 2.0, 0.0)
    pixels = images()
    found = module.losses(pixels, sampled=False)
    error = module.network(pixels) - pixels
    across = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    assert float(found["pixels"].mean()) == pytest.approx(float(error.abs().mean()), rel=1e-4)
    assert float(found["differences"].mean()) == pytest.approx(float(across), rel=1e-4)
    torch.testing.assert_close(found["total"], found["pixels"] + 2 * found["differences"])
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    before = float(found["total"].mean())
    for _ in range(40):
        loss = module.losses(pixels, sampled=True)["total"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(module.losses(pixels, sampled=False)["total"].mean()) < 0.5 * before


def test_two_processes_log_the_losses_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them has three images, the other five."""
    modules = [AutoencoderModule(ConvAutoencoder(**SIZES), small_encoders(), AdamW(1e-3), 2.0, 0.1) for _ in range(3)]

    def step(module: AutoencoderModule, pixels: Tensor) -> dict[str, float]:
        module.network.load_state_dict(modules[0].network.state_dict())
        module.losses = lambda pixels, sampled: AutoencoderModule.losses(module, pixels, sampled=False)  # type: ignore[method-assign]
        module.pixels = lambda batch: batch  # type: ignore[method-assign]
        logged = logged_by(module)
        module.training_step(pixels, 0)  # type: ignore[arg-type]
        return logged

    pixels = images(8)
    whole = step(modules[2], pixels)
    assert whole.keys() == {f"train/{name}" for name in ("pixels", "differences", "kl", "loss")}
    parts = on_two_ranks(monkeypatch, lambda rank: step(modules[rank], pixels[slice(3 * rank, 3 + 5 * rank)]))
    assert parts == [pytest.approx(whole, rel=1e-4)] * 2


def test_validations_show_images_so_many_steps_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    module = AutoencoderModule(ConvAutoencoder(**SIZES), small_encoders(), AdamW(1e-3))
    shown, step = list[int](), 0
    trainer = SimpleNamespace(sanity_checking=False, is_global_zero=True)
    for name, value in {"global_step": lambda self: step, "trainer": lambda self: trainer}.items():
        monkeypatch.setattr(AutoencoderModule, name, property(value))
    monkeypatch.setattr(AutoencoderModule, "shows_images", True)
    monkeypatch.setattr(module, "pixels", lambda batch: batch)
    monkeypatch.setattr(module, "log_values", lambda *_: None)
    monkeypatch.setattr(module, "show_image", lambda *_: shown.append(step))
    for every, steps in ((1, [0, 2, 4]), (3, [0, 4]), (0, [])):
        shown.clear()
        module.log_images_every_n_steps, module._images_at = every, None
        for step in (0, 2, 4):  # noqa: B007, the property reads it
            for batch_idx in (0, 1):
                module.validation_step(images(2), batch_idx)  # type: ignore[arg-type]
        assert shown == steps, every
    with pytest.raises(ValueError, match=r"log_images_every_n_steps, .* must not be negative"):
        AutoencoderModule(ConvAutoencoder(**SIZES), small_encoders(), AdamW(1e-3), log_images_every_n_steps=-1)


def encoders_of(run: Path | str | None) -> Encoders:
    plain = small_encoders()
    return Encoders(TrainedAutoencoder(None if run is None else str(run), **SIZES), plain.text, plain.view, "grey")


def settings(folder: Path) -> list[str]:
    """Return settings for a small autoencoder on the images of a folder."""
    sizes = [f"model.network.{name}={value}" for name, value in SIZES.items()]
    small = [option for option in SMALL if not option.startswith("model")]
    return ["model=image_autoencoder", *small, *sizes, f"data.root={folder / 'images'}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the command on small images with exact pixel values."""
    folder = tmp_path_factory.mktemp("autoencoder")
    write_images(folder / "images", {SQUARE: 8}, small_encoders())
    more = [f"run_dir={folder / 'run'}", "max_steps=2", "val_every_n_steps=2"]
    train.run(compose("train", [*settings(folder), *more]))
    return folder / "run"


def test_a_run_becomes_an_encoder_whose_weights_travel(run: Path, tmp_path: Path) -> None:
    """Shards encoded with it keep the images; a model trained on them loads without the run; another autoencoder is
    refused."""
    encoders = encoders_of(run)
    assert not encoders.exact
    shown = (images(2) * 127.5 + 127.5).to(torch.uint8)
    latents = encoders.encode_images(shown)
    assert latents.shape == (2, 4, 8, 8)
    trained = load_module(run)
    assert isinstance(trained, AutoencoderModule)
    assert torch.equal(latents, trained.network.posterior(shown.float() / 127.5 - 1)[0])
    assert encoders.quick_fingerprint == encoders.fingerprint != small_encoders().fingerprint

    other = encoders_of(None)
    other.load_state(encoders.state())
    assert torch.equal(other.encode_images(shown), latents)
    with pytest.raises(ValueError, match="name its run with"):
        encoders_of(None).encode_images(shown)
    with pytest.raises(ValueError, match="does not hold an autoencoder of channels=5"):
        _ = TrainedAutoencoder(str(run), 5, 4, 8).network
    with pytest.raises(InstantiationException, match="train one on such images"):
        instantiate(compose("prepare", ["step=images", "encoders=own_autoencoder", "source=x", "root=x"]).encoders)
    changed = encoders.state()
    changed["autoencoder"] = {name: value + 1 for name, value in changed["autoencoder"].items()}
    with pytest.raises(ValueError, match="use the same encoders="):
        encoders_of(None).load_state(changed)


def test_a_model_on_its_latents_needs_neither_run_nor_shards(run: Path, tmp_path: Path) -> None:
    encoders = encoders_of(run)
    root = write_images(tmp_path / "images", {SQUARE: 6}, encoders, keep_images=True)
    data = ImageShards(batch_size=2, root=root, num_workers=0)
    data.setup()
    batch = next(iter(data.held_out("val", with_images=True)))
    assert batch.images is not None
    assert batch.images.dtype == torch.uint8
    assert not torch.equal(encoders.decode_latents(batch.latents), batch.images / 255)
    assert next(iter(data.held_out("val"))).images is None  # training does not read them

    moved = tmp_path / "run"
    run.rename(moved)
    try:
        options = [o for o in SMALL if not o.startswith("encoders.autoencoder")]
        given = [f"encoders.autoencoder.{name}={value}" for name, value in SIZES.items()]
        given += ["encoders=own_autoencoder", f"encoders.autoencoder.init_from={moved}", "model.network.patch_size=2"]
        given += ["encoders.text.length=8", f"data.root={root}", f"run_dir={tmp_path / 'dit'}"]
        train.run(compose("train", [*options, *given, "max_steps=1"]))
    finally:
        moved.rename(run)
    train.run(compose("train", [*options, *given, "max_steps=2", "resume=true"]))  # the named run is no longer there
    assert read_checkpoint(tmp_path / "dit")["global_step"] == 2
    module = load_module(tmp_path / "dit")
    assert isinstance(module, PatchDiTModule)
    ready = module.ready_encoders()
    assert torch.equal(ready.decode_latents(batch.latents), encoders.decode_latents(batch.latents))


def test_shards_of_something_else_than_pixels_are_refused(run: Path, tmp_path: Path) -> None:
    root = write_images(tmp_path, {SQUARE: 4}, encoders_of(run))
    data = ImageShards(batch_size=2, root=root, num_workers=0)
    data.setup()
    module = AutoencoderModule(ConvAutoencoder(**SIZES), small_encoders(), AdamW(1e-3))
    with pytest.raises(ValueError, match="latents have 4 channels, packed pixels 48"):
        module.set_statistics(data.statistics)
    with pytest.raises(ValueError, match="hold pixels exactly"):
        AutoencoderModule(ConvAutoencoder(**SIZES), encoders_of(run), AdamW(1e-3))


def test_a_decoder_alone_is_trained_on_from_a_run_with_noise_on_its_latents(run: Path, tmp_path: Path) -> None:
    """The encoder stays bit-identical, EMA included, so that models of its latents stay valid; the decoder changes."""
    more = [f"model.init_from={run}", "model.decoder_only=true", "model.latent_noise=0.5", "max_steps=2"]
    train.run(compose("train", [*settings(run.parent), *more, f"run_dir={tmp_path / 'on'}"]))
    before, after = load_module(run), load_module(tmp_path / "on")
    assert isinstance(before, AutoencoderModule)
    assert isinstance(after, AutoencoderModule)
    for name, value in before.network.state_dict().items():
        assert torch.equal(value, after.network.state_dict()[name]) == name.startswith("encoder."), name


def test_training_of_a_decoder_alone_is_resumed(run: Path, tmp_path: Path) -> None:
    """It continues from its own checkpoint: the weights are those of an uninterrupted run."""
    more = [*settings(run.parent), f"model.init_from={run}", "model.decoder_only=true"]
    train.run(compose("train", [*more, "max_steps=2", f"run_dir={tmp_path / 'whole'}"]))
    train.run(compose("train", [*more, "max_steps=1", f"run_dir={tmp_path / 'parts'}"]))
    train.run(compose("train", [*more, "max_steps=2", f"run_dir={tmp_path / 'parts'}", "resume=true"]))
    whole, parts = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_a_run_with_parts_of_a_package_starts_from_another_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own settings name the package, which permits building its parts from the earlier checkpoint."""
    (tmp_path / "own_lab.py").write_text(
        "from keygrip.models.patch_dit.trained_autoencoder import ConvAutoencoder\n"
        "from keygrip.training.parts import model_part\n\n\n"
        "@model_part\nclass Network(ConvAutoencoder):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = [*settings(run.parent), "model.network._target_=own_lab.Network", "max_steps=1"]
    train.run(compose("train", [*own, f"run_dir={tmp_path / 'first'}"]))
    on = [f"model.init_from={tmp_path / 'first'}", "model.decoder_only=true", f"run_dir={tmp_path / 'on'}"]
    train.run(compose("train", [*own, *on]))
    before, after = (load_module(tmp_path / name, trust=["own_lab"]) for name in ("first", "on"))
    assert isinstance(before, AutoencoderModule)
    assert isinstance(after, AutoencoderModule)
    torch.testing.assert_close(after.network.encoder.state_dict(), before.network.encoder.state_dict(), rtol=0, atol=0)
    with pytest.raises(UntrustedPartError, match=r"own_lab\.Network is not built"):  # for a run that does not name it
        train.run(compose("train", [*own, "model.network._target_=" + NETWORK, *on, f"run_dir={tmp_path / 'other'}"]))


def test_latent_noise_is_of_each_image_and_in_standard_deviations() -> None:
    """`latent_noise` is the largest strength; each image gets a uniform share of that many standard deviations."""
    module = AutoencoderModule(ConvAutoencoder(**SIZES), small_encoders(), AdamW(1e-3), latent_noise=0.5)
    pixels = images(64)
    mean, _ = module.network.posterior(pixels)
    given: list[Tensor] = []
    decode = module.network.decode
    module.network.decode = lambda latents: given.append(latents) or decode(latents)  # type: ignore[assignment, func-returns-value, method-assign]
    with torch.no_grad():
        module.network.encoder[-1].weight[SIZES["channels"] :] = 0  # variances of exp(-20): no posterior noise
        module.network.encoder[-1].bias[SIZES["channels"] :] = -20
        module.losses(pixels, sampled=True)
        module.losses(pixels, sampled=False)
    noise = (given[0] - mean) / mean.std(dim=(0, 2, 3), keepdim=True)
    strengths = noise.std(dim=(1, 2, 3))
    assert float(strengths.max()) < 0.6
    assert float(strengths.min()) < 0.1
    assert float(strengths.mean()) == pytest.approx(0.25, abs=0.06)
    torch.testing.assert_close(given[1], mean)


def test_a_decoder_alone_needs_a_run(run: Path, tmp_path: Path) -> None:
    more = ["model.decoder_only=true", "max_steps=1", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match=r"model\.decoder_only=true keeps a trained encoder: name its run"):
        train.run(compose("train", [*settings(run.parent), *more]))
    with pytest.raises(ValueError, match="latent_noise must not be negative"):
        AutoencoderModule(ConvAutoencoder(**SIZES), small_encoders(), AdamW(1e-3), latent_noise=-1.0)


def test_the_transformer_begins_with_the_decoder_and_that_with_its_autoencoder() -> None:
    """There is one stage for each, trained one after the other."""
    overrides = ["experiment=dit_robot_images_latents_128px"]
    for begins_with in ("image_decoder_128px", "image_autoencoder_128px"):
        resolved: Any = OmegaConf.to_container(compose("train", [*overrides, "run_dir=x"]), resolve=True)
        wanted: dict[Path, PretrainingStage] = {}
        with_run_folders(resolved, wanted)
        (stage,) = wanted.values()
        overrides = list(stage.overrides)
        assert overrides == [f"experiment={begins_with}"]
