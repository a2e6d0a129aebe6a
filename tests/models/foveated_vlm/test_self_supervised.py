"""The encoder that no label teaches: what its losses compare, that it learns, that no label is read, resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_sets import write_set
from vlm_parts import self_supervised_module as module
from vlm_parts import small_backbone

from keygrip import train
from keygrip.config import compose
from keygrip.data.batches import VideoTextSample
from keygrip.data.video_text.conversations import answer
from keygrip.models.foveated_vlm.self_supervised import (
    FLAT,
    LOSSES,
    FramesBatch,
    FramesCollator,
    SelfSupervisedEncoder,
    SelfSupervisedModule,
    _TwoViews,
    changes_of,
    patches_of,
    targets_of,
    view_of,
)
from keygrip.training.checkpoints import read_checkpoint
from keygrip.training.optimizers import AdamW

WEIGHTS = dict.fromkeys(LOSSES, 1.0)


def video(frames: int, key: str, said: str = "7") -> VideoTextSample:
    pixels = np.random.default_rng(len(key)).integers(0, 255, (frames, 64, 64, 3), dtype=np.uint8)
    return VideoTextSample(pixels, (answer("?", said, "mark", {"pixel": [4, 4]}),), "tours", key)


def test_targets_are_detail_and_mean_of_each_patch() -> None:
    images = torch.zeros(1, 3, 4, 4)
    images[0, :, :2, 2:] = torch.tensor([[1.0, 3.0], [1.0, 3.0]])  # the patch on the upper right
    patches = patches_of(images, 2)
    assert patches[0, 1].tolist() == [1, 3, 1, 3] * 3
    wanted, detail = targets_of(patches)
    torch.testing.assert_close(detail[0], torch.tensor([0.0, 1.0, 0.0, 0.0]))
    scale = (1 + FLAT**2) ** -0.5
    torch.testing.assert_close(wanted[0, 1], torch.tensor([-scale, scale] * 6 + [2.0] * 3))
    assert (wanted[0, 0] == 0).all()


def test_a_view_is_moved_and_its_edges_drawn_out() -> None:
    images = torch.arange(16.0).view(1, 1, 4, 4)
    colour = (torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), 2.0))
    moved = view_of(images, (1, -2), colour)[0, 0]
    assert moved[1].tolist() == [5, 7, 7, 7]  # the first row's right half, times 2 and plus 1
    assert moved[0].tolist() == moved[1].tolist()
    assert torch.equal(view_of(images, (0, 0), (torch.zeros(1), torch.ones(1))), images)


def test_what_is_hidden_is_the_mean_colour() -> None:
    network = SelfSupervisedEncoder(small_backbone("tiny"), width=32)
    images = torch.ones(1, 3, 64, 64)
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, 6] = True  # second row, third column, of patches of 16 pixels
    seen = network.hide(images, hidden)
    assert (seen[0, :, 16:32, 32:48] == 0).all()
    assert float(seen.mean()) == 15 / 16


def test_places_that_agree_are_those_that_show_the_same() -> None:
    """With features that are the pixels themselves, patches find their places in a view moved by whole patches."""
    trained = module(shift=0, temperature=0.01)
    trained.network.agreement_head = torch.nn.Identity()
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 16, 32, generator=generator)
    second = first.view(2, 4, 4, 32).roll((1, -1), (1, 2)).flatten(1, 2)
    nothing = [torch.zeros(2, 16, dtype=torch.bool)] * 2
    features, detail = torch.cat([first, second]), torch.ones(4, 16)

    def loss(move: tuple[int, int]) -> float:
        random = torch.Generator().manual_seed(1)
        views = _TwoViews(features, (4, 4), nothing, [(0, 0), move], 16)
        return float(trained._agreement(views, detail, random))

    assert loss((16, -16)) < 1e-3 < 5 < loss((0, 0))


@pytest.mark.parametrize("names", [LOSSES[:-1], LOSSES[-1:]], ids=lambda names: "-".join(names))
def test_every_loss_falls_on_the_frames_it_learns(names: tuple[str, ...]) -> None:
    trained = module(shift=8, asked_patches=4)
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 255, (2, 3, 4, 4), generator=generator, dtype=torch.uint8)
    squares = small.repeat_interleave(16, 2).repeat_interleave(16, 3)  # of 16 pixels
    batch = FramesBatch(squares, torch.tensor([0, 0]))
    optimizer = torch.optim.Adam(trained.network.parameters(), lr=3e-3)

    def held() -> dict[str, float]:
        with torch.no_grad():
            found = [trained.losses(batch, seed) for seed in range(1000, 1004)]
        return {name: float(torch.stack([each[name] for each in found]).mean()) for name in names}

    before = held()
    for step in range(80):
        optimizer.zero_grad()
        losses = trained.losses(batch, step)
        torch.stack([losses[name] for name in names]).sum().backward()
        optimizer.step()
    after = held()
    assert {name: after[name] < 0.97 * before[name] for name in names} == dict.fromkeys(names, True), (before, after)


def test_moments_of_no_weight_cost_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = module(WEIGHTS | {"moments": 0.0})
    monkeypatch.setattr(trained, "_of_crops", None)
    batch = FramesBatch(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.tensor([0, 0]))
    assert set(trained.losses(batch, 0)) == set(LOSSES) - {"moments"}


def test_what_changes_over_a_video_is_what_counts() -> None:
    trained = module(shift=0, changes=1.0)
    images = torch.zeros(3, 3, 64, 64)
    images[1, :, 20:24, 36:40] = 4.0  # 16 pixels of the patch in the second row, third column
    passing = images[[0, 0, 1, 0]]  # in one moment of four: the other three are as they were
    assert changes_of(passing, torch.ones(4, 4, dtype=torch.bool)).flatten(1).amax(1).gt(0).tolist() == [0, 0, 1, 0]
    video = torch.tensor([0, 0, 1])
    changed = changes_of(images, video[:, None] == video)
    assert changed[2].max() == 0  # the other video stands still
    assert (changed[:2] > 0.9).flatten(1).sum(1).tolist() == [16, 16]
    weight, counts = trained._weights(torch.cat([changed, changed]))
    assert weight.shape == (6, 16, 3 * 256 + 3)
    assert counts.nonzero().tolist() == [[view, 6] for view in (0, 1, 3, 4)]
    said, wanted = torch.zeros(6, 16, 771), torch.zeros(6, 16, 771)
    wanted[0, 6, 0] = wanted[0, 5, 0] = (
        1.0  # in a patch that changes, at a pixel that does not, and in one that does not
    )
    assert trained._error(said, wanted, weight) == 0
    wanted[0, 6, 4 * 16 + 4] = 1.0
    torch.testing.assert_close(
        trained._error(said, wanted, weight), counts[0, 6] ** 2 * 16 / wanted.numel(), atol=0, rtol=1e-3
    )


def test_nothing_but_frames_reaches_the_losses() -> None:
    samples = [video(2, "a"), video(1, "bb")]
    other = [replace(sample, conversations=(answer("what?", "other", "cue"),)) for sample in samples]
    one, two = FramesCollator()(samples), FramesCollator()(other)
    assert vars(one).keys() == {"frames", "video"}
    assert one.video.tolist() == two.video.tolist() == [0, 0, 1]
    assert one.frames.shape == (3, 3, 64, 64)
    assert torch.equal(one.frames, two.frames)
    trained = module()
    first, again, third = (trained.losses(batch, seed) for batch, seed in ((one, 5), (two, 5), (two, 6)))
    assert all(torch.equal(first[name], again[name]) for name in LOSSES)
    assert not any(torch.equal(first[name], third[name]) for name in LOSSES)  # another seed hides and asks otherwise
    with pytest.raises(ValueError, match="a batch without frames"):
        FramesCollator()([replace(samples[0], frames=samples[0].frames[:0])])


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="must name exactly"):
        SelfSupervisedModule(module().network, FramesCollator(), AdamW(1e-3), {"pixels": 1.0})
    with pytest.raises(ValueError, match="temperature above 0"):
        module(temperature=0.0)
    with pytest.raises(ValueError, match="hidden_share=1"):
        SelfSupervisedEncoder(small_backbone("tiny"), hidden_share=1.0)


@pytest.mark.slow
def test_runs_without_labels_and_runs_resumed_end_with_the_same_weights(tmp_path: Path) -> None:
    """One run on a set with questions of cubes; one on the same images with other words, and cut in two."""
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
