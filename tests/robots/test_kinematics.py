from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from keygrip.envs.yam.scene import ARM_JOINT_NAMES, TOOL_SITE, build_spec
from keygrip.envs.yam.tasks import HOME, TaskOptions
from keygrip.robots.inverse_kinematics import pointing_down, solve, yaw_of
from keygrip.robots.kinematics import (
    arm_chain,
    arm_file,
    forward_kinematics,
    gripper_file,
    matrix_from_quaternion,
    quaternion_from_matrix,
)
from keygrip.robots.mujoco_backend import mujoco


def random_joints(count: int, seed: int = 0) -> np.ndarray:
    limits = arm_chain().limits
    return np.random.default_rng(seed).uniform(limits[:, 0], limits[:, 1], (count, 6))


def test_forward_kinematics_is_the_physics_engines() -> None:
    model = build_spec(TaskOptions(name="pick")).compile()
    data = mujoco.MjData(model)
    where = [model.joint(n).qposadr[0] for n in ARM_JOINT_NAMES]
    joints = random_joints(20)
    positions, quaternions = forward_kinematics(joints)
    for i in range(len(joints)):
        data.qpos[where] = joints[i]
        mujoco.mj_kinematics(model, data)
        np.testing.assert_allclose(positions[i], data.site(TOOL_SITE).xpos, atol=1e-9)
        rotation = data.site(TOOL_SITE).xmat.reshape(3, 3)
        np.testing.assert_allclose(matrix_from_quaternion(quaternions[i]), rotation, atol=1e-9)


def test_forward_kinematics_keeps_leading_axes() -> None:
    joints = random_joints(6).reshape(2, 3, 6)
    position, quaternion = forward_kinematics(joints)
    assert position.shape == (2, 3, 3)
    assert quaternion.shape == (2, 3, 4)
    np.testing.assert_allclose(position[1, 2], forward_kinematics(joints[1, 2])[0], atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(quaternion, axis=-1), 1.0, atol=1e-12)


def test_forward_kinematics_of_other_arms_differs() -> None:
    assert np.linalg.norm(forward_kinematics(HOME, arm="big_yam")[0] - forward_kinematics(HOME)[0]) > 0.005


def test_wrong_shape_and_unknown_parts_are_named() -> None:
    with pytest.raises(ValueError, match="shape"):
        forward_kinematics(np.zeros(7))
    with pytest.raises(ValueError, match="yam_pro"):
        forward_kinematics(HOME, arm="yam9")
    with pytest.raises(ValueError, match="linear_4310"):
        forward_kinematics(HOME, gripper="hook")


def test_revisions_of_an_arm_have_i2rts_names() -> None:
    from i2rt.robots.utils import ArmType

    path = ("arm", "yam_ultra", "v2", "yam_ultra.xml")
    assert arm_file("yam_ultra_2").parts[-4:] == path == Path(ArmType.YAM_ULTRA_2.get_xml_path()).parts[-4:]
    assert arm_file("yam_ultra").parts[-2] == "v1"
    np.testing.assert_allclose(forward_kinematics(HOME, "yam_ultra_2")[0], forward_kinematics(HOME, "yam_ultra")[0])
    for name in ("yam_ultra_1", "yam_2", "yam_ultra_02", "../yam"):
        with pytest.raises(ValueError, match=r"known: big_yam, yam, yam_pro, yam_ultra, yam_ultra_2$"):
            arm_file(name)


def install(site: Path, name: str, files: Mapping[str, str]) -> None:
    """Write a distribution as pip does: its files and the record of them."""
    for file, text in files.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(text)
    record = site / f"{name}-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (record / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    importlib.invalidate_caches()  # two changes of a folder may have one time


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """Return a folder that is searched for packages first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "i2rt"]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "i2rt"]:
        del sys.modules[name]


ARM, GRIPPER = "i2rt/robot_models/arm/yam/v1/yam.xml", "i2rt/robot_models/gripper/linear_4310/linear_4310.xml"


def test_i2rts_package_over_dreamscales_is_refused(site) -> None:
    """pip reports no conflict of the two names; the arms stay dreamscale-i2rt's, the grippers become I2RT's."""
    install(site, "dreamscale_i2rt", {"i2rt/__init__.py": "", ARM: "<a/>", GRIPPER: "<b/>"})
    assert arm_file() == site / ARM
    install(site, "i2rt", {"i2rt/__init__.py": "", "i2rt/robot_models/arm/yam/yam.xml": "<c/>", GRIPPER: "<c/>"})
    for use in (arm_file, gripper_file):
        with pytest.raises(ImportError, match=r"installed over each other.*`pip uninstall i2rt`, then"):
            use()


def test_an_editable_install_of_i2rts_package_is_accepted(site) -> None:
    """Its files are elsewhere, and found only after dreamscale-i2rt's."""
    install(site, "dreamscale_i2rt", {"i2rt/__init__.py": "", ARM: "<a/>", GRIPPER: "<b/>"})
    install(site, "i2rt", {"__editable__.i2rt-1.0.pth": "/elsewhere\n"})
    assert arm_file() == site / ARM


def test_i2rts_package_in_place_of_dreamscales_is_named(site) -> None:
    (site / "i2rt/robot_models/arm/yam").mkdir(parents=True)
    (site / "i2rt/__init__.py").touch()
    with pytest.raises(FileNotFoundError, match=r"not of dreamscale-i2rt.*remove that one"):
        arm_file()


def test_inverse_undoes_forward() -> None:
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(40):
        point = np.array([rng.uniform(0.2, 0.38), rng.uniform(-0.15, 0.15), rng.uniform(0.01, 0.12)])
        turn = pointing_down(np.arctan2(point[1], point[0]) + rng.uniform(-0.7, 0.7), rng.uniform(0, 0.3))
        solution = solve(point, turn, HOME)
        position, quaternion = forward_kinematics(solution.joints)
        assert solution.position_error == pytest.approx(float(np.linalg.norm(position - point)), abs=1e-9)
        if solution.position_error < 1e-4 and solution.angle_error < 1e-3:
            found += 1
            np.testing.assert_allclose(matrix_from_quaternion(quaternion), turn, atol=2e-3)
    assert found == 40


def test_inverse_respects_limits_and_reports_the_unreachable() -> None:
    limits = arm_chain().limits
    solution = solve(np.array([0.9, 0.0, 0.1]), pointing_down(0.0), HOME)
    assert solution.position_error > 0.1
    assert (solution.joints >= limits[:, 0]).all()
    assert (solution.joints <= limits[:, 1]).all()


@pytest.mark.parametrize("yaw", [-2.0, -0.3, 0.0, 1.4])
def test_pointing_down_and_yaw_agree(yaw: float) -> None:
    rotation = pointing_down(yaw, 0.4)
    assert yaw_of(rotation) == pytest.approx(yaw)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    np.testing.assert_allclose(pointing_down(yaw)[:, 2], [0, 0, -1], atol=1e-12)


def test_quaternions_of_a_trembling_hand_do_not_flip() -> None:
    tremor = [quaternion_from_matrix(pointing_down(0.3 + a, b)) for a in (-0.02, 0.02) for b in (-0.02, 0.02)]
    assert min(float(p @ q) for p in tremor for q in tremor) > 0.99
