"""Meta-World's table of tasks; needs no simulator."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
    with pytest.raises(ValueError, match="twice"):
        task_names(["mt10", "reach-v3"])
    with pytest.raises(ValueError, match="corner2"):
        MetaWorldTask(camera="corner9")
    with pytest.raises(ValueError, match="500"):
        MetaWorldTask(step_limit=501)
    assert MetaWorldTask("reach").instruction == "Reach a goal position"


def test_the_simulators_own_environment_needs_neither_torch_nor_hydra() -> None:
    """`metaworld` lives in an environment of its own with numpy, MuJoCo and Pillow: what runs there must not ask for
    more."""
    code = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("omegaconf", "hydra", "torch", "lightning", "timm", "sklearn"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import keygrip.envs.metaworld.tasks
import keygrip.envs.rendering
import keygrip.envs.workers
import keygrip.evaluation.rollout_worker
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
