"""Conditions for image generation from opened images: text, references, masks, an image to edit.

The same as `keygrip sample` does with files, for callers that have PIL images.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from keygrip.data.bad_samples import convert_errors
from keygrip.data.image_text.crops import Bucket, nearest_bucket
from keygrip.data.image_text.decoding import refuse_frames, refuse_transparency, upright
from keygrip.inference.references import conditions_of, edit_of, mask_of, reference_of, warn_of_cut
from keygrip.models.patch_dit.context import Conditions
from keygrip.models.patch_dit.idle_guidance import GivenConditions, refuse_idle_guidance, warn_of_untrained
from keygrip.models.patch_dit.module import PatchDiTModule
from keygrip.models.patch_dit.sampler import Edit, Sampling

Images = Image.Image | Sequence[Image.Image] | None
MOST_PIXELS = 2**24  # of a generated image: 4096 x 4096
USUAL_STRENGTH = 0.6  # if an image is changed as a whole


def strength_of(given: float | None, redraws_a_part: bool) -> float:
    """Return how far samples may differ from the start image: the given strength; otherwise 0.6, or 1 if only a part is
    generated again."""
    if given is not None:
        return float(given)
    return 1.0 if redraws_a_part else USUAL_STRENGTH


@dataclass(frozen=True)
class Start:
    """A start image for a batch.

    Args:
        edit: its latents, and where they are kept. pixels: ``[3, H, W]`` in 0..1. redrawn: ``[1, H, W]`` in 0..1, where
            pixels are generated again; None: everywhere.
    """

    edit: Edit
    pixels: Tensor
    redrawn: Tensor | None


class SteeredImages:
    """Text and images that condition some samples, all of one size.

    Args:
        module: the model. prompt, image: one or a list; two lists have equal lengths.
        image_mask: the image's patches are used where it is white; with ``blend`` one for each image.
        blend: all images condition each sample together, by their masks or by their mean.
        start_image: all samples start from it. strength: how far they may differ, in (0, 1]; None: 0.6, with redraw 1.
        redraw: white where the image is generated again; all other pixels stay unchanged.

    Raises:
        ValueError: There is nothing to generate, lists have different lengths, an image cannot be used, or a setting
            has no effect.
    """

    def __init__(
        self,
        module: PatchDiTModule,
        prompt: str | Sequence[str] | None = None,
        image: Images = None,
        image_mask: Images = None,
        blend: bool = False,
        start_image: Image.Image | None = None,
        strength: float | None = None,
        redraw: Image.Image | None = None,
    ) -> None:
        self.module = module
        if prompt is not None and not isinstance(prompt, Sequence):
            raise ValueError(f"prompt is a text or a list of them, not {type(prompt).__name__}")
        prompts = [] if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
        if any(isinstance(each, list | tuple) for each in (start_image, redraw)):
            raise ValueError("start_image and redraw are one image each, for all drawings: call again for others")
        odd = [each for each in prompts if not isinstance(each, str)]
        if odd:
            raise ValueError(f"prompt holds {odd[0]!r}, which is no text")
        images, masks = open_images(image, "image"), open_images(image_mask, "image_mask", mask=True)
        if blend and len(images) < 2:
            raise ValueError("blend=True puts several images together: give image=[IMAGE, IMAGE]")
        steering = [images] if blend else [[each] for each in images]
        self.count = max(len(prompts), len(steering))
        if not self.count:
            raise ValueError("nothing to draw: give prompt, image, or both")
        blank = [place for place, text in enumerate(prompts) if not text.strip()]
        if blank and not images:
            raise ValueError(f"prompt {blank[0]} is empty and no image steers: give a prompt, or image=IMAGE")
        if any(len(given) not in (0, 1, self.count) for given in (prompts, steering)):
            raise ValueError(f"{len(prompts)} prompts and {len(images)} images: give as many of each, or one")
        if masks and len(masks) != (len(images) if blend else min(len(images), 1)):
            each = "one for each image" if blend else "one, for the image of each drawing" if images else "an image too"
            raise ValueError(f"{len(masks)} masks (image_mask) for {len(images)} images: give {each}")
        self.prompts = prompts * self.count if len(prompts) == 1 else prompts
        self.steering = steering * self.count if len(steering) == 1 else steering
        self.images, self.masks = images, masks
        if start_image is None and not (redraw is None and strength is None):
            raise ValueError("strength and redraw are for start_image: leave them out")
        self.start_image = next(iter(open_images(start_image, "start_image")), None)
        self.redraw = next(iter(open_images(redraw, "redraw", mask=True)), None)
        self.strength = strength_of(strength, redraw is not None)

    @property
    def shown(self) -> dict[str, Image.Image]:
        """All images by name. The first, the start image or else the first reference, determines the aspect ratio."""
        start = {} if self.start_image is None else {"start_image": self.start_image}
        return start | {f"image {place}": image for place, image in enumerate(self.images)}

    def refuse_idle(self, given: Collection[str], sampling: Sampling) -> None:
        """Check as `keygrip.models.patch_dit.idle_guidance.refuse_idle_guidance`.

        Args:
            given: names of the fields of `Sampling` that the caller sets. sampling: includes them.

        Raises:
            ValueError: A setting has no effect; the message names the first one.
        """
        has_text = [bool(prompt.strip()) for prompt in self.prompts]
        words, images = any(has_text), bool(self.steering)
        if words and images and not all(has_text) and sampling.full_scale:  # its term uses both conditions
            raise ValueError(
                f"prompt {has_text.index(False)} is empty, and full_scale={sampling.full_scale} is for words and image "
                "together: draw images without words by a call of their own"
            )
        conditions = GivenConditions(
            words=words,
            images=images,
            both=words and images,
            masks=bool(self.masks),
            strength=None if self.start_image is None else self.strength,
            redraws_a_part=self.redraw is not None,
        )
        refuse_idle_guidance(self.module, given, sampling, conditions)
        warn_of_untrained(self.module, conditions)

    def conditions(self, bucket: Bucket) -> Conditions:
        """Return the conditions of all samples, normalised, on the model's device. Raises ValueError if a mask has
        another aspect ratio or excludes all patches."""
        encoders = self.module.encoders
        references = [
            [reference_of(image, bucket, encoders, f"image {place}") for place, image in enumerate(images)]
            for images in self.steering
        ]
        called = [f"image_mask {place}" for place in range(len(self.masks))]
        masks = [
            [mask_of(mask, each[place], called[place]) for each in references] for place, mask in enumerate(self.masks)
        ]
        return conditions_of(self.module, self.prompts, references, masks, called, bucket)

    def start(self, bucket: Bucket, total: int) -> Start | None:
        """Return what ``total`` samples start from; None: noise. Raises ValueError if a mask's aspect ratio differs."""
        if self.start_image is None:
            return None
        start = reference_of(self.start_image, bucket, self.module.encoders, "start_image")
        mask = None if self.redraw is None else mask_of(self.redraw, start, "redraw")
        return Start(edit_of(self.module, start, mask, self.strength, total), start.shown, mask)


def open_images(images: Images, name: str, mask: bool = False) -> list[Image.Image]:
    """Return one image or several as 8-bit RGB, rotated according to their EXIF orientation.

    Args:
        name: of the setting, for messages. mask: the images are masks, which must not have transparent parts.

    Raises:
        ValueError: An image is not a PIL image, has several frames or pages, cannot be decoded (PIL decodes the pixels
            of an opened file at their first use), or cannot be converted.
    """
    upright_images = []
    listed: Sequence[Any] = () if images is None else images if isinstance(images, list | tuple) else (images,)
    for index, image in enumerate(listed):
        if not isinstance(image, Image.Image):
            raise ValueError(f"{name} {index} is a {type(image).__name__}: give PIL images")
        with convert_errors(f"{name} {index}", lambda where, what: ValueError(f"{where} cannot be used: {what}")):
            refuse_frames(image)
            if not min(image.size):
                raise ValueError("it has no pixels")
            if mask:
                refuse_transparency(image)
            upright_images.append(upright(image))
    return upright_images


def bucket_of(
    module: PatchDiTModule, images: Mapping[str, Image.Image], height: int | None, width: int | None
) -> Bucket:
    """Return the size of the images to generate: the given one, or else the trained size that is closest in aspect
    ratio to the first image, without images the most common.

    Raises:
        ValueError: The size is too large, not whole or not divisible.
    """
    stride = module.encoders.latent_stride
    if height is not None or width is not None:
        sides = (height if width is None else width), (width if height is None else height)
        if any(side is not None and side != int(side) for side in sides):
            raise ValueError(f"height={height}, width={width}: both are whole numbers of pixels")
        bucket = Bucket(int(sides[0] or 0), int(sides[1] or 0))
        step = stride * module.network.patch_size
        if bucket.width * bucket.height > MOST_PIXELS:
            raise ValueError(f"height={bucket.height}, width={bucket.width}: an image has at most {MOST_PIXELS} pixels")
        if min(bucket.width, bucket.height) < step or bucket.width % step or bucket.height % step:
            raise ValueError(f"height={bucket.height}, width={bucket.width}: both must be multiples of {step} pixels")
        return bucket
    trained = [Bucket(w * stride, h * stride) for h, w in module.statistics.latent_sizes]
    if not images:
        return trained[0]
    bucket = nearest_bucket(*next(iter(images.values())).size, trained)
    for name, image in images.items():
        warn_of_cut(image.size, bucket, name, "height and width")
    return bucket
