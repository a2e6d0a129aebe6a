"""Exports of an image model besides its own folder format: a LoRA and a diffusers pipeline."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dit_parts import SMALL, write_flux, write_images
from hydra.utils import instantiate
from image_sets import SQUARE
from image_sets import write_images as write_drawn
from PIL import Image
from safetensors.torch import load_file

import keygrip
from keygrip import export, sample, train
from keygrip.config import compose
from keygrip.data.image_text.crops import Bucket, cut_out, shared_crop
from keygrip.evaluate import evaluation_output
from keygrip.models.nn.flow_matching import noise_levels, seeded_noise
from keygrip.models.patch_dit.context import Conditions
from keygrip.models.patch_dit.figures import as_bytes
from keygrip.models.patch_dit.sampler import Sampling
from keygrip.training.checkpoints import find_checkpoint, read_checkpoint, weights_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    root = write_images(folder / "images")
    train.run(compose("train", [*SMALL, f"data.root={root}", f"run_dir={folder / 'run'}", "max_steps=3"]))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "one.png")
    return folder


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.slow
def test_an_adapter_is_trained_exported_and_sampled_with(trained: Path, tmp_path: Path) -> None:
    """The adapted run, the initial run with the adapter, and the export with merged weights give the same images; the
    base itself does not change."""
    pytest.importorskip("peft")
    adapted = ["ablation=patch_dit/lora", "model.lora.rank=4", f"model.init_from={trained / 'run'}", "max_steps=3"]
    given = [f"data.root={trained / 'images'}", f"run_dir={tmp_path / 'adapted'}", "optimizer.lr=0.05"]
    train.run(compose("train", [*SMALL, *adapted, *given, "optimizer.warmup_steps=0"]))
    made = export.run(
        compose("export", [f"checkpoint={tmp_path / 'adapted'}", f"to={tmp_path / 'lora'}", "format=lora"])
    )
    assert made["bytes"] == sum(path.stat().st_size for path in (tmp_path / "lora").iterdir())
    merged = export.run(compose("export", [f"checkpoint={tmp_path / 'adapted'}", f"to={tmp_path / 'plain'}"]))
    assert not [name for name in load_file(tmp_path / "plain/model.safetensors") if "lora" in name]
    shown = {}
    for name, more in (
        ("exported", [f"checkpoint={merged['folder']}"]),
        ("adapted", [f"checkpoint={tmp_path / 'adapted'}"]),
        ("merged", [f"checkpoint={trained / 'run'}", f"lora={tmp_path / 'lora'}"]),
        ("base", [f"checkpoint={trained / 'run'}"]),
    ):
        result = sample.run(compose("sample", [*more, "prompt=a red thing", f"run_dir={tmp_path / name}"]))
        shown[name] = pixels(result["images"][0])
    assert np.abs(shown["adapted"] - shown["merged"]).max() <= 1
    assert np.abs(shown["adapted"] - shown["exported"]).max() <= 1
    assert np.abs(shown["adapted"] - shown["base"]).max() > 1
    with pytest.raises(ValueError, match="trained without LoRA"):
        export.run(compose("export", [f"checkpoint={trained / 'run'}", f"to={tmp_path / 'no'}", "format=lora"]))
    assert not (tmp_path / "no").exists()


def test_samples_of_a_run_and_an_export_are_stored_beside_their_evaluations(trained: Path, tmp_path: Path) -> None:
    made = export.run(compose("export", [f"checkpoint={trained / 'run'}", f"to={tmp_path / 'plain'}"]))
    for checkpoint in (trained / "run", Path(made["folder"])):
        result = sample.run(compose("sample", [f"checkpoint={checkpoint}", "prompt=a red thing", "steps=1"]))
        folder = Path(result["images"][0]).parent.parent
        assert folder == checkpoint / "samples"
        assert folder.parent == evaluation_output(find_checkpoint(checkpoint), None).parent
    assert keygrip.load(made["folder"])  # still a complete export


@pytest.mark.slow  # diffusers takes seconds to import
def test_a_pipeline_of_diffusers_draws_the_same_images(trained: Path, tmp_path: Path) -> None:
    from keygrip.inference.diffusers_pipeline import PatchDiTPipeline

    export.run(compose("export", [f"checkpoint={trained / 'run'}", f"to={tmp_path / 'pipe'}", "format=diffusers"]))
    inside = tmp_path / "pipe" / "transformer"
    assert 'keygrip.load("pipe/transformer")' in (inside / "README.md").read_text()
    found = weights_of(read_checkpoint(trained / "run" / "checkpoints" / "last.ckpt"))[1]
    assert weights_of(read_checkpoint(inside))[1] == found != "of the last step"
    pipeline = PatchDiTPipeline.from_pretrained(str(tmp_path / "pipe"))
    pipeline.set_progress_bar_config(disable=True)
    options = [f"checkpoint={trained / 'run'}", "prompt=a red thing", f"image={trained / 'one.png'}", "seed=3"]
    expected = pixels(sample.run(compose("sample", [*options, f"run_dir={tmp_path / 'out'}"]))["images"][0])
    module = pipeline.transformer.module
    stride, (height, width) = module.encoders.latent_stride, expected.shape[:2]
    noise = seeded_noise([3], (module.network.latent_channels, height // stride, width // stride))
    image = Image.open(trained / "one.png")
    drawn = pipeline("a red thing", image, latents=noise).images[0]
    assert np.abs(np.asarray(drawn).astype(int) - expected).max() <= 1
    pipeline.save_pretrained(str(tmp_path / "again"))
    again = PatchDiTPipeline.from_pretrained(str(tmp_path / "again"))
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(np.asarray(again("a red thing", image, latents=noise).images[0]), np.asarray(drawn))
    two = pipeline(
        ["a red thing", "a green thing"], generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    assert two.shape[0] == 2
    latents = pipeline("a red thing", image, latents=noise, output_type="latent").images
    assert latents.shape == noise.shape
    decoded = module.ready_encoders().decode_latents(module.statistics.restored(latents))
    assert np.abs(as_bytes(decoded.cpu())[0].astype(int) - np.asarray(drawn)).max() <= 1
    with pytest.raises(ValueError, match="nothing to draw"):
        pipeline()


@pytest.fixture(scope="module")
def piped(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model as a pipeline, with a solver of second order and a guide."""
    folder = tmp_path_factory.mktemp("piped")
    run = ["max_steps=20", f"data.root={trained / 'images'}", f"run_dir={folder / 'run'}", "model.sampling.steps=4"]
    run += ["ablation=patch_dit/early_guide", "model.guide.at_step=5"]
    train.run(compose("train", [*SMALL, *run, "model.sampling.solver=heun", "optimizer.lr=0.01"]))
    export.run(compose("export", [f"checkpoint={folder / 'run'}", f"to={folder / 'pipe'}", "format=diffusers"]))
    return folder


@pytest.mark.slow
def test_a_pipeline_draws_by_the_model_s_own_solver(piped: Path) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    from keygrip.inference.diffusers_pipeline import PatchDiTPipeline

    pipeline = PatchDiTPipeline.from_pretrained(str(piped / "pipe"))
    pipeline.set_progress_bar_config(disable=True)
    module = pipeline.transformer.module
    noise = seeded_noise([3], (module.network.latent_channels, 4, 4))
    words = Conditions(*module.ready_encoders().encode_text(["a red thing"]), None, None, (3, 3))
    drawn = {}
    for solver in ("heun", "adams_bashforth", "euler"):
        with pipeline.transformer.autocast():  # this processor may compute in bfloat16
            expected = module.draw(words, (4, 4), [3], replace(module.sampling, solver=solver))
        given = {} if solver == "heun" else {"solver": solver}
        drawn[solver] = pipeline("a red thing", latents=noise, output_type="pt", **given).images
        torch.testing.assert_close(drawn[solver], expected, atol=1e-5, rtol=0, msg=solver)
    unguided = pipeline("a red thing", latents=noise, output_type="pt", guide_scale=0.0).images
    assert (drawn["heun"] - unguided).abs().max() > 1e-4
    assert (drawn["heun"] - drawn["euler"]).abs().max() > 1e-4
    assert (drawn["adams_bashforth"] - drawn["euler"]).abs().max() > 1e-4
    pipeline.transformer.precision = torch.float32  # bfloat16 turns a last-bit difference of a level into 1/256
    for solver in ("adams_bashforth", "euler"):  # 0.7 is the level of a step, and 0.69999999 in float32
        ways = {"solver": solver, "steps": 10, "interval": (0.7, 1.0)}
        with pipeline.transformer.autocast():
            expected = module.draw(words, (4, 4), [3], module.sampling.changed(ways))
        ways["num_inference_steps"] = ways.pop("steps")
        found = pipeline("a red thing", latents=noise, output_type="pt", **ways).images
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, msg=solver)
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="solver=heun takes steps of its own, and none of FlowMatchHeun"):
        pipeline("a red thing", latents=noise)


@pytest.mark.slow
def test_with_an_adapter_autoguidance_is_left_out_and_that_is_said(
    piped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The guide was made without the adapter; here the adapter changes nothing."""
    monkeypatch.setattr("keygrip.inference.images.load_lora", lambda *_: None)

    def drawn(name: str, *options: str) -> np.ndarray:
        given = [f"checkpoint={piped / 'run'}", "prompt=a red thing", f"run_dir={tmp_path / name}", *options]
        caplog.clear()
        return pixels(sample.run(compose("sample", given))["images"][0])

    unguided, own = drawn("unguided", "guide_scale=0"), drawn("own")
    assert np.abs(own - unguided).max() > 0
    assert np.array_equal(drawn("adapted", "lora=adapter"), unguided)
    assert "with lora there is no guide, and the model's own guide_scale=0.4 is left out" in caplog.text
    assert np.array_equal(drawn("asked", "lora=adapter", "guide_scale=0"), unguided)
    assert "guide_scale" not in caplog.text
    with pytest.raises(
        ValueError, match=r"guide_scale=1\.0 cannot be had with lora=adapter: the guide of .* is an earlier"
    ):
        drawn("refused", "lora=adapter", "guide_scale=1")


@pytest.mark.slow
def test_a_pipeline_turns_photos_as_their_camera_says(piped: Path, caplog: pytest.LogCaptureFixture) -> None:
    from keygrip.inference.diffusers_pipeline import PatchDiTPipeline

    pipeline = PatchDiTPipeline.from_pretrained(str(piped / "pipe"))
    pipeline.set_progress_bar_config(disable=True)
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    turned = wide.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # EXIF: to be rotated back to the right
    noise = seeded_noise([3], (pipeline.transformer.module.network.latent_channels, 4, 6))
    straight, same = (np.asarray(pipeline(image=image, latents=noise).images[0]) for image in (wide, turned))
    assert straight.shape == (16, 24, 3)
    assert np.array_equal(straight, same)
    assert "pixels the middle" not in caplog.text
    drawn = pipeline(
        image=[wide, Image.new("RGB", (80, 20))], num_inference_steps=1
    ).images  # in the shape of the first image
    assert [image.size for image in drawn] == [(24, 16)] * 2
    assert "image 1: of its 80 x 20 pixels the middle 30 x 20 are used" in caplog.text
    assert "give height and width for another" in caplog.text


@pytest.mark.slow
def test_a_pipeline_in_half_precision_draws_nearly_the_same(piped: Path) -> None:
    """Whether loaded in bfloat16 or converted: the network computes in bfloat16, the feature statistics stay
    float32."""
    from keygrip.inference.diffusers_pipeline import PatchDiTPipeline

    def drawn(pipeline: PatchDiTPipeline) -> np.ndarray:
        pipeline.set_progress_bar_config(disable=True)
        noise = seeded_noise([3], (pipeline.transformer.module.network.latent_channels, 4, 4))
        return np.asarray(pipeline("a red thing", latents=noise, output_type="pt").images)

    plain = PatchDiTPipeline.from_pretrained(str(piped / "pipe"))
    expected = drawn(plain)
    loaded = PatchDiTPipeline.from_pretrained(str(piped / "pipe"), dtype=torch.bfloat16)
    module = loaded.transformer.module
    assert {p.dtype for p in module.network.parameters()} == {torch.bfloat16}
    assert torch.equal(module.statistics.latent_mean, plain.transformer.module.statistics.latent_mean)
    half = drawn(loaded)
    assert 0 < np.abs(half - expected).max() < 0.1
    assert np.array_equal(drawn(plain.to(torch.bfloat16)), half)
    plain.transformer.float().bfloat16()
    assert np.array_equal(drawn(plain), half)


@pytest.mark.slow
def test_how_diffusers_would_fetch_and_keep_the_weights_is_left_to_us(piped: Path) -> None:
    """diffusers' keywords for these are accepted; those that select other files than the folder's are refused."""
    from keygrip.inference.diffusers_pipeline import PatchDiTPipeline, PatchDiTTransformer

    kept = {"offload_folder": "elsewhere", "offload_state_dict": True, "low_cpu_mem_usage": True, "disable_mmap": True}
    fetched = {"cache_dir": "elsewhere", "local_files_only": True, "token": "secret", "revision": "main"}
    found = PatchDiTPipeline.from_pretrained(str(piped / "pipe"), **kept, **fetched)
    same = PatchDiTTransformer.from_pretrained(piped / "pipe" / "transformer", **kept, **fetched)
    for name, weights in same.module.state_dict().items():
        assert torch.equal(weights, found.transformer.module.state_dict()[name]), name
    for name, value in {"variant": "fp16", "use_flashpack": True}.items():
        with pytest.raises(ValueError, match=f"{name}: no effect on PatchDiTTransformer"):
            PatchDiTTransformer.from_pretrained(piped / "pipe" / "transformer", **{name: value})


@pytest.mark.slow
def test_the_weights_are_on_the_one_device_that_diffusers_keyword_names(
    piped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keygrip.inference import diffusers_pipeline
    from keygrip.inference.diffusers_pipeline import PatchDiTPipeline, PatchDiTTransformer

    load, devices = diffusers_pipeline.load_module, []

    def load_on_the_cpu(path: Any, device: Any, *given: Any, **named: Any) -> Any:
        devices.append(str(device))
        return load(path, "cpu", *given, **named)

    monkeypatch.setattr(diffusers_pipeline, "load_module", load_on_the_cpu)
    folder = piped / "pipe" / "transformer"
    for given in (None, "cpu", "cuda", "cuda:1"):
        PatchDiTTransformer.from_pretrained(folder, device_map=given)
    assert devices == ["cpu", "cpu", "cuda", "cuda:1"]
    for named in ({"device_map": "balanced"}, {"device_map": {"": 0}}, {"max_memory": {0: "1GB"}}):
        with pytest.raises(ValueError, match="keeps its weights on one device: give device_map='cuda', or"):
            PatchDiTTransformer.from_pretrained(folder, **named)
    for named in ({"device_map": "balanced"}, {"max_memory": {0: "1GB"}}):
        with pytest.raises(ValueError, match="keeps its weights on one device"):
            PatchDiTPipeline.from_pretrained(str(piped / "pipe"), **named)

    transformer = PatchDiTTransformer.from_pretrained(folder)
    transformer.module._device = torch.device("meta")  # what noise and conditions are made on
    assert transformer.cpu().module.device == torch.device("cpu")
    moved: list[Any] = []
    monkeypatch.setattr(PatchDiTTransformer, "to", lambda self, device: moved.append(device) or self)
    assert transformer.cuda().cuda(1) is transformer
    assert moved == ["cuda", 1]


# ---- in the hands of diffusers ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_diffusers_own_class_reads_the_folder_where_it_is_told_to(
    piped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`DiffusionPipeline` executes the folder's pipeline.py only with `trust_remote_code=True`, also after saving; our
    class never does."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    from keygrip.inference.diffusers_pipeline import PatchDiTPipeline

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pipe"
    PatchDiTPipeline.from_pretrained(str(piped / "pipe")).save_pretrained(str(folder))
    for each in (piped / "pipe", folder):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            DiffusionPipeline.from_pretrained(str(each))
        found = DiffusionPipeline.from_pretrained(str(each), trust_remote_code=True)
        assert type(found) is PatchDiTPipeline
        found.set_progress_bar_config(disable=True)
        noise = seeded_noise([3], (found.transformer.module.network.latent_channels, 4, 4))
        drawn = found("a red thing", latents=noise, output_type="pt").images
        same = PatchDiTPipeline.from_pretrained(str(piped / "pipe"))
        same.set_progress_bar_config(disable=True)
        assert torch.equal(drawn, same("a red thing", latents=noise, output_type="pt").images)
    (folder / "pipeline.py").write_text("raise RuntimeError('executed')")
    PatchDiTPipeline.from_pretrained(str(folder))
    with pytest.raises(RuntimeError, match="executed"):
        DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)


@pytest.mark.slow
def test_a_pipeline_of_large_encoders_is_opened_with_their_files(tmp_path: Path) -> None:
    """The folder does not contain them, and its paths to them are not trusted: the caller gives the paths at each
    loading."""
    from diffusers import DiffusionPipeline

    from keygrip.inference.diffusers_pipeline import PatchDiTPipeline, PatchDiTTransformer

    flux = write_flux(tmp_path / "flux")
    external: dict[str, Any] = {"encoders.autoencoder.source": str(flux / "vae"), "encoders.text.source": str(flux)}
    external["encoders.view.download"] = True
    settings = ["encoders=flux_t5_dinov3", *(f"{name}={value}" for name, value in external.items())]
    parts = ["autoencoder.dtype=float32", "text.dtype=float32", "text.length=12", "text.width=24", "view.size=48"]
    parts += ["text.subfolder=text_encoder_2", "text.tokenizer_subfolder=tokenizer_2", "view.weights=random"]
    parts += ["view.width=16", "view.depth=1", "view.heads=2"]
    settings += [f"encoders.{part}" for part in parts]
    small = [each for each in SMALL if not each.startswith("encoders")]
    encoders = instantiate(compose("train", [*small, *settings]).encoders)
    root = write_drawn(tmp_path / "images", {SQUARE: 4}, encoders)
    given = [f"data.root={root}", f"run_dir={tmp_path / 'run'}", "max_steps=2", "model.log_images_every_n_steps=0"]
    train.run(compose("train", [*small, *settings, *given]))
    pipe, named = tmp_path / "pipe", [f"external.{name}={value}" for name, value in external.items()]
    export.run(compose("export", [f"checkpoint={tmp_path / 'run'}", f"to={pipe}", "format=diffusers", *named]))

    takes = r"external=\{encoders.text.source: PATH\} \(PatchDiTPipeline.from_pretrained of .* takes external"
    with pytest.raises(ValueError, match=takes):
        PatchDiTPipeline.from_pretrained(str(pipe))
    with pytest.raises(ValueError, match=takes):
        DiffusionPipeline.from_pretrained(str(pipe), trust_remote_code=True)
    drawn = []
    for folder in (pipe, tmp_path / "again"):
        pipeline = PatchDiTPipeline.from_pretrained(str(folder), external=external)
        pipeline.set_progress_bar_config(disable=True)
        noise = seeded_noise([3], (16, 4, 4))
        drawn.append(pipeline("a red cube", latents=noise, output_type="pt").images)
        if folder == pipe:
            pipeline.save_pretrained(str(tmp_path / "again"))
    assert torch.equal(*drawn)
    with pytest.raises(ValueError, match=takes):  # the given files apply to one call
        PatchDiTPipeline.from_pretrained(str(pipe))

    inside = pipe / "transformer"
    part = PatchDiTTransformer.from_pretrained(inside, external=external)
    assert PatchDiTPipeline.from_pretrained(str(pipe), transformer=part).transformer is part
    with pytest.raises(ValueError, match="no effect on a transformer that is given"):
        PatchDiTPipeline.from_pretrained(str(pipe), external=external, transformer=part)
    with pytest.raises(ValueError, match="subfolder: no effect on PatchDiTTransformer"):
        PatchDiTTransformer.from_pretrained(pipe, subfolder="transformer", external=external)


@pytest.fixture(scope="module")
def opened(trained: Path) -> dict[str, Image.Image]:
    """Images to condition on; they also exist as files next to the trained model."""
    generator = np.random.default_rng(2)
    half = np.zeros((32, 32, 3), dtype=np.uint8)
    half[:, :16] = 255
    made = {
        "two": generator.integers(0, 256, (32, 32, 3), dtype=np.uint8),
        "left": half,
        "right": 255 - half,
    }
    for name, pixel in made.items():
        Image.fromarray(pixel).save(trained / f"{name}.png")
    return {name: Image.open(trained / f"{name}.png") for name in ("one", *made)}


@pytest.mark.slow
def test_a_pipeline_is_steered_as_keygrip_sample_is(
    trained: Path, piped: Path, opened: dict[str, Image.Image], tmp_path: Path
) -> None:
    """References with masks, start images, masks of the redrawn part, and scales: both give the same images, and each
    setting changes the image."""
    from keygrip.inference.diffusers_pipeline import PatchDiTPipeline

    pipeline = PatchDiTPipeline.from_pretrained(str(piped / "pipe"))
    pipeline.set_progress_bar_config(disable=True)
    noise = seeded_noise([3], (pipeline.transformer.module.network.latent_channels, 4, 4))
    images: list[dict[str, str | list[str]]] = [
        {"image": "one"},
        {"start_image": "two"},
        {"start_image": "two", "redraw": "left"},
    ]
    images += [{"image": "one", "image_mask": "left"}, {"image": ["one", "two"], "image_mask": ["left", "right"]}]
    plain: list[dict[str, object]] = [{}, {"strength": 0.5, "solver": "euler", "steps": 6}, {"strength": 0.75}]
    plain += [{"cls_scale": 3.0, "interval": [0.2, 1.0]}, {"blend": True, "text_rescale": 0.5}]
    shown = []
    for number, (files, options) in enumerate(zip(images, plain, strict=True)):
        paths = {
            name: str(trained / f"{file}.png") if isinstance(file, str) else [str(trained / f"{f}.png") for f in file]
            for name, file in files.items()
        }
        given = [f"{name}={value}" for name, value in {**paths, **options}.items()]
        own = [f"checkpoint={piped / 'run'}", "prompt=a red thing", "seed=3", f"run_dir={tmp_path / str(number)}"]
        expected = pixels(sample.run(compose("sample", [*own, *given]))["images"][0])
        taken = {
            name: opened[file] if isinstance(file, str) else [opened[f] for f in file] for name, file in files.items()
        }
        renamed = {"num_inference_steps" if name == "steps" else name: value for name, value in options.items()}
        drawn = pipeline("a red thing", latents=noise, output_type="np", **taken, **renamed).images[0]
        shown.append(255 * np.asarray(drawn))
        assert np.abs(shown[-1] - expected).max() < 1.5, files
    assert all(np.abs(one - other).max() > 0.02 for n, one in enumerate(shown) for other in shown[:n])
    kept = cut_out(opened["two"], shared_crop(*opened["two"].size, Bucket(16, 16)), (16, 16))
    assert np.abs(shown[2][:, 8:] - kept[:, 8:]).max() < 0.01  # the right half stays
    assert np.abs(shown[2][:, :8] - kept[:, :8]).mean() > 5


@pytest.mark.slow
def test_a_pipeline_refuses_what_keygrip_sample_refuses(piped: Path, opened: dict[str, Image.Image]) -> None:
    import diffusers

    from keygrip.inference.diffusers_pipeline import PatchDiTPipeline

    pipeline = PatchDiTPipeline.from_pretrained(str(piped / "pipe"))
    pipeline.set_progress_bar_config(disable=True)
    one, two = opened["one"], opened["two"]
    buffer = io.BytesIO()
    one.save(buffer, "GIF", save_all=True, append_images=[two])
    animated = Image.open(buffer)

    def cut() -> Image.Image:
        """Return an image of a truncated file, whose pixels have not been loaded yet."""
        whole = io.BytesIO()
        Image.effect_noise((64, 64), 90).save(whole, "JPEG", quality=95)
        return Image.open(io.BytesIO(whole.getvalue()[:-900]))

    for given, message in (
        ({"height": 0}, "height=0, width=0: both must be multiples"),
        ({"height": 16, "width": 0}, "height=16, width=0: both"),
        ({"height": 18, "width": 16}, "height=18, width=16: both"),
        ({"image": animated}, "image 0 cannot be used: it has 2 frames"),
        ({"start_image": animated}, "start_image 0 cannot be used: it has 2 frames"),
        ({"image": one, "image_mask": animated}, "image_mask 0 cannot be used"),
        ({"image": one, "image_mask": [one, two]}, "2 masks .* for 1 images"),
        ({"image_mask": one}, "1 masks .* for 0 images"),
        ({"image": one, "image_mask": one.resize((48, 16))}, "image_mask 0 has 48 x 16 pixels and its image .* shape"),
        ({"start_image": one, "redraw": one.resize((48, 16))}, "redraw has 48 x 16 pixels and its image start_image"),
        ({"image": one, "image_mask": Image.new("L", (32, 32))}, "image_mask 0 is nowhere white .* patch of image 0"),
        ({"image": cut()}, "image 0 cannot be used: .*truncated"),
        ({"image": one, "image_mask": cut()}, "image_mask 0 cannot be used: .*truncated"),
        ({"start_image": cut()}, "start_image 0 cannot be used: .*truncated"),
        ({"start_image": one, "redraw": cut()}, "redraw 0 cannot be used: .*truncated"),
        ({"image": one, "blend": True}, "blend=True puts several images together"),
        ({"strength": 0.5}, "strength and redraw are for start_image"),
        ({"redraw": one}, "strength and redraw are for start_image"),
        ({"start_image": one, "strength": 0.0}, "must lie above 0"),
        ({"dino_scale": 2.0}, "dino_scale has no effect without image"),
        ({"full_scale": 2.0, "guidance": "independent"}, "full_scale is for prompt and image together"),
        ({"interval": (0.5, 0.2)}, "the lower one first"),
        ({"height": 10**6, "width": 10**6}, "an image has at most 16777216 pixels"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt=1.5: must be a whole number"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt=True: must be a whole number"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
        ({"callback_on_step_end": lambda *_: {"latents": None}}, "gives latents that are no tensor of shape"),
        ({"start_image": one, "strength": 1.0}, "strength=1 without redraw leaves nothing"),
        ({"start_image": [one, two], "strength": 0.5}, "start_image and redraw are one image each"),
        ({"start_image": [], "strength": 0.5}, "start_image and redraw are one image each"),
        ({"image": Image.new("RGB", (0, 0))}, "image 0 cannot be used: it has no pixels"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5: must be a whole number"),
        ({"text_scale": "2"}, "text_scale='2': must be a number"),
        ({"guidance_scale": 7.5}, r"guidance_scale=7\.5: .* give text_scale and dino_scale"),
        ({"negative_prompt": "blurry"}, "negative_prompt: .* leave it out; text_scale says how far"),
        ({"start_image": one, "redraw": one, "output_type": "latent"}, "output_type='latent' gives none"),
        ({"latents": np.zeros((1, 3, 4, 4))}, "latents are a tensor, not ndarray"),
        ({"generator": (torch.Generator(),) * 2}, "2 generators for 1 images"),
        ({"callback_on_step_end": lambda *_: [1]}, "callback_on_step_end returns a dict, not list"),
        ({"generator": 3}, "generator=3: give a torch.Generator"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"tensor_inputs=\['noise'\]: \['latents'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline("a red thing", **given)
    with pytest.raises(ValueError, match="prompt is a text or a list of them, not int"):
        pipeline(5)
    with pytest.raises(ValueError, match=r"dtype=torch\.float64: the pipeline computes in float32"):
        PatchDiTPipeline.from_pretrained(str(piped / "pipe"), torch_dtype=torch.float64)
    with pytest.raises(FileNotFoundError, match=r"is a pipeline of diffusers: its checkpoint is .*transformer"):
        keygrip.load(piped / "pipe")
    with pytest.raises(ValueError, match="3 prompts and 2 images: give as many"):
        pipeline(["a red thing"] * 3, [one, two])
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        pipeline(["a red thing"] * 3, generator=[torch.Generator()] * 2)
    own = pipeline.scheduler.config.shift
    for shift in (0, -2, "a"):
        pipeline.scheduler.set_shift(shift)
        with pytest.raises(
            ValueError, match=rf"the scheduler's shift is {shift!r} \(scheduler_config\.json, set_shift\)"
        ):
            pipeline("a red thing")
    pipeline.scheduler.set_shift(own)
    scheduler = pipeline.scheduler
    for other, message in (
        (
            diffusers.EulerDiscreteScheduler,
            r"would draw at other noise levels than the model's \((level 2 of 5 is|4 levels in place of 5)",
        ),
        (diffusers.DDIMScheduler, r"DDIMScheduler takes no noise levels \(sigmas\): leave the pipeline"),
    ):
        pipeline.scheduler = other.from_config(scheduler.config)
        with pytest.raises(ValueError, match=message):
            pipeline("a red thing", solver="euler")
    pipeline.scheduler = scheduler
    for offload in ("model_cpu_offload", "sequential_cpu_offload", "group_offload"):
        with pytest.raises(ValueError, match="keeps its weights on one device"):
            getattr(pipeline, f"enable_{offload}")("cpu")
    with torch.no_grad():
        pipeline.transformer.module.network.latent_out.weight.mul_(1e30)
    with pytest.raises(ValueError, match="what was drawn is not finite"):
        pipeline("a red thing", output_type="np")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("scheduler", ["own_scheduler", "Own"]),
        ("scheduler", ["pipe.evil", "Own"]),
        ("scheduler", ["diffusers", "DiffusionPipeline"]),
        ("transformer", ["evil", "PatchDiTTransformer"]),
        ("safety_checker", ["evil", "Own"]),
    ],
)
def test_a_pipeline_s_folder_names_no_code_to_import(
    name: str, part: list[str], piped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions of diffusers import the modules that model_index.json names, from the folder or from Python's
    search path."""
    from keygrip.inference.diffusers_pipeline import PatchDiTPipeline

    folder = Path(shutil.copytree(piped / "pipe", tmp_path / "pipe"))
    for place in ("scheduler/own_scheduler.py", "evil.py", "scheduler/evil.py"):
        (folder / place).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {name: part}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=f"model_index.json names {name}=.* is no part of a PatchDiTPipeline"):
        PatchDiTPipeline.from_pretrained(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_pipeline_tells_of_its_steps(piped: Path) -> None:
    """As in diffusers, the callback receives the number of each step, and may change the latents where the scheduler
    takes the steps."""
    from keygrip.inference.diffusers_pipeline import PatchDiTPipeline

    pipeline = PatchDiTPipeline.from_pretrained(str(piped / "pipe"))
    pipeline.set_progress_bar_config(disable=True)
    told: list[tuple[int, float, torch.Tensor]] = []

    def keep(
        given: object, step: int, timestep: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        assert given is pipeline
        told.append((step, float(timestep), state["latents"].clone()))
        return state

    for solver in ("heun", "euler"):
        told.clear()
        drawn = pipeline("a red thing", solver=solver, output_type="pt", callback_on_step_end=keep).images
        assert [step for step, *_ in told] == [0, 1, 2, 3]
        assert told[0][1] == 1000.0 > told[1][1] > told[3][1] > 0
        module = pipeline.transformer.module
        decoded = module.encoders.decode_latents(module.statistics.restored(told[-1][2]))
        torch.testing.assert_close(drawn, decoded.cpu())

    def empty(_: object, step: int, timestep: torch.Tensor, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": torch.zeros_like(state["latents"])} if step == 3 else {}

    flat = pipeline("a red thing", solver="euler", output_type="pt", callback_on_step_end=empty).images
    module = pipeline.transformer.module
    nothing = module.encoders.decode_latents(module.statistics.restored(torch.zeros_like(told[-1][2])))
    torch.testing.assert_close(flat, nothing.cpu())
    with pytest.raises(ValueError, match="callback_on_step_end gives other latents, and solver=heun"):
        pipeline("a red thing", callback_on_step_end=empty)


# ---- other schedulers of diffusers -----------------------------------------------------------------------------------


@pytest.mark.slow  # diffusers takes seconds to import
def test_schedulers_draw_at_the_model_s_noise_levels_or_are_refused() -> None:
    import diffusers

    from keygrip.inference.schedulers import set_levels

    sampling = Sampling(steps=10, timestep_shift=6.0)

    def levels(kind: str, strength: float = 1.0, **options: Any) -> list[float]:
        scheduler = getattr(diffusers, kind)(**options)
        set_levels(scheduler, sampling, 1.0, strength, torch.device("cpu"))
        return list(scheduler.sigmas.tolist())

    wanted = noise_levels(10, 6.0)
    flow: dict[str, Any] = {"use_flow_sigmas": True, "flow_shift": 6.0}
    own, uni = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"
    for kind, options in (
        (uni, {**flow, "prediction_type": "flow_prediction"}),
        (own, {"shift": 6.0}),
        ("FlowMatchLCMScheduler", {"shift": 6.0}),
    ):
        assert levels(kind, **options) == pytest.approx(wanted, abs=1e-5), kind
    assert levels(own, 0.5, shift=6.0)[0] == pytest.approx(0.5)
    assert levels(own, shift=6.0, use_karras_sigmas=True)[5] != pytest.approx(wanted[5], abs=1e-3)  # as requested
    for kind, strength, options, message in (
        (uni, 1.0, flow, "prediction_type='epsilon', and the model predicts the velocity"),
        (
            uni,
            1.0,
            {"prediction_type": "flow_prediction"},
            r"does not take the model's noise levels \(Passing `sigmas`",
        ),
        (uni, 1.0, {**flow, "final_sigmas_type": "sigma_min"}, r"\(level 11 of 11 is 0\.4 in place of 0\)"),
        (own, 1.0, {"use_dynamic_shifting": True}, "give use_dynamic_shifting=False, or leave the pipeline"),
        (own, 1.0, {"invert_sigmas": True}, "do not fall from 1 to 0: they go from 0 to 1, and level 1 of 11 is 0"),
        (own, 0.5, {"invert_sigmas": True}, r"do not fall from 0\.5 to 0: they go from 0\.5 to 1"),
        (own, 0.5, {"shift_terminal": 0.3}, r"do not fall from 0\.5 to 0: they go from "),
        ("FlowMatchLCMScheduler", 1.0, {"invert_sigmas": True}, r"\(level 1 of 11 is 0 in place of 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            levels(kind, strength, **options)


@pytest.mark.slow
def test_a_scheduler_made_from_the_pipeline_s_configuration_has_the_model_s_shift_or_is_refused() -> None:
    """`from_config` drops a setting that the other scheduler calls otherwise, and keeps it in the configuration."""
    import diffusers

    from keygrip.inference.schedulers import set_levels

    config = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0).config
    sampling = Sampling(steps=4, timestep_shift=6.0)
    flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

    def levels(scheduler: Any, strength: float = 1.0, student: bool = False) -> list[float]:
        set_levels(scheduler, sampling, 1.0, strength, torch.device("cpu"), student)
        return list(scheduler.sigmas.tolist())

    unipc = diffusers.UniPCMultistepScheduler
    for scheduler in (unipc.from_config(config, **flow), unipc(**flow), diffusers.FlowMatchLCMScheduler(shift=2.0)):
        name = "flow_shift" if isinstance(scheduler, unipc) else "shift"
        with pytest.raises(ValueError, match=rf"\(level 2 of 5 is 0\.\d+ in place of 0\.947\d*\): give {name}=6, or"):
            levels(scheduler)
    for scheduler in (unipc.from_config(config, **flow, flow_shift=6.0), diffusers.FlowMatchLCMScheduler(shift=6.0)):
        assert levels(scheduler) == pytest.approx(noise_levels(4, 6.0), abs=1e-5)

    own = diffusers.FlowMatchEulerDiscreteScheduler
    assert levels(own(shift=1.0)) == pytest.approx([1, 0.75, 0.5, 0.25, 0])  # as requested
    assert levels(own(shift=6.0), student=True) == pytest.approx(noise_levels(4, 6.0), abs=1e-5)
    with pytest.raises(ValueError, match=r"\(level 2 of 5 is 0\.75 in place of 0\.947\d*\): give shift=6, or leave"):
        levels(own(shift=1.0), student=True)
    with pytest.raises(ValueError, match=r"in place of 0\.\d+\): leave the pipeline the scheduler"):
        levels(own(shift=6.0, use_karras_sigmas=True), student=True)
    with pytest.raises(ValueError, match=r"\(level 2 of 3 is 0\.25 in place of 0\.428\d*\): give shift=6"):
        levels(own(shift=1.0), 0.5, student=True)
    assert levels(own(shift=6.0), 0.5, student=True) == pytest.approx([0.5, 3 / 7, 0], abs=1e-5)


@pytest.mark.slow
def test_noise_that_a_scheduler_adds_comes_from_the_generator(piped: Path) -> None:
    """Repeated calls give the same images, a list gives each image as a single call does, and what is not redrawn does
    not change."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

    from keygrip.inference.diffusers_pipeline import PatchDiTPipeline

    pipeline = PatchDiTPipeline.from_pretrained(str(piped / "pipe"))
    pipeline.set_progress_bar_config(disable=True)
    last: list[torch.Tensor] = []

    def keep(_: object, step: int, timestep: torch.Tensor, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last[:] = [state["latents"]]
        return {}

    def drawn(seeds: list[int], **given: Any) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        own = generators[0] if len(seeds) == 1 else generators
        words = ["a red thing", "a green thing"][-len(seeds) :]
        found = pipeline(words, solver="euler", generator=own, output_type="pt", callback_on_step_end=keep, **given)
        images: torch.Tensor = found.images
        return images

    shift = pipeline.scheduler.config.shift
    start = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    half = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 8, 1).repeat(16, 0))
    redrawn: dict[str, Any] = {"start_image": start, "redraw": half, "strength": 1.0}
    plain = drawn([3])
    drawn([3], **redrawn)
    stays = last[0][..., :2]
    for scheduler in (
        FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True),
        FlowMatchLCMScheduler(shift=shift),
    ):
        pipeline.scheduler = scheduler
        alone = drawn([3])
        assert torch.equal(alone, drawn([3]))
        assert (alone - plain).abs().max() > 1e-3
        assert (alone - drawn([4])).abs().max() > 1e-3
        torch.testing.assert_close(drawn([4, 3])[1:], alone, atol=1e-5, rtol=0)
        drawn([3], **redrawn)
        torch.testing.assert_close(last[0][..., :2], stays, atol=1e-4, rtol=0)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)
    with pytest.raises(
        ValueError, match="solver=heun takes steps of its own, without the noise of stochastic_sampling"
    ):
        pipeline("a red thing")
