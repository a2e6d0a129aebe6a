"""Images and intrinsics change together: a drawn point is found where the new camera projects it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from keygrip.data.robot.augmentation import Augmentation, ImageGeometry, cut, follow_pixels, normalise
from keygrip.models.geometry.cameras import project

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
WIDTH, HEIGHT = 160, 120
INTRINSICS = np.array([[150.0, 0, 78.0], [0, 145.0, 63.0], [0, 0, 1]])


def looking_down() -> np.ndarray:
    pose = np.diag([1.0, -1.0, -1.0, 1.0])
    pose[:3, 3] = 0.02, -0.01, 0.9
    return pose


def picture_of(point: np.ndarray, intrinsics: np.ndarray, pose: np.ndarray, sigma: float = 3.0) -> np.ndarray:
    """Draw a soft bright dot on black where the point projects. Pixel centres lie at half integers."""
    pixel, _ = project(*(torch.from_numpy(part) for part in (point, intrinsics, pose)))
    x, y = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    value = 255 * np.exp(-((x - float(pixel[0])) ** 2 + (y - float(pixel[1])) ** 2) / (2 * sigma**2))
    return np.repeat(value.round().astype(np.uint8)[..., None], 3, axis=2)


def centre_of_mass(image: torch.Tensor) -> np.ndarray:
    value = (image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).sum(0).double().numpy()
    value = np.where(value > 0.2 * value.max(), value, 0)
    y, x = np.mgrid[: value.shape[0], : value.shape[1]] + 0.5
    return np.array([(x * value).sum(), (y * value).sum()]) / value.sum()


@pytest.mark.parametrize("fit", ["crop", "stretch"])
@pytest.mark.parametrize("rotate", [0.0, 25.0])
@pytest.mark.parametrize("size", [48, 96, 192])
@pytest.mark.quick_sets(6)
def test_a_point_is_found_where_the_new_camera_puts_it(fit: str, rotate: float, size: int) -> None:
    geometry = ImageGeometry(size, MEAN, STD, field=0.8, fit=fit)
    augmentation = Augmentation(scale=(0.7, 1.3), shift=0.2, rotate_degrees=rotate)
    rng, seen, worst = np.random.default_rng(0), 0, 0.0
    pose = looking_down()
    margin = 14 * size / 96  # the dot must lie entirely inside, or its centre of mass is wrong
    for draw in range(120):
        point = np.array([*rng.uniform(-0.25, 0.25, 2), rng.uniform(0, 0.2)])
        picture = picture_of(point, INTRINSICS, pose)
        image, intrinsics, new_pose, _ = augmentation_without_colour(augmentation).apply(
            np.random.default_rng(draw), geometry, picture, INTRINSICS, pose
        )
        assert image.shape == (3, size, size)
        pixel, _ = project(torch.from_numpy(point).float(), intrinsics, new_pose)
        if not ((pixel > margin) & (pixel < size - margin)).all():
            continue
        seen += 1
        worst = max(worst, float(np.abs(centre_of_mass(image) - pixel.numpy()).max()))
    assert seen > 25
    assert worst < 0.2


def augmentation_without_colour(augmentation: Augmentation) -> Augmentation:
    return Augmentation(augmentation.scale, augmentation.shift, augmentation.rotate_degrees, 0, 0, 0, 0)


@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_the_nominal_crop_moves_pixels_and_intrinsics_together(fit: str) -> None:
    geometry = ImageGeometry(64, MEAN, STD, field=0.9, fit=fit)
    point, pose = np.array([0.05, -0.08, 0.1]), looking_down()
    image, intrinsics = geometry.apply(picture_of(point, INTRINSICS, pose), INTRINSICS)
    pixel, _ = project(torch.from_numpy(point).float(), intrinsics, torch.from_numpy(pose).float())
    np.testing.assert_allclose(centre_of_mass(image), pixel.numpy(), atol=0.2)


def test_without_a_change_of_size_the_crop_copies_pixels() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    geometry = ImageGeometry(32, (0, 0, 0), (1, 1, 1), field=0.8)
    image, intrinsics = geometry.apply(picture, np.eye(3))
    np.testing.assert_array_equal((image * 255).round().permute(1, 2, 0).numpy(), picture[4:36, 14:46])
    np.testing.assert_array_equal(intrinsics, [[1, 0, -14], [0, 1, -4], [0, 0, 1]])


def test_normalisation_is_that_of_the_backbone() -> None:
    picture = np.full((8, 8, 3), (255, 0, 51), np.uint8)
    image, _ = ImageGeometry(8, MEAN, STD).apply(picture, np.eye(3))
    expected = [(1 - 0.5) / 0.2, (0 - 0.4) / 0.25, (0.2 - 0.3) / 0.3]
    np.testing.assert_allclose(image[:, 3, 3].numpy(), expected, atol=1e-6)
    assert image.dtype == torch.float32


@pytest.mark.parametrize(("width", "height"), [(WIDTH, HEIGHT), (96, 96), (640, 480), (1280, 720)])
@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_crops_stay_inside_the_image(width: int, height: int, fit: str) -> None:
    augmentation = Augmentation(scale=(0.5, 3.0), shift=0.9)
    white = np.full((height, width, 3), 255, np.uint8)
    for draw in range(60):
        geometry = ImageGeometry(32, MEAN, STD, field=0.9 + 0.02 * (draw % 5), fit=fit)
        box = augmentation.box(np.random.default_rng(draw), geometry, width, height)
        assert box.left >= 0
        assert box.top >= 0
        assert box.right <= width
        assert box.bottom <= height
        assert cut(white, box, 32).min() == 255


def test_a_turn_becomes_a_roll_of_the_camera() -> None:
    rng = np.random.default_rng(0)
    geometry = ImageGeometry(64, MEAN, STD, field=0.7)
    augmentation = Augmentation(rotate_degrees=40)
    points = torch.from_numpy(rng.uniform(-0.2, 0.2, (50, 3)))
    for draw in range(20):
        to_image = augmentation.box(np.random.default_rng(draw), geometry, WIDTH, HEIGHT).to_image(64)
        intrinsics, pose = follow_pixels(to_image, INTRINSICS, looking_down())
        assert intrinsics[1, 0] == 0
        assert intrinsics[0, 0] > 0
        assert intrinsics[1, 1] > 0
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
        before, _ = project(points, torch.from_numpy(INTRINSICS), torch.from_numpy(looking_down()))
        after, _ = project(points, torch.from_numpy(intrinsics), torch.from_numpy(pose))
        moved = before.numpy() @ to_image[:2, :2].T + to_image[:2, 2]
        np.testing.assert_allclose(after.numpy(), moved, atol=1e-9)


def test_colours_change_the_image_and_nothing_else() -> None:
    picture = np.random.default_rng(1).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    geometry = ImageGeometry(32, MEAN, STD, field=0.8)
    coloured = Augmentation(brightness=0.5, contrast=0.5, saturation=0.9, channel_gain=0.3)
    plain = augmentation_without_colour(coloured)
    for draw in range(5):
        a, b = (
            x.apply(np.random.default_rng(draw), geometry, picture, INTRINSICS, np.eye(4)) for x in (coloured, plain)
        )
        assert not torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
        assert torch.equal(a[2], b[2])


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("brightness", lambda x, f: x * f),
        ("contrast", lambda x, f: (x - grey(x).mean()) * f + grey(x).mean()),
        ("saturation", lambda x, f: (x - grey(x)) * f + grey(x)),
    ],
)
def test_each_change_of_colour_is_what_it_says(part: str, expected: Callable[[np.ndarray, float], np.ndarray]) -> None:
    amount = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "channel_gain": 0.0} | {part: 0.4}
    picture = np.random.default_rng(2).integers(90, 150, (1, 1, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    picture[::4, ::4] = picture[0, 0]
    picture[2:, 2:] = picture[0, 0] + 5
    picture[::4, ::4] = picture[0, 0]  # the pixels from which the mean grey is computed
    generator = np.random.default_rng(3)
    order = ["brightness", "contrast", "saturation"]
    factor = 1.0
    for name in order:
        drawn = 1 + generator.uniform(-amount[name], amount[name])
        factor = drawn if name == part else factor
    result = recoloured(Augmentation(**amount), 3, picture)
    reference = expected(picture.astype(float), factor)
    if part == "contrast":
        level = grey(picture[:1, :1].astype(float)).mean()
        reference = (picture - level) * factor + level
    assert abs(factor - 1) > 0.05
    np.testing.assert_allclose(result, reference.clip(0, 255), atol=1e-3)


def recoloured(augmentation: Augmentation, seed: int, picture: np.ndarray) -> np.ndarray:
    """Return the values 0 to 255 of the recoloured image, height x width x 3."""
    colours = augmentation.colours(np.random.default_rng(seed), picture)
    image = normalise(picture, MEAN, STD, colours).permute(1, 2, 0).double().numpy()
    return (image * STD + MEAN) * 255


def grey(picture: np.ndarray) -> np.ndarray:
    return (picture @ [0.299, 0.587, 0.114])[..., None]


def test_bright_colours_clip_as_a_sensor_does() -> None:
    picture = np.full((8, 8, 3), 250, np.uint8)
    results = [recoloured(Augmentation(brightness=0.5), draw, picture) for draw in range(30)]
    assert max(result.max() for result in results) == pytest.approx(255, abs=1e-3)
    assert min(result.min() for result in results) > 80


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageGeometry(0, MEAN, STD), "image_size"),
        (lambda: ImageGeometry(8, MEAN, STD, field=1.2), "field must be"),
        (lambda: ImageGeometry(8, MEAN, STD, fit="pad"), "one of crop, stretch"),
        (lambda: ImageGeometry(8, MEAN, (0, 1, 1)), "std above 0"),
        (lambda: Augmentation(scale=(1.2, 0.8)), "rising"),
        (lambda: Augmentation(contrast=1.5), "contrast must be"),
        (lambda: ImageGeometry(8, MEAN, STD).apply(np.zeros((8, 8, 3), np.float32), np.eye(3)), "uint8"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_white_balance_scales_each_channel_after_the_other_changes() -> None:
    picture = np.random.default_rng(2).integers(90, 150, (16, 16, 3), dtype=np.uint8)
    plain, own = (Augmentation(channel_gain=amount).colours(np.random.default_rng(3), picture) for amount in (0.0, 0.3))
    generator = np.random.default_rng(3)
    generator.uniform(size=3)  # brightness, contrast, saturation
    gain = 1 + generator.uniform(-0.3, 0.3, size=3)
    np.testing.assert_allclose(own.matrix, gain[:, None] * plain.matrix)
    np.testing.assert_allclose(own.offset, gain * plain.offset)
