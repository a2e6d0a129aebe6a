"""Meta-World itself, through its recorder and rollouts, in its own Python environment: `make metaworld-test`.

In other runs these tests are deselected, and pytest reports how many. With `-m metaworld` but without the environment,
they fail.
"""

from __future__ import annotations

import json
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keygrip.config import compose
from keygrip.data.robot.discovery import find_demos
from keygrip.envs.metaworld.tasks import HELD_OUT_SEED, MetaWorldTask
from keygrip.evaluation.remote_rollouts import RemoteSettings, run_remote
from keygrip.models.policy import Needs, Plan
from keygrip.prepare import run
from keygrip.recording.metaworld import record_step
from keygrip.runtime.chunk_execution import RecedingHorizon

pytestmark = pytest.mark.metaworld
ROOT = Path(__file__).parents[3]
CAMERAS = ["corner2", "topview", "corner", "corner3", "corner4", "behindGripper"]


def interpreter() -> str:
    python = os.environ.get("METAWORLD_PYTHON", ".venv-metaworld/bin/python")
    assert Path(python).is_file(), f"no Meta-World at {python}: run `make metaworld-test`"
    return python


def remote(python: str, cameras: list[str] | None = None) -> RemoteSettings:
    control = partial(RecedingHorizon, execute_seconds=0.5)
    return RemoteSettings(python, "keygrip.envs.metaworld.tasks.MetaWorldTask", 64, 80.0, cameras, control)


class Replay:
    """Plans the commands of a demonstration from its first frame on: every `stride`-th frame, 10 steps per plan."""

    needs = Needs(arms=("right",))

    def __init__(self, demo: Any, stride: int = 1) -> None:
        self.arm, self.at, self.stride = demo.arms["right"].commanded, 0, stride

    def plan(self, observation: Any) -> Plan:
        rows = np.minimum(self.at + self.stride * np.arange(10), len(self.arm) - 1)
        self.at += 10
        parts = (self.arm.position[rows], self.arm.quaternion[rows], self.arm.gripper[rows])
        return Plan(*(part[None] for part in parts), 0.05 * self.stride)


def test_scripted_demonstrations_are_recorded_and_their_commands_succeed(tmp_path: Path) -> None:
    python = interpreter()
    report = record_step(["drawer-close-v3"], tmp_path, 2, image_size=64, recoveries=0.0, processes=1, python=python)
    assert report["demos"] == report["recorded"] == 2
    demos = [reference.read() for reference in find_demos(tmp_path)]
    assert {demo.instruction for demo in demos} == {"Push and close a drawer"}
    camera = demos[0].cameras["corner2"]
    x, y, depth = (
        camera.intrinsics[0] @ (camera.world_to_camera[0] @ np.append(demos[0].arms["right"].position[0], 1))[:3]
    )
    assert 0 < x / depth < 64
    assert 0 < y / depth < 64
    assert camera.frames.read(0).std() > 10
    again = record_step(["drawer-close-v3"], tmp_path, 2, image_size=64, recoveries=0.0, processes=1, python=python)
    assert again["recorded"] == 0
    settings = remote(python)
    task = MetaWorldTask("drawer-close")
    ((_, result),) = run_remote(Replay(demos[0]), settings, [(task, demos[0].source["seed"], tmp_path / "a.mp4")], 1)
    assert result.success
    assert (tmp_path / "a.mp4").is_file()
    ((_, still),) = run_remote(_Still(), settings, [(MetaWorldTask("push", step_limit=40), HELD_OUT_SEED, None)], 1)
    assert (still.success, still.failure, still.seconds) == (False, "timeout", 0.5)
    elsewhere = remote(python, ["nowhere"])
    with pytest.raises(ValueError, match="has no camera 'nowhere'; it has corner2"):
        list(run_remote(_Still(), elsewhere, [(task, HELD_OUT_SEED, None)], 1))


@pytest.mark.parametrize("task", ["box-close-v3", "handle-pull-v3", "handle-pull-side-v3"])
def test_scripts_that_swing_are_eased_and_succeed_from_positions_every_tenth_of_a_second(
    task: str, tmp_path: Path
) -> None:
    python = interpreter()
    record_step([task], tmp_path, 1, image_size=32, recoveries=0.0, processes=1, python=python)
    (reference,) = find_demos(tmp_path)
    demo = reference.read()
    moved = np.abs(np.diff(demo.arms["right"].commanded.position, axis=0)).max()
    assert moved < 0.026  # m per frame of four steps; the script itself moves 0.04
    job = (MetaWorldTask(task), demo.source["seed"], None)
    ((_, result),) = run_remote(Replay(demo, stride=2), remote(python), [job], 1)
    assert result.success


def projected(camera: dict[str, Any], point: Any) -> np.ndarray:
    """Return the pixel [2] of a point [3] in the world."""
    seen = np.array(camera["intrinsics"]) @ (np.array(camera["world_to_camera"]) @ np.append(point, 1))[:3]
    return seen[:2] / seen[2]


def test_what_moves_is_seen_where_the_cameras_say_and_a_seed_decides_the_start() -> None:
    """An image that is not rotated upright, or mirrored extrinsics, would cause errors of tens of pixels."""
    command = [interpreter(), "-W", "ignore", str(ROOT / "tests/support/metaworld_views.py"), *CAMERAS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    for camera, goals in found["goals"].items():
        visible = [goal for goal in goals if len(goal["pixels"]) > 30]
        assert len(visible) >= 3, camera
        for goal in visible:
            offset = np.mean(goal["pixels"], axis=0) - projected(goal, goal["point"])
            assert np.abs(offset).max() < 0.3, (camera, goal["point"])
        assert np.array(visible[0]["world_to_camera"])[1, 2] < 0.01, camera  # image down is not world up
    hand = found["fingers"]
    pixels, middle = np.median(hand["pixels"], axis=0), np.add(hand["point"], [0, 0, 0.045])  # fingers are 9 cm long
    np.testing.assert_allclose(pixels, projected(hand, middle), atol=5)
    first, other, again = (np.array(start) for start in found["starts"])
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.02


def test_images_may_be_as_large_as_those_of_other_cells() -> None:
    """MuJoCo's own buffer for these scenes is 480 pixels high."""
    code = """
from keygrip.envs.metaworld.environment import MetaWorldEnvironment
from keygrip.envs.metaworld.tasks import MetaWorldTask

print(MetaWorldEnvironment(MetaWorldTask("reach"), 512).reset(seed=0)[0]["image"].shape)
try:
    MetaWorldEnvironment(MetaWorldTask("reach"), 1281)
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [interpreter(), "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines() == ["(512, 512, 3)", "image_size=1281 is outside [16, 1280] pixels"]


def recorded(root: Path, demos: int, *overrides: str) -> list[Any]:
    """Demonstrations of reaching."""
    settings = ["step=record", "env=metaworld", f"env.python={interpreter()}", f"root={root}", "tasks=[reach-v3]"]
    run(compose("prepare", [*settings, f"demos={demos}", "image_size=64", "processes=1", *overrides]))
    return [reference.read() for reference in find_demos(root)]


def test_two_cameras_record_the_hand_where_it_is_with_shadows_where_asked(tmp_path: Path) -> None:
    shaded, plain = (
        recorded(tmp_path / str(shadows), 1, "cameras=[corner2,topview]", f"shadows={shadows}", "recoveries=0")[0]
        for shadows in (True, False)
    )
    for demo, shadows in ((shaded, True), (plain, False)):
        assert list(demo.cameras) == ["corner2", "topview"]
        assert demo.source["task"]["shadows"] is shadows
    positions = plain.arms["right"].position
    np.testing.assert_array_equal(shaded.arms["right"].position, positions)
    last = len(positions) - 1
    assert np.linalg.norm(positions[last] - positions[0]) > 0.1
    for name, track in plain.cameras.items():
        first, end = (track.frames.read(row).astype(int) for row in (0, last))
        changed = np.argwhere(np.abs(end - first).max(-1) > 40)[:, ::-1] + 0.5
        for row in (0, last):
            at = projected(
                {"intrinsics": track.intrinsics[row], "world_to_camera": track.world_to_camera[row]}, positions[row]
            )
            assert np.linalg.norm(changed - at, axis=1).min() < 3, (name, row)
            dark = shaded.cameras[name].frames.read(row).astype(int) < track.frames.read(row).astype(int) - 20
            assert dark.mean() > 0.002, name


def test_a_folder_with_images_upside_down_is_not_continued_with_upright_ones(tmp_path: Path) -> None:
    more = partial(record_step, ["reach-v3"], image_size=32, recoveries=0.0, processes=1, python=interpreter())
    more(root=tmp_path, demos=1, cameras=["corner2", "corner4"])
    file = tmp_path / "recording.json"
    content = json.loads(file.read_text())
    assert content["settings"].pop("turned_upright") == ["corner4"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"turned_upright: None there, \['corner4'\] now"):
        more(root=tmp_path, demos=2, cameras=["corner2", "corner4"])


def test_a_recovery_starts_elsewhere_and_ends_at_the_same_goal(tmp_path: Path) -> None:
    undisturbed, disturbed = (recorded(tmp_path / str(share), 3, f"recoveries={share}") for share in (0.0, 1.0))
    for whole, recovery in zip(undisturbed, disturbed, strict=True):
        assert (whole.source["recovery"], recovery.source["recovery"]) == (False, True)
        assert whole.source["seed"] == recovery.source["seed"]
        ways = [demo.arms["right"].position for demo in (whole, recovery)]
        assert np.linalg.norm(ways[0][0] - ways[1][0]) > 0.02  # m
        assert np.linalg.norm(ways[0][-1] - ways[1][-1]) < 0.03
    some = recorded(tmp_path / "some", 6, "recoveries=0.2")
    assert {demo.source["recovery"] for demo in some} == {False, True}


class _Still:
    needs = Needs(arms=("right",))

    def plan(self, observation: Any) -> Plan:
        here, turn = (np.asarray(observation[name]).reshape(1, 1, -1) for name in ("position", "quaternion"))
        return Plan(here, turn, np.ones((1, 1)), 0.5)


def test_scripts_as_published_are_neither_replaced_nor_eased() -> None:
    code = """
import numpy as np
from metaworld.policies import ENV_POLICY_MAP

from keygrip.envs.metaworld.environment import MetaWorldEnvironment
from keygrip.envs.metaworld.expert import Expert
from keygrip.envs.metaworld.tasks import MetaWorldTask

for task in ("handle-pull-v3", "box-close-v3"):
    environment = MetaWorldEnvironment(MetaWorldTask(task), render_images=False)
    environment.reset(seed=0)
    own, published = (Expert(environment, 0, as_published=each) for each in (False, True))
    wanted = np.clip(ENV_POLICY_MAP[task]().get_action(environment.sensed.copy()), -1, 1)
    print(type(published._policy) is ENV_POLICY_MAP[task], type(own._policy) is ENV_POLICY_MAP[task])
    print(np.allclose(published._wanted(), wanted), np.allclose(own._wanted(), wanted))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [interpreter(), "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines() == ["True False", "True False", "True True", "True False"]
