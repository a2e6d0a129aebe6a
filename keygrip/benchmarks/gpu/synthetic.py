"""Random batches with the shapes of each system's training data, and modules with random weights to train on them.

Shape legend: B batch, A arms, T planned steps, V views, S image side in pixels, F frames, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from keygrip.benchmarks.geometry_vla import untrained as untrained_vla
from keygrip.benchmarks.inference import looking_down
from keygrip.benchmarks.inference import untrained as untrained_volume_query
from keygrip.config import compose
from keygrip.data.batches import (
    ImageTextBatch,
    ImageTextStatistics,
    MultiViewPolicyBatch,
    PolicyBatch,
    VideoTextBatch,
)
from keygrip.data.image_text.datamodule import UNKNOWN
from keygrip.models.geometry.rotations import rotation_exp
from keygrip.training.checkpoints import build_module

INSTRUCTION = "put the red cube into the bowl"
PROMPT_SHARE = 0.75  # share of the text tokens before the answer
CAPTION_TOKENS = 40  # tokens of a usual caption

MakeBatch = Callable[[int], Any]


def volume_query(overrides: Sequence[str]) -> tuple[LightningModule, MakeBatch]:
    """Return a volume-query policy and a function that makes batches of one camera's images."""
    config = compose("train", overrides)
    module, size = untrained_volume_query(config), config.data.image_size

    def make(count: int) -> PolicyBatch:
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(count, 3, size, size, generator=generator)
        intrinsics, world_to_camera = _camera_matrices(size, count)
        targets = _random_targets(generator, count, len(config.data.arms), config.data.horizon)
        return PolicyBatch(**targets, image=image, intrinsics=intrinsics, world_to_camera=world_to_camera)

    return module, make


def geometry_vla(overrides: Sequence[str]) -> tuple[LightningModule, MakeBatch]:
    """Return a geometry-injected policy and a function that makes batches of several cameras' images.

    The tokenizer is a small one trained on the instruction: the pretrained tokenizer would have to be downloaded. The
    number of tokens is nearly the same, and so is the time.
    """
    config = compose("train", overrides)
    tiny = compose("train", ["model=geometry_vla", "data=yam_language", "vlm=tiny"])
    config.vlm.tokenizer = tiny.vlm.tokenizer
    module, size = untrained_vla(config), config.data.image_size
    views = list(config.data.cameras)

    def make(count: int) -> MultiViewPolicyBatch:
        generator = torch.Generator().manual_seed(0)
        intrinsics, world_to_camera = _camera_matrices(size, count)
        depth = torch.rand(count, len(views), size, size, generator=generator) + 0.5
        return MultiViewPolicyBatch(
            **_random_targets(generator, count, len(config.data.arms), config.data.horizon),
            images=_random_bytes(generator, count, len(views), 3, size, size),
            view_intrinsics=intrinsics[:, None].expand(-1, len(views), -1, -1).contiguous(),
            view_world_to_camera=world_to_camera[:, None].expand(-1, len(views), -1, -1).contiguous(),
            depth=depth if config.data.depth else None,
            cameras=tuple(views),
            mean=tuple(config.data.mean),
            std=tuple(config.data.std),
        )

    return module, make


def foveated_vlm(overrides: Sequence[str], frames: int, text_tokens: int) -> tuple[LightningModule, MakeBatch]:
    """Return a video-language model and a function that makes batches of videos with one row of text per video."""
    config = compose("train", overrides)
    module = _built(config)
    size, vocabulary = config.backbone.image_size, config.language.model.vocabulary
    prompt = int(PROMPT_SHARE * text_tokens)

    def make(count: int) -> VideoTextBatch:
        generator = torch.Generator().manual_seed(0)
        answer = (torch.arange(text_tokens) >= prompt).expand(count, -1).contiguous()
        everything = torch.ones(count, text_tokens, dtype=torch.bool)
        return VideoTextBatch(
            frames=_random_bytes(generator, count, frames, 3, size, size),
            frame_mask=torch.ones(count, frames, dtype=torch.bool),
            video_index=torch.arange(count),
            input_ids=torch.randint(3, min(300, vocabulary), (count, text_tokens), generator=generator),
            attention_mask=everything,
            loss_mask=answer,
            answer_mask=answer,
            visual_at=[prompt] * count,
            truncated=0,
            kind=["caption"] * count,
            source=["random"] * count,
            key=[str(row) for row in range(count)],
            texts=[],
            seconds=[tuple(map(float, range(frames)))] * count,
        )

    return module, make


def patch_dit(overrides: Sequence[str], latent: int, patch_grid: int) -> tuple[LightningModule, MakeBatch]:
    """Return a diffusion transformer and a function that makes batches of latents with caption states and DINO
    features."""
    config = compose("train", overrides)
    module = _built(config)
    encoders: Any = module.encoders
    channels, text_dim, length = encoders.latent_channels, encoders.text_dim, encoders.text_length
    width: int = encoders.dino_dim
    grid = (patch_grid, patch_grid)
    statistics = ImageTextStatistics(
        latent_mean=torch.zeros(channels),
        latent_std=torch.ones(channels),
        cls_mean=torch.zeros(width),
        cls_std=torch.ones(width),
        patch_mean=torch.zeros(width),
        patch_std=torch.ones(width),
        text_length=length,
        text_dim=text_dim,
        latent_sizes=[(latent, latent)],
        patch_grids=[grid],
        fingerprint="",
        encoders=encoders.quick_fingerprint or UNKNOWN,
        folder="",
    )
    module.set_statistics(statistics)  # type: ignore[operator]

    def make(count: int) -> ImageTextBatch:
        generator = torch.Generator().manual_seed(0)
        mask = (torch.arange(length) < min(CAPTION_TOKENS, length)).expand(count, -1).contiguous()
        return ImageTextBatch(
            latents=torch.randn(count, channels, latent, latent, generator=generator),
            text_states=torch.randn(count, length, text_dim, generator=generator) * mask[..., None],
            text_mask=mask,
            dino_cls=torch.randn(count, width, generator=generator),
            dino_patches=torch.randn(count, patch_grid**2, width, generator=generator),
            patch_grid=grid,
            captions=[INSTRUCTION] * count,
            keys=[str(row) for row in range(count)],
            records=[{"caption": INSTRUCTION}] * count,
        )

    return module, make


def _built(config: DictConfig) -> LightningModule:
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    return build_module(resolved)


def _camera_matrices(size: int, count: int) -> tuple[Tensor, Tensor]:
    camera = looking_down(size)
    intrinsics, world_to_camera = (
        torch.as_tensor(camera[name], dtype=torch.float32).expand(count, -1, -1).contiguous()
        for name in ("intrinsics", "world_to_camera")
    )
    return intrinsics, world_to_camera


def _random_bytes(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _random_targets(generator: torch.Generator, count: int, arms: int, steps: int) -> dict[str, Any]:
    """Return the fields that the batches of all policies share: poses within reach, in view of `looking_down`."""

    def near(*shape: int) -> Tensor:
        return torch.rand(*shape, 3, generator=generator) * 0.2 + torch.tensor([0.2, -0.1, 0.05])

    def turned(*shape: int) -> Tensor:
        return rotation_exp(torch.rand(*shape, 3, generator=generator))

    return {
        "start_position": near(count, arms),
        "start_quaternion": turned(count, arms),
        "start_gripper": torch.rand(count, arms, generator=generator),
        "position": near(count, arms, steps),
        "quaternion": turned(count, arms, steps),
        "gripper": torch.rand(count, arms, steps, generator=generator),
        "action_is_pad": torch.zeros(count, arms, steps, dtype=torch.bool),
        "keyframe": near(count, arms),
        "demo_index": torch.zeros(count, dtype=torch.long),
        "frame_index": torch.arange(count),
        "instruction": [INSTRUCTION] * count,
    }
