"""What an image model is exported as beside its own folder: a LoRA, a pipeline of diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dit_parts import SMALL, write_images
from PIL import Image
from safetensors.torch import load_file

from keygrip import export, sample, train
from keygrip.config import compose
from keygrip.models.nn.flow_matching import seeded_noise
from keygrip.models.patch_dit.context import Conditions


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
    """The images of the adapted run, from the run that it started from and the adapter, and from the export with the
    differences added; the base itself stays."""
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


@pytest.mark.slow  # diffusers takes seconds to import
def test_a_pipeline_of_diffusers_draws_the_same_images(trained: Path, tmp_path: Path) -> None:
    from keygrip.inference.diffusers_pipeline import PatchDiTPipeline

    export.run(compose("export", [f"checkpoint={trained / 'run'}", f"to={tmp_path / 'pipe'}", "format=diffusers"]))
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
    with pytest.raises(ValueError, match="nothing to draw"):
        pipeline()


@pytest.fixture(scope="module")
def piped(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model as a pipeline; its solver is one of second order."""
    folder = tmp_path_factory.mktemp("piped")
    run = ["max_steps=20", f"data.root={trained / 'images'}", f"run_dir={folder / 'run'}", "model.sampling.steps=4"]
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
    assert (drawn["heun"] - drawn["euler"]).abs().max() > 1e-4
    assert (drawn["adams_bashforth"] - drawn["euler"]).abs().max() > 1e-4
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="solver=heun takes steps of its own, and none of FlowMatchHeun"):
        pipeline("a red thing", latents=noise)


@pytest.mark.slow
def test_a_pipeline_turns_photos_as_their_camera_says(piped: Path) -> None:
    from keygrip.inference.diffusers_pipeline import PatchDiTPipeline

    pipeline = PatchDiTPipeline.from_pretrained(str(piped / "pipe"))
    pipeline.set_progress_bar_config(disable=True)
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    turned = wide.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned back to the right
    noise = seeded_noise([3], (pipeline.transformer.module.network.latent_channels, 4, 6))
    straight, same = (np.asarray(pipeline(image=image, latents=noise).images[0]) for image in (wide, turned))
    assert straight.shape == (16, 24, 3)
    assert np.array_equal(straight, same)


@pytest.mark.slow
def test_a_pipeline_in_half_precision_draws_nearly_the_same(piped: Path) -> None:
    """Loaded so or brought there: the network computes in bfloat16, the statistics of features stay float32."""
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
