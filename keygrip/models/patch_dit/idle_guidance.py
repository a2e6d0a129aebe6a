"""Rejection of sampling settings without effect on samples: in `keygrip sample`, in `evaluate` and in Python.

Also warnings about conditions that a model was not trained on, for callers who choose them; an evaluation uses its own.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from keygrip.models.patch_dit.module import PatchDiTModule
from keygrip.models.patch_dit.sampler import Sampling, refuse_idle_interval, refuse_idle_solver

log = logging.getLogger(__name__)

OF_WORDS, OF_IMAGES = ("text_scale", "text_rescale"), ("dino_scale", "dino_rescale", "cls_scale")
OF_BOTH = ("full_scale", "full_rescale")
OF_ONE = ("independent", "none")  # kinds of guidance that need no second condition
OF_TWO = (*OF_BOTH, "guidance")
NOT_OF_WORDS = (*OF_IMAGES, *OF_TWO)  # not read when sampling from text alone


@dataclass(frozen=True)
class GivenConditions:
    """The conditions of all images to be sampled.

    Args:
        words, images: whether there are any. both: whether one sample has both. masks: whether images have masks.
        strength: of an image to start from; None: there is none. redraws_a_part: whether a part of it stays.
    """

    words: bool
    images: bool
    both: bool
    masks: bool = False
    strength: float | None = None
    redraws_a_part: bool = False


def changes_nothing(name: str, value: object) -> bool:
    """Whether the given part of `Sampling` changes nothing if there is only one condition."""
    return value is None or (name in OF_TWO and value in (0, *OF_ONE))


def refuse_idle_guidance(
    module: PatchDiTModule, given: Collection[str], sampling: Sampling, conditions: GivenConditions
) -> None:
    """Refuse settings without effect, and warn about one that the model was not trained for.

    Args:
        given: names of the parts of `Sampling` that the caller gives. sampling: with these parts.

    Raises:
        ValueError: a setting has no effect; the message names the first one.
    """
    for names, has, condition in ((OF_WORDS, conditions.words, "prompt"), (OF_IMAGES, conditions.images, "image")):
        idle = [name for name in names if name in given and not has]
        if idle:
            raise ValueError(f"{idle[0]} has no effect without {condition}: leave it out")
    joint_settings = [name for name in OF_BOTH if name in given and getattr(sampling, name)]
    joint_settings += ["guidance"] if "guidance" in given and sampling.guidance not in OF_ONE else []
    if joint_settings and not conditions.both:
        raise ValueError(f"{joint_settings[0]} is for prompt and image together: leave it out")
    if conditions.strength == 1 and not conditions.redraws_a_part:
        raise ValueError("strength=1 without redraw leaves nothing of start_image: give less, or leave start_image out")
    if conditions.strength not in (None, 1) and module.few_steps is not None:
        raise ValueError(
            f"start_image at strength={conditions.strength:g}: a student of few steps was trained to begin with noise "
            "alone; give strength=1 with redraw, or draw with its teacher"
        )
    strength = 1.0 if conditions.strength is None else conditions.strength
    if "interval" in given:
        ways = [module.sampling_at(size, sampling) for size in module.statistics.latent_sizes]
        refuse_idle_interval(ways, strength)
    if "solver" in given:
        refuse_idle_solver(sampling, strength)
    patches = module.network.use_dino_patches
    idle = [name for name, has in (("image_mask", conditions.masks), ("cls_scale", "cls_scale" in given)) if has]
    if idle and not patches:
        raise ValueError(f"{idle[0]} has no effect: this model was trained without patches, leave it out")
    if "cls_scale" in idle and not module.dropout.cls_alone:
        log.warning("cls_scale: this model never saw a CLS vector without patches (model.dropout.cls_alone is 0)")


def warn_of_untrained(module: PatchDiTModule, conditions: GivenConditions) -> None:
    """Warn about conditions that have less effect than expected, or that the model never received in training."""
    if conditions.images and not module.network.use_dino_patches:
        log.warning("this model was trained without patches: of the image only its overall look counts")
    if conditions.masks and not module.dropout.masked_patches:
        log.warning("image_mask: this model never saw a part of an image's patches (model.dropout.masked_patches is 0)")
