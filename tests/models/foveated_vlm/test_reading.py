"""Encoder pretraining: the labels of the patches, and encoders that are trained where they are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_ranks import logged_by
from shard_sets import CharacterCollator, picture, write_set
from torch import distributed
from torch import multiprocessing as mp
from vlm_parts import small_backbone

from keygrip.artifacts import read_record, write_json
from keygrip.data.batches import VideoTextSample, VideoTextStatistics
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.writer import ShardWriter, write_manifest
from keygrip.data.video_text.conversations import answer, describe_video_text, read_sample, video_text_parts
from keygrip.data.video_text.datamodule import VideoTexts
from keygrip.data.video_text.sample_types import Conversation
from keygrip.data.video_text.shard_source import ShardSource
from keygrip.models.foveated_vlm.encoder_pretraining import (
    IGNORED,
    EncoderPretraining,
    EncoderPretrainingBatch,
    EncoderPretrainingCollator,
    EncoderPretrainingModule,
    patch_labels,
)
from keygrip.training.optimizers import AdamW

COLOURS = ["red", "blue"]


def asked(kind: str, frame: int, colour: str, pixel: tuple[float, float], said: str) -> Conversation:
    evidence = {"frame": frame, "colour": colour, "pixel": list(pixel), "pixels_seen": 64}
    return answer("?", said, kind, evidence)


def a_video(frames: int, texts: list[Conversation], key: str = "v") -> VideoTextSample:
    return VideoTextSample(np.zeros((frames, 32, 32, 3), np.uint8), tuple(texts), "tours", key)


def test_cubes_follow_from_the_evidence_of_questions() -> None:
    first = a_video(2, [asked("mark", 1, "red", (4, 4), "7"), asked("glance", 1, "red", (4, 4), "red")])
    second = a_video(1, [asked("glance", 0, "blue", (20, 12), "blue"), asked("cue", 0, "red", (1, 1), "3")])
    batch = EncoderPretrainingCollator(COLOURS)([first, second])
    assert batch.frames.shape == (3, 3, 32, 32)
    assert batch.frame.tolist() == [1, 2]
    assert batch.colour.tolist() == [0, 1]
    assert batch.digit.tolist() == [7, IGNORED]  # the second cube's digit is hidden: no question asks for it
    assert batch.pointed.tolist() == [1, 1]
    with pytest.raises(ValueError, match="has no labels of the cubes"):
        EncoderPretrainingCollator(COLOURS)([a_video(1, [answer("?", "yes", "caption")])])
    with pytest.raises(ValueError, match="has a green cube"):
        EncoderPretrainingCollator(COLOURS)([a_video(1, [asked("mark", 0, "green", (1, 1), "3")])])


def test_patches_show_what_covers_them() -> None:
    """A cube of 8 x 8 pixels around (11, 4), in patches of 8 pixels."""
    batch = EncoderPretrainingBatch(
        frames=torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        frame=torch.tensor([1]),
        pixel=torch.tensor([[11.0, 4.0]]),
        area=torch.tensor([64.0]),
        colour=torch.tensor([1]),
        digit=torch.tensor([5]),
        pointed=torch.tensor([0]),
    )
    labels = patch_labels(batch, (4, 4))
    assert (labels["colour"][0] == 0).all()
    assert (labels["digit"][0] == IGNORED).all()
    colour = labels["colour"][1].view(4, 4)
    assert colour[0].tolist() == [IGNORED, 2, 0, 0]  # an eighth of the first is covered: neither cube nor table
    assert (colour[1:] == 0).all()
    assert labels["digit"][1].view(4, 4)[0].tolist() == [IGNORED, 5, IGNORED, IGNORED]
    assert labels["pointed"][1].view(4, 4)[0, 1] == 0


def test_cubes_of_frames_that_are_read_smaller_are_where_they_are_seen(tmp_path: Path) -> None:
    """A tour with frames of 64 pixels, read at 32: a cube of 16 x 16 pixels around (40, 40) becomes 8 x 8 around (20,
    20)."""
    told = {"frame": 1, "colour": "red", "pixel": [40.0, 40.0], "pixels_seen": 256}
    with ShardWriter(tmp_path / "s-000.tar") as writer:
        images = [picture(n, 64) for n in range(2)]
        writer.add("s0", *video_text_parts(images, [answer("?", "7", "mark", told)], "s", extension="png"))
    write_manifest(tmp_path, describe_video_text, progress=False)
    shards = ShardSet(tmp_path)
    assert read_sample(shards, 0, 64).conversations[0].evidence == told
    small = read_sample(shards, 0, 32)
    assert small.conversations[0].evidence == told | {"pixel": [20.0, 20.0], "pixels_seen": 64.0}
    right = a_video(2, [asked("mark", 1, "red", (20, 20), "7")])
    found, expected = (patch_labels(EncoderPretrainingCollator(COLOURS)([each]), (4, 4)) for each in (small, right))
    assert (expected["digit"][1] == 7).nonzero().tolist() == [[10]]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_small_reader_learns_its_frames() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = EncoderPretraining(small_backbone("tiny"), 2)
    weights = {"colour": 1.0, "digit": 2.0, "pointed": 1.0, "frame_colour": 0.3, "frame_digit": 0.5, "asked": 1.0}
    module = EncoderPretrainingModule(network, EncoderPretrainingCollator(COLOURS), AdamW(lr=3e-3), weights)
    batch = EncoderPretrainingBatch(
        frames=torch.randint(0, 255, (8, 3, 32, 32), generator=generator, dtype=torch.uint8),
        frame=torch.arange(8),
        pixel=torch.rand(8, 2, generator=generator) * 32,
        area=torch.full((8,), 200.0),
        colour=torch.arange(8) % 2,
        digit=torch.arange(8),
        pointed=torch.ones(8, dtype=torch.int64),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(60):
        losses, right = module.losses(batch)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    assert {name: int(good) == int(count) > 0 for name, (good, count) in right.items()} == dict.fromkeys(weights, True)


def cubes(frames: int, asked: int) -> EncoderPretrainingBatch:
    """Return a batch of `frames` frames, of which the first `asked` have a question."""
    generator = torch.Generator().manual_seed(frames)
    return EncoderPretrainingBatch(
        frames=torch.randint(0, 255, (frames, 3, 32, 32), generator=generator, dtype=torch.uint8),
        frame=torch.arange(asked),
        pixel=torch.rand(asked, 2, generator=generator) * 32,
        area=torch.full((asked,), 200.0),
        colour=torch.arange(asked) % 2,
        digit=torch.arange(asked),
        pointed=torch.ones(asked, dtype=torch.int64),
    )


def a_step(batch: EncoderPretrainingBatch) -> dict[str, float]:
    """Return the loss of a training step and what it logs."""
    torch.manual_seed(0)
    weights = dict.fromkeys(("colour", "digit", "pointed", "frame_colour", "frame_digit", "asked"), 1.0)
    network = EncoderPretraining(small_backbone("tiny"), 2)
    module = EncoderPretrainingModule(network, EncoderPretrainingCollator(COLOURS), AdamW(lr=1e-3), weights)
    logged = logged_by(module)
    return {"loss": float(module.training_step(batch, 0).detach())} | logged


def _part(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    write_json(Path(folder, f"{rank}.json"), a_step(cubes(2, 1) if rank == 0 else cubes(6, 6)))
    distributed.destroy_process_group()


def test_two_processes_have_the_loss_of_one(tmp_path: Path) -> None:
    """One of the processes has fewer frames, and fewer of them have a question."""
    mp.start_processes(_part, (str(tmp_path),), nprocs=2, start_method="fork")  # spawned, they import torch again
    few, many = cubes(2, 1), cubes(6, 6)
    names = ("frames", "pixel", "area", "colour", "digit", "pointed")
    whole = {name: torch.cat([getattr(few, name), getattr(many, name)]) for name in names}
    together = a_step(EncoderPretrainingBatch(frame=torch.cat([few.frame, many.frame + 2]), **whole))
    parts = [read_record(tmp_path / f"{rank}.json") for rank in (0, 1)]
    assert sum(part.pop("loss") for part in parts) / 2 == pytest.approx(together.pop("loss"), rel=1e-5)  # as DDP does
    assert together.keys() == {"train/loss", "train/digit"}
    assert parts == [pytest.approx(together, rel=1e-5)] * 2


def test_standardised_heads_see_how_features_differ_and_not_how_much() -> None:
    said = []
    for spread, offset in ((1.0, 0.0), (0.1, 1.0)):
        torch.manual_seed(0)
        network = EncoderPretraining(small_backbone("tiny"), 2, standardise=True)
        with torch.no_grad():
            network.backbone.net.norm.weight.fill_(spread)
            network.backbone.net.norm.bias.fill_(offset)
        images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        said.append(network(images)[0]["digit"])
    assert said[0].std() > 0.1
    torch.testing.assert_close(said[1], said[0], atol=1e-3, rtol=0)


def test_weights_must_name_every_loss() -> None:
    network, collator = EncoderPretraining(small_backbone("tiny"), 2), EncoderPretrainingCollator(COLOURS)
    with pytest.raises(ValueError, match="must name exactly"):
        EncoderPretrainingModule(network, collator, AdamW(lr=1e-3), {"colour": 1.0})
    with pytest.raises(ValueError, match="has 1 names"):
        names = dict.fromkeys(("colour", "digit", "pointed", "frame_colour", "frame_digit", "asked"), 1.0)
        EncoderPretrainingModule(network, EncoderPretrainingCollator(["red"]), AdamW(lr=1e-3), names)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("questions", {"mark": 4, "caption": 0}), ("questions", 3), ("val_questions", {"glance": 1}), ("kinds", ["mark"])],
)
def test_settings_that_leave_cubes_unnamed_are_refused(tmp_path: Path, setting: str, value: object) -> None:
    """A cube that no question names would be trained on as if it were absent."""
    write_set(tmp_path / "train", [2] * 4, kinds=("mark", "glance", "caption"))
    weights = {"colour": 1.0, "digit": 2.0, "pointed": 1.0, "frame_colour": 0.3, "frame_digit": 0.5, "asked": 1.0}
    network = EncoderPretraining(small_backbone("tiny"), 2)
    module = EncoderPretrainingModule(network, EncoderPretrainingCollator(COLOURS), AdamW(lr=3e-3), weights)

    def statistics(**options: Any) -> VideoTextStatistics:
        kinds = options.pop("kinds", None)
        source = ShardSource(tmp_path, kinds=kinds, val_fraction=0.0)
        data = VideoTexts({"tours": source}, CharacterCollator(), 8, 2, num_workers=0, **options)
        data.setup("fit")
        return data.statistics

    module.set_statistics(statistics(questions={"caption": 0}, val_questions=None))
    with pytest.raises(ValueError, match=r"not all questions of the kinds (glance|mark).*set data\.questions=null"):
        module.set_statistics(statistics(**{setting: value}))
