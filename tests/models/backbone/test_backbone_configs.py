"""Every option of the group backbone fits the constructor; the option that needs no weights is built."""

from __future__ import annotations

import inspect

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import keygrip.train  # noqa: F401  (registers the schema)
from keygrip.config import compose, group_options
from keygrip.models.backbone import VARIANTS, DinoBackbone

OPTIONS = group_options("backbone")


def config_of(option: str) -> DictConfig:
    return OmegaConf.create(OmegaConf.to_container(compose("train", [f"backbone={option}", "run_dir=x"]).backbone))


@pytest.mark.parametrize("option", OPTIONS)
def test_config_fits_the_constructor(option):
    config = config_of(option)
    assert config.pop("_target_") == "keygrip.models.backbone.DinoBackbone"
    accepted = set(inspect.signature(DinoBackbone).parameters)
    assert set(config) <= accepted
    assert {"variant", "image_size", "weights", "trainable", "gradient_checkpointing", "stem"} <= set(config)
    variant = VARIANTS[config.variant]
    assert config.image_size % variant.patch_size == 0
    assert config.weights == ("random" if variant.family == "tiny" else "pretrained")


def test_every_variant_has_a_config():
    assert {config_of(option).variant for option in OPTIONS} == set(VARIANTS)


def test_tiny_is_built_from_its_config():
    backbone = instantiate(config_of("tiny"))
    assert isinstance(backbone, DinoBackbone)
    assert backbone.loaded_weights == "random"
    assert (backbone.image_size, backbone.patch_size, backbone.embed_dim) == (192, 16, 128)
    assert backbone.mean == (0.485, 0.456, 0.406)
