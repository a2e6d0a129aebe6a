"""Quaternion algebra against scipy, and the rotation codecs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from keygrip.models.geometry.rotation_codecs import KMeansRotation, PCARotation, fit_or_load
from keygrip.models.geometry.rotations import (
    geodesic_angle,
    matrix_to_quaternion,
    mean_rotation,
    quaternion_multiply,
    quaternion_to_matrix,
    rotation_exp,
    rotation_log,
)


def random_rotations(count: int, seed: int = 0) -> tuple[Rotation, torch.Tensor]:
    rotation = Rotation.random(count, rng=np.random.default_rng(seed))
    return rotation, torch.from_numpy(rotation.as_quat(scalar_first=True))


def test_conversions_agree_with_scipy() -> None:
    rotation, quaternion = random_rotations(500)
    torch.testing.assert_close(quaternion_to_matrix(quaternion), torch.from_numpy(rotation.as_matrix()))
    torch.testing.assert_close(rotation_log(quaternion), torch.from_numpy(rotation.as_rotvec()))
    back = matrix_to_quaternion(torch.from_numpy(rotation.as_matrix()))
    assert geodesic_angle(back, quaternion).max() < 1e-7
    assert geodesic_angle(rotation_exp(rotation_log(quaternion)), quaternion).max() < 1e-7


def test_half_turns_and_tiny_turns_are_accurate() -> None:
    axes = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0]], dtype=torch.float64)
    for angle in (torch.pi, torch.pi - 1e-6, 1e-9, 0.0):
        quaternion = rotation_exp(axes * angle)
        assert geodesic_angle(matrix_to_quaternion(quaternion_to_matrix(quaternion)), quaternion).max() < 1e-7
        torch.testing.assert_close(rotation_log(quaternion).norm(dim=-1), torch.full((4,), float(angle)).double())


def test_product_and_mean_agree_with_scipy() -> None:
    a, qa = random_rotations(50, 1)
    b, qb = random_rotations(50, 2)
    assert (
        geodesic_angle(quaternion_multiply(qa, qb), torch.from_numpy((a * b).as_quat(scalar_first=True))).max() < 1e-7
    )
    near = Rotation.from_rotvec(np.random.default_rng(0).normal(0, 0.3, (40, 3))) * a[0]
    quaternions = torch.from_numpy(near.as_quat(scalar_first=True)) * torch.tensor([1.0, -1.0]).repeat(20)[:, None]
    assert geodesic_angle(mean_rotation(quaternions), torch.from_numpy(near.mean().as_quat(scalar_first=True))) < 1e-6


def yaw_data(count: int = 400, tilt: float = 0.02) -> torch.Tensor:
    """A downward gripper rotated about the vertical, with small random tilts; signs of the quaternions alternate."""
    rng = np.random.default_rng(3)
    yaw = Rotation.from_euler("z", rng.uniform(-1.2, 1.2, (count, 1)))
    wobble = Rotation.from_rotvec(rng.normal(0, tilt, (count, 3)))
    quaternion = (yaw * Rotation.from_euler("x", np.pi) * wobble).as_quat(scalar_first=True)
    return torch.from_numpy(quaternion * np.where(np.arange(count) % 2, 1, -1)[:, None])


def test_pca_codec_explains_yaw_and_stays_within_its_floor() -> None:
    codec = PCARotation(classes=32)
    report = codec.fit(yaw_data())
    assert report["pc1_explained"] > 0.98
    quaternions = yaw_data(tilt=0.0)
    clean = PCARotation(classes=32)
    clean.fit(quaternions)
    width = float(torch.rad2deg(clean.score_range[1] - clean.score_range[0])) / 32
    assert clean.quantisation(quaternions)["decode_error_max_deg"] <= width / 2 + 0.01
    assert torch.equal(clean.encode(quaternions), clean.encode(-quaternions))
    codes = torch.arange(32)
    assert torch.equal(clean.encode(clean.decode(codes)), codes)


def test_pca_expectation_is_finer_than_a_bin() -> None:
    codec = PCARotation(classes=32)
    quaternions = yaw_data(tilt=0.0)
    codec.fit(quaternions)
    position = codec.bin_position(quaternions)
    bins = torch.arange(32) + 0.5
    logits = -((bins - position[:, None]) ** 2) / 2
    fine = torch.rad2deg(geodesic_angle(codec.expectation(logits, window=3), quaternions.float()))[
        (position > 4) & (position < 28)
    ]
    assert fine.mean() < 0.2 * codec.quantisation(quaternions)["decode_error_deg"]


def test_pca_warns_where_one_component_is_not_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, quaternions = random_rotations(300)
    for _ in range(2):  # newly fitted, then loaded
        caplog.clear()
        fit_or_load(PCARotation(), quaternions, tmp_path, "x")
        (said,) = (r.getMessage() for r in caplog.records if "first principal component" in r.getMessage())
        assert "rotation.min_explained=0.8" in said
        assert "rotation=kmeans" in said


def test_kmeans_uses_geodesic_distance_and_ignores_signs() -> None:
    _, quaternions = random_rotations(300)
    codec = KMeansRotation(classes=8)
    codec.fit(quaternions)
    angles = geodesic_angle(quaternions[:, None], codec.prototypes.double()[None])
    assert torch.equal(codec.encode(quaternions), angles.argmin(-1))
    assert torch.equal(codec.encode(quaternions), codec.encode(-quaternions))


def test_kmeans_with_fewer_rotations_than_classes() -> None:
    _, quaternions = random_rotations(3)
    codec = KMeansRotation(classes=8)
    report = codec.fit(quaternions.repeat(5, 1))
    assert report["prototypes_used"] == 3
    assert report["decode_error_max_deg"] < 1e-3


def test_constant_rotation_has_a_basis_too() -> None:
    quaternions = torch.tensor([[0.0, 1.0, 0.0, 0.0]]).repeat(10, 1)
    assert PCARotation().fit(quaternions)["decode_error_max_deg"] < 0.1


def test_unfitted_and_broken_input_are_refused() -> None:
    with pytest.raises(ValueError, match="no basis yet"):
        PCARotation().encode(torch.tensor([[1.0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="NaN"):
        PCARotation().fit(torch.full((3, 4), torch.nan))
    with pytest.raises(ValueError, match="at least 2 classes"):
        KMeansRotation(classes=1)


@pytest.mark.parametrize("build", [PCARotation, KMeansRotation])
def test_basis_beside_the_dataset_is_reused_only_for_the_same_rotations(tmp_path: Path, build: type) -> None:
    quaternions = yaw_data()
    first, second, other, finer = build(), build(), build(), build(classes=16)
    report = fit_or_load(first, quaternions, tmp_path, "v1")
    assert fit_or_load(second, quaternions, tmp_path, "v1") == pytest.approx(report)
    assert len(list(tmp_path.iterdir())) == 1
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    fit_or_load(other, quaternions[:200], tmp_path, "v1")
    fit_or_load(other, quaternions, tmp_path, "v2")
    fit_or_load(finer, quaternions, tmp_path, "v1")
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_basis_is_fitted_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quaternions, first, second = yaw_data(), KMeansRotation(), KMeansRotation()
    fit_or_load(first, quaternions, tmp_path, "v1")
    (file,) = tmp_path.iterdir()
    content, prototypes = bytearray(file.read_bytes()), first.state_dict()["prototypes"]
    content[content.index(prototypes.numpy().tobytes()) + 3] ^= 8
    file.write_bytes(content)
    fit_or_load(second, quaternions, tmp_path, "v1")
    assert torch.equal(second.state_dict()["prototypes"], prototypes)
    assert "it is fitted again" in caplog.text


@pytest.mark.parametrize("kept", [0, 100])
def test_a_basis_that_is_cut_off_is_fitted_again(tmp_path: Path, kept: int, caplog: pytest.LogCaptureFixture) -> None:
    first, second = KMeansRotation(), KMeansRotation()
    fit_or_load(first, yaw_data(), tmp_path, "v1")
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:kept])
    fit_or_load(second, yaw_data(), tmp_path, "v1")
    assert torch.equal(second.state_dict()["prototypes"], first.state_dict()["prototypes"])
    assert "it is fitted again" in caplog.text


def test_outliers_are_said_and_do_not_widen_the_bins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    axis = torch.tensor([0.0, 0.0, 1.0])
    turns = torch.cat([torch.linspace(-0.7, 0.7, 995), torch.full((5,), 3.0)])  # 0.5 % wrong measurements
    rotations = rotation_exp(turns[:, None] * axis)
    wide, narrow = PCARotation(32), PCARotation(32, outlier_share=0.02)
    said = r"span 212 degrees, and 98 % of the training rotations lie within 79: .*6.6 degrees wide in place of 2.5"
    for _ in range(2):  # newly fitted, then loaded
        caplog.clear()
        report = fit_or_load(wide, rotations, tmp_path, "x")
        (record,) = caplog.records
        assert re.search(said, record.getMessage())
        assert "rotation.outlier_share=0.02" in record.getMessage()
    caplog.clear()
    floor = fit_or_load(narrow, rotations, tmp_path, "x")
    assert not caplog.records
    assert floor["decode_error_max_deg"] > 100 > report["decode_error_max_deg"]
    good = rotations[20:970]
    assert narrow.quantisation(good)["decode_error_max_deg"] < 1.5  # half of 80 degrees in 32 bins
    assert wide.quantisation(good)["decode_error_max_deg"] > 2.5
    with pytest.raises(ValueError, match="outlier_share"):
        PCARotation(32, outlier_share=0.5)


@pytest.mark.parametrize(
    "codec",
    [
        pytest.param(lambda: PCARotation(32, min_explained=0.0), id="beside the axis of the bins"),
        pytest.param(lambda: KMeansRotation(2), id="far from every prototype"),
    ],
)
def test_many_rotations_far_from_their_codes_are_counted_and_few_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, codec: type
) -> None:
    turns = torch.linspace(-1.0, 1.0, 1000)[:, None] * torch.tensor([0.0, 0.0, 1.0])
    for aside, warned in ((80, True), (30, False)):  # 8 and 3 % of the rotations
        rotations = turns.clone()
        rotations[500 : 500 + aside, 0] = torch.tensor([1.3, -1.3]).repeat(40)[:aside]
        caplog.clear()
        report = fit_or_load(codec(), rotation_exp(rotations), tmp_path, "x")
        assert report["rotations"] == 1000
        assert report["decode_error_max_deg"] > 45
        messages = [record.getMessage() for record in caplog.records]
        count = int(report["rotations_over_45_deg"])
        said = f"{count} of 1000 training rotations are stored with more than 45 degrees of error ("
        assert [message.startswith(said) for message in messages] == [True] * warned
        assert count == aside
        assert all(("rotation.classes" in each) == (codec().__class__ is KMeansRotation) for each in messages)


@pytest.mark.parametrize(
    "turns",
    [
        pytest.param(torch.linspace(-1.2, 1.2, 500), id="evenly over the range"),
        pytest.param(torch.randn(500, generator=torch.Generator().manual_seed(0)) * 0.3, id="about one direction"),
        pytest.param(torch.zeros(500).index_fill(0, torch.arange(4), 0.5), id="in bins that are narrow all the same"),
        pytest.param(torch.zeros(500), id="never"),
    ],
)
def test_rotations_without_outliers_are_not_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, turns: torch.Tensor
) -> None:
    fit_or_load(PCARotation(32), rotation_exp(turns[:, None] * torch.tensor([0.0, 0.0, 1.0])), tmp_path, "x")
    assert not caplog.records
