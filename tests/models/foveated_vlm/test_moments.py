"""The loss that finds what changes at a place: which places and moments it takes, its crops, and what it asks."""

from __future__ import annotations

import pytest
import torch
from vlm_parts import self_supervised_module as module

from keygrip.models.foveated_vlm import moments, self_supervised
from keygrip.models.foveated_vlm.moments import (
    alike_moments,
    changes_of,
    crops_of,
    often_changed,
    recoloured,
    varied_crops,
    windows_of,
)
from keygrip.models.foveated_vlm.self_supervised import (
    patches_of,
)


def test_it_is_told_by_what_changes_at_a_place_and_by_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three videos: a patch of the first one changes all the time, others never or once; that of the second stands.
    Features are the mean colours of patches."""
    trained = module(shift=0, temperature=0.01, asked_patches=4)
    trained.network.moments_head = torch.nn.Identity()
    video, generator = torch.tensor([0, 0, 0, 0, 1, 1, 2]), torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 4, 4, generator=generator)[video]
    images[:4, :, 2, 1] = 4 * torch.randn(4, 3, generator=generator)
    images[1, :, 0, 3] += 5.0  # something passes by
    images = images.repeat_interleave(16, 2).repeat_interleave(16, 3)
    alike = video[:, None] == video
    changes = changes_of(images, alike)
    patches = patches_of(images, 16).unflatten(-1, (3, -1)).mean(-1)

    def whole(frames: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        means = patches_of(frames, 16).unflatten(-1, (3, -1)).mean(-1)
        return means[torch.arange(len(means))[:, None, None], windows]

    def loss(near: torch.Tensor) -> float:
        def crops(frames: torch.Tensor, places: torch.Tensor, *_: object) -> torch.Tensor:
            return near[torch.arange(len(near))[:, None, None], windows_of(places, 4)[0][video]]

        monkeypatch.setattr(self_supervised, "varied_crops", crops)
        monkeypatch.setattr(trained, "_of_crops", lambda crops: crops)
        monkeypatch.setattr(trained, "_of_windows", whole)
        return float(trained._moments(images, changes, alike, video, torch.Generator().manual_seed(1)))

    assert loss(patches) < 1e-3
    elsewhere = patches.clone()
    elsewhere[:, 9] = patches[:1, 9]  # all but the changing place is as it was: the place's token tells no moment
    assert loss(elsewhere) > 0.3
    passing = patches.clone()
    passing[:4] = patches[:4, :, None].mean((0, 2))[None].expand(4, -1, -1)
    passing[:, 9] = patches[:, 9]  # what passes by is not asked about
    assert loss(passing) < 1e-3
    assert trained._moments(images, torch.zeros_like(changes), alike, video, generator) == 0.0  # nothing changes


def test_a_moment_is_found_among_those_that_look_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two poses that take the whole frame, and a small mark: the moments of the same pose are the candidates, and of
    the patches only that of the mark changes between them."""
    monkeypatch.setattr(moments, "ALIKE", 2)
    poses = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images, video = poses[[0, 1, 0, 1, 0]], torch.tensor([0, 0, 0, 0, 1])
    images[2:, :, :4, :4] += 1.0
    alike = alike_moments(images, video)
    assert [row.nonzero()[:, 0].tolist() for row in alike] == [[0, 2], [1, 3], [0, 2], [1, 3], [4]]
    assert (often_changed(changes_of(images, alike), video, 16) > 0.5).tolist() == [[True] + [False] * 3, [False] * 4]
    whole_video = changes_of(images, video[:, None] == video)
    assert (often_changed(whole_video, video, 16) > 0.5).tolist() == [[True] * 4, [False] * 4]


def test_a_place_that_a_view_has_lost_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved up by a patch, the place of the first row is gone, and that of the second row is in the first."""
    video, alike = torch.zeros(3, dtype=torch.int64), torch.ones(3, 3, dtype=torch.bool)
    for row, kept in ((0, False), (1, True)):
        trained = module(shift=0, temperature=0.01, asked_patches=1)
        images = torch.zeros(3, 3, 64, 64)
        images[:, :, 16 * row : 16 * row + 16, 16:32] = 4 * torch.randn(3, 3, 1, 1)
        monkeypatch.setattr(trained, "_move", lambda size, random: (-16, 0))
        changes = changes_of(images, alike)
        assert (trained._moments(images, changes, alike, video, torch.Generator().manual_seed(0)) > 0) == kept


def test_crops_are_squares_of_the_image_turned_and_scaled() -> None:
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    centre = torch.tensor([[[7.5, 9.5], [24.0, 7.5]]])  # (x, y), between pixels and on one
    none, same = torch.zeros(1, 2), torch.ones(1, 2)
    crops = crops_of(image, centre, 4, none, same)
    torch.testing.assert_close(crops[0, 0], image[0, :, 8:12, 6:10], atol=1e-5, rtol=0)
    between = (image[0, :, 6:10, 22:26] + image[0, :, 6:10, 23:27]) / 2
    torch.testing.assert_close(crops[0, 1], between, atol=1e-5, rtol=0)
    turned = crops_of(image, centre, 4, none + torch.pi / 2, same)
    torch.testing.assert_close(turned[0, 0], image[0, :, 8:12, 6:10].rot90(1, (1, 2)), atol=1e-4, rtol=0)
    wide = crops_of(image, centre[:, :1], 4, none[:, :1], 2 * same[:, :1])  # every second pixel
    smooth = torch.nn.functional.avg_pool2d(image[:, :, 6:14, 4:12], 2)[0]
    torch.testing.assert_close(wide[0, 0], smooth, atol=1e-4, rtol=0)
    outside = crops_of(image, torch.tensor([[[-20.0, 5.0]]]), 4, none[:, :1], same[:, :1])
    torch.testing.assert_close(outside[0, 0, :, :, 0], outside[0, 0, :, :, 3])  # the border goes on


def test_a_place_is_varied_in_the_same_way_at_all_moments() -> None:
    """So that no moment is known by its colours or its turn; other places and videos are varied otherwise."""
    frame = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1, -1)
    video, places = torch.tensor([0, 0, 1, 1]), torch.tensor([[5, 5], [5, 5]])
    crops = varied_crops(frame, places, video, 16, torch.Generator().manual_seed(0))
    assert crops.shape == (4, 2, 3, 48, 48)
    torch.testing.assert_close(crops[0], crops[1])
    torch.testing.assert_close(crops[2], crops[3])
    assert (crops[0] - crops[2]).abs().mean() > 0.1
    assert (crops[0, 0] - crops[0, 1]).abs().mean() > 0.1


def test_recolouring_keeps_shapes_and_not_colours() -> None:
    crops = torch.randn(1, 200, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, -1, 4, 4)
    found = recoloured(crops, torch.tensor([0]), torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, found[..., :1, :1].expand_as(found))
    before, after = crops[0, :, :, 0, 0], found[0, :, :, 0, 0]
    share = torch.corrcoef(torch.cat([before.flatten()[None], after.flatten()[None]]))[0, 1]
    assert share < 0.6
    grey = torch.full((1, 50, 3, 2, 2), 0.7)
    spread = recoloured(grey, torch.tensor([0]), torch.Generator().manual_seed(1)).std(2)
    assert spread.max() < 1e-5  # grey stays grey


def test_windows_stay_inside_and_hold_their_place() -> None:
    windows, own = windows_of(torch.tensor([[0, 13, 24, 23]]), 5)
    assert windows[0, 0].tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    assert windows[0, 1].tolist() == [7, 8, 9, 12, 13, 14, 17, 18, 19]
    assert windows[0, 2].tolist() == [12, 13, 14, 17, 18, 19, 22, 23, 24]
    assert windows.gather(2, own[..., None])[..., 0].tolist() == [[0, 13, 24, 23]]
    assert windows_of(torch.tensor([[3]]), 2)[0].tolist() == [[[0, 1, 2, 3]]]  # a grid smaller than a window
