"""What an image model is exported as beside its own folder: a LoRA, a pipeline of diffusers."""

from __future__ import annotations

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
