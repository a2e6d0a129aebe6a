"""The cache of geometry features: keyed by content, limited in size, complete files, several processes."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from keygrip.models.geometry_vla import feature_cache
from keygrip.models.geometry_vla.feature_cache import FeatureCache


class Counting:
    """Compute features from the images, and count how many were computed."""

    def __init__(self) -> None:
        self.computed = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.computed += len(images)
        return images.float().flatten(1)[:, :48].reshape(-1, 8, 6) / 255


def pictures(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 2, 3, 8, 8), generator=generator, dtype=torch.uint8)


def test_the_same_images_are_computed_once_and_give_the_same(tmp_path: Path) -> None:
    cache, compute, images = FeatureCache(tmp_path, 1.0), Counting(), pictures(3)
    first = cache.features(images, "a", compute)
    again = FeatureCache(tmp_path, 1.0).features(images.flip(0), "a", compute)
    assert compute.computed == 3
    assert torch.equal(again.flip(0), first)
    torch.testing.assert_close(first, Counting()(images), atol=1e-3, rtol=1e-3)
    mixed = cache.features(torch.cat([images[1:2], pictures(1, seed=1)]), "a", compute)
    assert compute.computed == 4, "only the picture that is new"
    assert torch.equal(mixed[0], first[1])


def test_another_pixel_or_another_encoder_is_another_feature(tmp_path: Path) -> None:
    cache, compute, images = FeatureCache(tmp_path, 1.0), Counting(), pictures(1)
    cache.features(images, "a", compute)
    changed = images.clone()
    changed[0, 1, 2, 7, 7] ^= 1
    cache.features(changed, "a", compute)
    cache.features(images, "b", compute)
    assert compute.computed == 3


def test_values_beyond_half_precision_survive(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 1.0)
    images = pictures(1)
    for _ in range(2):
        found = cache.features(images, "a", lambda batch: torch.full((len(batch), 4), 1e6))
        assert torch.equal(found, torch.full((1, 4), 1e6))


def test_size_stays_below_the_limit_and_the_least_used_go(tmp_path: Path) -> None:
    compute = Counting()
    probe = FeatureCache(tmp_path / "probe", 1.0)
    probe.features(pictures(1), "a", compute)
    each = probe.size()
    limit = 6 * each
    cache = FeatureCache(tmp_path / "cache", limit / 1e9)
    first = pictures(1, seed=100)
    cache.features(first, "a", compute)
    for seed in range(20):
        cache.features(pictures(1, seed=seed), "a", compute)
        cache.features(first, "a", compute)  # always the most recently used
        for age, path in enumerate(sorted((tmp_path / "cache").glob("*/*.safetensors"), key=os.path.getmtime)):
            os.utime(path, ns=(age, age))  # the clock is too coarse to distinguish them
        held = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.safetensors"))
        assert held <= limit
        assert cache.size() == held
    before = compute.computed
    cache.features(first, "a", compute)
    assert compute.computed == before


@pytest.mark.parametrize("counter", [None, ""], ids=["removed", "empty"])
def test_files_that_no_counter_counts_count_too(tmp_path: Path, counter: str | None) -> None:
    """A copy made with a pattern that leaves hidden files out has no counter."""
    probe = FeatureCache(tmp_path / "probe", 1.0)
    probe.features(pictures(1), "a", Counting())
    limit, folder = 4 * probe.size(), tmp_path / "cache"
    FeatureCache(folder, 1.0).features(pictures(6), "a", Counting())
    (folder / ".size").unlink()
    if counter is not None:
        (folder / ".size").write_text(counter)
    cache = FeatureCache(folder, limit / 1e9)
    assert cache.size() == 6 * probe.size()
    cache.features(pictures(1, seed=1), "a", Counting())
    held = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    assert 0 < held <= limit
    assert cache.size() == held


@pytest.mark.parametrize("stopped_after", ["write_bytes", "write_text"])
def test_a_counter_is_never_below_the_size_of_the_files(
    stopped_after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may end between writing a feature and its counter."""

    class Stopped(Exception):
        pass

    cache = FeatureCache(tmp_path, 1.0)
    cache.features(pictures(1), "a", Counting())
    write = getattr(feature_cache, stopped_after)

    def stop(path: Path, content: Any) -> None:
        write(path, content)
        raise Stopped

    monkeypatch.setattr(feature_cache, stopped_after, stop)
    with pytest.raises(Stopped):
        cache.features(pictures(1, seed=1), "a", Counting())
    held = sum(path.stat().st_size for path in tmp_path.glob("*/*.safetensors"))
    assert cache.size() >= held > 0


def test_a_broken_file_is_computed_again(tmp_path: Path) -> None:
    cache, compute, images = FeatureCache(tmp_path, 1.0), Counting(), pictures(1)
    first = cache.features(images, "a", compute)
    (path,) = tmp_path.glob("*/*.safetensors")
    whole = path.read_bytes()
    for computed, broken in ((2, whole[:20]), (3, whole[:-1] + bytes([whole[-1] ^ 1]))):  # truncated; one bit changed
        path.write_bytes(broken)
        assert torch.equal(cache.features(images, "a", compute), first)
        assert compute.computed == computed
        assert torch.equal(cache.features(images, "a", compute), first)
        assert compute.computed == computed


def test_files_without_a_checksum_are_not_read_and_not_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, compute, images = FeatureCache(tmp_path, 1.0), Counting(), pictures(2)
    first = cache.features(images, "a", compute)
    for path in tmp_path.glob("*/*.safetensors"):
        path.write_bytes(save({"feature": torch.zeros(8, 6)}))
    assert torch.equal(cache.features(images, "a", compute), first)
    assert torch.equal(cache.features(images, "a", compute), first)
    assert (compute.computed, caplog.text) == (4, "")


def test_a_full_disk_names_a_remedy_with_which_the_run_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache, "write_bytes", full)
    with pytest.raises(
        OSError, match=r"No space left.*give geometry\.cache\.folder a disk with room, with which"
    ) as told:
        FeatureCache(tmp_path, 1.0).features(pictures(1), "a", Counting())
    assert "cache=null" not in str(told.value)


def work(folder: str, limit_gb: float, seed: int) -> None:
    torch.set_num_threads(1)
    cache, compute = FeatureCache(folder, limit_gb), Counting()
    for turn in range(12):
        images = pictures(2, seed=(seed + turn) % 6)
        found = cache.features(images, "a", compute)
        torch.testing.assert_close(found, Counting()(images), atol=1e-3, rtol=1e-3)


def test_several_processes_share_a_folder_that_is_too_small_for_all(tmp_path: Path) -> None:
    probe = FeatureCache(tmp_path / "probe", 1.0)
    probe.features(pictures(1), "a", Counting())
    limit = 5 * probe.size()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(str(tmp_path / "c"), limit / 1e9, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    held = sum(path.stat().st_size for path in (tmp_path / "c").glob("*/*.safetensors"))
    assert held <= limit
    assert FeatureCache(tmp_path / "c", 1.0).size() == held
    assert not list((tmp_path / "c").glob("*/.*")), "no half-written file is left"


def test_a_cache_without_effect_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(feature_cache, "SURPRISING", 4)
    for repeated, warnings in ((True, 0), (False, 1)):
        caplog.clear()
        cache = FeatureCache(tmp_path / str(repeated), 1.0)
        for seed in range(8):
            cache.features(pictures(1, seed=seed // 2 if repeated else seed), "a", Counting())
        assert len([record for record in caplog.records if "none came twice" in record.message]) == warnings


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"geometry\.cache=null for no cache"):
        FeatureCache(tmp_path, 0.0)
    with pytest.raises(ValueError, match="must be uint8"):
        FeatureCache(tmp_path, 1.0).features(pictures(1).float(), "a", Counting())
