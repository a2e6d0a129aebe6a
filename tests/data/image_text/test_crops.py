"""Aspect buckets, and the crop that the latent and the DINO view share."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from keygrip.data.image_text.crops import Bucket, aspect_buckets, cut_out, nearest_bucket, shared_crop


def test_buckets_have_one_area_and_sides_that_divide() -> None:
    buckets = aspect_buckets(512, 64, 2.0)
    assert Bucket(512, 512) in buckets
    assert {Bucket(b.height, b.width) for b in buckets} == set(buckets)
    for bucket in buckets:
        assert bucket.width % 64 == 0
        assert bucket.height % 64 == 0
        assert abs(bucket.width * bucket.height / 512**2 - 1) < 0.13
        assert 0.5 <= bucket.width / bucket.height <= 2.0
    assert aspect_buckets(64, 16, 1.0) == [Bucket(64, 64)]


@pytest.mark.parametrize(("size", "step", "aspect"), [(500, 64, 2.0), (32, 64, 2.0), (512, 64, 0.5)])
def test_sizes_that_make_no_buckets_are_refused(size: int, step: int, aspect: float) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        aspect_buckets(size, step, aspect)


@pytest.mark.parametrize(
    ("step", "said"), [(24, "size=64 must be a multiple of bucket_step=24"), (0, "bucket_step=0 must be at least 1")]
)
def test_a_step_that_makes_no_buckets_has_the_name_of_its_setting(step: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        aspect_buckets(64, step, 2.0)


def test_nearest_bucket_is_of_the_likest_shape() -> None:
    buckets = [Bucket(64, 64), Bucket(96, 48), Bucket(48, 96)]
    assert nearest_bucket(640, 640, buckets) == Bucket(64, 64)
    assert nearest_bucket(1900, 1000, buckets) == Bucket(96, 48)
    assert nearest_bucket(1000, 1900, buckets) == Bucket(48, 96)


def test_of_buckets_of_one_shape_the_first_is_taken() -> None:
    """A model samples at the most common of its sizes, which comes first."""
    large, small = Bucket(128, 128), Bucket(64, 64)
    assert nearest_bucket(640, 640, [large, small]) == large
    assert nearest_bucket(640, 640, [small, large]) == small


def test_a_bucket_is_named_by_its_size() -> None:
    assert Bucket.from_name(Bucket(96, 48).name) == Bucket(96, 48)
    with pytest.raises(ValueError, match="does not name a bucket"):
        Bucket.from_name("bucket_96")


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (101, 100), (64, 64)])
@pytest.mark.parametrize("bucket", [Bucket(64, 64), Bucket(96, 48)])
def test_the_crop_has_the_shape_of_the_bucket_and_touches_the_image(size: tuple[int, int], bucket: Bucket) -> None:
    left, top, right, bottom = shared_crop(*size, bucket)
    assert (right - left) / (bottom - top) == pytest.approx(bucket.width / bucket.height)
    assert min(left, top) == pytest.approx(0.0, abs=1e-9)
    assert left + right == pytest.approx(size[0])  # the crop is centred
    assert top + bottom == pytest.approx(size[1])


@pytest.mark.parametrize("step", [16, 64])
def test_no_crop_leaves_the_image_by_rounding(step: int) -> None:
    """Pillow refuses a box that begins 1e-14 pixels outside of the image."""
    buckets = aspect_buckets(512, step, 2.0)
    for width in range(400, 2000, 37):
        for height in [*range(400, 2000, 41), width * 9 // 16, width * 2 // 3]:
            left, top, right, bottom = shared_crop(width, height, nearest_bucket(width, height, buckets))
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


@pytest.mark.parametrize("size", [(1600, 900), (900, 1600), (1500, 1000), (211, 211)])
def test_usual_sizes_are_cut(size: tuple[int, int]) -> None:
    for bucket in (*aspect_buckets(512, 64, 2.0), *aspect_buckets(512, 16, 2.0)):
        assert cut_out(Image.new("RGB", size), shared_crop(*size, bucket), (8, 8)).shape == (8, 8, 3)


def centre_of_red(pixels: np.ndarray) -> tuple[float, float]:
    """Return the centre (x, y) of the red pixels, in fractions of the image."""
    weight = np.clip(pixels[..., 0].astype(float) - pixels[..., 1], 0, None)
    y, x = np.indices(weight.shape)
    return tuple(
        float((weight * (axis + 0.5)).sum() / weight.sum() / n)
        for axis, n in ((x, weight.shape[1]), (y, weight.shape[0]))
    )  # type: ignore[return-value]


@pytest.mark.parametrize("size", [(300, 150), (150, 300), (311, 200)])
@pytest.mark.parametrize("bucket", [Bucket(64, 64), Bucket(96, 48), Bucket(48, 96)])
def test_latent_image_and_view_show_the_same_crop(size: tuple[int, int], bucket: Bucket) -> None:
    """A mark lies at the same place in both, although one is square and the other is not."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    x, y = size[0] // 2 + 20, size[1] // 2 - 18  # inside every crop
    pixels[y - 6 : y + 6, x - 6 : x + 6] = (255, 0, 0)
    picture = Image.fromarray(pixels)
    box = shared_crop(*size, bucket)
    latent, view = cut_out(picture, box, (bucket.width, bucket.height)), cut_out(picture, box, (96, 96))
    assert latent.shape == (bucket.height, bucket.width, 3)
    np.testing.assert_allclose(centre_of_red(latent), centre_of_red(view), atol=0.004)
    expected = ((x - box[0]) / (box[2] - box[0]), (y - box[1]) / (box[3] - box[1]))
    np.testing.assert_allclose(centre_of_red(latent), expected, atol=0.004)
