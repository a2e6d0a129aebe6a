"""Actions: decoding inverts encoding, no clipping, padding excluded from the statistics, missing statistics."""

from __future__ import annotations

import pytest
import torch
from vla_parts import T, poses

from keygrip.data.batches import PolicyTargets
from keygrip.models.geometry.rotations import geodesic_angle
from keygrip.models.geometry_vla.action_spaces import ActionKind
from keygrip.models.geometry_vla.actions import SIZE, PoseActions


def chunks(count: int = 64, seed: int = 4) -> PolicyTargets:
    return PolicyTargets(**poses(count, seed), instruction=["go"] * count)


def fitted(kind: ActionKind, tail: float = 0.01) -> PoseActions:
    actions = PoseActions(["right"], kind, tail)
    actions.take(chunks())
    return actions


@pytest.mark.parametrize("kind", ["absolute", "delta"])
def test_poses_come_back(kind: ActionKind) -> None:
    actions, batch = fitted(kind), chunks(16, seed=9)
    encoded = actions.encode(batch)
    assert encoded.shape == (16, T, SIZE)
    position, quaternion, gripper = actions.decode(encoded, batch.start_position, batch.start_quaternion)
    torch.testing.assert_close(position, batch.position, atol=1e-5, rtol=0)
    torch.testing.assert_close(gripper, batch.gripper, atol=1e-5, rtol=0)
    assert geodesic_angle(quaternion, batch.quaternion).max() < 1e-3


def test_delta_is_the_way_from_the_present_pose() -> None:
    actions, batch = fitted("delta"), chunks(8, seed=9)
    batch.position = batch.start_position[:, :, None].expand_as(batch.position).clone()
    batch.quaternion = batch.start_quaternion[:, :, None].expand_as(batch.quaternion).clone()
    still = actions.encode(batch)
    torch.testing.assert_close(still[..., :9], still[:1, :1, :9].expand(8, T, 9), atol=1e-4, rtol=0)
    moved = actions.decode(still, batch.start_position + 0.1, batch.start_quaternion)[0]
    torch.testing.assert_close(moved, batch.position + 0.1, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["absolute", "delta"])
def test_nothing_is_clipped(kind: ActionKind) -> None:
    """Values beyond the usual range are normalised to values beyond -1 .. 1 and decoded again: clipping would change
    them."""
    actions, batch = fitted(kind, tail=0.2), chunks(64)
    encoded = actions.encode(batch)
    assert (encoded.abs() > 1.2).float().mean() > 0.05
    position, _, gripper = actions.decode(encoded, batch.start_position, batch.start_quaternion)
    torch.testing.assert_close(position, batch.position, atol=1e-5, rtol=0)
    torch.testing.assert_close(gripper, batch.gripper, atol=1e-5, rtol=0)
    far = actions.decode(torch.full((1, T, SIZE), 3.0), batch.start_position[:1], batch.start_quaternion[:1])[0]
    near = actions.decode(torch.full((1, T, SIZE), 1.0), batch.start_position[:1], batch.start_quaternion[:1])[0]
    assert (far > near + 0.01).all()


def test_almost_all_of_the_training_split_lies_in_range_and_constants_do_not_explode() -> None:
    data = chunks()
    data.position[..., 1] = 0.123
    actions = PoseActions(["right"])
    actions.take(data)
    encoded = actions.encode(data)
    assert (encoded.abs() <= 1.0 + 1e-5).float().mean() > 0.96
    assert encoded[..., 1].abs().max() < 1e-4
    state = actions.state(data.start_position, data.start_quaternion, data.start_gripper)
    assert state.shape == (64, SIZE)
    assert (state.abs() <= 1.0 + 1e-5).float().mean() > 0.96


def test_values_far_beyond_the_range_of_almost_all_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """For example a gripper that is closed in a smaller share of the frames than the tail."""
    data = chunks(300)
    PoseActions(["right"]).take(data)
    assert not caplog.records
    data.gripper[:] = data.start_gripper[:] = 1.0
    data.gripper[0] = data.start_gripper[0] = 0.0
    PoseActions(["right"]).take(data)
    assert "all but 2 % lie in -1 .. 1, some reach 100 (number 10 of the right arm's" in caplog.text
    assert "arm's state), 100 (number 10 of the right arm's actions)" in caplog.text
    caplog.clear()
    whole = PoseActions(["right"], tail=0.0)
    whole.take(data)
    assert not caplog.records
    assert whole.encode(data).abs().max() <= 1 + 1e-5


def test_padded_steps_do_not_count() -> None:
    data, padded = chunks(), chunks()
    padded.action_is_pad[:, :, -1] = True
    padded.position[:, :, -1] = 1e3
    first, second = PoseActions(["right"]), PoseActions(["right"])
    data.action_is_pad[:, :, -1] = True
    first.take(data)
    second.take(padded)
    assert torch.equal(first.high, second.high)
    mask = second.mask(padded)
    assert mask.shape == (64, T, SIZE)
    assert mask[:, :-1].all()
    assert not mask[:, -1].any()
    padded.action_is_pad[:] = True
    with pytest.raises(ValueError, match="no action that is not padding"):
        PoseActions(["right"]).take(padded)


def test_two_arms_keep_their_places() -> None:
    one, other = poses(8, 1), poses(8, 2)
    arms = {name: torch.cat([one[name], other[name]], dim=1) if one[name].ndim > 1 else one[name] for name in one}
    both = PolicyTargets(**arms, instruction=["go"] * 8)
    actions = PoseActions(["left", "right"])
    actions.take(both)
    both.action_is_pad[:, 1, 2] = True
    mask = actions.mask(both)
    assert mask[:, 2, :SIZE].all()
    assert not mask[:, 2, SIZE:].any()
    position, _, _ = actions.decode(actions.encode(both), both.start_position, both.start_quaternion)
    torch.testing.assert_close(position, both.position, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="2 arms and the model 1"):
        PoseActions(["right"]).take(both)


def test_statistics_lie_in_the_checkpoint_and_missing_ones_raise() -> None:
    actions, batch = fitted("absolute"), chunks(4, seed=9)
    empty = PoseActions(["right"])
    for use in (
        lambda: empty.encode(batch),
        lambda: empty.decode(torch.zeros(4, T, SIZE), batch.start_position, batch.start_quaternion),
        lambda: empty.state(batch.start_position, batch.start_quaternion, batch.start_gripper),
    ):
        with pytest.raises(ValueError, match="no statistics of its training actions"):
            use()
    empty.load_state_dict(actions.state_dict())
    assert torch.equal(empty.encode(batch), actions.encode(batch))
    with pytest.raises(RuntimeError, match="Missing key"):
        PoseActions(["right"]).load_state_dict({})


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="one of absolute, delta, joint, osc"):
        PoseActions(["right"], "relative")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tail"):
        PoseActions(["right"], tail=0.5)
