"""A single image shown as several equal frames: in training, in the counts of a budget and a context, and in
inference."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shard_sets import picture, write_conversations, write_set
from vlm_parts import sensitive_module

from keygrip.data.batches import VideoTextBatch
from keygrip.data.shards.budget import Budget
from keygrip.data.video_text.conversations import answer, frame_settings
from keygrip.data.video_text.datamodule import VideoTexts
from keygrip.data.video_text.shard_source import ShardSource
from keygrip.evaluation.multiple_choice import _frames
from keygrip.evaluation.video_text import _octaves
from keygrip.inference.answers import _batches
from keygrip.inference.video_chat import VideoChat
from keygrip.models.foveated_vlm.conversations import ConversationCollator
from keygrip.models.language.tokenizers import TrainedTokenizer

FRAMES = [1, 3, 1, 0, 2, 6] * 6


def module(root: Path, longest_row: int | None = None, collator: dict[str, Any] | None = None, **options: Any) -> Any:
    source = ShardSource(root, val_fraction=0.0)
    made = ConversationCollator(TrainedTokenizer(400), "visual_first", "answers", **(collator or {}))
    data = VideoTexts({"all": source}, made, 8, **{"batch_size": 6, "num_workers": 0, **options})
    data.configure_for(SimpleNamespace(longest_row=longest_row))
    data.prepare_data()
    data.setup("fit")
    return data


def shown(data: VideoTexts) -> dict[int, np.ndarray]:
    """Return the frames of each sample, by number."""
    found = {}
    for batch in data.train_dataloader():
        assert isinstance(batch, VideoTextBatch)
        for video, key in zip(batch.video_index.tolist(), batch.key, strict=True):
            found[int(key[1:])] = batch.frames[video][batch.frame_mask[video]].numpy()
    return found


@pytest.mark.parametrize("memory_gb", [0.0, 1.0])
def test_images_are_repeated_and_videos_and_texts_are_not(memory_gb: float, tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", FRAMES)
    data = module(root, image_frames=4, memory_gb=memory_gb)
    for _ in range(2):
        found = shown(data)
        assert len(found) == len(FRAMES)
        for number, frames in found.items():
            assert len(frames) == {1: 4}.get(FRAMES[number], FRAMES[number])
            assert (frames == number).all()
    assert data.statistics.image_frames == 4
    (part,) = data.parts["train"]
    assert part.frames(5).tolist() == [{1: 4, 6: 5}.get(count, count) for count in FRAMES]


def test_a_budget_counts_the_frames_that_are_shown(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", [1] * 40)
    for repeated in (1, 4):
        data = module(root, image_frames=repeated, batch_size=40, budget=Budget(frames=16, positions=4096))
        counts = [int(batch.frame_mask.sum()) for batch in data.train_dataloader()]
        assert max(counts) == 16
        assert sum(counts) == 40 * repeated


@pytest.mark.parametrize("budget", [Budget(64, 4096), None])
def test_rows_with_all_frames_of_an_image_are_within_the_context(budget: Budget | None, tmp_path: Path) -> None:
    """An image of 8 frames with 16 tokens per frame takes 128 positions, a video of two frames takes 32."""
    talks = [(2 - n % 2, [answer("Which?", "red " * (1 + n // 8), "mark")]) for n in range(40)]
    write_conversations(tmp_path / "set", talks, "v")
    collator = {"tokens_per_frame": 16}
    lengths = {}
    for batch in module(tmp_path / "set", collator=collator, batch_size=1).train_dataloader():
        lengths |= {int(key[1:]): int(n) for key, n in zip(batch.key, batch.attention_mask.sum(1), strict=True)}
    limit = 128 + sorted(lengths[n] for n in lengths if n % 2)[8]
    data = module(tmp_path / "set", limit, collator, image_frames=8, batch_size=1, budget=budget)
    found = shown(data)
    for number, frames in found.items():
        assert 16 * len(frames) + lengths[number] <= limit
    wanted = {n for n in lengths if n % 2 == 0 or 128 + lengths[n] <= limit}
    assert set(found) == wanted if budget else set(found) <= wanted
    assert 8 < sum(n % 2 for n in wanted) < 20


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", [1] * 4)
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"data.image_frames={count}: 1 to data.max_frames=4"):
            module(root, image_frames=count, max_frames=4)
        with pytest.raises(ValueError, match=f"image_frames={count}: an image has 1 to max_frames=4"):
            frame_settings(8, "stretch", 4, count)
    with pytest.raises(ValueError, match=r"data.image_frames=2 and collator.timestamps=true"):
        module(root, collator={"timestamps": True}, image_frames=2)


@pytest.fixture
def chat(tmp_path: Path) -> VideoChat:
    made = sensitive_module(tmp_path, ["Which digit is on the red cube?", "Three."])
    made.image_options = frame_settings(28, "stretch", 8, 4)
    return VideoChat(made)


def test_an_image_is_answered_as_in_training(chat: VideoChat, tmp_path: Path) -> None:
    """It is processed as a video of the same number of equal frames; several images, and videos, stay as they are."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    words = {"type": "text", "text": "Which digit?"}

    def said(*items: Any) -> str:
        return chat.generate([{"role": "user", "content": [*items, words]}], max_new_tokens=12)

    single = said({"type": "image", "image": image})
    assert single == said({"type": "video", "video": [image] * 4})
    one = VideoChat(chat.module)
    one.reader.image_frames = 1
    assert single != one.generate([{"role": "user", "content": [{"type": "image", "image": image}, words]}], 12)
    both = chat._read([{"role": "user", "content": [{"type": "image", "image": image}] * 2 + [words]}])
    assert [len(frames) for frames in both.visuals] == [1, 1]
    alone = chat._read([{"role": "user", "content": [{"type": "image", "image": image}, words]}])
    assert alone.seconds == (0.0,) * 4

    image.save(tmp_path / "a.png")
    unreadable: dict[str, str] = {}
    ((video,),) = _batches(chat.module, [tmp_path / "a.png"], 64, unreadable)
    assert video.frames.shape == (4, 28, 28, 3)
    question: Any = SimpleNamespace(video=tmp_path / "a.png", clip=None, middles=False)
    frames, seconds = _frames(chat.module, question)
    assert len(frames) == len(seconds) == 4
    assert not unreadable


def test_fewer_frames_than_in_training_show_an_image_as_fewer(chat: VideoChat, tmp_path: Path) -> None:
    """A single frame of a longer video remains single, and is not repeated as an image is."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(5):
        (pictures / f"{number}.png").write_bytes(picture(number, 28))
    for most in (1, 3):
        chat.module.image_options["max_frames"] = most
        batches = list(_batches(chat.module, [pictures / "0.png", pictures], 64, {}))
        assert [len(video.frames) for batch in batches for video in batch] == [most, most]
        for path in (pictures / "0.png", pictures):
            question: Any = SimpleNamespace(video=path, clip=None, middles=False)
            assert len(_frames(chat.module, question)[0]) == most


def test_figures_by_length_count_an_image_as_one_frame(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", [1, 3, 0, 4, 1, 6])
    (batch,) = module(root, image_frames=4).train_dataloader()
    numbers = [int(key[1:]) for key in dict(zip(batch.video_index.tolist(), batch.key, strict=True)).values()]
    assert dict(zip(numbers, _octaves(batch, 1), strict=True)) == {0: 4, 1: 4, 2: 0, 3: 4, 4: 4, 5: 8}
    moving = batch.frames.clone()
    moving[numbers.index(3), 1] += 1  # makes it a video with the same number of frames
    batch.frames = moving
    assert dict(zip(numbers, _octaves(batch, 4), strict=True)) == {0: 1, 1: 4, 2: 0, 3: 4, 4: 1, 5: 8}


def test_a_checkpoint_keeps_it_and_older_ones_have_single_frames(chat: VideoChat) -> None:
    content: dict[str, Any] = {}
    chat.module.on_save_checkpoint(content)
    chat.module.image_options = {}
    chat.module.on_load_checkpoint(content)
    assert chat.module.image_options["image_frames"] == 4
    files, _ = chat.module.export_files()
    assert files["processor_config.json"]["image_frames"] == 4
    content["language"]["pictures"] = content["language"].pop("images")  # the key in earlier checkpoints
    chat.module.image_options = {}
    chat.module.on_load_checkpoint(content)
    assert chat.module.image_options["image_frames"] == 4
    del content["language"]["pictures"]["image_frames"]
    chat.module.on_load_checkpoint(content)
    assert chat.module.image_options["image_frames"] == 1


def test_frames_are_equal_to_the_image_and_in_the_input_of_the_network(chat: VideoChat, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(120, 28))
    prompt = chat._read(
        [
            {
                "role": "user",
                "content": [{"type": "image", "path": str(tmp_path / "a.png")}, {"type": "text", "text": "?"}],
            }
        ]
    )
    padded, counts = chat.reader.join_frames([prompt])
    assert counts == [4]
    assert torch.equal(torch.from_numpy(padded[0]), torch.full((4, 28, 28, 3), 120, dtype=torch.uint8))
