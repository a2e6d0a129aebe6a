"""Draws images from words, from a reference image, or from both, with a trained patch-conditioned DiT."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from keygrip.artifacts import atomic_write
from keygrip.data.bad_samples import BadSample
from keygrip.data.image_text.crops import Bucket, cut_out, shared_crop
from keygrip.data.image_text.decoding import decode_image
from keygrip.models.patch_dit.context import Conditions
from keygrip.models.patch_dit.figures import as_bytes, image_grid
from keygrip.models.patch_dit.module import PatchDiTModule
from keygrip.models.patch_dit.sampler import Sampling
from keygrip.training.checkpoints import external_files, find_checkpoint, load_module
from keygrip.training.strategies import automatic_precision

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleRequest:
    """One image to draw: its words, its reference image (either may be None) and its seed."""

    prompt: str | None
    image: str | None
    seed: int


def sample(cfg: DictConfig) -> dict[str, Any]:
    """Draws as ``cfg`` says; returns what is printed.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint or image, neither words nor image, an impossible size, or
            encoders other than those that the model was trained with.
    """
    requests = requested(cfg)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    file = find_checkpoint(cfg.checkpoint, cfg.checkpoint_step)
    module = load_module(
        file, map_location=device, expected=PatchDiTModule, trust=tuple(cfg.trust), external=external_files(cfg)
    )
    assert isinstance(module, PatchDiTModule)
    sampling = sampling_of(cfg, module.sampling)
    _refuse_idle(cfg, module)
    bucket = bucket_of(cfg.size, module)
    started = time.perf_counter()
    images, references = draw(module, requests, bucket, sampling, cfg.batch_size)
    wall_s = time.perf_counter() - started
    folder = Path(cfg.run_dir) if cfg.run_dir else _folder_beside(file)
    files = write(folder, requests, images, references)
    log.info("%d images of %s in %.1f s: %s", len(requests), bucket.name, wall_s, folder)
    return {
        "images": [str(path) for path in files[:-1]],
        "grid": str(files[-1]),
        "prompts": [request.prompt for request in requests],
        "references": [request.image for request in requests],
        "seeds": [request.seed for request in requests],
        "size": [bucket.width, bucket.height],
        "sampling": {field.name: getattr(sampling, field.name) for field in fields(sampling)},
        "wall_s": round(wall_s, 3),
        "s_per_image": round(wall_s / len(requests), 3),
    }


def requested(cfg: DictConfig) -> list[SampleRequest]:
    """One request for each pair of words and reference (a single one goes with all of the other) and each seed.

    Raises:
        ValueError: nothing is requested, or lists of different lengths.
    """
    prompts: list[str | None] = [None] if cfg.prompt is None else _listed(cfg.prompt)
    images: list[str | None] = [None] if cfg.image is None else _listed(cfg.image)
    if prompts == [None] and images == [None]:
        raise ValueError('nothing to draw: give prompt="...", image=FILE, or both')
    if cfg.samples < 1 or cfg.batch_size < 1:
        raise ValueError("samples and batch_size must be at least 1")
    count = max(len(prompts), len(images))
    for name, values in (("prompt", prompts), ("image", images)):
        if len(values) not in (1, count):
            raise ValueError(f"{len(prompts)} prompts and {len(images)} images: give as many of each, or one {name}")
    pairs = [(prompts[n % len(prompts)], images[n % len(images)]) for n in range(count)]
    return [SampleRequest(prompt, image, cfg.seed + n) for prompt, image in pairs for n in range(cfg.samples)]


def _listed(value: Any) -> list[str | None]:
    return [str(value)] if isinstance(value, str | int | float) else [str(each) for each in value]


def sampling_of(cfg: DictConfig, usual: Sampling) -> Sampling:
    """The checkpoint's own way of sampling with what was asked for changed."""
    given = {field.name: cfg.get(field.name) for field in fields(usual)}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if "interval" in changed:
        low, high = changed["interval"]
        changed["interval"] = (float(low), float(high))
    return replace(usual, **changed)


def _refuse_idle(cfg: DictConfig, module: PatchDiTModule) -> None:
    """A scale for what is not given would have no effect."""
    for condition, names in (("prompt", ("text_scale", "text_rescale")), ("image", ("dino_scale", "dino_rescale"))):
        for name in names:
            if cfg[condition] is None and cfg[name] is not None:
                raise ValueError(f"{name}={cfg[name]} has no effect without {condition}=...: leave it out")
    if (cfg.prompt is None or cfg.image is None) and (cfg.full_scale or cfg.full_rescale):
        raise ValueError("full_scale and full_rescale are for prompt and image together: leave them out")
    if cfg.image is not None and not module.network.use_dino_patches:
        log.warning("this model was trained without patches: of the image only its overall look counts")


def bucket_of(size: Any, module: PatchDiTModule) -> Bucket:
    """The size to draw, from a number (square), "WIDTHxHEIGHT" or [width, height]; None: the most usual in training.

    Raises:
        ValueError: no size, or sides that do not divide.
    """
    stride = module.encoders.latent_stride
    trained = [Bucket(width * stride, height * stride) for height, width in module.statistics.latent_sizes]
    if size is None:
        return trained[0]
    try:
        sides = [int(side) for side in (str(size).lower().split("x") if isinstance(size, str | int) else size)]
        bucket = Bucket(*(sides * 2 if len(sides) == 1 else sides))
    except (TypeError, ValueError):
        raise ValueError(f"size={size}: give a number (square), WIDTHxHEIGHT or [WIDTH,HEIGHT], in pixels") from None
    step = stride * module.network.patch_size
    if min(bucket.width, bucket.height) < step or bucket.width % step or bucket.height % step:
        raise ValueError(f"size={size}: both sides must be multiples of {step} pixels")
    if bucket not in trained:
        sizes = ", ".join(f"{each.width}x{each.height}" for each in trained)
        log.warning("the model has not seen %dx%d in training; it has seen %s", bucket.width, bucket.height, sizes)
    return bucket


def draw(
    module: PatchDiTModule, requests: Sequence[SampleRequest], bucket: Bucket, sampling: Sampling, batch_size: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Images ``[N, 3, H, W]`` in 0..1 on the CPU, and each reference image as it was cropped ``[3, H, W]``."""
    encoders = module.ready_encoders()
    references = {image: _crops(image, bucket, encoders) for image in dict.fromkeys(r.image for r in requests) if image}
    stride = encoders.latent_stride
    size = bucket.height // stride, bucket.width // stride
    on_gpu = module.device.type == "cuda"
    half = automatic_precision(on_gpu) == "bf16-mixed"
    batches = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
    images = []
    with tqdm(
        total=len(batches) * sampling.steps, desc="sampling", unit="step", delay=2, leave=False, disable=None
    ) as bar:
        for batch in batches:
            conditions = conditions_of(module, batch, references, encoders.dino_grid(bucket.width, bucket.height))
            with torch.autocast(module.device.type, torch.bfloat16, enabled=half):
                found = module.draw(
                    conditions, size, [request.seed for request in batch], sampling, lambda *_: bar.update()
                )
            images.append(found.cpu())
    shown = {name: torch.from_numpy(crop.copy()).permute(2, 0, 1) / 255 for name, (crop, _) in references.items()}
    return torch.cat(images), shown


def conditions_of(
    module: PatchDiTModule, requests: Sequence[SampleRequest], references: dict[str, Any], patch_grid: tuple[int, int]
) -> Conditions:
    """Words and reference images of some requests, as the network takes them."""
    encoders, statistics = module.encoders, module.statistics
    states = mask = cls = patches = None
    if requests[0].prompt is not None:
        states, mask = encoders.encode_text([str(request.prompt) for request in requests])
    if requests[0].image is not None:
        views = np.stack([references[str(request.image)][1] for request in requests])
        raw_cls, raw_patches = encoders.encode_view(torch.from_numpy(views).permute(0, 3, 1, 2).contiguous())
        cls, patches = statistics.normalised("cls", raw_cls), statistics.normalised("patch", raw_patches)
    return Conditions(states, mask, cls, patches, patch_grid).to(module.device)


def _crops(image: str, bucket: Bucket, encoders: Any) -> tuple[Any, Any]:
    """What an image shows of itself at the size to draw, and the DINO view of the very same crop; both uint8 HWC."""
    if not Path(image).exists():
        raise FileNotFoundError(f"image={image}: there is no such file")
    try:
        whole = decode_image(image)
    except BadSample as error:
        raise ValueError(f"image={image} cannot be read as an image: {error.what}") from error
    box = shared_crop(*whole.size, bucket)
    view = encoders.view_size(bucket.width, bucket.height)
    return cut_out(whole, box, (bucket.width, bucket.height)), cut_out(whole, box, view)


def write(
    folder: Path, requests: Sequence[SampleRequest], images: torch.Tensor, references: dict[str, torch.Tensor]
) -> list[Path]:
    """The files: every image, then the grid with a row for each pair of words and reference, the reference first."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[tuple[str | None, str | None], list[torch.Tensor]] = {}
    for request, drawn in zip(requests, images, strict=True):
        first = [] if request.image is None else [references[request.image]]
        rows.setdefault((request.prompt, request.image), first).append(drawn)
    titled = []
    for (prompt, image), shown in rows.items():
        words = prompt if image is None else f"{Path(image).name}: {prompt}" if prompt is not None else Path(image).name
        titled.append((str(words), torch.stack(shown)))
    named = [
        (folder / f"{n:03d}_seed{r.seed}.png", frame)
        for n, (r, frame) in enumerate(zip(requests, as_bytes(images), strict=True))
    ]
    files = []
    for path, frame in [*named, (folder / "grid.png", image_grid(titled))]:
        with atomic_write(path) as file:
            Image.fromarray(frame).save(file, "PNG")
        files.append(path)
    return files


def _folder_beside(checkpoint: Path) -> Path:
    """A new folder for these samples in the run's own."""
    run_folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    return run_folder / "samples" / time.strftime("%Y-%m-%d_%H-%M-%S")
