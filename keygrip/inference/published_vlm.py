"""Convert the published video-language model, fVLM, to a keygrip model: `keygrip prepare step=published_vlm`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from keygrip.artifacts import refuse_existing
from keygrip.config import compose
from keygrip.data.video_text.conversations import frame_settings
from keygrip.exporting.folder import CONVERTED_FROM, model_card, write_export
from keygrip.models.backbone.architectures import VARIANTS
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.models.foveated_vlm.published_weights import (
    encoder_sizes,
    load_published,
    read_published,
    refuse_other_language,
)
from keygrip.models.language.decoder import SIZES
from keygrip.models.language.hub import read_config
from keygrip.training.checkpoints import HEADER, WEIGHTS_ARE, Header, build_module
from keygrip.training.metadata import run_metadata

log = logging.getLogger(__name__)

LEAST_TEXT = 64  # minimum number of positions for a question and its answer
VISUAL_SCALE = 0.14  # of the published model, independent of the scale of the language model's embeddings
OVERRIDES = ("experiment=vlm_stage3_published", "model.init_from=null", "backbone.weights=random")


def export_published(
    weights: str,
    language_model: str,
    to: str,
    image_size: int = 224,
    fit: str = "crop",
    max_frames: int = 64,
    image_frames: int = 8,
) -> dict[str, Any]:
    """Write the published model in the format of `keygrip export`. The folder can be given to `keygrip generate`,
    `keygrip evaluate`, `VideoChat.from_pretrained` and `model.init_from`.

    Args:
        weights: a file, a folder with model.safetensors, or a name on the Hugging Face hub (sanps/fVLM-135M).
        language_model: the language model that it was trained from, a folder or a name on the hub. Its config.json
            gives the sizes, and its tokenizer is used.
        to: a new folder. image_size: edge of the square frames in pixels.
        fit: how frames become square (see `fit_image`). The published training used the central square of videos and
            images (according to its download scripts), while the example in its model card stretches them.
        max_frames: longer videos are reduced to that many evenly spaced frames. image_frames: a single image is
            repeated as that many frames, as in training.

    Returns:
        What was written: folder, weights, parameters.

    Raises:
        FileNotFoundError: weights or language model do not exist. FileExistsError: `to` holds something.
        ValueError: They are damaged, belong to another model, or do not match each other.
    """
    refuse_existing(to)
    frame_options = frame_settings(image_size, fit, max_frames, image_frames)
    state, language_config = read_published(weights), read_config(language_model)
    if (kind := getattr(language_config, "model_type", None)) != "llama":
        raise ValueError(
            f"{language_model} is a {kind or 'model without a type'}; the published model has a llama (SmolLM2)"
        )
    sizes = {setting: getattr(language_config, attribute, None) for attribute, setting in SIZES.items()}
    refuse_other_language(state, sizes, weights, language_model)
    if language_config.max_position_embeddings < max_frames + LEAST_TEXT:
        raise ValueError(
            f"{language_model} has a context of {language_config.max_position_embeddings} positions, too few for "
            f"max_frames={max_frames} and a question"
        )
    config = _compose_recipe(language_config, sizes, encoder_sizes(state, weights), language_model, frame_options)
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    module = build_module(resolved)
    assert isinstance(module, FoveatedVLMModule)
    module.network.language.refuse_other(language_config, language_model)
    load_published(module.network, state, weights)
    module.collator.prepare(Path(to), lambda: iter(()))
    module.image_options = frame_options
    content: dict[str, Any] = {"global_step": 0, WEIGHTS_ARE: f"of {weights}"}
    content[HEADER] = Header(resolved, {**run_metadata(), CONVERTED_FROM: weights}).of(module)
    module.on_save_checkpoint(content)
    module_state = module.state_dict()
    card = model_card(Path(to).name, content, module_state, "in float32", {}, module)
    files, facts = module.export_files()
    write_export(to, content, module_state, card, files=files, facts=facts)
    log.info("wrote %s: the published weights of %s, with the tokenizer of %s", to, weights, language_model)
    return {"folder": str(to), "weights": weights, "parameters": sum(each.numel() for each in module.parameters())}


def _compose_recipe(
    language_config: Any,
    sizes: dict[str, Any],
    encoder: dict[str, int],
    language_model: str,
    frame_options: dict[str, Any],
) -> DictConfig:
    """Return the recipe of the published model's last stage, with the sizes of the given weights.

    Args:
        language_config: transformers' configuration of the language model. sizes: its sizes, by their names in
            conf/language. encoder: sizes of the encoder. frame_options: how frames are prepared, see `frame_settings`.
    """
    config = compose("train", OVERRIDES)
    model = config.language.model
    model.update(sizes)
    model.context, model.weights = language_config.max_position_embeddings, "random"
    model.rope_theta = float(
        (getattr(language_config, "rope_parameters", None) or {}).get("rope_theta", model.rope_theta)
    )
    config.language.tokenizer.source = language_model
    config.model.network.visual_scale = VISUAL_SCALE
    config.backbone.image_size = frame_options["image_size"]
    for name in ("fit", "max_frames", "image_frames"):
        config.data[name] = frame_options[name]
    variants = [row for row in VARIANTS.values() if row.family == "dinov2" and not row.registers]
    variant = next((row for row in variants if row.width == encoder["width"]), variants[0])
    config.backbone.variant = variant.name
    for name in ("width", "depth", "heads"):
        if encoder[name] != getattr(variant, name):
            OmegaConf.update(config, f"backbone.{name}", encoder[name], force_add=True)
    return config
