"""Settings of guidance that have no effect on what is drawn: refused, from the command line and from Python alike."""

from __future__ import annotations

import logging
from collections.abc import Collection

from keygrip.models.nn.flow_matching import noise_levels
from keygrip.models.patch_dit.module import PatchDiTModule
from keygrip.models.patch_dit.sampler import Sampling

log = logging.getLogger(__name__)

OF_WORDS, OF_IMAGES = ("text_scale", "text_rescale"), ("dino_scale", "dino_rescale", "cls_scale")
OF_BOTH = ("full_scale", "full_rescale")
OF_ONE = ("independent", "none")  # kinds of guidance that need no second condition


def refuse_idle_guidance(
    module: PatchDiTModule, given: Collection[str], sampling: Sampling, words: bool, images: bool, masks: bool
) -> None:
    """Refuses settings without effect, and warns of what the model was not trained for.

    Args:
        given: names of the parts of `Sampling` that the caller gives. sampling: with them. words, images, masks:
            whether there are any, in any of the drawings.

    Raises:
        ValueError: names the first of them.
    """
    for names, has, condition in ((OF_WORDS, words, "prompt"), (OF_IMAGES, images, "image")):
        idle = [name for name in names if name in given and not has]
        if idle:
            raise ValueError(f"{idle[0]} has no effect without {condition}: leave it out")
    both = [name for name in OF_BOTH if name in given and getattr(sampling, name)]
    both += ["guidance"] if "guidance" in given and sampling.guidance not in OF_ONE else []
    if both and not (words and images):
        raise ValueError(f"{both[0]} is for prompt and image together: leave it out")
    sizes = module.statistics.latent_sizes
    if "interval" in given and sizes and not any(_visits(module, size, sampling) for size in sizes):
        raise ValueError(
            f"interval={list(sampling.interval)} has no effect: none of the {sampling.steps} steps has a noise level "
            "in it; guidance=none draws so"
        )
    patches = module.network.use_dino_patches
    idle = [name for name, has in (("image_mask", masks), ("cls_scale", "cls_scale" in given)) if has]
    if idle and not patches:
        raise ValueError(f"{idle[0]} has no effect: this model was trained without patches, leave it out")
    if images and not patches:
        log.warning("this model was trained without patches: of the image only its overall look counts")
    if "cls_scale" in idle and not module.dropout.cls_alone:
        log.warning("cls_scale: this model never saw a CLS vector without patches (model.dropout.cls_alone is 0)")
    if masks and not module.dropout.masked_patches:
        log.warning("image_mask: this model never saw a part of an image's patches (model.dropout.masked_patches is 0)")


def _visits(module: PatchDiTModule, size: tuple[int, int], sampling: Sampling) -> bool:
    """Whether a step at latents of (h, w) has a noise level with guidance."""
    low, high = sampling.interval
    levels = noise_levels(sampling.steps, module.sampling_at(size, sampling).timestep_shift)
    return any(low <= level <= high for level in levels[:-1])
