"""Typed batches: what a data module hands to a training module.

Legend of shapes: B samples, A arms, T future steps, V views, S image size; of videos with text: V videos, F frames, L
tokens; of images with text: C, h, w channels and size of a latent, D width of a DINO feature, Dt of a text state, g
grid edges.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Collection, Iterator, Sequence
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

CLOSED = 0.5  # a gripper whose opening is less is closed


class Movable:
    """What batches have in common: their tensors move together. Mixed into dataclasses."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """With each tensor changed."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}  # type: ignore[arg-type]
        return type(self)(**{k: change(v) if isinstance(v, Tensor) else v for k, v in values.items()})

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> Self:
        """Moved to a device. Only floats change to `dtype` (indices stay integers, masks stay bool).

        What lies in page-locked memory is copied beside the computation in any case: Lightning asks for that with plain
        tensors alone."""

        def move(tensor: Tensor) -> Tensor:
            beside = non_blocking or (device is not None and torch.device(device).type == "cuda" and tensor.is_pinned())
            return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=beside)

        return self.map(move)

    def pin_memory(self) -> Self:
        """In page-locked memory, from which copies to a GPU run beside the computation."""
        return self.map(Tensor.pin_memory)


@dataclass
class PolicyTargets(Movable, ABC):
    """Where arms are and where they are to go: what all batches for policies share.

    Args:
        start_position: float32 [B, A, 3] metres, start_quaternion [B, A, 4] w x y z, start_gripper [B, A]: the pose
            reached now.
        position: float32 [B, A, T, 3], quaternion [B, A, T, 4], gripper [B, A, T]: the targets.
        action_is_pad: bool [B, A, T], the step lies past the end of the demo and repeats the last pose.
        keyframe: float32 [B, A, 3] metres: the target at the next frame in which the gripper closes or opens, or at the
            demo's last frame (keyframes of James and Davison, 2022, arXiv:2105.14829).
        start_joints: float32 [B, A, J] radians, joints: float32 [B, A, T, J]: joint angles reached, now and at the
            targets; None where the model does not read them.
        controller: float32 [B, A, T, D]: what the robot's own controller was told on the way to each target; None where
            the model does not read it.
        embodiment: int64 [B], which of the model's robots; None where it keeps none apart.
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
        """Stacks samples, in a loader worker straight into shared memory.

        Each sample has the batch's tensors without the first dimension, and one sentence as `instruction`. What is
        neither tensor nor sentence is the same in all samples.
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
    """Samples for a policy with one camera. Holds metres and quaternions only: the module projects and bins them on its
    device.

    Args (beside those of `PolicyTargets`):
        image: float32 [B, 3, S, S], normalised with the backbone's mean and std (here and nowhere else).
        intrinsics: float32 [B, 3, 3], of that image (augmented and resized).
        world_to_camera: float32 [B, 4, 4].
        detail: uint8 [B, 3, Q, Q], the same cut at a higher resolution, in the same colours and not normalised; None
            where none was asked for.
    """

    image: Tensor
    intrinsics: Tensor
    world_to_camera: Tensor
    detail: Tensor | None = None


@dataclass
class MultiViewPolicyBatch(PolicyTargets):
    """Samples for a policy with V cameras.

    `image`, `intrinsics` and `world_to_camera` are the first camera's, as in a `PolicyBatch`: a policy of one camera
    trains on either.

    Args (beside those of `PolicyTargets`):
        images: uint8 [B, V, 3, S, S] RGB, augmented, not normalised: encoders differ in their mean and std (see
            `normalised`), and what is cached by content needs bytes.
        view_intrinsics: float32 [B, V, 3, 3], of those images.
        view_world_to_camera: float32 [B, V, 4, 4].
        depth: float32 [B, V, S, S] metres along the optical axis, 0 where unknown; None where none was asked for.
        cameras: V names, in the order of the views.
        mean, std: the backbone's, for `image`.
        detail: uint8 [B, 3, Q, Q], the first camera's, as in a `PolicyBatch`; None where none was asked for.
        view_mask: bool [B, V], True for views that are there, False for black ones in the place of cameras that a demo
            lacks or that were left out at random; None: all are there.
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
        """float32 [B, V, 3, S, S] as an encoder with this mean and std wants them."""
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


PolicyBatch.register(MultiViewPolicyBatch)  # it has all that a PolicyBatch has: goes wherever one is asked for


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32 [..., 3, S, S] from uint8, a channel at a time, on the device of the images: bytes travel faster."""
    # not made on the device: that would wait for all that it has to do
    scale, shift = (torch.tensor(v).view(3, 1, 1).to(images.device, non_blocking=True) for v in (std, mean))
    return (images.float() / 255 - shift) / scale


@dataclass
class VideoTextBatch(Movable):
    """B rows of text about V videos: a row is a conversation, and several rows may share a video.

    Args:
        frames: uint8 [V, F, 3, S, S] as they come from the disk (see `normalised`); F may be 0.
        frame_mask: bool [V, F], True for real frames; padding frames (zeros) stand behind them.
        video_index: int64 [B], the video of each row; 0 <= video_index < V.
        input_ids: int64 [B, L], without the visual tokens, padded on the right.
        attention_mask: bool [B, L], True for real tokens; padding is known by its place, never by an id.
        loss_mask: bool [B, L], True where the token is to be predicted.
        answer_mask: bool [B, L], True for the assistant's words and the token that ends its turn, whatever the loss is.
        visual_at: B positions in the text before which the visual tokens stand.
        truncated: rows whose last turns were left out, since they do not fit.
        kind, source, key: B strings. texts: the B conversations, for tables and images.
        left_out: conversations of the samples that are no row: none of their answers fits, or carries loss.
        seconds: V, when each frame of a video was taken, () of images that have no common time, None where it is not
            known; [] where they were not read.
        clips: how many of the videos are cut out of longer ones.
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
        """How large it is, for reports."""
        frames, tokens = int(self.frame_mask.sum()), int(self.attention_mask.sum())
        return {"videos": len(self.frame_mask), "frames": frames, "rows": len(self), "text_tokens": tokens}

    def __len__(self) -> int:
        return len(self.input_ids)

    def seconds_of(self, row: int) -> tuple[float, ...] | None:
        """When the frames of a row's video were taken; None where that is not known."""
        return self.seconds[int(self.video_index[row])] if self.seconds else None

    def normalised(self, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """float32 [V, F, 3, S, S] as the backbone wants them."""
        return normalised(self.frames, mean, std)

    def first_videos(self, frames: int) -> Self:
        """The first videos that have at most so many frames together (at least one), and their rows."""
        count = max(1, int((self.frame_mask.sum(1).cumsum(0) <= frames).sum()))
        longest = int(self.frame_mask[:count].sum(1).max()) if len(self.frame_mask) else 0
        rows = (self.video_index < count).nonzero()[:, 0]
        kept = rows.tolist()
        length = int(self.attention_mask[rows].sum(1).max()) if kept else 0
        columns = ("input_ids", "attention_mask", "loss_mask", "answer_mask")
        values: dict[str, Any] = {name: getattr(self, name)[rows, :length] for name in columns}
        lists = ("visual_at", "kind", "source", "key", "texts")
        values |= {name: [getattr(self, name)[row] for row in kept] for name in lists}
        values |= {name: getattr(self, name)[:count, :longest] for name in ("frames", "frame_mask")}
        return replace(self, video_index=self.video_index[rows], seconds=self.seconds[:count], **values)

    def answering(self, kinds: Collection[str]) -> Self:
        """The same rows, of which only those of some kinds have answers and carry a loss."""
        kept = torch.tensor([kind in kinds for kind in self.kind], device=self.loss_mask.device)[:, None]
        return replace(self, loss_mask=self.loss_mask & kept, answer_mask=self.answer_mask & kept)


@dataclass
class ImageTextBatch(Movable):
    """B images of one aspect bucket with their text, as a frozen set of encoders left them: nothing is normalised here.

    The rectangle that the latent shows and the one that the DINO view shows are the same crop of the same image:
    in coordinates that run from 0 to 1 over that crop, latent cell (i, j) has its centre at ((i + 0.5) / h,
    (j + 0.5) / w) and patch (i, j) at ((i + 0.5) / gh, (j + 0.5) / gw), whatever the bucket.

    Args:
        latents: float32 [B, C, h, w], as `encoders.encode_images` gives them and `decode_latents` takes them.
        text_states: float32 [B, L, Dt], zeros where `text_mask` is False.
        text_mask: bool [B, L], True for real tokens, which come first.
        dino_cls: float32 [B, D]. dino_patches: float32 [B, gh * gw, D], row after row.
        patch_grid: (gh, gw), of every image of the batch.
        captions, keys: B strings.
        records: B dicts, what else the shards say of an image: "caption", "size" and "crop" (of the source image,
            pixels), and perhaps "evidence".
        images: uint8 [B, 3, H, W], the images themselves, where they were asked for and the shards keep them.
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

    def __len__(self) -> int:
        return len(self.latents)

    @classmethod
    def joined(cls, batches: Sequence[ImageTextBatch]) -> ImageTextBatch:
        """Batches of one bucket as one, without images' own pixels; shorter texts are padded to the longest."""
        length = max(batch.text_mask.shape[1] for batch in batches)
        missing = [length - batch.text_mask.shape[1] for batch in batches]
        pairs = list(zip(batches, missing, strict=True))
        return cls(
            latents=torch.cat([batch.latents for batch in batches]),
            text_states=torch.cat([functional.pad(batch.text_states, (0, 0, 0, more)) for batch, more in pairs]),
            text_mask=torch.cat([functional.pad(batch.text_mask, (0, more)) for batch, more in pairs]),
            dino_cls=torch.cat([batch.dino_cls for batch in batches]),
            dino_patches=torch.cat([batch.dino_patches for batch in batches]),
            patch_grid=batches[0].patch_grid,
            captions=[caption for batch in batches for caption in batch.captions],
            keys=[key for batch in batches for key in batch.keys],
            records=[record for batch in batches for record in batch.records],
        )


@dataclass(frozen=True)
class ImageTextStatistics:
    """What a model keeps of its image shards beside the weights; over the training split.

    Features enter a network as (x - mean) / std, channel by channel: the one normalisation of latents and DINO
    features. `latent_mean + latent_std * x` leads back to what `encoders.decode_latents` takes.

    Args:
        latent_mean, latent_std: float32 [C].
        cls_mean, cls_std: float32 [D], of the CLS vector. patch_mean, patch_std: float32 [D], over all patches.
        text_length, text_dim: L and Dt of the text states.
        latent_sizes: (h, w) of each bucket, the fullest first. patch_grids: (gh, gw) of each.
        fingerprint: of the shards. encoders: fingerprint of what made them; sampling refuses encoders with another.
        folder: where something derived from the shards (an attribute classifier) may be kept.
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


@dataclass(frozen=True)
class VideoTextStatistics:
    """What a model keeps of its data beside the weights.

    Args:
        folder: where something derived from their text (a tokenizer) may be kept. fingerprint: of the training shards.
        image_size, fit, max_frames, image_frames: how images were prepared.
        texts: goes through the text of every training turn.
        clips_keep_times: some training clips begin at a later second than 0, in words too.
        kinds: of the conversations that are trained on; empty: not known.
        partial_kinds: those of which a video's conversations are not all read, in training or validation.
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


def stack_frames(samples: Sequence[VideoTextSample]) -> tuple[Tensor, Tensor]:
    """frames uint8 [V, F, 3, S, S] and frame_mask [V, F] of some samples, padded to the longest."""
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
