"""Equivalent grips: their rotations, classes, shared loss and errors, against explicit sums."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from policy_batches import observation_of

from keygrip.data.batches import PolicyBatch
from keygrip.models.geometry.rotation_codecs import PCARotation
from keygrip.models.geometry.rotations import geodesic_angle, quaternion_multiply, rotation_exp
from keygrip.models.policy import Observation
from keygrip.models.volume_query.policy import VolumeQueryPolicy
from keygrip.models.volume_query.symmetry import (
    GripSymmetry,
    equivalent_classes,
    equivalent_turns,
    nearest_angle,
    shared_cross_entropy,
    steady_turns,
)
from tests.models.volume_query.test_module import S, T, batch, build, statistics

UP = torch.tensor([0.0, 0.0, 1.0])


def about_vertical(degrees: torch.Tensor) -> torch.Tensor:
    return rotation_exp(torch.deg2rad(degrees)[..., None] * UP)


def codec() -> PCARotation:
    """Return a codec with 32 bins over 160 degrees about the vertical, centred on no rotation."""
    fitted = PCARotation(classes=32)
    fitted.fit(about_vertical(torch.linspace(-80, 80, 161)))
    return fitted


def observed(data: PolicyBatch, quaternion: torch.Tensor, gripper: float) -> Observation:
    """Return a black image from a batch's first camera, with a gripper rotated by [4] and open by 0 to 1."""
    turned = {"quaternion": quaternion.numpy(), "gripper": np.float32(gripper)}
    return {**observation_of(data, np.zeros((S, S, 3), np.uint8)), **turned}


def test_equivalents_are_equal_turns_about_the_vertical() -> None:
    tilted = rotation_exp(torch.tensor([[0.3, 0.2, 0.4], [1.0, -0.5, 0.0]]))
    turned = equivalent_turns(tilted, 4)
    torch.testing.assert_close(turned[:, 0], tilted)
    for k in range(4):
        expected = torch.full((2,), min(k, 4 - k) * math.pi / 2)
        torch.testing.assert_close(geodesic_angle(turned[:, k], tilted), expected, atol=1e-3, rtol=0)


def test_classes_are_those_of_the_equivalents_that_the_codec_holds() -> None:
    bins, degrees = codec(), torch.tensor([20.0, 75.0, 20.0])
    free = torch.tensor([True, True, False])
    classes = equivalent_classes(bins, about_vertical(degrees), free, 4)
    for row, there in enumerate(([20.0, -70.0], [75.0, -15.0], [20.0])):  # the others are outside of the bins
        expected = bins.encode(about_vertical(torch.tensor(there)))
        assert classes[row].nonzero().flatten().tolist() == sorted(expected.tolist())


def test_a_gripper_that_training_never_turned_about_the_vertical_has_one_grip() -> None:
    """Its bins are bins of tilt: a quarter turn must not be encoded as one of them."""
    tilts = rotation_exp(torch.deg2rad(torch.linspace(-40, 40, 81))[:, None] * torch.tensor([1.0, 0.0, 0.0]))
    bins = PCARotation(classes=32)
    bins.fit(tilts)
    chosen, free = tilts[10:70:9], torch.tensor(True)
    for order in (2, 4, 8):
        classes = equivalent_classes(bins, chosen, free.expand(len(chosen)), order)
        assert classes.sum(-1).tolist() == [1] * len(chosen)
        turned = equivalent_turns(chosen[:1], order)[:, 1]  # the rotation of the gripper at the start
        kept = steady_turns(chosen[:1], turned[0], free, bins, order)
        torch.testing.assert_close(kept, chosen[:1])
    assert bool(bins.covers(tilts[1:-1]).all())


def test_a_turn_about_the_axis_beyond_the_bins_allows_its_equivalents_no_more_tilt() -> None:
    yaw = about_vertical(torch.linspace(-20, 20, 41))
    bins = PCARotation(classes=8)
    bins.fit(yaw)
    tilted = rotation_exp(torch.deg2rad(torch.tensor([40.0, 0.0, 0.0])))
    for beyond in (0.0, 90.0):
        assert not bool(bins.covers(tilted, like=about_vertical(torch.tensor(beyond))))


def test_a_gripper_that_is_tilted_too_keeps_its_equivalent_grips() -> None:
    """Tilts are off the axis of bins of yaw, and a rotation about the vertical does not change them."""
    torch.manual_seed(0)
    yaw = about_vertical(torch.rand(2000) * 190 - 95)
    shares = []
    for tilt in (0.0, 8.0, 15.0):
        tilts = torch.cat([torch.deg2rad(tilt * torch.randn(len(yaw), 2)), torch.zeros(len(yaw), 1)], dim=-1)
        shown = quaternion_multiply(yaw, rotation_exp(tilts))
        bins = PCARotation(classes=32)
        bins.fit(shown)
        classes = equivalent_classes(bins, shown, torch.ones(len(yaw), dtype=torch.bool), 4)
        shares.append(float(classes.sum(-1).float().mean()))
    assert shares == pytest.approx([shares[0]] * 3, abs=0.1)
    assert shares[0] > 2


def test_the_loss_is_of_the_summed_probability() -> None:
    torch.manual_seed(0)
    logits, classes = torch.randn(4, 6, dtype=torch.float64).float(), torch.rand(4, 6) < 0.4
    classes[:, 0] = True
    expected = torch.stack([-row.softmax(-1)[kept].sum().log() for row, kept in zip(logits, classes, strict=True)])
    torch.testing.assert_close(shared_cross_entropy(logits, classes), expected)


def test_a_plan_does_not_turn_from_one_equivalent_to_another() -> None:
    bins = codec()
    decoded = torch.tensor([[10.0, -70.0, 25.0, -60.0], [10.0, -70.0, 25.0, -60.0], [50.0, -30.0, 75.0, -20.0]])
    start, free = torch.tensor([0.0, 0.0, 40.0]), torch.tensor([True, False, True])
    found = steady_turns(about_vertical(decoded), about_vertical(start), free, bins, 4)
    expected = torch.tensor([[10.0, 20.0, 25.0, 30.0], [10.0, -70.0, 25.0, -60.0], [50.0, 60.0, 75.0, 70.0]])
    assert float(torch.rad2deg(geodesic_angle(found, about_vertical(expected))).max()) < 0.1
    # -5 and 85 degrees are the same grip, but 85 degrees is outside of the training range
    beyond = steady_turns(
        about_vertical(torch.tensor([[79.0, -5.0]])), about_vertical(torch.tensor([70.0])), free[:1], bins, 4
    )
    assert float(torch.rad2deg(geodesic_angle(beyond[0, 1], about_vertical(torch.tensor(-5.0))))) < 0.1


def test_errors_count_to_the_nearest_equivalent_while_the_gripper_is_open() -> None:
    found, true = about_vertical(torch.tensor([95.0, 95.0])), about_vertical(torch.tensor([0.0, 0.0]))
    error = nearest_angle(found, true, torch.tensor([True, False]), 4)
    torch.testing.assert_close(torch.rad2deg(error), torch.tensor([5.0, 95.0]), atol=1e-2, rtol=0)


def test_module_shares_the_loss_and_keeps_it_where_the_gripper_holds(tmp_path: Path) -> None:
    plain, shared = build(tmp=tmp_path), build(tmp=tmp_path, rotation_symmetry=4)
    for module in (plain, shared):
        module.codec("right").fit(about_vertical(torch.linspace(-130, 130, 201)))
    data = batch()
    targets = plain.targets(data)
    output = plain(data, targets, teacher=True)
    open_ = shared.losses(output, data, targets)["rotation"]
    assert float(open_) < float(plain.losses(output, data, targets)["rotation"])
    quarter = equivalent_turns(data.quaternion, 4)[..., 1, :]
    right = torch.nn.functional.one_hot(plain.codec("right").encode(quarter[:, 0]), 6).float()[:, None] * 50
    output.rotation.data.copy_(right)
    errors = shared.metrics(output, data, targets)
    assert float(errors["rotation_acc"]) == 1.0
    assert float(errors["rotation_deg"]) < 22  # half a bin of 43 degrees
    assert float(plain.metrics(output, data, targets)["rotation_deg"]) > 65
    data.start_gripper.zero_()
    held = shared.losses(output, data, targets)["rotation"]
    torch.testing.assert_close(held, plain.losses(output, data, targets)["rotation"])
    assert targets.valid.shape[-1] == T
    with pytest.raises(ValueError, match="rotation_symmetry"):
        build(rotation_symmetry=0)


CUBE, BAR, BALL = "pick up the Cube", "pick up the bar.", "pick up the ball"


def test_the_number_of_grips_follows_from_a_word_of_the_instruction(tmp_path: Path) -> None:
    """In a mixed batch each sample is treated as by a policy for its object alone."""
    words = {"cube": 4, "bar": 2}
    mixed = build(rotation_symmetry=words)
    mixed.set_statistics(statistics(("right",), tmp_path, instructions=(CUBE, BAR, BALL)))
    cube, bar, plain = (build(tmp=tmp_path, rotation_symmetry=order) for order in (4, 2, 1))
    modules = (mixed, cube, bar, plain)
    for module in modules:
        module.codec("right").fit(about_vertical(torch.linspace(-175, 175, 201)))
    data = batch(size=3)
    data.instruction[:] = [CUBE, BAR, BALL]
    targets = plain.targets(data)
    output = plain(data, targets, teacher=True)
    half = equivalent_turns(data.quaternion, 2)[..., 1, :]
    quarter = equivalent_turns(data.quaternion, 4)[..., 1, :]
    for turned, wrong in ((quarter, [False, True, True]), (half, [False, False, True])):
        errors = [module._rotation_error(turned, data) for module in modules]
        expected = torch.stack([errors[1][0], errors[2][1], errors[3][2]])
        torch.testing.assert_close(errors[0], expected)
        assert (errors[0] > 1).flatten(1).all(1).tolist() == wrong
    classes = [module._equivalent_classes(data) for module in modules]
    assert torch.equal(classes[0], torch.stack([classes[1][0], classes[2][1], classes[3][2]]))
    assert float(mixed.losses(output, data, targets)["rotation"]) < float(
        plain.losses(output, data, targets)["rotation"]
    )


def test_words_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    said = statistics(("right",), tmp_path, instructions=(CUBE, BALL))
    with pytest.raises(ValueError, match="names 'bar', a word that no instruction of the demonstrations has"):
        build(rotation_symmetry={"cube": 4, "bar": 2}).set_statistics(said)
    with pytest.raises(ValueError, match="different numbers for cube and ball, which the instruction"):
        GripSymmetry({"cube": 4, "ball": 8}).order_of("put the cube on the ball")
    for wrong in ({}, {"cube": 1}, {"cube": 9}, 9):
        with pytest.raises(ValueError, match=r"1 \(none\) to 8 equal turns"):
            GripSymmetry(wrong)
    assert GripSymmetry({"cube": 4}).order_of("pick up the cubes") == 1  # whole words only


def test_a_policy_of_several_objects_needs_the_instruction(tmp_path: Path) -> None:
    module = build(rotation_symmetry={"cube": 4})
    module.set_statistics(statistics(("right",), tmp_path, instructions=(CUBE, BALL)))
    module.codec("right").fit(about_vertical(torch.linspace(-130, 130, 201)))
    single = build(tmp=tmp_path, rotation_symmetry=4)
    single.load_state_dict(module.state_dict())
    assert module.policy().needs.instruction
    assert not replace(module.policy(), steady_turns=False).needs.instruction
    data = batch(size=1)
    start = equivalent_turns(data.start_quaternion[0, 0], 4)[1]
    seen = observed(data, start, 1.0)
    with pytest.raises(ValueError, match="lacks an instruction"):
        module.policy().plan(seen)
    turned, as_decoded = (module.policy().plan({**seen, "instruction": words}).quaternion for words in (CUBE, BALL))
    np.testing.assert_array_equal(turned, single.policy().plan(seen).quaternion)
    np.testing.assert_array_equal(as_decoded, replace(single.policy(), steady_turns=False).plan(seen).quaternion)
    assert np.abs(turned - as_decoded).max() > 0.1


def test_policy_plans_the_grip_that_is_nearest_to_its_gripper(tmp_path: Path) -> None:
    module = build(tmp=tmp_path, rotation_symmetry=4)
    module.codec("right").fit(about_vertical(torch.linspace(-130, 130, 201)))
    data = batch(size=1)

    def planned(policy: VolumeQueryPolicy, start: torch.Tensor, gripper: float) -> torch.Tensor:
        return torch.from_numpy(policy.plan(observed(data, start, gripper)).quaternion[0]).float()

    alone = replace(module.policy(), steady_turns=False)
    free = planned(alone, data.start_quaternion[0, 0], 1.0)
    quarters = [turn for turn in equivalent_turns(free[0], 4) if bool(module.codec("right").covers(turn))]
    assert len(quarters) > 1
    for start in quarters:
        found = planned(module.policy(), start, 1.0)
        assert float(geodesic_angle(found[0], start)) < 0.01
        torch.testing.assert_close(planned(module.policy(), start, 0.0), planned(alone, start, 0.0))
