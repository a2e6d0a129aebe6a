"""Objects found by colour: their centres and colours, which objects are sampled, and the crops around them."""

from __future__ import annotations

import pytest
import torch

from keygrip.models.foveated_vlm import objects
from keygrip.models.foveated_vlm.objects import crops_of, draw_objects

TABLE, RED, BLUE = (torch.tensor(colour) for colour in ([0.75, 0.65, 0.5], [0.8, 0.1, 0.1], [0.1, 0.2, 0.8]))


def frame(*squares: tuple[int, int, int, torch.Tensor]) -> torch.Tensor:
    """A table [3, 64, 64] with squares (x, y, side, colour), whose lower half is in shadow."""
    image = TABLE[:, None, None].repeat(1, 64, 64)
    for x, y, side, colour in squares:
        image[:, y : y + side, x : x + side] = colour[:, None, None]
        image[:, y + side // 2 : y + side, x : x + side] *= 0.6
    return image


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_windows_come_to_rest_in_the_middle_of_objects() -> None:
    """Also if another object touches it, and from whichever of its pixels the window starts."""
    images = torch.stack([frame((10, 20, 16, RED), (26, 20, 16, BLUE)), frame((37, 33, 16, BLUE))])
    found = draw_objects(images, 60, random())
    assert found.centre.shape == (2, 60, 2)
    for number, (x, y, colour) in ((0, (17.5, 27.5, RED)), (0, (33.5, 27.5, BLUE)), (1, (44.5, 40.5, BLUE))):
        near = ((found.drawn[number] - torch.tensor([x, y])).abs() < 7.5).all(-1)
        assert near.sum() > 3
        rest = found.centre[number][near]
        assert (rest - torch.tensor([x, y])).abs().max() < 1.0
        torch.testing.assert_close(
            found.colour[number][near], (0.8 * colour).expand_as(rest[:, :1] * colour), atol=0.05, rtol=0
        )


def test_rare_colours_are_drawn_as_often_as_common_ones() -> None:
    """A square of 6 % of the frame is in half of the samples; uniformly sampled pixels would hit it in 6 %."""
    images = frame((40, 8, 16, RED))[None].expand(20, -1, -1, -1)
    found = draw_objects(images, 12, random())
    on_red = (found.colour[..., 0] > 2 * found.colour[..., 1]).float().mean()
    assert 0.3 < on_red < 0.7


def test_draws_follow_the_generator_and_are_not_repeated() -> None:
    images = frame((40, 8, 16, RED))[None]
    one, again, other = (draw_objects(images, 300, random(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.centre, again.centre)
    assert not torch.equal(one.drawn, other.drawn)
    assert one.centre.isfinite().all()


def test_frames_smaller_than_a_window_have_objects_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "REACH", 40)
    images = torch.rand(2, 3, 16, 16, generator=random())
    found = draw_objects(images, 5, random())
    assert ((found.centre >= 0) & (found.centre <= 15)).all()
    black = draw_objects(torch.zeros(1, 3, 16, 16), 5, random())
    assert black.centre.isfinite().all()
    assert (black.colour == 0).all()


def test_crops_are_squares_of_the_image() -> None:
    image = torch.randn(1, 3, 32, 32, generator=random())
    crops = crops_of(image, torch.tensor([[[7.5, 9.5], [24.0, 7.5], [-20.0, 5.0]]]), 4)
    assert crops.shape == (1, 3, 3, 4, 4)
    torch.testing.assert_close(crops[0, 0], image[0, :, 8:12, 6:10], atol=1e-5, rtol=0)
    between = (image[0, :, 6:10, 22:26] + image[0, :, 6:10, 23:27]) / 2
    torch.testing.assert_close(crops[0, 1], between, atol=1e-5, rtol=0)
    torch.testing.assert_close(crops[0, 2, :, :, 0], crops[0, 2, :, :, 3])  # the border pixels are repeated
