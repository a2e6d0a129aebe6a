"""The frozen parts around the patch-conditioned DiT: pictures to latents and back, captions to text states, and the
DINO view of a picture to its CLS and patch features.

`Encoders` joins three parts and is the only thing that the rest of the package sees. Parts load their weights when
they are first used: a training run on finished shards never opens them.

Pictures are uint8 [B, 3, H, W] RGB in 0..255 on the way in and float32 [B, 3, H, W] in 0..1 on the way out.
Legend: B pictures, C h w channels and size of a latent, L text tokens, Dt width of a text state, D of a DINO feature,
gh gw the grid of patches.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from keygrip.models.backbone import DinoBackbone
from keygrip.training.parts import model_part

log = logging.getLogger(__name__)

GREY, COLOUR = "grey", "colour"
SQUARE, ASPECT = "square", "aspect"
GAMMA = 2.2
LUMINANCE = (0.2126, 0.7152, 0.0722)  # Rec. 709, of linear light
INSTALL = "pip install 'keygrip[dit]'"


class Autoencoder(Protocol):
    """Pictures to latents and back. `stride` x `stride` pixels make a latent cell of `channels` numbers."""

    channels: int
    stride: int

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, C, H / stride, W / stride]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """float32 [B, C, h, w] -> float32 [B, 3, h * stride, w * stride] in 0..1."""
        ...

    def to(self, device: torch.device | str) -> Self: ...

    def description(self) -> dict[str, Any]:
        """Plain values from which the part can be told apart from others."""
        ...


class TextEncoder(Protocol):
    """Captions to states of `length` tokens and `width` numbers each."""

    length: int
    width: int

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """float32 [B, L, Dt] with zeros at padding, and bool [B, L], True for tokens, which come first."""
        ...

    def to(self, device: torch.device | str) -> Self: ...

    def description(self) -> dict[str, Any]: ...


# ---- joined ----------------------------------------------------------------------------------------------------------


@model_part
class Encoders:
    """All frozen parts of a patch-conditioned DiT.

    Args:
        autoencoder, text, view: the parts.
        dino_view: "colour", or "grey": DINO is shown the luminance of linear light alone, and colour is left to the
            words.

    Attributes:
        latent_channels, latent_stride, text_dim, text_length, dino_dim: sizes, known without loading anything.
    """

    def __init__(self, autoencoder: Autoencoder, text: TextEncoder, view: DinoView, dino_view: str = COLOUR) -> None:
        if dino_view not in (GREY, COLOUR):
            raise ValueError(f"encoders.dino_view must be {GREY} or {COLOUR}, not {dino_view!r}")
        self.autoencoder, self.text, self.view, self.dino_view = autoencoder, text, view, dino_view
        self.latent_channels, self.latent_stride = autoencoder.channels, autoencoder.stride
        self.text_dim, self.text_length = text.width, text.length
        self.dino_dim = view.width
        self.device: torch.device | str = "cpu"

    def to(self, device: torch.device | str) -> Self:
        """Where the parts run: what goes in may lie anywhere, what comes out lies there."""
        self.device = device
        for part in (self.autoencoder, self.text, self.view):
            part.to(device)
        return self

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> latents, float32 [B, C, h, w].

        Raises:
            ValueError: H or W does not divide by the stride.
        """
        stride = self.latent_stride
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"pictures are uint8 [B, 3, H, W], got {images.dtype} {list(images.shape)}")
        if images.shape[2] % stride or images.shape[3] % stride:
            raise ValueError(
                f"a picture of {images.shape[3]} x {images.shape[2]} pixels does not divide by the latent's stride of "
                f"{stride}"
            )
        with torch.no_grad():
            return self.autoencoder.encode(images.to(self.device)).float()

    def decode_latents(self, latents: Tensor) -> Tensor:
        """float32 [B, C, h, w] -> pictures, float32 [B, 3, H, W] in 0..1."""
        with torch.no_grad():
            return self.autoencoder.decode(latents.to(self.device).float()).float().clamp(0, 1)

    def encode_text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States float32 [B, L, Dt], zeros at padding, and mask bool [B, L]."""
        with torch.no_grad():
            states, mask = self.text.encode(captions)
        return states.to(self.device), mask.to(self.device)

    def encode_view(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, vh, vw], of `view_size` -> cls float32 [B, D] and patches float32 [B, gh * gw, D], raw."""
        if views.dtype != torch.uint8 or views.ndim != 4:
            raise ValueError(f"DINO views are uint8 [B, 3, h, w], got {views.dtype} {list(views.shape)}")
        with torch.no_grad():
            pixels = views.to(self.device).float() / 255
            return self.view.encode(grey(pixels) if self.dino_view == GREY else pixels)

    def view_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels of the DINO view of a picture of that size: the whole of it, resized."""
        return self.view.size_of(width, height)

    def dino_grid(self, width: int, height: int) -> tuple[int, int]:
        """(gh, gw) of a picture of that size."""
        view_width, view_height = self.view_size(width, height)
        return view_height // self.view.patch, view_width // self.view.patch

    @property
    def description(self) -> dict[str, Any]:
        """Plain values that tell these encoders from others. Loads what must be looked at for that."""
        seen = {"dino_view": self.dino_view} | ({"gamma": GAMMA} if self.dino_view == GREY else {})
        return {
            **seen,
            "autoencoder": self.autoencoder.description(),
            "text": self.text.description(),
            "view": self.view.description(),
        }

    @property
    def fingerprint(self) -> str:
        """Of the description: shards and checkpoints name the encoders that they were made with."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def quick_fingerprint(self) -> str | None:
        """The fingerprint where it is known without loading large weights."""
        small = isinstance(self.autoencoder, PixelPacking) and isinstance(self.text, RandomWordVectors)
        return self.fingerprint if small and self.view.state() is not None else None

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint: the fingerprint, and the weights of a small DINO."""
        return {"fingerprint": self.fingerprint, "view": self.view.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state` gave.

        Raises:
            ValueError: these are other encoders, and the result would be wrong pictures.
        """
        self.view.load_state(state["view"])
        if self.fingerprint != state["fingerprint"]:
            raise ValueError(
                f"these encoders have the fingerprint {self.fingerprint}, those of the checkpoint "
                f"{state['fingerprint']}: use the same encoders= with the same options as for its shards"
            )


# ---- the DINO view ---------------------------------------------------------------------------------------------------


@model_part(external=["weights_path"])
class DinoView:
    """Features of a small picture of the whole crop, by a frozen DINO.

    Args:
        variant, weights, weights_path, width, depth, heads: of the backbone, as in :class:`DinoBackbone`. Random
            weights are always the same ones.
        size: edge in pixels of a square view.
        shape: "square" stretches every crop to the square view (a fixed number of patches); "aspect" keeps its shape,
            with about as many patches.

    Raises:
        ValueError: an option out of range.
    """

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
    ) -> None:
        from keygrip.models.backbone.architectures import VARIANTS

        if shape not in (SQUARE, ASPECT):
            raise ValueError(f"encoders.view.shape must be {SQUARE} or {ASPECT}, not {shape!r}")
        if variant not in VARIANTS:
            raise ValueError(f"encoders.view.variant={variant!r} is not known; choose one of {', '.join(VARIANTS)}")
        self.patch = VARIANTS[variant].patch_size
        if size % self.patch or size < self.patch:
            raise ValueError(f"encoders.view.size={size} does not divide by the patch size {self.patch} of {variant}")
        self.size, self.shape = size, shape
        self.options: dict[str, Any] = {
            "variant": variant,
            "image_size": size,
            "weights": weights,
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
        """Built when it is first asked for."""
        if self._backbone is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self._backbone = DinoBackbone(**self.options, trainable="frozen").eval().to(self.device)
        return self._backbone

    def to(self, device: torch.device | str) -> Self:
        self.device = device
        if self._backbone is not None:
            self._backbone.to(device)
        return self

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the view of a picture."""
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

    def description(self) -> dict[str, Any]:
        said = {**self.options, "shape": self.shape}
        del said["weights_path"]
        if self._stored:  # known by their content
            said["weights"] = weights_digest(self.backbone)
        else:
            said |= sample_of(self.backbone)
        return said

    @property
    def _stored(self) -> bool:
        """Whether the weights are small enough to travel in a checkpoint: decided without loading them."""
        reduced = any(self.options[name] is not None for name in ("width", "depth", "heads"))
        return self.options["variant"] == "tiny" or reduced

    def state(self) -> dict[str, Tensor] | None:
        """The weights where they are small, to be stored with a model; None where they are known by name."""
        if not self._stored:
            return None
        return {name: value.cpu().clone() for name, value in self.backbone.state_dict().items()}

    def load_state(self, state: dict[str, Tensor] | None) -> None:
        """Takes weights back, wherever they first came from: that place may be gone."""
        if state is not None:
            if self._backbone is None:
                self.options |= {"weights": "random", "weights_path": None}
            self.backbone.load_state_dict(state)


def grey(pixels: Tensor) -> Tensor:
    """Luminance of linear light, shown as a grey picture: [B, 3, H, W] in 0..1 -> the same shape.

    Colours of one luminance under one light become one grey; the usual grey of encoded values would tell them apart.
    """
    weights = torch.tensor(LUMINANCE, device=pixels.device).view(3, 1, 1)
    light = (pixels.clamp(0, 1) ** GAMMA * weights).sum(dim=1, keepdim=True)
    return (light ** (1 / GAMMA)).expand_as(pixels)


def weights_digest(module: nn.Module) -> str:
    """sha256 of all weights of a module, 16 digits."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value.detach().float().cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]


# ---- small parts that need no download -------------------------------------------------------------------------------


@model_part
class PixelPacking:
    """No autoencoder at all: each square of `edge` x `edge` pixels becomes one cell of 3 * edge^2 channels, exactly.

    Channel c * edge^2 + i * edge + j is pixel (i, j) of colour c, in -1..1.
    """

    def __init__(self, edge: int = 8) -> None:
        if edge < 1:
            raise ValueError(f"encoders.autoencoder.edge must be at least 1, not {edge}")
        self.stride, self.channels = edge, 3 * edge * edge

    def encode(self, images: Tensor) -> Tensor:
        return functional.pixel_unshuffle(images.float() / 127.5 - 1, self.stride)

    def decode(self, latents: Tensor) -> Tensor:
        return (functional.pixel_shuffle(latents, self.stride) + 1) / 2

    def to(self, device: torch.device | str) -> Self:
        return self

    def description(self) -> dict[str, Any]:
        return {"kind": "pixel packing", "edge": self.stride}


@model_part
class RandomWordVectors:
    """A frozen text encoder without training: every word has one random vector for ever, every place another.

    A word's vector is drawn from a generator seeded by the word itself, so that there is no vocabulary and no unknown
    word. State i is word vector + 0.5 * place vector i. Words are runs of letters or digits, in lower case; other signs
    count as words of their own.

    Args:
        length: tokens; longer captions are cut off there, which is said once.
        width: of a state.
    """

    def __init__(self, length: int = 16, width: int = 64) -> None:
        if length < 1 or width < 1:
            raise ValueError(f"encoders.text: length {length} and width {width} must be at least 1")
        self.length, self.width = length, width
        self._said = False

    def tokens(self, caption: str) -> list[str]:
        """The words of a caption, as many as fit."""
        words = re.findall(r"[^\W\d_]+|\d+|[^\w\s]|_", caption.lower())
        if len(words) > self.length and not self._said:
            self._said = True
            log.warning("captions of more than %d words are cut off, the first: %s", self.length, caption[:100])
        return words[: self.length]

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        states = torch.zeros(len(captions), self.length, self.width)
        mask = torch.zeros(len(captions), self.length, dtype=torch.bool)
        for row, caption in enumerate(captions):
            for place, word in enumerate(self.tokens(caption)):
                vector = random_vector(f"word {word}", self.width) + 0.5 * random_vector(f"place {place}", self.width)
                states[row, place] = torch.from_numpy(vector)
                mask[row, place] = True
        return states, mask

    def to(self, device: torch.device | str) -> Self:
        return self

    def description(self) -> dict[str, Any]:
        # one drawn number: another random generator would be another encoder
        probe = round(float(random_vector("word cube", self.width)[0]), 6)
        return {"kind": "random word vectors", "length": self.length, "width": self.width, "probe": probe}


@lru_cache(maxsize=65536)
def random_vector(name: str, width: int) -> np.ndarray:
    """float32 [width] of standard normal numbers, a function of the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    vector.setflags(write=False)
    return vector


# ---- the real ones ---------------------------------------------------------------------------------------------------


@model_part(external=["source"])
class FluxAutoencoder:
    """diffusers' AutoencoderKL with 16 channels, as FLUX.1 has it. Latents are (mean - shift) * scale of its config.

    Args:
        source: a local folder with its config.json, or a name on the Hugging Face hub.
        subfolder: where a larger model keeps it; of no account where `source` is the part's own folder.
        dtype: of its weights. channels, stride: what it is expected to have.
    """

    def __init__(
        self,
        source: str,
        subfolder: str | None = "vae",
        dtype: str = "bfloat16",
        channels: int = 16,
        stride: int = 8,
    ) -> None:
        self.source, self.subfolder, self.dtype = source, subfolder, named_dtype(dtype)
        self.channels, self.stride = channels, stride
        self.device: torch.device | str = "cpu"
        self._model: Any = None

    @property
    def model(self) -> Any:
        """Loaded when it is first asked for.

        Raises:
            ImportError: diffusers is not installed. FileNotFoundError: not there. ValueError: another kind of model.
        """
        if self._model is None:
            try:
                from diffusers import AutoencoderKL
            except ImportError as error:
                raise ImportError(f"the FLUX autoencoder needs diffusers: {INSTALL}") from error
            folder = subfolder_of(self.source, self.subfolder)
            arguments = {"torch_dtype": self.dtype, **({"subfolder": folder} if folder else {})}
            model = from_source(AutoencoderKL, self.source, "the autoencoder", arguments)
            factor = 2 ** (len(model.config.block_out_channels) - 1)
            if (model.config.latent_channels, factor) != (self.channels, self.stride):
                raise ValueError(
                    f"{self.source} has latents of {model.config.latent_channels} channels and stride {factor}; "
                    f"{self.channels} and {self.stride} are asked for (encoders.autoencoder)"
                )
            self._model = model.eval().requires_grad_(False).to(self.device)
        return self._model

    def to(self, device: torch.device | str) -> Self:
        self.device = device
        if self._model is not None:
            self._model.to(device)
        return self

    def encode(self, images: Tensor) -> Tensor:
        """The mean of the posterior: the same picture always gives the same latent."""
        model = self.model
        pixels = (images.float() / 127.5 - 1).to(self.device, self.dtype)
        mean = model.encode(pixels).latent_dist.mode().float()
        return (mean - (model.config.shift_factor or 0.0)) * model.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        model = self.model
        raw = latents.float() / model.config.scaling_factor + (model.config.shift_factor or 0.0)
        return (model.decode(raw.to(self.device, self.dtype)).sample.float() + 1) / 2

    def description(self) -> dict[str, Any]:
        names = ("latent_channels", "block_out_channels", "scaling_factor", "shift_factor")
        config = {name: getattr(self.model.config, name) for name in names}
        return {"kind": "AutoencoderKL", "config": config, **sample_of(self.model)}


@model_part(external=["source"])
class T5Text:
    """The encoder of a T5 model: the hidden states of its last layer.

    Args:
        source: a local folder with config.json and the tokenizer's files, or a name on the Hugging Face hub.
        length: tokens; captions are cut off there, and padded up to there.
        width: of a state (the model's d_model). dtype: of its weights.
        subfolder, tokenizer_subfolder: where a larger model keeps them ("text_encoder_2", "tokenizer_2" in FLUX.1's
            folder).
    """

    def __init__(
        self,
        source: str,
        length: int = 512,
        width: int = 4096,
        dtype: str = "bfloat16",
        subfolder: str | None = None,
        tokenizer_subfolder: str | None = None,
    ) -> None:
        self.source, self.length, self.width, self.dtype = source, length, width, named_dtype(dtype)
        self.subfolder, self.tokenizer_subfolder = subfolder, tokenizer_subfolder
        self.device: torch.device | str = "cpu"
        self._parts: tuple[Any, Any] | None = None

    @property
    def parts(self) -> tuple[Any, Any]:
        """Tokenizer and model, loaded when first asked for.

        Raises:
            ImportError: transformers is not installed. FileNotFoundError: not there. ValueError: another width.
        """
        if self._parts is None:
            try:
                from transformers import AutoTokenizer, T5EncoderModel
            except ImportError as error:
                raise ImportError(f"the T5 encoder needs transformers: {INSTALL}") from error
            folders = [subfolder_of(self.source, name) for name in (self.tokenizer_subfolder, self.subfolder)]
            inside: list[dict[str, Any]] = [{"subfolder": folder} if folder else {} for folder in folders]
            tokenizer = from_source(AutoTokenizer, self.source, "the T5 tokenizer", inside[0])
            model = from_source(T5EncoderModel, self.source, "the T5 encoder", {"dtype": self.dtype, **inside[1]})
            if model.config.d_model != self.width:
                raise ValueError(
                    f"{self.source} has states of {model.config.d_model} numbers, encoders.text.width={self.width}"
                )
            self._parts = (tokenizer, model.eval().requires_grad_(False).to(self.device))
        return self._parts

    def to(self, device: torch.device | str) -> Self:
        self.device = device
        if self._parts is not None:
            self._parts[1].to(device)
        return self

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokenizer, model = self.parts
        found = tokenizer(
            list(captions), max_length=self.length, truncation=True, padding="longest", return_tensors="pt"
        )
        ids, mask = (found[name].to(self.device) for name in ("input_ids", "attention_mask"))
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        mask = mask.bool()
        missing = self.length - ids.shape[1]  # what stands behind the longest caption is never computed
        states = functional.pad(states * mask[..., None], (0, 0, 0, missing))
        return states, functional.pad(mask, (0, missing))

    def description(self) -> dict[str, Any]:
        tokenizer, model = self.parts
        sizes = {name: getattr(model.config, name) for name in ("d_model", "d_ff", "num_layers", "num_heads")}
        probe = tokenizer("a red cube left of the blue block")["input_ids"]
        return {"kind": "T5", "length": self.length, "config": sizes, "probe": probe, **sample_of(model)}


def subfolder_of(source: str, subfolder: str | None) -> str | None:
    """None where the source is a folder without that subfolder: it is then the part's own folder."""
    if subfolder and Path(source).is_dir() and not (Path(source) / subfolder).is_dir():
        return None
    return subfolder


def from_source(loader: Any, source: str, what: str, arguments: dict[str, Any]) -> Any:
    """`loader.from_pretrained(source)`, with one line that says what to do where it is not to be had.

    Raises:
        FileNotFoundError: the folder lacks the files, or the hub cannot be reached and holds no copy here.
    """
    try:
        return loader.from_pretrained(source, **arguments)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"{what} cannot be loaded from {source} ({reason}): name a local folder that holds it as the hub ships it, "
            "or download it once with `hf download`"
        ) from error


def named_dtype(name: str) -> torch.dtype:
    """Raises ValueError: not a floating-point type."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype {name!r} is not known; choose one of {', '.join(known)}")
    return known[name]


def sample_of(module: nn.Module) -> dict[str, Any]:
    """A few numbers of a large model's weights: enough to tell two trainings apart without reading all of it."""
    parameters = dict(module.named_parameters())
    digest = hashlib.sha256()
    for name in sorted(parameters)[:: max(1, len(parameters) // 16)]:
        digest.update(name.encode())
        digest.update(parameters[name].detach().flatten()[:64].float().cpu().numpy().tobytes())
    return {"parameters": sum(p.numel() for p in parameters.values()), "sample": digest.hexdigest()[:16]}
