"""Small shard sets to test with, and a collator that counts characters in place of tokens."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from keygrip.data.batches import Conversation, VideoTextBatch, VideoTextSample, stack_frames
from keygrip.data.shards.writer import ShardWriter, write_manifest
from keygrip.data.video_text.conversations import answer, describe_video_text, video_text_parts


def picture(shade: int, size: int = 8) -> bytes:
    """Return a PNG file with one shade of grey."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def small_video() -> bytes:
    """Return two seconds of mp4, 8 frames of 16 pixels."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for number in range(8):
            image = np.full((16, 16, 3), 30 * number, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def conversations(name: str, length: int = 5, kinds: Sequence[str] = ("mark",)) -> list[Conversation]:
    return [answer(f"{kind} {name}" + "?" * length, name, kind, {"n": 1}) for kind in kinds]


def write_set(
    root: Path,
    frames: Sequence[int],
    per_shard: int = 10,
    prefix: str = "s",
    lengths: Sequence[int] | None = None,
    kinds: Sequence[str] = ("mark",),
) -> Path:
    """Write a set with one sample per number of frames; sample n is named <prefix>n, and its images have the shade
    n."""
    for start in range(0, len(frames), per_shard):
        with ShardWriter(root / f"{prefix}-{start // per_shard:03d}.tar") as writer:
            for number in range(start, min(start + per_shard, len(frames))):
                texts = conversations(f"{prefix}{number}", 5 if lengths is None else lengths[number], kinds)
                pictures = [picture(number % 256)] * frames[number]
                writer.add(f"{prefix}{number}", *video_text_parts(pictures, texts, prefix, extension="png"))
    write_manifest(root, describe_video_text, progress=False)
    return root


class CharacterCollator:
    """Makes one token per character of the first turn."""

    def __call__(self, samples: list[VideoTextSample]) -> VideoTextBatch:
        frames, frame_mask = stack_frames(samples)
        rows = [(n, sample, text) for n, sample in enumerate(samples) for text in sample.conversations]
        lengths = [len(text.turns[0].text) for _, _, text in rows]
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return VideoTextBatch(
            frames=frames,
            frame_mask=frame_mask,
            video_index=torch.tensor([n for n, _, _ in rows]),
            input_ids=mask.long(),
            attention_mask=mask,
            loss_mask=mask,
            answer_mask=mask,
            visual_at=[0] * len(rows),
            truncated=0,
            kind=[text.kind for _, _, text in rows],
            source=[sample.source for _, sample, _ in rows],
            key=[sample.key for _, sample, _ in rows],
            texts=[text for _, _, text in rows],
        )


def write_conversations(root: Path, samples: Sequence[tuple[int, Sequence[Conversation]]], prefix: str = "s") -> Path:
    """Write a set of (frames, conversations) as another program would: without settings."""
    with ShardWriter(root / "train" / f"{prefix}-000.tar") as writer:
        for number, (frames, said) in enumerate(samples):
            images = [picture(number % 256)] * frames
            writer.add(f"{prefix}{number}", *video_text_parts(images, said, prefix, extension="png"))
    write_manifest(root / "train", describe_video_text, progress=False)
    return root
