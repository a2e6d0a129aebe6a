"""The DINO view of an image: CLS and patch features from a frozen backbone.

Legend: B images, D width of a DINO feature, gh gw the grid of patches.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from keygrip.models.backbone import DinoBackbone
from keygrip.models.backbone.architectures import VARIANTS
from keygrip.models.backbone.weights import find_weights
from keygrip.models.patch_dit.pretrained import sample_of
from keygrip.training.integrity import tensors_digest
from keygrip.training.parts import ReadWhere, model_part

log = logging.getLogger(__name__)

GREY, COLOUR = "grey", "colour"
SQUARE, ASPECT = "square", "aspect"
GAMMA = 2.2
LUMINANCE = (0.2126, 0.7152, 0.0722)  # Rec. 709, of linear light


# Whether weights are downloaded, and from which file they are read, is set by whoever opens a checkpoint.
@model_part(from_checkpoint={"download": None}, external=["init_from", "weights_path", "download"])
class DinoView:
    """Features of a small image of the whole crop, by a frozen DINO.

    Args:
        variant, weights, init_from, weights_path, width, depth, heads: of the backbone, as in :class:`DinoBackbone`.
            Random weights are always the same.
        size: edge in pixels of a square view.
        shape: "square" stretches every crop to the square view (a fixed number of patches); "aspect" keeps its shape,
            with about as many patches.
        download: fetch pretrained weights that are not on this machine from the hub; a checkpoint alone never causes a
            download.

    Raises:
        ValueError: an option out of range.
    """

    read_where: ClassVar = {"download": ReadWhere("weights", "pretrained")}

    def __init__(
        self,
        variant: str,
        size: int,
        weights: str,
        shape: str = SQUARE,
        weights_path: str | None = None,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        init_from: str | None = None,
        download: bool | None = True,
    ) -> None:
        if shape not in (SQUARE, ASPECT):
            raise ValueError(f"encoders.view.shape must be {SQUARE} or {ASPECT}, not {shape!r}")
        if variant not in VARIANTS:
            raise ValueError(f"encoders.view.variant={variant!r} is not known; choose one of {', '.join(VARIANTS)}")
        self.patch = VARIANTS[variant].patch_size
        if size % self.patch or size < self.patch:
            raise ValueError(f"encoders.view.size={size} does not divide by the patch size {self.patch} of {variant}")
        for name, value in (("width", width), ("depth", depth), ("heads", heads)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"encoders.view.{name}={value!r}: a whole number from 1, or null")
        self.size, self.shape, self.download = size, shape, bool(download)
        self.options: dict[str, Any] = {
            "variant": variant,
            "image_size": size,
            "weights": weights,
            "init_from": init_from,
            "weights_path": weights_path,
            "width": width,
            "depth": depth,
            "heads": heads,
        }
        self.width = width or VARIANTS[variant].width
        self.device: torch.device | str = "cpu"
        self._backbone: DinoBackbone | None = None

    @property
    def backbone(self) -> DinoBackbone:
        """The backbone, built on first use.

        Raises:
            FileNotFoundError: its weights are missing, or a download is needed and not allowed.
        """
        if self._backbone is None:
            local_options = self._cached_weights_options() if not self.download else {}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self._backbone = DinoBackbone(**self.options | local_options, trainable="frozen").eval().to(self.device)
        return self._backbone

    def _cached_weights_options(self) -> dict[str, str]:
        """Options to add so that weights of the hub are read from the cache of an earlier download."""
        variant = VARIANTS[self.options["variant"]]
        source = find_weights(variant, *(self.options[name] for name in ("weights", "weights_path", "init_from")))
        if source is None or source.path is not None:
            return {}
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(variant.hub_name, "model.safetensors")
        if not isinstance(file, str):
            raise FileNotFoundError(
                f"the view's weights, {variant.hub_name} of the hub, are not on this machine, and "
                "encoders.view.download is off, as it is for every checkpoint until its opener says otherwise: name a "
                "file, encoders.view.weights_path=FILE, or let them be fetched, encoders.view.download=true (of a "
                "checkpoint below external: external.encoders.view.download=true)"
            )
        return {"weights_path": file}

    def to(self, device: torch.device | str) -> Self:
        self.device = device
        if self._backbone is not None:
            self._backbone.to(device)
        return self

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the view of an image."""
        if self.shape == SQUARE:
            return self.size, self.size
        stretch = (width / height) ** 0.5
        wide, high = (max(1, round(self.size * s / self.patch)) * self.patch for s in (stretch, 1 / stretch))
        return wide, high

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """float [B, 3, vh, vw] in 0..1 -> cls [B, D], patches [B, N, D], float32."""
        backbone = self.backbone
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (backbone.mean, backbone.std))
        features = backbone((pixels - mean) / std)
        return features.cls.float(), features.patches.float()

    def settings(self) -> dict[str, Any]:
        """The part of `description` that is known without loading weights."""
        settings = {**self.options, "shape": self.shape}
        del settings["weights_path"], settings["init_from"]
        if self._stored:  # identified by their content
            del settings["weights"]
        return settings

    def description(self) -> dict[str, Any]:
        weights = {"weights": weights_digest(self.backbone)} if self._stored else sample_of(self.backbone)
        return {**self.settings(), **weights}

    @property
    def _stored(self) -> bool:
        """Whether the weights are small enough to be stored in a checkpoint: decided without loading them."""
        reduced = any(self.options[name] is not None for name in ("width", "depth", "heads"))
        return self.options["variant"] == "tiny" or reduced

    def state(self) -> dict[str, Tensor] | None:
        """The weights if they are small, to be stored with a model; None if they are known by name."""
        if not self._stored:
            return None
        return {name: value.cpu().clone() for name, value in self.backbone.state_dict().items()}

    def load_state(self, state: dict[str, Tensor] | None) -> None:
        """Load stored weights, independent of their original source, which may no longer exist."""
        if state is None and self._stored:
            raise ValueError("the checkpoint holds no weights of its view")
        if state is not None:
            if self._backbone is None:
                self._refuse_larger_network(sum(value.numel() for value in state.values()))
                self.options |= {"weights": "random", "init_from": None, "weights_path": None}
            self.backbone.load_state_dict(state)

    def _refuse_larger_network(self, stored_count: int) -> None:
        """Raise ValueError if the options need more weights than are stored."""
        depth = self.options["depth"] or VARIANTS[self.options["variant"]].depth
        if 8 * depth * self.width**2 > stored_count:  # a block of a vision transformer has 12 width^2 weights
            raise ValueError(
                f"encoders.view: depth={depth} and width={self.width} are more than the {stored_count} numbers "
                "stored of it"
            )


def grey(pixels: Tensor) -> Tensor:
    """Luminance of linear light as a grey image: [B, 3, H, W] in 0..1 -> the same shape.

    Colours of equal luminance under the same light become the same grey; the usual grey of encoded values would differ.
    """
    weights = torch.tensor(LUMINANCE, device=pixels.device).view(3, 1, 1)
    light = (pixels.clamp(0, 1) ** GAMMA * weights).sum(dim=1, keepdim=True)
    return (light ** (1 / GAMMA)).expand_as(pixels)


def weights_digest(module: nn.Module) -> str:
    """sha256 of all weights of a module, 16 digits."""
    return tensors_digest(module.state_dict())
