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


@pytest.mark.parametrize("tilt_deg", [0.0, 40.0])
def test_wrong_readings_are_named_before_another_codec_is_advised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tilt_deg: float
) -> None:
    phase = torch.arange(600).double() / 20
    turns = torch.deg2rad(torch.stack([tilt_deg * phase.cos(), 0 * phase, 40 * phase.sin()], dim=-1))
    turns[100::200, 0] = 2.9
    turns[150::200, 0] = -2.9
    fit_or_load(PCARotation(min_explained=0.95), rotation_exp(turns), tmp_path, "x")
    (said,) = (r.getMessage() for r in caplog.records if "first principal component" in r.getMessage())
    assert f"0.95): 6 {DOCTOR}; without them it explains " in said
    assert ("without them it explains 100 %" in said) == (tilt_deg == 0)
    assert ("rotation=kmeans" in said) == (tilt_deg > 0)


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
    wide, narrow = PCARotation(32, outlier_share=0), PCARotation(32, outlier_share=0.02)
    said = r"span 212 degrees, and 98 % of the training rotations lie within 79: .*6.6 degrees wide in place of 2.5"
    for _ in range(2):  # newly fitted, then loaded
        caplog.clear()
        report = fit_or_load(wide, rotations, tmp_path, "x")
        (record,) = caplog.records
        assert re.search(said, record.getMessage())
        assert "rotation.outlier_share=0.02" in record.getMessage()
    caplog.clear()
    floor = fit_or_load(narrow, rotations, tmp_path, "x")
    assert floor["decode_error_max_deg"] > 100 > report["decode_error_max_deg"]
    (record,) = caplog.records
    assert f"{floor['decode_error_max_deg']:.0f} degrees" in record.getMessage()
    good = rotations[20:970]
    assert narrow.quantisation(good)["decode_error_max_deg"] < 1.5  # half of 80 degrees in 32 bins
    assert wide.quantisation(good)["decode_error_max_deg"] > 2.5
    with pytest.raises(ValueError, match="outlier_share"):
        PCARotation(32, outlier_share=0.5)


KMEANS, OTHER_BINS = "rotation=kmeans holds them", "rotation.outlier_share=0 widens all bins"
DOCTOR = "leave the path of the frames before and after (wrong readings): step=doctor names them"


@pytest.mark.parametrize("half_range", [60, 90])
@pytest.mark.parametrize(
    ("outliers", "largest", "advice"),
    [
        pytest.param(lambda yaw: Rotation.from_euler("x", 146, degrees=True) * yaw, 145, (KMEANS,), id="tilted"),
        pytest.param(lambda yaw: Rotation.from_euler("x", 60, degrees=True) * yaw, 59, (KMEANS,), id="tilted less"),
        pytest.param(
            lambda yaw: Rotation.random(len(yaw), rng=np.random.default_rng(5)), 90, (KMEANS, OTHER_BINS), id="random"
        ),
        pytest.param(lambda yaw: Rotation.from_quat(yaw.as_quat(scalar_first=True)), 90, (), id="another order"),
        pytest.param(
            lambda yaw: Rotation.from_euler("z", [[170.0]] * len(yaw), degrees=True),
            75,
            (OTHER_BINS,),
            id="turned farther",
        ),
    ],
)
def test_half_a_percent_of_outliers_is_reported_and_does_not_widen_the_bins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, half_range: int, outliers, largest: int, advice: tuple[str, ...]
) -> None:
    rng = np.random.default_rng(0)
    down = Rotation.from_euler("x", 180, degrees=True)
    yaw = Rotation.from_euler("z", half_range * np.sin(np.arange(2000) / 15)[:, None], degrees=True)
    sound = yaw * Rotation.from_rotvec(rng.normal(0, 0.02, (2000, 3))) * down
    rows = np.arange(100, 2000, 190)
    quaternions = sound.as_quat(scalar_first=True)
    quaternions[rows] = (outliers(yaw[rows]) * down).as_quat(scalar_first=True)
    all_of_them, good = torch.from_numpy(quaternions), torch.from_numpy(np.delete(quaternions, rows, axis=0))
    clean, codec = PCARotation(32), PCARotation(32)
    expected = fit_or_load(clean, good, tmp_path, "x")
    assert not caplog.records
    for _ in range(2):  # newly fitted, then loaded
        caplog.clear()
        report = fit_or_load(codec, all_of_them, tmp_path, "x")
        (message,) = [record.getMessage() for record in caplog.records]
        over = int(report["rotations_over_45_deg"])
        assert message.startswith(
            f"the largest decode error of the training rotations is {report['decode_error_max_deg']:.0f} degrees ("
        )
        assert f"{over} of 2000 have more than 45:" in message
        assert report["decode_error_max_deg"] >= largest
        assert all(part in message for part in (*advice, f"10 {DOCTOR}"))
        assert (OTHER_BINS in message) == (report["rotations_beyond_bins"] > 0)
    assert report["range_deg"] < 1.05 * expected["range_deg"]
    kept, before = codec.quantisation(good), clean.quantisation(good)
    assert kept["decode_error_deg"] < before["decode_error_deg"] + 0.15
    spanned = fit_or_load(PCARotation(32, outlier_share=0), all_of_them, tmp_path, "x")
    if report["rotations_beyond_bins"]:  # the advice is true
        assert spanned["range_deg"] > report["range_deg"] + 10
        assert spanned["rotations_beyond_bins"] == 0


@pytest.mark.parametrize("rare", [0, 12])
def test_bins_of_rotations_without_a_gap_span_all_of_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rare: int
) -> None:
    """Rare turns, here 1 % of the frames, that go on in steps of 9 degrees are no outliers."""
    degrees = torch.cat([torch.linspace(-40, 40, 1200 - rare), 40 + 9.0 * torch.arange(1, rare + 1)])
    rotations = rotation_exp(torch.deg2rad(degrees)[:, None] * torch.tensor([0.0, 0.0, 1.0]))
    codec, all_spanned = PCARotation(32), PCARotation(32, outlier_share=0)
    assert codec.fit(rotations) == all_spanned.fit(rotations)
    for name, value in codec.state_dict().items():
        assert torch.equal(value, all_spanned.state_dict()[name]), name
    report = fit_or_load(codec, rotations, tmp_path, "x")
    assert report["rotations_beyond_bins"] == 0
    assert report["decode_error_max_deg"] < 4
    assert not [record for record in caplog.records if "largest decode error" in record.getMessage()]


def fast_turns() -> torch.Tensor:
    """Return degrees of slow turns to 40 degrees and of ten fast ones, in steps of 12, to about 100; the last goes on
    to 112."""
    steps = 12.0 * torch.tensor([1, 2, 3, 4, 5, 4, 3, 2, 1, 0])
    fast = [40 + steps + 0.1 * number for number in range(10)]
    return torch.cat([torch.linspace(-40, 40, 900), *fast, torch.tensor([52.0, 64.0, 76.0, 88.0, 100.0, 112.5])])


@pytest.mark.parametrize(
    ("turns", "left_out"),
    [
        pytest.param(torch.linspace(-60, 60, 1000).index_fill(0, torch.tensor([500]), 75.0), 1, id="slow"),
        pytest.param(torch.linspace(-60, 60, 480).index_fill(0, torch.tensor([240]), 75.0), 0, id="few"),
        pytest.param(fast_turns(), 0, id="fast"),
    ],
)
def test_a_gap_counts_for_the_speed_of_the_turns_and_in_enough_rotations(turns: torch.Tensor, left_out: int) -> None:
    rotations = rotation_exp(torch.deg2rad(turns.double())[:, None] * torch.tensor([0.0, 0.0, 1.0]).double())
    report = PCARotation(32).fit(rotations)
    assert report["rotations_beyond_bins"] == left_out
    whole = float(turns.max() - turns.min())
    assert report["range_deg"] == pytest.approx(120 if left_out else whole, abs=0.5)


def about_z(degrees: torch.Tensor) -> torch.Tensor:
    return rotation_exp(torch.deg2rad(degrees.double())[:, None] * torch.tensor([0.0, 0.0, 1.0]).double())


def begins_elsewhere() -> torch.Tensor:
    """Return degrees of 151 demonstrations of 60 frames; the last one begins at 70 and grips at 90."""
    turn = torch.sin(torch.linspace(0, 3, 60) * torch.pi)
    rare = torch.cat([torch.linspace(70, 90, 40), torch.full((20,), 90.0)])
    return torch.cat([*(sign * (40 + number / 15) * turn for number in range(75) for sign in (1, -1)), rare])


def jumps_to_goals(demos: int) -> torch.Tensor:
    """Return degrees of commands that are at 0 for 30 frames and at a goal for 30; that of the last one is 90."""
    goals = torch.cat([torch.linspace(-45, 45, demos - 1), torch.tensor([90.0])])
    return torch.stack([torch.zeros(demos), goals], dim=1).repeat_interleave(30)


def turns_fast() -> torch.Tensor:
    """Return degrees of 200 demonstrations at -45, 0 and 45, and one that turns by 11 degrees per frame to 90."""
    held = torch.tensor([-45.0, 0.0, 45.0]).repeat_interleave(20).repeat(200)
    rare = torch.cat([torch.linspace(-45, 90, 13), torch.full((18,), 90.0), torch.linspace(90, 45, 5)])
    return torch.cat([held, rare])


def peaks() -> torch.Tensor:
    """Return degrees of slow turns within 40, and one by 12 degrees per frame that is at 76 for one frame."""
    slow = 40 * torch.cos(torch.arange(3000) / 20)
    return torch.cat([slow, torch.tensor([40.0, 52.0, 64.0, 76.0, 64.0, 52.0, 40.0]), slow])


@pytest.mark.parametrize("wrong", [0, 8])
@pytest.mark.parametrize(
    "turns",
    [
        pytest.param(begins_elsewhere(), id="begins elsewhere"),
        *(pytest.param(jumps_to_goals(demos), id=f"jumps, {demos} demos") for demos in (40, 81, 150)),
        pytest.param(turns_fast(), id="turns fast"),
        pytest.param(peaks(), id="peaks"),
    ],
)
def test_a_rare_rotation_that_lasts_stays_inside_the_bins_and_wrong_readings_do_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, turns: torch.Tensor, wrong: int
) -> None:
    codec, spans_all = PCARotation(32), PCARotation(32, outlier_share=0)
    spans_all.fit(about_z(turns))
    degrees = turns.clone()
    rows = torch.linspace(20, len(turns) - 5, 8).long()[:wrong]
    degrees[rows] = 170.0  # the last ones within the rare rotation, where it is that of the last frames
    report = fit_or_load(codec, about_z(degrees), tmp_path, "x")
    assert report["rotations_beyond_bins"] == wrong
    sound = about_z(turns)[torch.isin(torch.arange(len(turns)), rows, invert=True)]
    assert codec.quantisation(sound)["decode_error_max_deg"] < 1.05 * spans_all.report(sound)["decode_error_max_deg"]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (wrong > 0)
    assert all(f"{wrong} are beyond the outermost bins" in each and f"{wrong} {DOCTOR}" in each for each in warnings)


@pytest.mark.parametrize("successive", [1, 2, 3])
def test_three_successive_frames_are_no_outliers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, successive: int
) -> None:
    degrees = 60 * torch.sin(torch.arange(3000) / 20)
    for row in (500, 1500, 2500):
        degrees[row : row + successive] = -100.0
    report = fit_or_load(PCARotation(32), about_z(degrees), tmp_path, "x")
    assert report["rotations_beyond_bins"] == (0 if successive == 3 else 3 * successive)
    assert report["range_deg"] == pytest.approx(160 if successive == 3 else 120, abs=0.1)
    # the doctor judges rotations of single frames
    assert [DOCTOR in record.getMessage() for record in caplog.records] == [successive == 1] * (successive < 3)


@pytest.mark.parametrize("lasts", [True, False])
@pytest.mark.parametrize(
    ("codec", "turn", "advice"),
    [
        pytest.param(lambda: PCARotation(32), [80.0, 0.0, 0.0], KMEANS, id="beside the axis of the bins"),
        pytest.param(lambda: KMeansRotation(2), [80.0, 0.0, 0.0], "raise rotation.classes", id="far from prototypes"),
        pytest.param(
            lambda: PCARotation(32, outlier_share=0), [0.0, 0.0, 170.0], "rotation.outlier_share=0.02", id="wide bins"
        ),
    ],
)
def test_the_doctor_is_advised_only_where_it_finds_wrong_readings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, codec: type, turn: list[float], advice: str, lasts: bool
) -> None:
    turns = 35 * torch.sin(torch.arange(6000) / 20)[:, None] * torch.tensor([0.0, 0.0, 1.0])
    rows = torch.arange(3000, 3030) if lasts else torch.arange(100, 5900, 200)
    turns[rows] = torch.tensor(turn)
    report = fit_or_load(codec(), rotation_exp(torch.deg2rad(turns.double())), tmp_path, "x")
    assert report["rotations_off_path"] == (0 if lasts else len(rows))
    (message,) = [record.getMessage() for record in caplog.records]
    assert (f"{len(rows)} {DOCTOR}" in message) == (not lasts)
    assert ("doctor" in message) == (not lasts)
    assert advice in message


def test_wrong_readings_among_rotations_in_no_order_are_left_outside() -> None:
    degrees = torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 120 - 60
    degrees[100::200] = 170.0
    report = PCARotation(32).fit(about_z(degrees))
    assert report["rotations_beyond_bins"] == 10
    assert report["range_deg"] == pytest.approx(120, abs=0.5)


def test_errors_that_grow_without_a_gap_are_not_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The gripper tips by up to 66 degrees on its way in 2 % of the frames, as in the demo's recordings."""
    turns = torch.linspace(-1.2, 1.2, 2000)[:, None] * torch.tensor([0.0, 0.0, 1.0])
    turns[1000:1040, 0] = torch.deg2rad(torch.linspace(0, 66, 40)) * torch.tensor([1.0, -1.0]).repeat(20)
    report = fit_or_load(PCARotation(32), rotation_exp(turns), tmp_path, "x")
    assert report["decode_error_max_deg"] == pytest.approx(66, abs=1)
    assert report["rotations_over_45_deg"] > 10
    assert not caplog.records


def test_a_basis_of_a_checkpoint_without_outliers_left_out_is_loaded_unchanged() -> None:
    """Checkpoints hold the ends of the bins, which loading does not compute again."""
    turns = torch.cat([torch.linspace(-0.7, 0.7, 995), torch.full((5,), 3.0)])
    rotations = rotation_exp(turns[:, None] * torch.tensor([0.0, 0.0, 1.0]))
    stored, loaded = PCARotation(32, outlier_share=0), PCARotation(32)
    stored.fit(rotations)
    assert "outlier_share" not in stored.settings()
    loaded.load_state_dict(stored.state_dict())
    assert torch.equal(loaded.encode(rotations), stored.encode(rotations))
    assert torch.equal(loaded.score_range, stored.score_range)


@pytest.mark.parametrize(
    "codec",
    [
        pytest.param(lambda: PCARotation(32, min_explained=0.0), id="beside the axis of the bins"),
        pytest.param(lambda: KMeansRotation(2), id="far from every prototype"),
    ],
)
def test_many_rotations_far_from_their_codes_and_single_ones_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, codec: type
) -> None:
    turns = torch.linspace(-1.0, 1.0, 1000)[:, None] * torch.tensor([0.0, 0.0, 1.0])
    for aside in (80, 30, 1):  # 8, 3 and 0.1 % of the rotations
        rotations = turns.clone()
        rotations[500 : 500 + aside, 0] = torch.tensor([1.3, -1.3]).repeat(40)[:aside]
        caplog.clear()
        report = fit_or_load(codec(), rotation_exp(rotations), tmp_path, "x")
        assert report["rotations"] == 1000
        largest, count = report["decode_error_max_deg"], int(report["rotations_over_45_deg"])
        assert largest > 45
        assert count == aside
        # 3 % of the rotations, all turned by the same angle, may be a turn of the task
        messages = [record.getMessage() for record in caplog.records]
        said = f"the largest decode error of the training rotations is {largest:.0f} degrees ("
        assert [message.startswith(said) for message in messages] == [True] * (aside != 30)
        assert all(f"{count} of 1000 have more than 45:" in message for message in messages)
        assert all(("rotation.classes" in each) == (codec().__class__ is KMeansRotation) for each in messages)


@pytest.mark.parametrize(
    "turns",
    [
        pytest.param(torch.linspace(-1.2, 1.2, 500), id="evenly over the range"),
        pytest.param(torch.randn(500, generator=torch.Generator().manual_seed(0)) * 0.3, id="about one direction"),
        pytest.param(
            torch.linspace(-1.2, 1.2, 2000)[torch.randperm(2000, generator=torch.Generator().manual_seed(0))],
            id="in random order",
        ),
        pytest.param(torch.zeros(500).index_fill(0, torch.arange(4), 0.5), id="in bins that are narrow all the same"),
        pytest.param(torch.zeros(500), id="never"),
    ],
)
def test_rotations_without_outliers_are_not_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, turns: torch.Tensor
) -> None:
    fit_or_load(PCARotation(32), rotation_exp(turns[:, None] * torch.tensor([0.0, 0.0, 1.0])), tmp_path, "x")
    assert not caplog.records
