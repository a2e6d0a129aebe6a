"""Meta-World's table of tasks and our own script; needs no simulator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keygrip.envs.metaworld.own_scripts import DoorOpen, HandlePull
from keygrip.envs.metaworld.tasks import DIFFICULTY, INSTRUCTIONS, MT10, MT50, MetaWorldTask, task_names


def test_sets_and_groups_have_the_benchmarks_sizes() -> None:
    sizes = {group: len(tasks) for group, tasks in INSTRUCTIONS.items()}
    assert sizes == {"easy": 28, "medium": 11, "hard": 6, "very_hard": 5}
    assert len(MT50) == len(DIFFICULTY) == 50
    assert len(MT10) == 10
    assert set(MT10) < set(MT50)
    assert task_names("hard") == tuple(INSTRUCTIONS["hard"])
    assert task_names(["reach", "mt10"][:1]) == ("reach-v3",)


def test_names_and_options_that_do_not_exist_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'door-open-v3'"):
        task_names("dor-open")
    with pytest.raises(ValueError, match=r"no task 'pick': .*env=yam has one task: env\.task\.name="):
        task_names(["pick"])
    with pytest.raises(ValueError, match="twice"):
        task_names(["mt10", "reach-v3"])
    with pytest.raises(ValueError, match="corner2"):
        MetaWorldTask(camera="corner9")
    with pytest.raises(ValueError, match="500"):
        MetaWorldTask(step_limit=501)
    assert MetaWorldTask("reach").instruction == "Reach a goal position"


def test_the_simulators_own_environment_needs_neither_torch_nor_hydra() -> None:
    """`metaworld` runs in an environment of its own with numpy, MuJoCo and Pillow: the code that runs there must not
    import any other package."""
    code = """
import sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("omegaconf", "hydra", "torch", "lightning", "timm", "sklearn"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import keygrip.envs.metaworld.tasks
import keygrip.envs.rendering
import keygrip.envs.workers
import keygrip.evaluation.rollout_worker
import keygrip.data.robot.native_writer  # of the recorders that run there
import keygrip.recording.gymnasium_worker
import keygrip.recording.recorded_folder
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("hand", "step"),
    [
        pytest.param([0.0, 0.0, 0.14], [0, -1, 0], id="above the bar: to the front of it first"),
        pytest.param([0.05, -0.08, 0.1], [-1, 0, 0], id="in front, but aside"),
        pytest.param([0.0, -0.08, 0.1], [0, 0, -1], id="in front: down"),
        pytest.param([0.0, -0.075, -0.02], [0, 1, 0], id="below: against the bar"),
        pytest.param([0.0, -0.035, 0.0], [0, 0, 1], id="at the bar: up"),
        pytest.param([0.0, -0.03, 0.06], [0, -1, 0], id="slipped off: back to the front"),
    ],
)
def test_the_handle_is_pulled_up_from_the_front_with_shut_fingers(hand: list[float], step: list[int]) -> None:
    handle = np.array([0.1, 0.6, 0.06])
    action = HandlePull().get_action(np.concatenate([handle + hand, [1.0], handle, np.zeros(32)]))
    largest = np.abs(action[:3]).argmax()
    assert np.sign(action[largest]) == step[largest]
    assert np.abs(action[:3]).max() <= 0.5
    assert action[3] == 1.0


@pytest.mark.parametrize(
    ("hand", "step"),
    [
        pytest.param([-0.2, 0.0, 0.0], [1, 1, 1], id="away from the handle, low: up and over"),
        pytest.param([-0.08, 0.02, 0.12], [1, 0, 0], id="above the handle, not yet behind it: on"),
        pytest.param([0.01, 0.02, 0.12], [0, 0, -1], id="above the far side: down"),
        pytest.param([0.01, 0.02, 0.0], [-1, -1, 0], id="behind the handle: pull"),
        pytest.param([-0.15, -0.1, 0.0], [1, 1, 1], id="slipped off: up again"),
    ],
)
def test_the_hand_comes_down_behind_the_door_handle_and_pulls(hand: list[float], step: list[int]) -> None:
    handle = np.array([0.25, 0.7, 0.15])
    action = DoorOpen().get_action(np.concatenate([handle + hand, [1.0], handle, np.zeros(32)]))
    np.testing.assert_array_equal(np.sign(np.round(action[:3], 9)), step)
    assert action[3] == 1.0


def test_the_script_says_how_to_get_the_environment_that_it_lacks(tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "benchmarks/metaworld/script.py"
    command = [sys.executable, str(script), "--tasks", "mt10", "--python", "nowhere/bin/python"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("there is no Python interpreter at nowhere/bin/python: `make metaworld-install`")
    shown = subprocess.run([*command[:2], "--help"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "make metaworld-install" in shown
