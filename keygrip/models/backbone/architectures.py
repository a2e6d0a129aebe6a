"""The table of DINO variants and how each one is built on timm.

DINOv2 (Oquab et al. 2023, arXiv 2304.07193; registers: Darcet et al. 2023, arXiv 2309.16588) is timm's
`VisionTransformer`, DINOv3 (Simeoni et al. 2025, arXiv 2508.10104) is timm's `Eva`. Of DINOv3 only the `_qkvb` models
are used: the plain ones have no query and value biases and silently drop those of a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import timm
import torch
from timm.layers import LayerNorm
from timm.models.eva import Eva
from torch import Tensor, nn

Family = Literal["tiny", "dinov3", "dinov2"]
Stem = Literal["patch", "conv"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Variant:
    """One row of the table: a variant's names elsewhere, and its sizes."""

    name: str
    family: Family
    patch_size: int
    width: int
    depth: int
    heads: int
    registers: int
    timm_name: str | None = None  # architecture in timm
    timm_tag: str | None = None  # its pretrained weights in timm
    official_file: str | None = None  # Meta's file name
    download_page: str | None = None
    table_size: int | None = None  # image side whose position table the checkpoint holds (DINOv2 only)

    @property
    def hub_name(self) -> str:
        """Name of timm's pretrained weights on the Hugging Face hub, if there are any."""
        return f"timm/{self.timm_name}.{self.timm_tag}"


_V3_PAGE = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
_V2_URL = "https://dl.fbaipublicfiles.com/dinov2"


def _v3(name: str, width: int, depth: int, heads: int, timm_name: str, official_file: str) -> Variant:
    return Variant(
        name, "dinov3", 16, width, depth, heads, 4, timm_name, "lvd1689m", official_file, download_page=_V3_PAGE
    )


def _v2(name: str, width: int, heads: int, registers: int, timm_name: str) -> Variant:
    base = name.removesuffix("_reg")
    file = f"{base}_reg4_pretrain.pth" if registers else f"{base}_pretrain.pth"
    return Variant(
        name,
        "dinov2",
        14,
        width,
        12,
        heads,
        registers,
        timm_name,
        "lvd142m",
        file,
        download_page=f"{_V2_URL}/{base}/{file}",
        table_size=518,
    )


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("tiny", "tiny", 16, 128, 4, 2, 4),
        _v3(
            "dinov3_vits16",
            384,
            12,
            6,
            "vit_small_patch16_dinov3_qkvb",
            "dinov3_vits16_pretrain_lvd1689m-08c60483.pth",
        ),
        _v3(
            "dinov3_vits16plus",
            384,
            12,
            6,
            "vit_small_plus_patch16_dinov3_qkvb",
            "dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth",
        ),
        _v3(
            "dinov3_vitb16",
            768,
            12,
            12,
            "vit_base_patch16_dinov3_qkvb",
            "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth",
        ),
        _v3(
            "dinov3_vitl16",
            1024,
            24,
            16,
            "vit_large_patch16_dinov3_qkvb",
            "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth",
        ),
        _v2("dinov2_vits14", 384, 6, 0, "vit_small_patch14_dinov2"),
        _v2("dinov2_vits14_reg", 384, 6, 4, "vit_small_patch14_reg4_dinov2"),
        _v2("dinov2_vitb14", 768, 12, 0, "vit_base_patch14_dinov2"),
        _v2("dinov2_vitb14_reg", 768, 12, 4, "vit_base_patch14_reg4_dinov2"),
    )
}


class ConvStem(nn.Module):
    """Light convolutional stem in place of the linear patch embedding: [B, 3, H, W] -> [B, D, H/16, W/16].

    Convolutions extend across patch borders and retain the position inside a patch, which a linear patch embedding
    trained from scratch is slow to learn ("Early convolutions help transformers see better", Xiao et al. 2021, arXiv
    2106.14881). GroupNorm, not BatchNorm: it uses statistics of one image only, so that two processes compute the same
    weights as one process.

    A 3 x 3 convolution of stride 2 with padding on both sides is centred on the first of the two pixels that its output
    represents; four such layers would put a token's centre on its patch's corner, half a patch off. With padding only
    on the far side in the first three layers, it is within half a pixel of the patch's centre.
    """

    def __init__(self, width: int, channels: tuple[int, int, int] = (24, 48, 96)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for outputs in channels:
            layers += [
                nn.ZeroPad2d((0, 1, 0, 1)),
                nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, bias=False),
                nn.GroupNorm(num_groups=outputs // 8, num_channels=outputs),
                nn.GELU(),
            ]
            inputs = outputs
        layers.append(nn.Conv2d(inputs, width, kernel_size=3, stride=2, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def build_network(
    variant: Variant,
    *,
    stem: Stem,
    image_size: int,
    width: int,
    depth: int,
    heads: int,
    drop_path: float,
) -> nn.Module:
    """Build the bare timm network with random weights and with the rotary periods of Meta's files
    (see `set_rope_periods`)."""
    if variant.family == "tiny":
        network: nn.Module = Eva(
            img_size=image_size,
            patch_size=variant.patch_size,
            num_classes=0,
            global_pool="token",
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            num_reg_tokens=variant.registers,
            use_abs_pos_emb=False,
            use_rot_pos_emb=True,
            rope_type="dinov3",
            rope_temperature=100.0,
            rope_rotate_half=True,
            # DINOv3's LayerScale starts at 1e-5: blocks trained from scratch would stay near the identity
            init_values=None,
            use_fc_norm=False,
            dynamic_img_size=True,
            drop_path_rate=drop_path,
            norm_layer=partial(LayerNorm, eps=1e-5),
        )
        if stem == "conv":
            network.patch_embed.proj = ConvStem(width)  # type: ignore[union-attr]
    else:
        assert variant.timm_name is not None
        network = timm.create_model(
            variant.timm_name,
            pretrained=False,
            num_classes=0,
            dynamic_img_size=True,
            img_size=variant.table_size or image_size,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            drop_path_rate=drop_path,
        )
    rope = getattr(network, "rope", None)
    if rope is not None:
        # Meta computes and stores the periods in bfloat16. Files from other sources do not contain them, hence these
        # initial values.
        set_rope_periods(network, rope.periods.to(torch.bfloat16))
    return network


def set_rope_periods(network: nn.Module, periods: Tensor) -> None:
    """Set the network's rotary periods [E / 4], as float32 and as part of its state dict (timm leaves them out)."""
    rope = network.rope
    assert isinstance(rope, nn.Module)
    current = rope.get_buffer("periods")
    rope.register_buffer("periods", periods.detach().to(current.device, torch.float32, copy=True), persistent=True)


def resample_positions(table: Tensor, grid: tuple[int, int], *, offset: float, antialias: bool) -> Tensor:
    """Resample DINOv2's position table [1, M * M, D] to another patch grid, [1, h * w, D], as in Meta's code.

    Meta's plain models were trained with an offset of 0.1 added to the target size before the scale is computed, and
    without antialiasing; its register models without the offset and with antialiasing. timm always uses antialiasing
    (features off by 0.28).
    """
    side = round(table.shape[1] ** 0.5)
    assert side * side == table.shape[1], "position tables are square"
    height, width = grid
    if (height, width) == (side, side):
        return table
    image = table.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if offset:
        scale = ((height + offset) / side, (width + offset) / side)
        image = nn.functional.interpolate(image, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        image = nn.functional.interpolate(image, size=grid, mode="bicubic", antialias=antialias)
    assert image.shape[-2:] == grid
    return image.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
