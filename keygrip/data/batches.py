"""Typed batches, which data modules pass to training modules.

Legend of shapes: B samples, A arms, T future steps, V views, S image size. For videos with text: V videos, F frames, L
tokens. For images with text: C, h, w channels and size of a latent, D width of a DINO feature, Dt width of a text
state, gh and gw rows and columns of the patch grid.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import default_collate

from keygrip.data.video_text.sample_types import Conversation as Conversation
from keygrip.data.video_text.sample_types import Turn as Turn
from keygrip.data.video_text.sample_types import VideoTextSample as VideoTextSample

CLOSED = 0.5  # a gripper with a smaller opening counts as closed


class Movable:
    """Mixin for dataclasses: moves or changes all tensors of a batch together."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with `change` applied to each tensor."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}  # type: ignore[arg-type]
        return type(self)(**{k: change(v) if isinstance(v, Tensor) else v for k, v in values.items()})

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> Self:
        """Move to a device. Only floats change to `dtype` (indices stay integers, masks stay bool).

        Tensors in page-locked memory are always copied to a GPU asynchronously: Lightning passes `non_blocking` for
        plain tensors only."""

        def move(tensor: Tensor) -> Tensor:
            asynchronous = non_blocking or (
                device is not None and torch.device(device).type == "cuda" and tensor.is_pinned()
            )
            return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=asynchronous)

        return self.map(move)

    def pin_memory(self) -> Self:
        """Return a copy in page-locked memory, from which copies to a GPU run in parallel to the computation."""
        return self.map(Tensor.pin_memory)


@dataclass
class PolicyTargets(Movable, ABC):
    """The current poses and the target poses of the arms, which all batches for policies contain.

    Args:
        start_position: float32 [B, A, 3] metres, start_quaternion [B, A, 4] w x y z, start_gripper [B, A]: the measured
            pose at the current frame.
        position: float32 [B, A, T, 3], quaternion [B, A, T, 4], gripper [B, A, T]: the targets.
        action_is_pad: bool [B, A, T], True where the step lies past the end of the demo and repeats the last pose.
        keyframe: float32 [B, A, 3] metres: the target at the next frame in which the gripper closes or opens, or at the
            demo's last frame (keyframes of James and Davison, 2022, arXiv:2105.14829).
        start_joints: float32 [B, A, J] radians, joints: float32 [B, A, T, J]: measured joint angles, now and at the
            targets; None if the model does not read them.
        controller: float32 [B, A, T, D]: the commands that the robot's own controller received on the way to each
            target; None if the model does not read them.
        embodiment: int64 [B], index of the robot among the model's robots; None if the model does not distinguish them.
        demo_index: int64 [B], into the data module's list of demos. frame_index: int64 [B].
        instruction: B sentences.
    """

    start_position: Tensor
    start_quaternion: Tensor
    start_gripper: Tensor
    position: Tensor
    quaternion: Tensor
    gripper: Tensor
    action_is_pad: Tensor
    keyframe: Tensor
    demo_index: Tensor
    frame_index: Tensor
    instruction: list[str]
    start_joints: Tensor | None = field(default=None, kw_only=True)
    joints: Tensor | None = field(default=None, kw_only=True)
    controller: Tensor | None = field(default=None, kw_only=True)
    embodiment: Tensor | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.position)

    @classmethod
    def collate(cls, samples: Sequence[Self]) -> Self:
        """Stack samples into a batch; in a loader worker, directly into shared memory.

        Each sample has the batch's tensors without the first dimension, and one sentence as `instruction`. Fields that
        are neither tensors nor sentences are the same in all samples.
        """
        values: dict[str, Any] = {}
        for part in fields(cls):
            column = [getattr(sample, part.name) for sample in samples]
            if part.name == "instruction":
                values[part.name] = column
            else:
                values[part.name] = default_collate(column) if isinstance(column[0], Tensor) else column[0]
        return cls(**values)


@dataclass
class PolicyBatch(PolicyTargets):
    """Samples for a policy with one camera. The poses are in metres and quaternions only: the training module projects
    and bins them on its device.

    Args (in addition to those of `PolicyTargets`):
        image: float32 [B, 3, S, S], normalised with the backbone's mean and std (here and nowhere else).
        intrinsics: float32 [B, 3, 3], of that (augmented and resized) image.
        world_to_camera: float32 [B, 4, 4].
        detail: uint8 [B, 3, Q, Q], the same crop at a higher resolution, in the same colours and not normalised; None
            if it was not requested.
    """

    image: Tensor
    intrinsics: Tensor
    world_to_camera: Tensor
    detail: Tensor | None = None


@dataclass
class MultiViewPolicyBatch(PolicyTargets):
    """Samples for a policy with V cameras.

    `image`, `intrinsics` and `world_to_camera` belong to the first camera, as in a `PolicyBatch`: a policy with one
    camera can train on both types.

    Args (in addition to those of `PolicyTargets`):
        images: uint8 [B, V, 3, S, S] RGB, augmented, not normalised: encoders differ in their mean and std (see
            `normalised`), and caches with the content as key need bytes.
        view_intrinsics: float32 [B, V, 3, 3], of those images.
        view_world_to_camera: float32 [B, V, 4, 4].
        depth: float32 [B, V, S, S] metres along the optical axis, 0 where unknown; None if it was not requested.
        cameras: V names, in the order of the views.
        mean, std: of the backbone, for `image`.
        detail: uint8 [B, 3, Q, Q], of the first camera, as in a `PolicyBatch`; None if it was not requested.
        view_mask: bool [B, V], True for existing views, False for black images in place of cameras that a demo lacks or
            that were dropped at random; None: all views exist.
    """

    images: Tensor
    view_intrinsics: Tensor
    view_world_to_camera: Tensor
    depth: Tensor | None
    cameras: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    detail: Tensor | None = None
    view_mask: Tensor | None = None

    def normalised(self, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Return the images normalised for an encoder with this mean and std, float32 [B, V, 3, S, S]."""
        return normalised(self.images, mean, std)

    @property
    def image(self) -> Tensor:
        """float32 [B, 3, S, S] of the first camera, normalised."""
        return normalised(self.images[:, 0], self.mean, self.std)

    @property
    def intrinsics(self) -> Tensor:
        """[B, 3, 3] of the first camera, pixels."""
        return self.view_intrinsics[:, 0]

    @property
    def world_to_camera(self) -> Tensor:
        """[B, 4, 4] of the first camera, metres."""
        return self.view_world_to_camera[:, 0]


PolicyBatch.register(MultiViewPolicyBatch)  # it has every attribute of a PolicyBatch and can replace one


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise uint8 images per channel to float32 [..., 3, S, S], on their device: bytes transfer faster."""
    # not created on the device: that would wait for all work queued there
    scale, shift = (torch.tensor(v).view(3, 1, 1).to(images.device, non_blocking=True) for v in (std, mean))
    return (images.float() / 255 - shift) / scale


@dataclass
class VideoTextBatch(Movable):
    """B rows of text about V videos: a row is a conversation, and several rows may share a video.

    Args:
        frames: uint8 [V, F, 3, S, S] as read from the disk (see `normalised`); F may be 0.
        frame_mask: bool [V, F], True for real frames; padding frames (zeros) come after them.
        video_index: int64 [B], the video of each row; 0 <= video_index < V.
        input_ids: int64 [B, L], without the visual tokens, padded on the right.
        attention_mask: bool [B, L], True for real tokens; padding is identified by its position, never by a token id.
        loss_mask: bool [B, L], True where the loss includes the token.
        answer_mask: bool [B, L], True for the assistant's words and the token that ends its turn, independent of
            `loss_mask`.
        visual_at: B positions in the text before which the visual tokens are inserted.
        truncated: rows whose last turns were left out because they do not fit.
        kind, source, key: B strings. texts: the B conversations, for tables and images.
        left_out: conversations of the samples that became no row: none of their answers fits or contributes to the
            loss.
        seconds: for each of the V videos the times at which its frames were taken; () for images without a common time,
            None if the times are unknown; [] instead of the list if they were not read.
        clips: number of videos that are clips of longer videos.
    """

    frames: Tensor
    frame_mask: Tensor
    video_index: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    answer_mask: Tensor
    visual_at: list[int]
    truncated: int
    kind: list[str]
    source: list[str]
    key: list[str]
    texts: list[Conversation]
    left_out: int = 0
    seconds: list[tuple[float, ...] | None] = field(default_factory=list)
    clips: int = 0

    def sizes(self) -> dict[str, int]:
        """Return the numbers of videos, frames, rows and text tokens, for reports."""
        frames, tokens = int(self.frame_mask.sum()), int(self.attention_mask.sum())
        return {"videos": len(self.frame_mask), "frames": frames, "rows": len(self), "text_tokens": tokens}

    def __len__(self) -> int:
        return len(self.input_ids)

    def seconds_of(self, row: int) -> tuple[float, ...] | None:
        """Return the times at which the frames of a row's video were taken; None if they are unknown."""
        return self.seconds[int(self.video_index[row])] if self.seconds else None

    def normalised(self, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Return the frames normalised for the backbone, float32 [V, F, 3, S, S]."""
        return normalised(self.frames, mean, std)

    def first_videos(self, frames: int) -> Self:
        """Return the first videos with at most `frames` frames in total (at least one video), and their rows."""
        count = max(1, int((self.frame_mask.sum(1).cumsum(0) <= frames).sum()))
        longest = int(self.frame_mask[:count].sum(1).max()) if len(self.frame_mask) else 0
        rows = (self.video_index < count).nonzero()[:, 0]
        kept_rows = rows.tolist()
        length = int(self.attention_mask[rows].sum(1).max()) if kept_rows else 0
        columns = ("input_ids", "attention_mask", "loss_mask", "answer_mask")
        values: dict[str, Any] = {name: getattr(self, name)[rows, :length] for name in columns}
        lists = ("visual_at", "kind", "source", "key", "texts")
        values |= {name: [getattr(self, name)[row] for row in kept_rows] for name in lists}
        values |= {name: getattr(self, name)[:count, :longest] for name in ("frames", "frame_mask")}
        return replace(self, video_index=self.video_index[rows], seconds=self.seconds[:count], **values)

    def answering(self, kinds: Collection[str]) -> Self:
        """Return the same rows; only rows of the given kinds keep their answer mask and their loss mask."""
        kept = torch.tensor([kind in kinds for kind in self.kind], device=self.loss_mask.device)[:, None]
        return replace(self, loss_mask=self.loss_mask & kept, answer_mask=self.answer_mask & kept)


@dataclass
class ImageTextBatch(Movable):
    """B images of one aspect bucket with their text, as features of frozen encoders: nothing is normalised here.

    The latent and the DINO view show the same crop of the same image. In coordinates that run from 0 to 1 over that
    crop, latent cell (i, j) has its centre at ((i + 0.5) / h, (j + 0.5) / w) and patch (i, j) at ((i + 0.5) / gh,
    (j + 0.5) / gw), in every bucket.

    Args:
        latents: float32 [B, C, h, w], as `encoders.encode_images` returns them and `decode_latents` accepts them.
        text_states: float32 [B, L, Dt], zeros where `text_mask` is False.
        text_mask: bool [B, L], True for real tokens, which come before the padding.
        dino_cls: float32 [B, D]. dino_patches: float32 [B, gh * gw, D], in row-major order.
        patch_grid: (gh, gw), of every image of the batch.
        captions, keys: B strings.
        records: B dicts with the metadata of an image in the shards: "caption", "size" and "crop" (of the source image,
            pixels), and optionally "evidence".
        images: uint8 [B, 3, H, W], the pixels of the images, if they were requested and the shards contain them.
        numbers: B places of the images in their split, which depend neither on the size and order of batches nor on how
            many images were loaded. Empty for a batch that was not loaded from shards.
    """

    latents: Tensor
    text_states: Tensor
    text_mask: Tensor
    dino_cls: Tensor
    dino_patches: Tensor
    patch_grid: tuple[int, int]
    captions: list[str]
    keys: list[str]
    records: list[dict[str, Any]]
    images: Tensor | None = None
    numbers: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.latents)

    @classmethod
    def joined(cls, batches: Sequence[ImageTextBatch]) -> ImageTextBatch:
        """Join batches of one bucket into one, without the images' pixels; texts are padded to the longest one."""
        length = max(batch.text_mask.shape[1] for batch in batches)
        missing = [length - batch.text_mask.shape[1] for batch in batches]
        pairs = list(zip(batches, missing, strict=True))
        return cls(
            latents=torch.cat([batch.latents for batch in batches]),
            text_states=torch.cat([functional.pad(batch.text_states, (0, 0, 0, padding)) for batch, padding in pairs]),
            text_mask=torch.cat([functional.pad(batch.text_mask, (0, padding)) for batch, padding in pairs]),
            dino_cls=torch.cat([batch.dino_cls for batch in batches]),
            dino_patches=torch.cat([batch.dino_patches for batch in batches]),
            patch_grid=batches[0].patch_grid,
            captions=[caption for batch in batches for caption in batch.captions],
            keys=[key for batch in batches for key in batch.keys],
            records=[record for batch in batches for record in batch.records],
            numbers=[number for batch in batches for number in batch.numbers],
        )


@dataclass(frozen=True)
class ImageTextStatistics:
    """Statistics of the training split of image shards, which a model stores next to its weights.

    Features enter a network as (x - mean) / std per channel: the only normalisation of latents and DINO features.
    `latent_mean + latent_std * x` converts back to the values that `encoders.decode_latents` accepts.

    Args:
        latent_mean, latent_std: float32 [C].
        cls_mean, cls_std: float32 [D], of the CLS vector. patch_mean, patch_std: float32 [D], over all patches.
        text_length, text_dim: L and Dt of the text states.
        latent_sizes: (h, w) by bucket, the bucket with the most images first. patch_grids: (gh, gw) by bucket. Both of
            the buckets that training uses: those with at least a batch of images.
        fingerprint: of the shards. encoders: fingerprint of the encoders that computed the features; sampling refuses
            encoders with a different fingerprint.
        folder: where files derived from the shards (an attribute classifier) may be stored.
        val_latent_sizes: (h, w) by bucket of the validation split.
        encoder_settings: description of those encoders, by part; empty: unknown.
    """

    latent_mean: Tensor
    latent_std: Tensor
    cls_mean: Tensor
    cls_std: Tensor
    patch_mean: Tensor
    patch_std: Tensor
    text_length: int
    text_dim: int
    latent_sizes: list[tuple[int, int]]
    patch_grids: list[tuple[int, int]]
    fingerprint: str
    encoders: str
    folder: str
    val_latent_sizes: Sequence[tuple[int, int]] = ()
    encoder_settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class VideoTextStatistics:
    """Statistics of video-text data, which a model stores next to its weights.

    Args:
        folder: where files derived from the text (a tokenizer) may be stored. fingerprint: of the training shards.
        image_size, fit, max_frames, image_frames: how images were prepared.
        texts: returns an iterator over the text of every training turn.
        clips_keep_times: whether some training clips begin later than at second 0, also in the times that their
            conversations name.
        kinds: kinds of the conversations used in training; empty: unknown.
        partial_kinds: kinds for which not all conversations of a video are read, in training or validation.
        longest_video: most frames of a video, or of a clip, in training and validation; 0: unknown.
    """

    folder: Path
    fingerprint: str
    image_size: int
    fit: str
    max_frames: int
    texts: Callable[[], Iterator[str]]
    clips_keep_times: bool = False
    kinds: frozenset[str] = frozenset()
    partial_kinds: frozenset[str] = frozenset()
    image_frames: int = 1
    longest_video: int = 0


def stack_frames(samples: Sequence[VideoTextSample]) -> tuple[Tensor, Tensor]:
    """Stack the frames of samples, padded to the longest: frames uint8 [V, F, 3, S, S] and frame_mask [V, F]."""
    longest = max(len(sample.frames) for sample in samples)
    size = next((sample.frames.shape[1] for sample in samples if len(sample.frames)), 0)
    frames = torch.zeros(len(samples), longest, 3, size, size, dtype=torch.uint8)
    mask = torch.zeros(len(samples), longest, dtype=torch.bool)
    for row, sample in enumerate(samples):
        count = len(sample.frames)
        if count:
            frames[row, :count] = torch.from_numpy(np.ascontiguousarray(sample.frames)).permute(0, 3, 1, 2)
            mask[row, :count] = True
    return frames, mask
