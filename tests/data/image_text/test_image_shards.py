"""Image shards: samples are read as they were written, one bucket per batch, skipped samples, resume."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter, OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import SQUARE, WIDE, drawn, small_encoders, write_images

from keygrip.data.bad_samples import BadSample
from keygrip.data.batches import ImageTextBatch
from keygrip.data.image_text.bucket_folders import MAKE_AGAIN, MadeImages
from keygrip.data.image_text.bucket_samples import BucketBatchSampler
from keygrip.data.image_text.datamodule import ImageShards
from keygrip.data.image_text.samples import (
    LATENT,
    RECORD,
    TEXT,
    TEXT_MASK,
    describe_image_text,
    image_text_parts,
    missing_parts,
    npy_bytes,
    read_image_text,
)
from keygrip.data.image_text.sources.encoding import as_tensor, prepare_image
from keygrip.data.image_text.statistics import Moments
from keygrip.data.manifests import make_manifests
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.remote import ShardCache
from keygrip.data.shards.writer import ShardWriter, write_manifest
from keygrip.data.validation import validate

COUNTS = {SQUARE: 11, WIDE: 6}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), COUNTS, small_encoders(), per_shard=5)


def module(root: Path, **options: Any) -> ImageShards:
    data = ImageShards(**{"batch_size": 4, "root": root, "num_workers": 0, **options})
    data.setup("fit")
    return data


def keys(batches: Any) -> list[list[str]]:
    return [batch.keys for batch in batches]


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_a_sample_comes_back_as_it_was_encoded(root: Path) -> None:
    encoders = small_encoders()
    picture, truth = drawn(1003, WIDE)
    ready = prepare_image(picture, f"a {truth['colour']} cube near the blue block", WIDE, encoders, "k")
    shards = ShardSet(root / "val" / WIDE.name)
    found = read_image_text(shards, 3)
    shown = encoders.decode_latents(torch.from_numpy(found.latent)[None])
    assert torch.equal((shown * 255).round().to(torch.uint8), as_tensor([ready.pixels]))  # exact in half precision
    cls, patches = encoders.encode_view(as_tensor([ready.view]))
    np.testing.assert_allclose(found.dino_cls, cls[0].numpy(), atol=2e-3)
    np.testing.assert_allclose(found.dino_patches, patches[0].numpy(), atol=4e-3)
    assert found.patch_grid == (3, 3)
    assert found.record["evidence"] == truth
    assert found.text_mask.tolist() == [True] * 7 + [False]
    assert not found.text_states[7:].any()


def test_columns_say_what_a_sample_has() -> None:
    latent, states, cls, patches = np.zeros((3, 2, 4)), np.ones((5, 6)), np.zeros(7), np.zeros((6, 7))
    mask = np.array([True, True, False, False, False])
    record = {"caption": "two words", "patch_grid": [2, 3]}
    parts, row = image_text_parts(latent, states, mask, cls, patches, record)
    assert row == {
        "latent_channels": 3,
        "latent_height": 2,
        "latent_width": 4,
        "dino": 7,
        "patches": 6,
        "grid_height": 2,
        "grid_width": 3,
        "text_dim": 6,
        "text_length": 5,
        "text_tokens": 2,
        "caption_length": 9,
    }
    assert missing_parts(row) == []
    del parts[LATENT], parts[TEXT]
    assert missing_parts(describe_image_text(parts)) == [LATENT, TEXT]


def test_trimmed_text_is_read_as_if_it_were_whole(tmp_path: Path) -> None:
    arrays = [np.random.default_rng(n).normal(size=s) for n, s in enumerate([(3, 2, 2), (5, 6), (7,), (4, 7)])]
    mask = np.array([True, True, False, False, False])
    arrays[1][2:] = 0
    sizes, found = [], []
    for trim in (False, True):
        parts, row = image_text_parts(arrays[0], arrays[1], mask, *arrays[2:], {"caption": "two words"}, trim_text=trim)
        sizes.append(len(parts[TEXT]))
        with ShardWriter(tmp_path / str(trim) / "a.tar") as writer:
            writer.add("k", parts, row)
        write_manifest(tmp_path / str(trim), describe_image_text, progress=False)
        found.append(read_image_text(ShardSet(tmp_path / str(trim)), 0))
    assert sizes[1] < sizes[0]
    np.testing.assert_array_equal(found[0].text_states, found[1].text_states)
    np.testing.assert_array_equal(found[0].text_mask, found[1].text_mask)


def test_parts_in_upper_case_are_read_as_in_lower_case(tmp_path: Path) -> None:
    arrays = (np.zeros((3, 2, 2)), np.ones((5, 6)), np.array([True, *[False] * 4]), np.ones(7), np.zeros((4, 7)))
    more = [(np.full((5, 6), 2.0), arrays[2])]
    parts, row = image_text_parts(*arrays, {"caption": "a", "captions": ["a", "b"]}, more_text=more)
    upper = {name.upper(): content for name, content in parts.items()}
    some = {name.upper() if name == RECORD else name: content for name, content in parts.items()}
    with ShardWriter(tmp_path / "a.tar") as writer:
        for key, written in (("lower", parts), ("upper", upper), ("some", some)):
            writer.add(key, written, row)
    assert make_manifests(tmp_path, again=True)["bad_samples"] == 0  # the manifests are written again
    shards = ShardSet(tmp_path)
    for number in range(3):
        assert {name: values[number].item() for name, values in shards.columns.items()} == row
        assert read_image_text(shards, number).record["caption"] == "a"
        assert read_image_text(shards, number, caption=1).text_states[0, 0] == 2
    report = validate(tmp_path)
    assert report["buckets"]["."]["complete"] == 3
    assert all("the same content occurs twice" in problem for problem in report["problems"])


def test_a_blank_caption_of_a_foreign_set_is_read_as_none(tmp_path: Path) -> None:
    """The foreign encoder ended the empty text with a token. A sample without a caption in its record keeps its
    text."""
    arrays = (np.zeros((3, 2, 2)), np.ones((5, 6)), np.array([True, *[False] * 4]), np.zeros(7), np.zeros((4, 7)))
    with ShardWriter(tmp_path / "a.tar") as writer:
        for key, record in (("blank", {"caption": " "}), ("unnamed", {}), ("told", {"caption": "word"})):
            writer.add(key, *image_text_parts(*arrays, record))
    write_manifest(tmp_path, describe_image_text, progress=False)
    shards = ShardSet(tmp_path)
    found = {shards.key(number): read_image_text(shards, number) for number in range(3)}
    assert {key: int(sample.text_mask.sum()) for key, sample in found.items()} == {"blank": 0, "unnamed": 1, "told": 1}
    assert not found["blank"].text_states.any()


def test_numbers_that_half_precision_cannot_hold_are_refused() -> None:
    arrays = (np.full((1, 1, 1), 1e6), np.zeros((1, 1)), np.ones(1, bool), np.zeros(2), np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"vae\.npy holds numbers that are not finite"):
        image_text_parts(*arrays, {"caption": ""})


@pytest.mark.parametrize(
    ("part", "content", "said"),
    [
        (TEXT_MASK, npy_bytes(np.array([0, 1, 1], np.uint8)), "does not fit"),
        (LATENT, npy_bytes(np.full((3, 2, 2), np.nan, np.float16)), "not finite"),
        (LATENT, b"no array", "k of"),
        ("json", json.dumps({"caption": "", "patch_grid": [3, 5]}).encode(), "do not make a grid"),
    ],
)
def test_a_broken_part_names_its_sample(tmp_path: Path, part: str, content: bytes, said: str) -> None:
    arrays = (np.zeros((3, 2, 2)), np.zeros((3, 6)), np.array([True, False, False]), np.zeros(7), np.zeros((4, 7)))
    parts, row = image_text_parts(*arrays, {"caption": ""})
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("k", {**parts, part: content}, row)
    write_manifest(tmp_path, describe_image_text, progress=False)
    with pytest.raises(BadSample, match=said) as error:
        read_image_text(ShardSet(tmp_path), 0)
    assert "k of" in str(error.value)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_every_batch_is_of_one_bucket(root: Path) -> None:
    batches = list(module(root).train_dataloader())
    assert all(isinstance(batch, ImageTextBatch) for batch in batches)
    shapes = Counter(tuple(batch.latents.shape) for batch in batches)
    assert shapes == {(4, 48, 8, 8): 2, (4, 48, 8, 12): 1}  # 11 and 6 samples in batches of four
    batch = batches[0]
    assert batch.text_states.shape == (4, 8, 8)
    assert batch.dino_patches.shape == (4, 9, 16)
    assert batch.patch_grid == (3, 3)
    assert not batch.text_states[~batch.text_mask].any()
    assert [record["caption"] for record in batch.records] == batch.captions


def test_aspect_views_have_grids_of_their_own(tmp_path: Path) -> None:
    write_images(tmp_path, {WIDE: 4}, small_encoders(shape="aspect"), {"train": 0})
    batch = next(iter(module(tmp_path).train_dataloader()))
    assert batch.patch_grid == (2, 4)
    assert batch.dino_patches.shape == (4, 8, 16)


def test_epochs_differ_and_leave_out_others() -> None:
    sampler = BucketBatchSampler(np.repeat([0, 1], [11, 6]), 4)
    epochs = [np.concatenate(sampler.batches(epoch)) for epoch in range(6)]
    assert all(len(epoch) == 12 == len(set(epoch.tolist())) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert set(np.concatenate(epochs).tolist()) == set(range(17))
    np.testing.assert_array_equal(epochs[3], np.concatenate(sampler.batches(3)))


def copies_in_epoch(batches: list[np.ndarray], shard: np.ndarray, room: int) -> int:
    """Return how many shards a cache with room for `room` of them copies if it removes the least recently used."""
    cached: OrderedDict[int, None] = OrderedDict()
    copies = 0
    for number in shard[np.concatenate(batches)].tolist():
        copies += number not in cached
        cached[number] = None
        cached.move_to_end(number)
        if len(cached) > room:
            cached.popitem(last=False)
    return copies


def test_windows_of_shards_need_a_cache_of_two_windows() -> None:
    """Buckets of 40, 14 and 1 shards; the last shard holds fewer samples than two batches."""
    sizes = [50] * 54 + [30]
    shard, bucket = np.repeat(np.arange(55), sizes), np.repeat([0, 1, 2], [2000, 700, 30])
    everywhere, windows = (BucketBatchSampler(bucket, 16, shard=shard, window_shards=each) for each in (None, 8))
    assert len(everywhere) == len(windows) == 125 + 43 + 1
    for epoch in range(3):
        batches = windows.batches(epoch)
        assert [len(batch) for batch in batches] == [16] * 169
        assert len(np.unique(np.concatenate(batches))) == 169 * 16
        assert all(len(np.unique(bucket[batch])) == 1 for batch in batches)
        assert 55 <= copies_in_epoch(batches, shard, 16) <= 75  # a few for batches that span several windows
        assert copies_in_epoch(everywhere.batches(epoch), shard, 16) > 1500
    first, second = (set(shard[np.concatenate(windows.batches(epoch)[:10])].tolist()) for epoch in (0, 1))
    assert max(len(first), len(second)) <= 8
    assert first != second  # other windows in each epoch
    np.testing.assert_array_equal(everywhere.batches(1), BucketBatchSampler(bucket, 16).batches(1))
    parts = [list(BucketBatchSampler(bucket, 16, 0, 2, shard=shard, window_shards=8).parts_of(2, n)) for n in (0, 100)]
    assert [np.concatenate(part).tolist() for part in parts[0]] == [batch.tolist() for batch in windows.batches(2)]
    assert [np.concatenate(part).tolist() for part in parts[1]] == [b.tolist() for b in windows.batches(2)[100:]]


def test_training_shuffles_in_windows_of_the_shards_of_all_buckets(root: Path) -> None:
    """The training split has 3 and 2 shards, of 5, 5, 1 and 5, 1 samples."""
    data = module(root, window_shards=2, batch_size=2)
    samples = data.samples("train")
    assert np.unique(samples.shard, return_counts=True)[1].tolist() == [5, 5, 1, 5, 1]
    names = [samples.parts[number].shards for number in samples.bucket]
    for sample, (shards, shard) in enumerate(zip(names, samples.shard, strict=True)):
        assert shards is samples.parts[int(shard >= 3)].shards, sample
    expected = BucketBatchSampler(samples.bucket, 2, shard=samples.shard, window_shards=2).batches(0)
    loader = data.train_dataloader()
    assert [batch.numbers for batch in loader] == [batch.tolist() for batch in expected]
    assert len(loader) == 5 + 3
    with pytest.raises(ValueError, match=r"data\.window_shards must be at least 1, not 0"):
        module(root, window_shards=0)


def test_held_out_samples_come_once_in_a_fixed_order(root: Path) -> None:
    data = module(root)
    first, second = keys(data.val_dataloader()), keys(data.val_dataloader())
    assert first == second
    assert sorted(key for batch in first for key in batch) == sorted(
        f"val-{bucket.name}-{1000 + n}" for bucket, count in COUNTS.items() for n in range(count)
    )
    limited = [key for batch in keys(data.held_out("val", 6)) for key in batch]
    assert len(limited) == 6
    assert {key.split("-")[1] for key in limited} == {SQUARE.name, WIDE.name}  # samples of every bucket


def test_ranks_share_each_batch() -> None:
    bucket = np.repeat([0, 1], [11, 6])
    whole = [[k.sample for k in batch] for batch in BucketBatchSampler(bucket, 4)]
    ranks = [list(BucketBatchSampler(bucket, 4, rank, 2)) for rank in range(2)]
    for batch, left, right in zip(whole, *ranks, strict=True):
        assert [k.sample for k in left + right] == batch
    with pytest.raises(ValueError, match="must divide by the 3 processes"):
        BucketBatchSampler(bucket, 4, 0, 3)


def test_no_rank_of_validation_goes_without_a_batch() -> None:
    options = {"shuffle": False, "drop_last": False}
    buckets = np.repeat([0, 1, 2, 3], [13, 1, 8, 6])
    samplers = [BucketBatchSampler(buckets, 4, rank, 2, **options) for rank in range(2)]  # type: ignore[arg-type]
    ranks = [list(sampler) for sampler in samplers]
    assert [len(batches) for batches in ranks] == [len(sampler) for sampler in samplers] == [8, 8]
    assert all(batch for batches in ranks for batch in batches)
    seen = [key.sample for batches in ranks for batch in batches for key in batch]
    assert sorted(seen) == sorted([*range(28), 13])  # only the bucket of one sample repeats it
    alone = list(BucketBatchSampler(buckets, 4, **options))  # type: ignore[arg-type]
    merged = [[*left, *right] for left, right in zip(*ranks, strict=True)]
    places = [next(n for n, batch in enumerate(alone) if batch[0] == both[0]) for both in merged]
    assert places == sorted(places)  # in the order of a single process


def test_too_few_samples_for_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="holds 11 samples, fewer than one batch of 12"):
        BucketBatchSampler(np.repeat([0, 1], [11, 6]), 12)


def test_a_bucket_below_a_batch_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        module(root, batch_size=8)
    assert "bucket_48x32 holds 6 training samples, fewer than a batch of 8" in caplog.text


# ---- resume ----------------------------------------------------------------------------------------------------------


class Fit:
    """The attributes of a trainer that the data module uses."""

    def __init__(self, done: int = 0) -> None:
        self.global_rank, self.world_size = 0, 1
        progress = SimpleNamespace(total=SimpleNamespace(processed=done))
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))


@pytest.mark.parametrize("window", [None, 2])
def test_training_goes_on_in_the_middle_of_an_epoch(window: int | None, root: Path) -> None:
    data = module(root, window_shards=window)
    data.trainer = Fit()  # type: ignore[assignment]
    loader = data.train_dataloader()
    whole = [keys(loader)]
    data.trainer = Fit(3)  # type: ignore[assignment]
    whole += [keys(loader)]
    resumed = module(root, window_shards=window)
    data.trainer = Fit(4)  # type: ignore[assignment]
    resumed.load_state_dict(data.state_dict())
    resumed.trainer = Fit()  # type: ignore[assignment]
    assert keys(resumed.train_dataloader()) == whole[1][1:]
    assert whole[0] != whole[1]


def test_other_data_cannot_continue_the_order(root: Path) -> None:
    state = module(root).state_dict()
    with pytest.raises(
        ValueError, match=r"trained with data.batch_size=4, this run has 2; the order of samples cannot"
    ):
        module(root, batch_size=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"trained with data.window_shards=None, this run has 2; the order of samples"):
        module(root, window_shards=2).load_state_dict(state)
    before = {name: value for name, value in state.items() if name != "window_shards"}  # an earlier version's
    module(root).load_state_dict(before)
    with pytest.raises(ValueError, match=r"data.window_shards=None, this run has 2"):
        module(root, window_shards=2).load_state_dict(before)
    name = min(state["shards"])
    assert re.fullmatch(r"bucket_\d+x\d+/shard-\d+\.tar", name)
    changed = {**state, "shards": {**state["shards"], name: "0" * 16}}
    with pytest.raises(ValueError, match=rf"the data are not those of the checkpoint: 1 changed \({name}\); the order"):
        module(root).load_state_dict(changed)


def test_loader_processes_change_nothing(root: Path) -> None:
    alone = list(module(root).train_dataloader())
    several = list(module(root, num_workers=1).train_dataloader())
    assert keys(alone) == keys(several)
    for left, right in zip(alone, several, strict=True):
        assert torch.equal(left.latents, right.latents)


# ---- what is missing -------------------------------------------------------------------------------------------------


def test_samples_without_patches_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, {SQUARE: 12}, small_encoders(), {"train": 0}, without_patches=(2, 7))
    with caplog.at_level("WARNING"):
        data = module(tmp_path, max_skipped_share=0.2)
    assert "skipped: 2 of 12 samples" in caplog.text
    assert "have no dinov3_patches.npy" in caplog.text
    part, samples = data.parts["train"][0], data.samples("train")
    order = np.concatenate([batch for e in range(4) for batch in BucketBatchSampler(samples.bucket, 4).batches(e)])
    seen = {part.shards.key(int(part.chosen[sample])) for sample in order}
    assert seen == {f"train-bucket_32x32-{n}" for n in range(12) if n not in (2, 7)}


def test_too_many_skipped_samples_are_an_error(tmp_path: Path) -> None:
    write_images(tmp_path, {SQUARE: 8}, small_encoders(), {"train": 0}, without_patches=(2, 7))
    with pytest.raises(ValueError, match=r"2 of 8 samples .* more than data\.max_skipped_share=0\.05 allows"):
        module(tmp_path)


def test_a_set_in_which_all_are_skipped_is_an_error(tmp_path: Path) -> None:
    write_images(tmp_path, {SQUARE: 4}, small_encoders(), {"train": 0}, without_patches=(0, 1, 2, 3))
    with pytest.raises(ValueError, match=r"all 4 samples in .* are skipped: no dinov3_patches\.npy"):
        module(tmp_path, max_skipped_share=1.0)


def test_records_are_read_alone_and_without_those_that_are_unreadable(tmp_path: Path) -> None:
    write_images(tmp_path, {SQUARE: 8, WIDE: 3}, small_encoders(), {"train": 0})
    data = module(tmp_path)
    whole = {
        key: record for batch in data.held_out("train") for key, record in zip(batch.keys, batch.records, strict=True)
    }
    keys_in_order = [part.shards.key(index) for part in data.parts["train"] for index in part.chosen.tolist()]
    assert list(data.samples("train").records()) == [whole[key] for key in keys_in_order]
    assert len(list(data.samples("train", 4).records())) == 4
    index = data.parts["train"][0].shards.index(0)
    place = next(i for i in range(*index.first_part[3:5]) if index.part_names[i] == RECORD)
    tar = tmp_path / "train" / SQUARE.name / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[index.part_offsets[place] : index.part_offsets[place] + 6] = b"broken"
    tar.write_bytes(content)
    readable = [key for key in keys_in_order if key != "train-bucket_32x32-3"]
    assert list(data.samples("train").records()) == [whole[key] for key in readable]


def test_an_unreadable_sample_is_replaced_and_counted(tmp_path: Path) -> None:
    write_images(tmp_path, {SQUARE: 8}, small_encoders(), {"train": 0})
    data = module(tmp_path)
    part = data.parts["train"][0]
    index = part.shards.index(0)
    place = next(i for i in range(*index.first_part[3:5]) if index.part_names[i] == LATENT)
    tar = tmp_path / "train" / SQUARE.name / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[index.part_offsets[place] : index.part_offsets[place] + 6] = b"broken"
    tar.write_bytes(content)
    batches = list(data.train_dataloader())
    assert [len(batch) for batch in batches] == [4, 4]
    assert "train-bucket_32x32-3" not in {key for batch in batches for key in batch.keys}
    assert data.skipped.count == 1


def test_other_encoders_within_a_set_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path, {SQUARE: 4}, small_encoders(), {"train": 0}, said=False)
    write_images(tmp_path, {WIDE: 4}, small_encoders(edge=8), {"train": 0})
    with pytest.raises(ValueError, match="made with different encoders"):
        module(tmp_path)


# ---- statistics and places -------------------------------------------------------------------------------------------


def test_statistics_are_of_the_training_split_and_kept(root: Path) -> None:
    data = module(root)
    found = data.statistics
    samples = data.samples("train")
    latents = [samples[key].latent for key in _all(samples)]  # type: ignore[arg-type]
    flat = np.concatenate([latent.reshape(48, -1) for latent in latents], axis=1)
    np.testing.assert_allclose(found.latent_mean.numpy(), flat.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(found.latent_std.numpy(), flat.std(axis=1), atol=1e-5)
    assert found.latent_sizes == [(8, 8), (8, 12)]
    assert found.patch_grids == [(3, 3), (3, 3)]
    assert found.encoders == small_encoders().fingerprint
    files = list((root / ".keygrip").glob("statistics-*.npz"))
    assert [file.name for file in files] == [f"statistics-{data.fingerprint}.npz"]
    assert torch.equal(module(root).statistics.patch_std, found.patch_std)


def test_sizes_are_of_the_buckets_that_fill_a_batch(root: Path) -> None:
    """Validation may contain other sizes, which are listed separately."""
    found = module(root, batch_size=8).statistics
    assert (found.latent_sizes, found.patch_grids) == ([(8, 8)], [(3, 3)])
    assert found.val_latent_sizes == [(8, 8), (8, 12)]
    with pytest.raises(ValueError, match="holds 11 training images, fewer than a batch of 12: lower"):
        _ = module(root, batch_size=12).statistics


def test_channels_that_do_not_vary_are_not_scaled(tmp_path: Path) -> None:
    """With a single image the CLS vector does not vary: the vector of another image is shifted and not scaled. Channels
    that vary only by float16 rounding are not scaled either; channels that vary by small amounts are scaled."""
    write_images(tmp_path, {SQUARE: 1}, small_encoders(), splits={"train": 0, "val": 1000})
    found = module(tmp_path, batch_size=1).statistics
    assert torch.equal(found.cls_std, torch.ones_like(found.cls_std))
    assert not torch.equal(found.patch_std, torch.ones_like(found.patch_std))
    moments = Moments()
    rounded = np.nextafter(np.full(9, 700, np.float16), np.float16(np.inf))
    rounded[::2] = 700
    moments.add(np.stack([rounded, np.zeros(9), np.tile([0.001, -0.001, 0], 3), np.tile([9, 9.1, 9.2], 3)], axis=1))
    mean, std = moments.result()
    np.testing.assert_allclose(mean, [700.2, 0, 0, 9.1], atol=0.1)
    np.testing.assert_allclose(std, [1, 1, 0.001 * (2 / 3) ** 0.5, 0.1 * (2 / 3) ** 0.5], rtol=1e-3)


def _all(samples: Any) -> list[Any]:
    from keygrip.data.shards.sampling import SampleKey

    return [SampleKey(n, 0) for n in range(len(samples))]


def test_a_set_without_splits_is_divided_by_its_keys(tmp_path: Path) -> None:
    write_images(tmp_path, {SQUARE: 40}, small_encoders(), {"": 0})
    data = module(tmp_path, val_fraction=0.3)
    train, val = ({p.shards.key(int(i)) for p in data.parts[s] for i in p.chosen} for s in ("train", "val"))
    assert len(train) + len(val) == 40
    assert not train & val
    assert 4 < len(val) < 20
    assert data.test_dataloader() == []


@pytest.mark.parametrize(("split", "said"), [("", "data.val_fraction=0.001 takes none"), ("train", "there is no val/")])
def test_a_set_without_images_for_validation_is_said(
    split: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, {SQUARE: 8}, small_encoders(), {split: 0})
    with caplog.at_level("WARNING"):
        data = module(tmp_path, val_fraction=0.001)
        assert not caplog.text  # validation is not requested yet, and perhaps never will be
        assert data.val_dataloader() == []
    assert f"{tmp_path} has no images for validation ({said}): training writes no val/ figures" in caplog.text


def test_a_set_from_elsewhere_needs_only_manifests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, {SQUARE: 4, WIDE: 4}, small_encoders(), {"train": 0}, said=False)
    for file in tmp_path.rglob("*"):
        if file.name.endswith((".npz", "manifest.json")):
            file.unlink()
    with pytest.raises(FileNotFoundError, match="step=manifest"):
        module(tmp_path)
    assert make_manifests(tmp_path)["samples"] == 8
    data = module(tmp_path)
    assert len(list(data.train_dataloader())) == 2
    assert data.statistics.encoders == "unknown"


def test_a_set_is_read_from_a_url(root: Path, tmp_path: Path) -> None:
    here, there = module(root), module(f"file://{root}", cache_dir=tmp_path)  # type: ignore[arg-type]
    assert there.fingerprint == here.fingerprint
    assert keys(there.train_dataloader()) == keys(here.train_dataloader())


def test_statistics_of_a_set_that_cannot_be_reached_are_not_stored(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fetch = ShardCache.fetch

    def fetch_what_is_reached(self: ShardCache, name: str, *rest: Any, **options: Any) -> Path:
        if name == "shard-000001.tar":
            raise ConnectionError(f"{self.url}/{name} cannot be read")
        return fetch(self, name, *rest, **options)

    data = module(f"file://{root}", cache_dir=tmp_path / "cache")  # type: ignore[arg-type]
    monkeypatch.setattr(ShardCache, "fetch", fetch_what_is_reached)
    with pytest.raises(ConnectionError, match=r"^file://.*shard-000001\.tar cannot be read$"):
        data.statistics  # noqa: B018
    monkeypatch.setattr(ShardCache, "fetch", fetch)
    assert torch.equal(data.statistics.latent_mean, module(root).statistics.latent_mean)


def test_a_cache_smaller_than_a_remote_set_is_said(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        module(f"file://{root}", cache_dir=tmp_path, cache_gb=1e-6, window_shards=1)  # type: ignore[arg-type]
        module(f"file://{root}", cache_dir=tmp_path, cache_gb=1e-6)  # type: ignore[arg-type]
    two, everything = (record.getMessage() for record in caplog.records)
    assert two.startswith("two windows of data.window_shards=1 remote shards have up to")
    read = sum(path.stat().st_size for split in ("train", "val") for path in (root / split).rglob("*.tar"))
    assert everything.startswith(f"the remote shards have {read / 1e9:.3g} GB, and data.cache_gb=1e-06: ")


@pytest.mark.parametrize("spares", [True, False])
def test_copies_that_a_training_made_are_spared(
    spares: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageShards, "spares_copies", spares)
    data = module(f"file://{root}", cache_dir=tmp_path / "cache", cache_gb=0.0)  # type: ignore[arg-type]
    before = [folder / "before.tar" for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]
    for path in before:
        path.write_bytes(bytes(10))
    for _ in data.train_dataloader():
        pass
    assert before
    assert all(path.is_file() for path in before) is spares  # else removed in the folders that it read


def test_the_copies_of_all_buckets_and_splits_stay_within_one_limit(root: Path, tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in root.rglob("*.tar"))
    limit = 2.2 * largest
    data = module(f"file://{root}", cache_dir=tmp_path, cache_gb=limit / 1e9)  # type: ignore[arg-type]
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for _ in loader:
            assert sum(path.stat().st_size for path in tmp_path.rglob("*.tar")) <= limit
    assert len({path.parent for path in root.rglob("*.tar")}) == 6


def make_drawn(root: Path, options: dict[str, Any]) -> None:
    """A function that makes a set, with the arguments that `MadeImages` passes."""
    write_images(Path(root), {SQUARE: options["train"]}, small_encoders(), {"train": 0})


def test_images_are_made_once_and_again_where_the_making_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import image_sets

    monkeypatch.setattr(image_sets, "make_drawn", make_drawn, raising=False)
    make = MadeImages("image_sets.make_drawn", {"train": 4, "processes": 2}, tmp_path, "drawn")
    assert make.root == MadeImages("image_sets.make_drawn", {"train": 4, "processes": 1}, tmp_path, "drawn").root
    assert make.root != MadeImages("image_sets.make_drawn", {"train": 5}, tmp_path, "drawn").root
    former, present = ({"train": 5, name: {"fovy_deg": 22.0}} for name in ("picture", "image"))
    kept, new = (MadeImages("image_sets.make_drawn", options, tmp_path, "drawn").root for options in (former, present))
    assert kept == new, "sets that were made before the option was renamed keep their folder"
    data = ImageShards(batch_size=4, make=make, num_workers=0)
    data.prepare_data()
    before = {path: path.stat().st_mtime_ns for path in make.root.rglob("*.tar")}
    data.prepare_data()
    assert {path: path.stat().st_mtime_ns for path in make.root.rglob("*.tar")} == before
    (make.root / "images.json").unlink()  # written last: without it the set is not complete
    shutil.rmtree(make.root / "train")
    data.prepare_data()
    data.setup()
    assert len(data.samples("train")) == 4


def test_without_a_place_it_says_what_to_give() -> None:
    data = ImageShards(batch_size=4)
    with pytest.raises(ValueError, match=r"data\.root=PATH"):
        data.setup()


@pytest.mark.parametrize("content", ["[]", "null", '{"schema": '])
def test_a_damaged_list_of_buckets_is_made_again_as_its_message_says(content: str, tmp_path: Path) -> None:
    write_images(tmp_path, {SQUARE: 3}, small_encoders(), {"train": 0})
    info = tmp_path / "images.json"
    splits = json.loads(info.read_text())["splits"]
    info.write_text(content)
    refused = r"images\.json is damaged \(.+\): remove it, and make it again with step=manifest"
    with pytest.raises(ValueError, match=refused):
        module(tmp_path, batch_size=1).setup()
    with pytest.raises(ValueError, match=refused):
        make_manifests(tmp_path)
    info.unlink()
    make_manifests(tmp_path)
    assert json.loads(info.read_text())["splits"] == splits
    assert len(module(tmp_path, batch_size=1).samples("train")) == 3


# ---- validation ------------------------------------------------------------------------------------------------------


def test_validation_counts_patches_latents_and_text(tmp_path: Path) -> None:
    write_images(tmp_path, {SQUARE: 5, WIDE: 3}, small_encoders(), {"train": 0}, without_patches=(1,))
    report = validate(tmp_path)
    assert report["errors"] == 0
    assert report["images"] == {"images": 8, "complete": 6, "latents": 8, "patches": 6, "text": 8}
    assert report["buckets"]["train/bucket_32x32"]["patches"] == 4
    assert report["buckets"]["train/bucket_48x32"]["complete"] == 2


@pytest.mark.parametrize(("split", "other"), [("val", "run the same step=images command again"), ("", MAKE_AGAIN)])
def test_validation_reports_a_damaged_list_of_buckets_beside_all_other_problems(
    split: str, other: str, tmp_path: Path
) -> None:
    write_images(tmp_path, {SQUARE: 3}, small_encoders(), {"train": 0, "val": 3}, without_patches=(0, 1, 2))
    info = tmp_path / split / "images.json"
    info.write_text("[]")
    damaged = f"{info} is damaged (it holds no JSON object): remove it, and {other}"
    report = validate(tmp_path)
    assert damaged in report["problems"]
    lacking = [each for each in report["problems"] if "none of its 3 images has all parts" in each]
    assert len(lacking) == report["errors"] - 1 > 0
    assert len((tmp_path / "problems.txt").read_text().splitlines()) == report["errors"]
    with pytest.raises(ValueError, match=re.escape(damaged)):
        make_manifests(tmp_path)


def test_validation_finds_a_bucket_without_patches_and_broken_parts(tmp_path: Path) -> None:
    write_images(tmp_path, {SQUARE: 3}, small_encoders(), {"train": 0}, without_patches=(0, 1, 2))
    report = validate(tmp_path)
    assert report["errors"] == 1
    assert "none of its 3 images has all parts" in report["problems"][0]


def test_buckets_that_images_json_does_not_name_are_refused(tmp_path: Path) -> None:
    """Training reads the buckets in `images.json`; a bucket that was added later has a manifest of its own."""
    write_images(tmp_path, {SQUARE: 3}, small_encoders(), {"train": 0})
    write_images(tmp_path / "later", {WIDE: 3}, small_encoders(), {"train": 0})
    assert validate(tmp_path)["errors"] == 0
    shutil.move(tmp_path / "later" / "train" / WIDE.name, tmp_path / "train" / WIDE.name)
    named = r"names other buckets than there are \(not named: train/bucket_48x32\): run step=manifest root="
    with pytest.raises(ValueError, match=named):
        module(tmp_path, batch_size=1).setup()
    report = validate(tmp_path)
    assert (report["images"]["images"], report["errors"]) == (6, 1)
    assert re.search(named, report["problems"][0])
    make_manifests(tmp_path)
    assert validate(tmp_path)["errors"] == 0
    assert len(module(tmp_path, batch_size=1).samples("train")) == 6
    shutil.rmtree(tmp_path / "train" / SQUARE.name)
    with pytest.raises(ValueError, match=r"other buckets than there are \(not there: train/bucket_32x32\)"):
        module(tmp_path, batch_size=1).setup()
