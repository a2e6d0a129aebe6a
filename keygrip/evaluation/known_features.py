"""Published image encoders with their weights, as features of images [B, 3, H, W] in 0..1: DINOv3, CLIP, Inception.

Whole images are resized to the input size of each encoder, without a crop. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import inception_v3

from keygrip.artifacts import sha256_file, sha256_of
from keygrip.models.language.hub import ForeignCodeError, checked_tokenizer, from_pretrained, read_weights
from keygrip.models.patch_dit.dino_view import DinoView
from keygrip.training.integrity import load_tensors

Features = Callable[[Tensor], Tensor]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FID_CLASSES = 1008  # classes of the Inception network on whose features the FID is defined; torchvision's has 1000


def known_encoder(kind: str, place: Path, variant: str) -> tuple[Features, str, str]:
    """Return features of images, a name for reports and the SHA-256 of the weights.

    Args:
        kind: "dinov3", the CLS vector; "clip", the projected embedding of CMMD; "inception", the pooled 2048 values.
        place: a file of weights; for "clip" a folder. variant: of DINOv3.

    Raises:
        FileNotFoundError, ValueError: The weights do not exist or belong to another network.
    """
    if kind == "clip":
        features = _load_clip(place)
        return features, f"clip {place.name}", clip_sha256(place)
    if not place.is_file():
        raise FileNotFoundError(f"features.weights={place}: there is no such file")
    if kind == "dinov3":
        return _load_dinov3(place, variant), f"dinov3 {place.name}", sha256_file(place)
    features, name = _load_inception(place)
    return features, f"{name} {place.name}", sha256_file(place)


def _load_dinov3(file: Path, variant: str) -> Features:
    view = DinoView(variant, 224, "pretrained", weights_path=str(file))

    def features(images: Tensor) -> Tensor:
        resized = functional.interpolate(images, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        return view.to(images.device).encode(resized)[0]

    return features


def _load_clip(folder: Path) -> Features:
    """As CMMD is defined: the whole image resized bicubically to the model's size, the projected embedding."""
    from transformers import CLIPVisionModelWithProjection

    network = clip_part(CLIPVisionModelWithProjection, folder)

    def features(images: Tensor) -> Tensor:
        pixels = clip_pixels(images, network.config.image_size)
        found: Tensor = network.to(images.device)(pixel_values=pixels).image_embeds
        return found

    return features


def clip_part(kind: Any, folder: Path) -> Any:
    """Load a tower or the tokenizer of a transformers CLIP, by its class.

    Raises:
        FileNotFoundError: The folder does not exist. ValueError: It does not hold that part, or its weights are in a
            file of PyTorch's that holds more than tensors, which is not executed (`ForeignCodeError`).
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: of clip a folder with config.json and model.safetensors or pytorch_model.bin (of "
            "openai/clip-vit-large-patch14-336: that of CMMD)"
        )
    source, options = str(folder), {"local_files_only": True}
    try:
        if hasattr(kind, "config_class"):  # a tower: in float32, because a figure must not depend on the stored dtype
            return read_weights(kind, source, "CLIP", **options).eval().requires_grad_(False)
        return checked_tokenizer(lambda: from_pretrained(kind, source, **options), source)
    except ForeignCodeError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder} holds no {kind.__name__} of transformers: {reason}") from error


def clip_sha256(folder: Path) -> str:
    """Return the SHA-256 of the files from which `clip_part` reads weights.

    Raises:
        ValueError: There are none with the usual names.
    """
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):  # transformers prefers them in this order
        if files := sorted(folder.glob(pattern)):
            return sha256_of(sha256_file(file).encode() for file in files)
    raise ValueError(f"{folder} has neither model.safetensors nor pytorch_model.bin: give its weights such a name")


def clip_pixels(images: Tensor, edge: int) -> Tensor:
    """Convert images ``[B, 3, H, W]`` in 0..1 to CLIP's input ``[B, 3, edge, edge]``."""
    resized = functional.interpolate(images, (edge, edge), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (resized - mean) / std


# ---- Inception -------------------------------------------------------------------------------------------------------


def _load_inception(file: Path) -> tuple[Features, str]:
    """With the FID's weights (pt_inception-2015-12-05-6726825d.pth) the features are those on which the FID is defined,
    resized as in its PyTorch port. torchvision's weights are from another training."""
    try:
        weights = load_tensors(file)
        is_fid = weights["fc.weight"].shape[0] == FID_CLASSES
        network = fid_inception() if is_fid else _build_torchvision_inception()
        network.load_state_dict(weights)
    except Exception as error:
        raise ValueError(
            f"features.weights={file} are neither the FID's (pt_inception-2015-12-05-6726825d.pth) nor torchvision's "
            f"of inception_v3: {str(error).splitlines()[0]}"
        ) from error
    network.fc = nn.Identity()
    network.eval().requires_grad_(False)

    def features(images: Tensor) -> Tensor:
        if is_fid:
            resized = functional.interpolate(images, (299, 299), mode="bilinear", align_corners=False)
        else:
            resized = functional.interpolate(images, (299, 299), mode="bicubic", antialias=True).clamp(0, 1)
        found: Tensor = network.to(images.device)(resized * 2 - 1)
        return found

    return features, "inception of the FID" if is_fid else "inception of torchvision (no FID)"


def _build_torchvision_inception() -> Any:
    return inception_v3(weights=None, init_weights=False, aux_logits=True)


def fid_inception() -> Any:
    """Inception of December 2015, on whose pooled features the FID is defined (Heusel et al., 2017), built from
    torchvision's parts: average pooling excludes padding, and the last block uses max pooling."""
    network = inception_v3(weights=None, init_weights=False, aux_logits=False, num_classes=FID_CLASSES)
    for name, block in network.named_children():
        if name.startswith("Mixed_") and hasattr(block, "branch_pool"):
            pool = nn.MaxPool2d(3, 1, 1) if name == "Mixed_7c" else nn.AvgPool2d(3, 1, 1, count_include_pad=False)
            block.register_forward_hook(partial(_repool_last_branch, pool))
    return network


def _repool_last_branch(pool: nn.Module, block: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Return a block's output with its last branch recomputed after another pooling."""
    branch: Tensor = block.branch_pool(pool(inputs[0]))
    return torch.cat([output[:, : -branch.shape[1]], branch], dim=1)
