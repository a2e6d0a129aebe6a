"""Generate images from text, from reference images, or from both, with a trained patch-conditioned DiT."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from keygrip.artifacts import nearest_existing, scratch_folder
from keygrip.data.image_text.crops import Bucket, nearest_bucket
from keygrip.inference.adapters import load_lora
from keygrip.inference.given_texts import texts_of
from keygrip.inference.image_files import (
    files_of,
    move_files,
    refuse_folder,
    write_grids,
    write_image,
)
from keygrip.inference.image_requests import SampleRequest, requested
from keygrip.inference.references import (
    Reference,
    conditions_of,
    decoded_file,
    edit_of,
    image_size,
    open_mask,
    open_reference,
    warn_of_cut,
)
from keygrip.inference.steered_images import MOST_PIXELS, strength_of
from keygrip.models.patch_dit.idle_guidance import GivenConditions, refuse_idle_guidance, warn_of_untrained
from keygrip.models.patch_dit.module import PatchDiTModule
from keygrip.models.patch_dit.sampler import NOT_FINITE, Edit, Sampling
from keygrip.progress import Progress
from keygrip.training.checkpoints import external_files, find_checkpoint, load_module, trusted_packages
from keygrip.training.run_folder import new_folder
from keygrip.training.strategies import automatic_autocast

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Steering:
    """Conditions that all images of a command share.

    Args:
        image_masks: files, one for each reference image: where its patches are used. start_image: file to start from.
        strength: how far the result may differ from it. redraw: file, white where the image is generated again.
    """

    image_masks: tuple[str, ...] = ()
    start_image: str | None = None
    strength: float = 1.0
    redraw: str | None = None


def sample(cfg: DictConfig) -> dict[str, Any]:
    """Generate images with the settings of ``cfg`` and return the result that the command prints.

    Raises:
        FileNotFoundError, ValueError: A checkpoint or image does not exist, neither text nor image is given, a size is
            impossible, or the encoders are not those that the model was trained with.
    """
    requests = requested(cfg)
    steering = steering_of(cfg, requests)
    if cfg.run_dir:  # checked before the model is loaded
        refuse_folder(Path(cfg.run_dir))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    file = find_checkpoint(cfg.checkpoint, cfg.checkpoint_step)
    module = load_module(
        file, map_location=device, expected=PatchDiTModule, trust=trusted_packages(cfg), external=external_files(cfg)
    )
    assert isinstance(module, PatchDiTModule)
    if cfg.lora is not None:
        if module.adapter is not None:
            raise ValueError(
                f"lora={cfg.lora}: {cfg.checkpoint} was itself trained with LoRA, whose weights are in it; leave lora "
                "out, or name the checkpoint that it began with"
            )
        if module.guide is not None:
            _leave_out_guide(module, cfg)
        load_lora(module.network, Path(cfg.lora), module.statistics.normalisation)
    options = {field.name: cfg.get(field.name) for field in fields(Sampling)}
    sampling = module.sampling_with(options)
    conditions = GivenConditions(
        words=any(r.prompt for r in requests),
        images=any(r.images for r in requests),
        both=any(r.prompt and r.images for r in requests),
        masks=bool(steering.image_masks),
        strength=None if steering.start_image is None else steering.strength,
        redraws_a_part=steering.redraw is not None,
    )
    set_names = {name for name, value in options.items() if value is not None}
    refuse_idle_guidance(module, set_names, sampling, conditions)
    warn_of_untrained(module, conditions)
    buckets = buckets_of(cfg.size, module, requests, steering)
    files = files_of(requests, buckets)
    target = Path(cfg.run_dir) if cfg.run_dir else _samples_folder(file)
    files.refuse_names(target)

    def shown(number: int) -> list[Tensor]:
        opened = (open_reference(image, buckets[number], module.encoders) for image in requests[number].images)
        return [reference.shown for reference in opened]

    started = time.perf_counter()
    with scratch_folder(nearest_existing(target) / "samples") as scratch:  # on the same file system
        for number, image in draw(module, requests, buckets, sampling, cfg.batch_size, steering):
            write_image(scratch / files.images[number], image)
        wall_s = time.perf_counter() - started
        write_grids(scratch, files, shown)
        folder = target if cfg.run_dir else new_folder(target, time.strftime("%Y-%m-%d_%H-%M-%S"))
        move_files(scratch, folder, files)
    sizes = [[bucket.width, bucket.height] for bucket in buckets]
    shapes = ", ".join(dict.fromkeys(f"{bucket.width}x{bucket.height}" for bucket in buckets))
    log.info("%d images of %s in %.1f s: %s", len(requests), shapes, wall_s, folder)
    return {
        "images": [str(folder / name) for name in files.images],
        "grid": str(folder / files.grids[0]),
        "grids": [str(folder / name) for name in files.grids],
        "prompts": [request.prompt for request in requests],
        "references": [request.reference for request in requests],
        "seeds": [request.seed for request in requests],
        "size": sizes[0],
        "sizes": sizes,
        "sampling": {field.name: getattr(sampling, field.name) for field in fields(sampling)},
        "wall_s": round(wall_s, 3),
        "s_per_image": round(wall_s / len(requests), 3),
    }


def _leave_out_guide(module: PatchDiTModule, cfg: DictConfig) -> None:
    """Remove the guide model. Autoguidance extrapolates away from an earlier state of the same weights. The guide does
    not have the adapter, so the adapter's effect would be multiplied by (1 + guide_scale). Raises ValueError if the
    command requests guidance by the guide."""
    if cfg.guide_scale:
        raise ValueError(
            f"guide_scale={cfg.guide_scale} cannot be had with lora={cfg.lora}: the guide of {cfg.checkpoint} is an "
            "earlier state of its weights, without the adapter; leave one of them out"
        )
    if module.sampling.guide_scale and cfg.guide_scale is None:
        log.warning(
            "with lora there is no guide, and the model's own guide_scale=%g is left out", module.sampling.guide_scale
        )
    module.guide, module.sampling = None, replace(module.sampling, guide_scale=0.0)


def steering_of(cfg: DictConfig, requests: Sequence[SampleRequest]) -> Steering:
    """Return masks and start image. Raises ValueError if a setting has no effect or the number of masks is wrong."""
    masks = () if cfg.image_mask is None else tuple(texts_of("image_mask", cfg.image_mask))
    for index, request in enumerate(requests):
        if masks and len(masks) != len(request.images):
            raise ValueError(
                f"{len(masks)} masks (image_mask) for the {len(request.images)} images of request {index}: give one "
                "for each image that steers"
            )
    if cfg.start_image is None and (cfg.redraw is not None or cfg.strength is not None):
        raise ValueError("strength and redraw are for start_image=FILE: leave them out")
    return Steering(masks, cfg.start_image, strength_of(cfg.strength, cfg.redraw is not None), cfg.redraw)


def buckets_of(
    size: Any, module: PatchDiTModule, requests: Sequence[SampleRequest], steering: Steering
) -> list[Bucket]:
    """Return the size of each request. If none is given, it is the trained size closest in aspect ratio to the start
    image or else the first reference; without images it is the most common size in training. Warns of each image that
    is cropped for it."""
    usual = bucket_of(size, module)
    if size is not None:
        return [usual] * len(requests)
    stride = module.encoders.latent_stride
    trained = [Bucket(width * stride, height * stride) for height, width in module.statistics.latent_sizes]
    start = [] if steering.start_image is None else [("start_image", steering.start_image)]
    sources = [[*start, *(("image", image) for image in request.images)] for request in requests]
    images = dict.fromkeys(source for each in sources for source in each)
    sizes = {(name, image): image_size(image, name) for name, image in images}
    buckets = [nearest_bucket(*sizes[each[0]], trained) if each else usual for each in sources]
    fitted = dict.fromkeys((source, bucket) for each, bucket in zip(sources, buckets, strict=True) for source in each)
    for (name, image), bucket in fitted:
        warn_of_cut(sizes[name, image], bucket, f"{name}={image}", "size=WIDTHxHEIGHT")
    return buckets


def bucket_of(size: Any, module: PatchDiTModule) -> Bucket:
    """Return the size from a number (square), "WIDTHxHEIGHT" or [width, height]. None: the most common size in
    training.

    Raises:
        ValueError: It is not a size, or its sides are not divisible by the step.
    """
    stride = module.encoders.latent_stride
    trained = [Bucket(width * stride, height * stride) for height, width in module.statistics.latent_sizes]
    if size is None:
        return trained[0]
    try:
        sides = [
            _whole_pixels(side) for side in (str(size).lower().split("x") if isinstance(size, str | int) else size)
        ]
        bucket = Bucket(*(sides * 2 if len(sides) == 1 else sides))
    except (TypeError, ValueError):
        raise ValueError(f"size={size}: give a number (square), WIDTHxHEIGHT or [WIDTH,HEIGHT], in pixels") from None
    step = stride * module.network.patch_size
    if bucket.width * bucket.height > MOST_PIXELS:
        raise ValueError(f"size={size}: an image has at most {MOST_PIXELS} pixels")
    if min(bucket.width, bucket.height) < step or bucket.width % step or bucket.height % step:
        raise ValueError(f"size={size}: both sides must be multiples of {step} pixels")
    if bucket not in trained:
        sizes = ", ".join(f"{each.width}x{each.height}" for each in trained)
        log.warning("the model has not seen %dx%d in training; it has seen %s", bucket.width, bucket.height, sizes)
    return bucket


def _whole_pixels(side: Any) -> int:
    if isinstance(side, float) and not side.is_integer():
        raise ValueError(f"{side} is no number of pixels")
    return int(side)


def batches_of(requests: Sequence[SampleRequest], buckets: Sequence[Bucket], batch_size: int) -> Iterator[list[int]]:
    """Yield indices of requests of one batch: same size, all or none with prompt, equally many images."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for index, (request, bucket) in enumerate(zip(requests, buckets, strict=True)):
        kinds.setdefault((bucket, request.prompt is None, len(request.images)), []).append(index)
    for members in kinds.values():
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def draw(
    module: PatchDiTModule,
    requests: Sequence[SampleRequest],
    buckets: Sequence[Bucket],
    sampling: Sampling,
    batch_size: int,
    steering: Steering,
) -> Iterator[tuple[int, Tensor]]:
    """Yield index and image ``[3, H, W]`` in 0..1 on the CPU of each request. Only one batch is in memory."""
    encoders = module.ready_encoders()
    stride = encoders.latent_stride
    batches = list(batches_of(requests, buckets, batch_size))
    if len(batches) > 1:  # checked before anything is generated
        for image in dict.fromkeys(image for request in requests for image in request.images):
            decoded_file(image, "image")
    opened: dict[str, Reference] = {}  # the references of one batch
    with Progress(total=len(batches) * sampling.steps, desc="sampling", unit="step", leave=False) as bar:
        for indices in batches:
            bucket, batch = buckets[indices[0]], [requests[index] for index in indices]
            opened = {
                image: open_reference(image, bucket, encoders)
                for image in dict.fromkeys(image for request in batch for image in request.images)
            }
            references = [[opened[image] for image in request.images] for request in batch]
            prompts = [] if batch[0].prompt is None else [str(request.prompt) for request in batch]
            masks = _open_masks(references, steering.image_masks)
            mask_names = [f"image_mask={file}" for file in steering.image_masks]
            conditions = conditions_of(module, prompts, references, masks, mask_names, bucket)
            edit, pixels_and_mask = _prepare_edit(module, bucket, len(batch), steering)
            size = bucket.height // stride, bucket.width // stride
            with automatic_autocast(module.device):
                seeds = [request.seed for request in batch]
                samples = module.draw(conditions, size, seeds, sampling, lambda *_: bar.update(), edit).cpu()
            if not bool(torch.isfinite(samples).all()):
                raise ValueError(NOT_FINITE)
            # unmasked pixels are those of the file, not those that the autoencoder reconstructs
            if pixels_and_mask is not None:
                samples = pixels_and_mask[1] * samples + (1 - pixels_and_mask[1]) * pixels_and_mask[0]
            yield from zip(indices, samples, strict=True)


def _prepare_edit(
    module: PatchDiTModule, bucket: Bucket, count: int, steering: Steering
) -> tuple[Edit | None, tuple[Tensor, Tensor] | None]:
    """Return the latents to start from, and with redraw also the pixels [3, H, W] and the mask [1, H, W]."""
    if steering.start_image is None:
        return None, None
    start = open_reference(steering.start_image, bucket, module.encoders, "start_image")
    mask = None if steering.redraw is None else open_mask(steering.redraw, start, "redraw")
    return edit_of(module, start, mask, steering.strength, count), None if mask is None else (start.shown, mask)


def _open_masks(references: Sequence[Sequence[Reference]], files: Sequence[str]) -> list[list[Tensor]]:
    """Return for each file its mask in every request. It covers the request's image; images may differ."""
    masks = []
    for index, file in enumerate(files):
        images = {each[index].file: each[index] for each in references}
        opened = {name: open_mask(file, image, "image_mask") for name, image in images.items()}
        masks.append([opened[each[index].file] for each in references])
    return masks


def _samples_folder(checkpoint: Path) -> Path:
    """Return the folder of a run or an export that holds a folder of samples for each command."""
    if checkpoint.is_dir():  # an export; evaluations of it are also stored in it
        return checkpoint / "samples"
    run_folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    return run_folder / "samples"
