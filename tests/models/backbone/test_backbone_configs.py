"""Every file of conf/backbone fits the constructor; the one that needs no weights is built from it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from keygrip.models.backbone import VARIANTS, DinoBackbone

CONFIGS = sorted((Path(__file__).parents[3] / "conf" / "backbone").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_fits_the_constructor(path):
    config = OmegaConf.load(path)
    assert config.pop("_target_") == "keygrip.models.backbone.DinoBackbone"
    accepted = set(inspect.signature(DinoBackbone).parameters)
    assert set(config) <= accepted
    assert {"variant", "image_size", "weights", "trainable", "gradient_checkpointing", "stem"} <= set(config)
    variant = VARIANTS[config.variant]
    assert config.image_size % variant.patch_size == 0
    assert config.weights == ("random" if variant.family == "tiny" else "pretrained")
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert all(
        " # " in line for line in lines if line.partition(":")[0] not in ("_target_", "variant") and line[0] != "#"
    )


def test_every_variant_has_a_config():
    assert {OmegaConf.load(path).variant for path in CONFIGS} == set(VARIANTS)


def test_tiny_is_built_from_its_config():
    backbone = instantiate(OmegaConf.load(next(path for path in CONFIGS if path.stem == "tiny")))
    assert isinstance(backbone, DinoBackbone)
    assert backbone.loaded_weights == "random"
    assert (backbone.image_size, backbone.patch_size, backbone.embed_dim) == (192, 16, 128)
    assert backbone.mean == (0.485, 0.456, 0.406)


def test_importing_the_package_does_not_import_timm():
    code = "import sys, keygrip.models.backbone; print('timm' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CONFIGS[0].parents[2]
    )
    assert result.stdout.strip() == "False"
