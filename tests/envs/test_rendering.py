from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keygrip.envs.rendering import CameraRenderer, Lens, world_to_camera
from keygrip.envs.yam.scene import build_spec, digit_image, lens_of
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.robots import mujoco_backend
from keygrip.robots.mujoco_backend import RenderingUnavailableError, mujoco

BALL = np.array([0.36, 0.07, 0.15])


@pytest.fixture(scope="module")
def world() -> tuple[mujoco.MjModel, mujoco.MjData]:
    spec = build_spec(TaskOptions(name="pick"))
    ball = {"type": mujoco.mjtGeom.mjGEOM_SPHERE, "size": [0.012, 0, 0], "pos": BALL}
    spec.worldbody.add_geom(name="ball", contype=0, conaffinity=0, **ball)
    model = spec.compile()
    data = mujoco.MjData(model)
    data.qpos[1] = 0.3  # the arm folded away from the ball
    mujoco.mj_forward(model, data)
    return model, data


@pytest.mark.parametrize("camera", ["over", "front"])
@pytest.mark.parametrize("window", [(224, 224, 0.0, 0.0), (200, 160, 0.21, -0.13), (96, 128, -0.3, 0.2)])
def test_a_ball_is_drawn_where_geometry_says(
    world: tuple[mujoco.MjModel, mujoco.MjData], camera: str, window: tuple[int, int, float, float]
) -> None:
    model, data = world
    width, height, *shift = window
    lens = Lens.from_field_of_view(width, height, 30.0, (shift[0], shift[1]))
    renderer = CameraRenderer(model, width, height)
    rows, columns = np.nonzero(renderer.segmentation(data, camera, lens) == model.geom("ball").id)
    depth = renderer.depth(data, camera, lens)
    renderer.close()
    in_camera = world_to_camera(data, model.camera(camera).id) @ np.append(BALL, 1.0)
    u, v, w = lens.intrinsics @ in_camera[:3]
    assert len(rows) > 20
    # Corner convention: the centre of the first pixel is 0.5, 0.5.
    assert columns.mean() + 0.5 == pytest.approx(u / w, abs=0.3)
    assert rows.mean() + 0.5 == pytest.approx(v / w, abs=0.3)
    nearest = depth[rows, columns].min()
    assert nearest == pytest.approx(in_camera[2] - 0.012, abs=0.003)


def test_a_named_camera_draws_through_its_own_lens(world: tuple[mujoco.MjModel, mujoco.MjData]) -> None:
    model, data = world
    renderer = CameraRenderer(model, 64, 64)
    picture = renderer.image(data, "over", lens_of("over", 64, 64))
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 10
    with pytest.raises(ValueError, match="32x32"):
        renderer.image(data, "over", lens_of("over", 32, 32))
    renderer.close()


@pytest.mark.parametrize("side", [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1)])
def test_printed_digits_can_be_read_on_every_face(side: tuple[int, int, int]) -> None:
    spec = build_spec(TaskOptions(name="pick", digits=True))
    back = np.array(side, float)
    up = np.array([0.0, 1.0, 0.0]) if side[2] else np.array([0.0, 0.0, 1.0])
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, np.stack([np.cross(up, back), up, back], axis=1).ravel())
    centre = np.array([0.3, 0.0, 0.02])
    spec.worldbody.add_camera(name="close", pos=centre + 0.06 * back, quat=quaternion, fovy=53.13)  # fills the image
    model = spec.compile()
    model.geom_matid[model.geom("object").id] = model.material("digit4").id
    model.geom_rgba[model.geom("object").id] = 1.0
    data = mujoco.MjData(model)
    data.qpos[1] = 0.3
    mujoco.mj_forward(model, data)
    renderer = CameraRenderer(model, 64, 64)
    seen = renderer.image(data, "close", Lens.from_field_of_view(64, 64, 53.13)).mean(axis=2).ravel()
    renderer.close()
    printed = digit_image(4)[..., 0]
    turned = [np.rot90(printed, k) for k in range(4)]
    likeness = [float(np.corrcoef(seen, p.ravel())[0, 1]) for p in [*turned, *(t.T for t in turned)]]  # .T mirrors
    assert likeness[0] > 0.8
    assert max(likeness[1:]) < likeness[0] - 0.2


def choose(monkeypatch: pytest.MonkeyPatch, asked: str | None, egl: bool, osmesa: bool) -> str:
    monkeypatch.setattr(mujoco_backend, "egl_works", lambda: egl)
    monkeypatch.setattr(mujoco_backend, "osmesa_works", lambda: osmesa)
    monkeypatch.setattr(sys, "platform", "linux")
    if asked is None:
        monkeypatch.delenv("MUJOCO_GL", raising=False)
    else:
        monkeypatch.setenv("MUJOCO_GL", asked)
    return mujoco_backend.choose_backend()


def test_backend_order_is_egl_then_osmesa(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, None, True, True) == "egl"
    assert choose(monkeypatch, None, False, True) == "osmesa"
    assert choose(monkeypatch, None, False, False) == "disable"
    assert choose(monkeypatch, "osmesa", True, True) == "osmesa"
    assert choose(monkeypatch, "glfw", True, True) == "glfw"


@pytest.mark.parametrize("asked", ["egl", "osmesa"])
def test_a_backend_that_was_asked_for_and_is_missing_names_the_packages(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    with pytest.raises(RenderingUnavailableError, match=f"{asked}.*libegl1 libgl1.*libosmesa6"):
        choose(monkeypatch, asked, False, False)


def test_without_gl_the_physics_runs_and_the_first_image_names_the_packages() -> None:
    script = (
        "from keygrip.envs.yam.environment import YamCell\n"
        "from keygrip.envs.yam.tasks import TaskOptions\n"
        "YamCell(TaskOptions(name='reach'), render_images=False).reset(seed=0)\n"
        "try:\n"
        "    YamCell(TaskOptions(name='reach'), image_size=32).reset(seed=0)\n"
        "except RuntimeError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    environment = {**os.environ, "MUJOCO_GL": "disable"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("RenderingUnavailableError")
    assert "libegl1 libgl1" in done.stdout
    assert "libosmesa6" in done.stdout


def test_importing_the_package_does_not_load_mujoco() -> None:
    script = "import sys, keygrip.envs.yam.tasks, keygrip.robots.kinematics\nprint('mujoco' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_reading_a_robots_model_first_leaves_a_backend_that_draws() -> None:
    """MuJoCo reads `MUJOCO_GL` once, at its first import in a process, whichever module that is."""
    script = (
        "import keygrip.robots.model_file\n"
        "from keygrip.envs.yam.environment import YamCell; from keygrip.envs.yam.tasks import TaskOptions\n"
        "print(YamCell(TaskOptions(name='reach'), 32).reset(seed=0)[0]['image'].shape)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(32, 32, 3)", done.stderr


@pytest.mark.slow
def test_drawing_before_torchs_compiler_is_loaded_does_not_kill_the_process() -> None:
    """Mesa and triton each bring an LLVM; loaded in the wrong order the second one crashes."""
    script = (
        "from keygrip.envs.yam.environment import YamCell; from keygrip.envs.yam.tasks import TaskOptions\n"
        "YamCell(TaskOptions(name='reach'), 32).reset(seed=0)\n"
        "import lightning"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
