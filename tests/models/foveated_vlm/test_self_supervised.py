"""Self-supervised encoder pretraining: what its losses compare, that it learns, that it reads no labels, resuming."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_ranks import logged_by, on_two_ranks
from shard_sets import write_set
from vlm_parts import self_supervised_module as module

from keygrip import train
from keygrip.config import compose
from keygrip.data.batches import VideoTextSample
from keygrip.data.video_text.conversations import answer
from keygrip.models.foveated_vlm import self_supervised
from keygrip.models.foveated_vlm.objects import SIDE, draw_objects
from keygrip.models.foveated_vlm.self_supervised import (
    COLOUR,
    FLAT,
    LOSSES,
    FramesBatch,
    FramesCollator,
    SelfSupervisedModule,
    _object_error,
    detail_of,
    patch_targets,
    patches_of,
    sample_query_colours,
    shift_images,
)
from keygrip.training.checkpoints import read_checkpoint
from keygrip.training.optimizers import AdamW


def video(frames: int, key: str, said: str = "7") -> VideoTextSample:
    pixels = np.random.default_rng(len(key)).integers(0, 255, (frames, 64, 64, 3), dtype=np.uint8)
    return VideoTextSample(pixels, (answer("?", said, "mark", {"pixel": [4, 4]}),), "tours", key)


def test_targets_are_detail_and_mean_of_each_patch() -> None:
    images = torch.zeros(1, 3, 4, 4)
    images[0, :, :2, 2:] = torch.tensor([[1.0, 3.0], [1.0, 3.0]])  # the upper right patch
    patches = patches_of(images, 2)
    assert patches[0, 1].tolist() == [1, 3, 1, 3] * 3
    wanted = patch_targets(patches)
    scale = (1 + FLAT**2) ** -0.5
    torch.testing.assert_close(wanted[0, 1], torch.tensor([-scale, scale] * 6 + [2.0] * 3))
    assert (wanted[0, 0] == 0).all()
    crop = detail_of(images[:, :1, :2, 2:], 3)
    torch.testing.assert_close(crop, torch.tensor([[-scale, scale] * 2]))


def test_a_moved_frame_has_its_edges_drawn_out() -> None:
    images = torch.arange(16.0).view(1, 1, 4, 4)
    found = shift_images(images, 1, -2)[0, 0]
    assert found[1].tolist() == [2, 3, 3, 3]  # the right half of the first row
    assert found[0].tolist() == found[1].tolist()
    assert torch.equal(shift_images(images, 0, 0), images)


def test_errors_of_objects_are_of_their_crop_and_colour() -> None:
    wanted = torch.zeros(1, 1, SIDE**2 + 3)
    said = wanted.clone()
    said[..., 0] = 2.0
    assert float(_object_error(said, wanted)) == pytest.approx(4 / SIDE**2)
    said[..., -1] = 3.0
    assert float(_object_error(said, wanted)) == pytest.approx(4 / SIDE**2 + COLOUR * 3)


def squares() -> FramesBatch:
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 255, (2, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return FramesBatch(small.repeat_interleave(16, 2).repeat_interleave(16, 3))


@pytest.mark.slow
def test_every_loss_falls_on_the_frames_it_learns() -> None:
    trained, batch = module(shift=8, objects=4), squares()
    optimizer = torch.optim.Adam(trained.network.parameters(), lr=3e-3)

    def held() -> dict[str, float]:
        with torch.no_grad():
            found = [trained.losses(batch, seed) for seed in range(1000, 1004)]
        return {name: float(torch.stack([each[name] for each in found]).mean()) for name in LOSSES}

    before = held()
    for step in range(80):
        optimizer.zero_grad()
        torch.stack(list(trained.losses(batch, step).values())).sum().backward()
        optimizer.step()
    after = held()
    assert {name: after[name] < 0.97 * before[name] for name in LOSSES} == dict.fromkeys(LOSSES, True), (before, after)


def test_heads_that_know_the_crops_have_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target of a token is the object sampled from a pixel of its patch; that of a query, the object of its
    colour."""
    trained, batch = module(shift=0, objects=6), squares()
    network, patch = trained.network, trained.network.backbone.patch_size
    random = torch.Generator().manual_seed(3)
    torch.randint(0, 1, (2,), generator=random)  # the module shifts frames before it samples objects
    drawn = draw_objects(batch.frames.float() / 255, 6, random)
    at = (drawn.drawn // patch).long()
    asked_at, told = [], []
    monkeypatch.setattr(network.cue, "forward", lambda colour: asked_at.append(colour) or torch.zeros(2, 6, 32))
    monkeypatch.setattr(network.object_head, "forward", lambda tokens: told.append(tokens) or torch.zeros(2, 6, 403))
    trained.losses(batch, 3)
    mean, std = (torch.tensor(each) for each in (network.backbone.mean, network.backbone.std))
    torch.testing.assert_close(asked_at[0], sample_query_colours((drawn.colour - mean) / std, random)[0])
    images = (batch.frames / 255 - mean[:, None, None]) / std[:, None, None]
    tokens = network.backbone(images).patches.unflatten(1, (64 // patch, 64 // patch))
    wanted = tokens[torch.arange(2)[:, None], at[..., 1], at[..., 0]]
    torch.testing.assert_close(told[0], wanted, atol=1e-4, rtol=1e-4)


def test_a_colour_that_is_none_of_the_frame_means_the_object_nearest_to_it() -> None:
    colour = torch.randn(400, 4, 3, generator=torch.Generator().manual_seed(1))
    asked, meant = sample_query_colours(colour, torch.Generator().manual_seed(2))
    exact = (asked == colour).all(-1)
    assert 0.45 < float(exact.float().mean()) < 0.55
    assert torch.equal(meant[exact], torch.arange(4).expand(400, -1)[exact])
    for frame in range(20):
        for asking in range(4):
            far = [float((asked[frame, asking] - colour[frame, one]).norm()) for one in range(4)]
            assert int(meant[frame, asking]) == far.index(min(far))
    assert float((meant != torch.arange(4)).float().mean()) > 0.15  # many are nearest to another object


def test_contrast_is_of_a_query_and_its_own_crop_among_all_but_the_same_object() -> None:
    """Embeddings are one-hot vectors: frame 0 samples one object twice (0 and 1) and another object (2)."""
    trained = module()
    trained.network.asked_embedding = trained.network.crop_embedding = torch.nn.Identity()
    centre = torch.tensor([[[10.0, 10.0], [11.0, 12.0], [40.0, 10.0]], [[10.0, 10.0], [30.0, 30.0], [50.0, 50.0]]])
    crops = torch.eye(6)[torch.tensor([0, 0, 1, 2, 3, 4])].view(2, 3, 6)

    own = torch.arange(3).expand(2, -1)

    def loss(read: torch.Tensor, meant: torch.Tensor = own) -> float:
        return float(trained._contrast(read, crops, centre, meant))

    assert loss(crops) < 1e-3  # the crop of the other sample of the same object is not a negative
    exchanged = crops.clone()
    exchanged[0, 0], exchanged[1, 0] = crops[1, 0], crops[0, 0]  # the same place of another frame is a negative
    assert loss(exchanged) > 3
    other = torch.tensor([[2, 1, 0], [0, 2, 1]])  # a query may refer to another object of its frame
    assert loss(crops.gather(1, other[..., None].expand(-1, -1, 6)), other) < 1e-3
    assert loss(crops, other) > 3
    assert loss(torch.zeros(2, 3, 6)) == pytest.approx(float(torch.tensor([5.0, 5, 6, 6, 6, 6]).log().mean()))


def test_nothing_but_frames_reaches_the_losses() -> None:
    samples = [video(2, "a"), video(1, "bb")]
    other = [replace(sample, conversations=(answer("what?", "other", "cue"),)) for sample in samples]
    one, two = FramesCollator()(samples), FramesCollator()(other)
    assert vars(one).keys() == {"frames"}
    assert one.frames.shape == (3, 3, 64, 64)
    assert torch.equal(one.frames, two.frames)
    trained = module()
    first, again, third = (trained.losses(batch, seed) for batch, seed in ((one, 5), (two, 5), (two, 6)))
    assert all(torch.equal(first[name], again[name]) for name in LOSSES)
    assert not any(torch.equal(first[name], third[name]) for name in LOSSES)  # another seed: other shifts and samples
    with pytest.raises(ValueError, match="a batch without frames"):
        FramesCollator()([replace(samples[0], frames=samples[0].frames[:0])])


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="must name exactly"):
        SelfSupervisedModule(module().network, FramesCollator(), AdamW(1e-3), {"pixels": 1.0})
    with pytest.raises(ValueError, match="objects must be at least 1"):
        module(objects=0)


def test_processes_and_batches_of_an_accumulated_step_draw_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    own, seeds = module(), []
    monkeypatch.setattr(self_supervised, "world_size", lambda: 2)
    for step, rank, number in product((0, 1), (0, 1), (0, 1, 2)):
        own.trainer = SimpleNamespace(accumulate_grad_batches=3, global_step=step, global_rank=rank)  # type: ignore[assignment]
        seeds.append(own._seed(3 * step + number))
    assert len(set(seeds)) == 12
    assert seeds[0] == 0  # one process without accumulation: the seed is the step
    assert seeds[6] == 1


def test_processes_log_the_mean_over_the_frames_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process has 1 frame, the other 3. The logged total is the weighted sum of the logged losses."""
    modules = [module(), module()]
    values = [{name: torch.tensor(float(rank + 1)) for name in LOSSES} for rank in (0, 1)]

    def step(rank: int) -> dict[str, float]:
        own = modules[rank]
        own.losses = lambda *_: values[rank]  # type: ignore[method-assign]
        own._seed = lambda _: 0  # type: ignore[method-assign]
        logged = logged_by(own)
        frames = squares().frames[:1].repeat(2 * rank + 1, 1, 1, 1)
        logged["returned"] = float(own.training_step(replace(squares(), frames=frames), 0))
        return logged

    found = on_two_ranks(monkeypatch, step)
    weight = sum(modules[0].weights.values())
    for logged, share in zip(found, (0.5, 3.0), strict=True):
        assert logged == pytest.approx(
            {f"train/{name}": 1.75 for name in LOSSES} | {"train/loss": 1.75 * weight, "returned": share * weight}
        )


@pytest.mark.slow
def test_runs_without_labels_and_runs_resumed_end_with_the_same_weights(tmp_path: Path) -> None:
    """One run on data with questions about cubes; one on the same images with other words, interrupted and resumed."""
    for name, kinds in (("labelled", ("mark", "cue")), ("wordless", ("caption",))):
        write_set(tmp_path / name / "train", [2, 3, 1, 2, 3, 1], kinds=kinds)
        write_set(tmp_path / name / "val", [2, 3], prefix="v", kinds=kinds)

    def run(name: str, data: str, *more: str) -> None:
        small = ["backbone.image_size=64", "+backbone.width=32", "+backbone.depth=2", "+backbone.heads=2"]
        none = [f"data.sources.tours_{number}=null" for number in (1, 2, 3)]
        quick = ["strategy=cpu", "strategy.precision=32-true", "logger=none", "callbacks.compute=null"]
        data = [f"data.sources.tours.root={tmp_path / data}", "data.batch_size=2", "limit_val_batches=1"]
        schedule = ["optimizer.schedule=constant", "optimizer.warmup_steps=0"]
        overrides = ["experiment=vlm_encoder_self_supervised", *small, *none, *quick, *data, *schedule, *more]
        train.run(compose("train", [*overrides, f"run_dir={tmp_path / name}"]))

    run("whole", "labelled", "max_steps=4")
    run("parts", "wordless", "max_steps=2")
    run("parts", "wordless", "max_steps=4", "resume=true")
    whole, parts = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
