"""How processes that a launcher starts determine the first of them, and the address where they meet."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment

from keygrip.launch import is_first_process, set_rendezvous_of_step
from keygrip.training import run_folder

NAMES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that the variables that a test sets are removed after it
        monkeypatch.delenv(name)


def told(monkeypatch: pytest.MonkeyPatch, **variables: str | int) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def meeting(monkeypatch: pytest.MonkeyPatch, job: int, step: int | None, nodes: str | None) -> tuple[str, int]:
    """Return the address where Lightning lets the tasks of one step of a job on n1 and n2 meet."""
    in_step: dict[str, str | int | None] = {"STEP_ID": step, "STEP_NODELIST": nodes}
    ours: dict[str, str | int | None] = {
        "NODELIST": "n[1-2]",
        "JOB_NODELIST": "n[1-2]",
        "JOB_ID": job,
        "NTASKS": 2,
        "NTASKS_PER_NODE": 2,
    }
    with monkeypatch.context() as patch:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, os.environ.get(name, ""))
            if not os.environ[name]:
                patch.delenv(name)
        told(patch, **{f"SLURM_{name}": value for name, value in (ours | in_step).items() if value is not None})
        set_rendezvous_of_step()
        environment = SLURMEnvironment(auto_requeue=False)
        return environment.main_address, environment.main_port


def test_steps_side_by_side_meet_at_nodes_and_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (meeting(monkeypatch, 1_234_567, step, node) for step, node in ((0, "n1"), (1, "n2")))
    assert first == ("n1", 19567)
    assert second[0] == "n2"
    assert meeting(monkeypatch, 1_234_567, 1, "n2") == second  # the same for every task of the step
    meetings = {meeting(monkeypatch, 1_234_567, step, "n1") for step in range(200)}
    assert len(meetings) == 200
    assert all(15_000 <= port < 25_000 for _, port in meetings)


def test_the_first_steps_of_jobs_queued_together_meet_at_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run on nodes that the jobs share."""
    numbers = [(job, step) for job, step in product(range(9_990, 10_030), range(8))]
    assert len({meeting(monkeypatch, job, step, "n1") for job, step in numbers}) == len(numbers)


def test_the_first_step_on_all_nodes_meets_where_lightning_has_it_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    assert meeting(monkeypatch, 42, 0, "n[1-2]") == ("n1", 15042)
    assert meeting(monkeypatch, 42, None, None) == ("n1", 15042)  # SLURM does not set the step


def test_a_meeting_that_the_user_names_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, MASTER_ADDR="here", MASTER_PORT=1234)
    assert meeting(monkeypatch, 42, 1, "n2") == ("here", 1234)


def test_one_process_of_torchrun_under_srun_is_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torchrun's rendezvous numbers the nodes in order of arrival."""
    for local, nodes in ((1, ((0, 1), (1, 0))), (2, ((0, 2), (1, 0)))):
        first = []
        for procid, begins in nodes:
            for number in range(local):
                told(monkeypatch, SLURM_JOB_ID=7, SLURM_PROCID=procid, SLURM_STEP_NUM_TASKS=2, WORLD_SIZE=2 * local)
                told(monkeypatch, RANK=begins + number, LOCAL_RANK=number, TORCHELASTIC_RUN_ID="x")
                if is_first_process():
                    first.append((procid, begins + number))
        assert first == [(1, 0)]
    told(monkeypatch, RANK=0, LOCAL_RANK=0)
    with run_folder.lock_folder(tmp_path):
        assert run_folder.is_held(tmp_path)


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"SLURM_PROCID": "1"}, False),
        ({"SLURM_PROCID": "1", "RANK": "0"}, False),  # not torchrun's: inherited from a batch script
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # started by Lightning
        ({"RANK": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, False),
    ],
)
def test_the_first_process_of_each_launcher(
    variables: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, **variables)
    assert is_first_process() is first
