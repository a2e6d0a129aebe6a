"""Distances between sets of images: known values, and that they see grain and missing variety."""

from __future__ import annotations

import pytest
import torch

from keygrip.evaluation.image_features import FeatureOptions, train_encoder
from keygrip.evaluation.image_report import pareto, shortcomings
from keygrip.evaluation.image_statistics import cmmd, frechet_distance, grain, precision_recall, set_figures


def normal(count: int, seed: int, shift: float = 0.0, spread: float = 1.0, width: int = 4) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * spread + shift


def test_frechet_distance_of_known_distributions() -> None:
    """Means apart by 2 in each of 4 axes: 16. Standard deviations 1 and 3: 4 axes of (3 - 1)^2, 16 more."""
    left = normal(5000, 0)
    assert frechet_distance(left, left) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(left, normal(5000, 1)) == pytest.approx(0, abs=0.02)
    assert frechet_distance(left, normal(5000, 1, 2.0)) == pytest.approx(16, rel=0.05)
    assert frechet_distance(left, normal(5000, 1, 2.0, 3.0)) == pytest.approx(32, rel=0.05)


def test_frechet_distance_equals_the_formula_with_a_matrix_root() -> None:
    """Fewer images than features as well."""
    mix = normal(6, 7, width=6).double()
    left, right = normal(50, 0, width=6).double() @ mix, normal(40, 1, 0.5, width=6).double()
    covariances = [torch.cov(values.T) for values in (left, right)]
    product = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    means = (left.mean(0) - right.mean(0)).pow(2).sum()
    expected = float(means + covariances[0].trace() + covariances[1].trace() - 2 * product)
    assert frechet_distance(left, right) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(left[:4], right[:3]) > 0


def test_cmmd_is_zero_for_one_distribution_and_grows() -> None:
    left = normal(300, 0, 1.0)
    values = [cmmd(left, normal(300, 1, shift)) for shift in (1.0, 0.5, -1.0)]
    assert abs(values[0]) < 0.5
    assert values[0] < values[1] < values[2]


def test_precision_and_recall_tell_quality_from_variety() -> None:
    real = normal(200, 0)
    assert min(precision_recall(normal(200, 1), real)) > 0.75
    few_kinds = normal(200, 2, 0.0, 0.1)
    precision, recall = precision_recall(few_kinds, real)
    assert precision > 0.95
    assert recall < 0.3
    assert precision_recall(real + 50, real) == (0.0, 0.0)


def test_grain_sees_noise_and_not_edges_or_shading() -> None:
    shaded = torch.linspace(0, 1, 32).expand(1, 3, 32, 32).clone()
    shaded[..., 8:20, 8:20] = 0.2
    noisy = (shaded + 0.03 * torch.randn(shaded.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert float(grain(shaded)) < 0.6
    assert 3 < float(grain(noisy)) < 10
    assert grain(torch.cat([shaded, noisy])).shape == (2,)


def test_too_few_images_leave_figures_out() -> None:
    real = normal(10, 0)
    assert set(set_figures(normal(10, 1), real)) == {"frechet", "cmmd", "precision", "recall"}
    assert set(set_figures(normal(3, 1), real)) == {"frechet", "cmmd"}
    assert not set_figures(normal(1, 1), real)
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(real[:1], real)


def test_an_encoder_without_labels_is_always_trained_to_the_same_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.full((96, 3, 32, 32), 180, dtype=torch.uint8)
    for image in images:
        x, y = torch.randint(2, 22, (2,), generator=generator).tolist()
        image[:, y : y + 8, x : x + 8] = torch.randint(0, 160, (3, 1, 1), generator=generator, dtype=torch.uint8)
    options = FeatureOptions(width=8, steps=25, batch_size=16)
    network = train_encoder([images[:64]], options)
    again = train_encoder([images[:64]], options)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        features = network(images[64:].float() / 255)
    assert features.shape == (32, 12 * 8)
    assert torch.isfinite(features).all()
    assert features.std(dim=0).mean() > 1e-3  # images differ in them


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "clip"}, "choose trained"),
        ({"kind": "inception"}, "name its file"),
        ({"weights": "a.pt"}, "leave weights out"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_feature_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureOptions(**options)  # type: ignore[arg-type]


def test_the_report_says_first_what_is_wrong() -> None:
    good = {"frechet": 1.2, "grain": 1.1, "ssim": 0.9, "cube_within_4px": 1.0, "colour_as_asked": 1.0}
    real = {"frechet": 1.0, "grain": 1.0}
    assert not shortcomings({"reconstruction": good, "real": real})
    found = shortcomings(
        {"reconstruction": good | {"grain": 4.0, "ssim": 0.45}, "real": real, "another_picture": {"ssim": 0.69}}
    )
    assert found == [
        "The grain of reconstructions is 4, 4 times that of real images (1).",
        "The SSIM of reconstructions is 0.45, below 0.80; that of an unrelated real image is 0.69.",
    ]


def test_pareto_rows() -> None:
    rows = [{"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5}, {"a": 0.4, "b": 0.5}, {"a": 0.0, "b": 1.0}]
    assert pareto(rows, ("a", "b")) == [0, 1, 3]
