"""Data sets of the hub: downloaded once, and refused with a one-line message if there is no network."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import keygrip
from keygrip import hub_network
from keygrip.data.robot.datamodule import RobotDemos
from keygrip.data.robot.hub import hub_name
from keygrip.training.parts import build_stored


@pytest.fixture
def within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate that the hub has just answered."""
    monkeypatch.setattr(hub_network, "_last", (time.monotonic(), None))


@pytest.mark.usefixtures("within_reach")
def test_a_data_set_of_the_hub_is_downloaded_once(
    native_root: Path, robot_demos: Callable[..., RobotDemos], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def snapshot_download(repo_id: str, repo_type: str, local_dir: Path) -> None:
        asked.append((repo_id, repo_type))
        shutil.copytree(native_root, local_dir, dirs_exist_ok=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for _ in range(2):
        data = robot_demos("hub:lab/cubes")
        data.refuse_missing()
        data.prepare_data()
        data.setup("fit")
        assert len(data.demos) == 10
    assert asked == [("lab/cubes", "dataset")]
    assert (tmp_path / "data/hub/lab/cubes/demo_00").is_dir()


def test_a_checkpoint_downloads_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The content of a checkpoint file must not cause a request to a server."""
    asked: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **told: asked.append(told))
    stored = {"_target_": "keygrip.data.robot.datamodule.RobotDemos", "root": "hub:lab/cubes", "camera": "over"}
    stored |= {"arms": ["right"], "image_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3, "horizon": 4}
    data = build_stored(stored | {"frame_stride": 1, "batch_size": 2, "make_missing": True}, "data")
    with pytest.raises(FileNotFoundError, match=r"data/hub/lab/cubes is missing, .*not downloaded.*open_loop=false"):
        data.prepare_data()
    assert not asked


def test_without_a_network_a_set_that_is_not_there_is_refused_before_anything_slow(
    robot_demos: Callable[..., RobotDemos], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native_root: Path
) -> None:
    asked: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_network, "_last", (time.monotonic(), "https://hub cannot be reached: no route"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **told: asked.append(told))
    data = robot_demos(["hub:lab/cubes", str(native_root)])
    for refuse in (data.refuse_missing, data.prepare_data):
        with pytest.raises(
            FileNotFoundError, match=r"\(https://hub cannot be reached: no route\).*hf download lab/cubes .*=FOLDER"
        ):
            refuse()
    assert not asked, "its client would try each file for half a minute"
    shutil.copytree(native_root, "data/hub/lab/cubes")
    Path("data/hub/lab/cubes/.complete").touch()
    data.refuse_missing()  # data sets that were downloaded before need no network
    with pytest.raises(FileNotFoundError, match=r"data folder nowhere does not exist"):
        robot_demos(["hub:lab/cubes", "nowhere"]).refuse_missing()


def test_data_are_looked_for_before_a_stage_is_trained_and_the_run_leaves_no_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_network, "_last", (time.monotonic(), "no route"))
    monkeypatch.setattr("keygrip.training.fit.complete_stages", lambda *_, **__: begun.append("stages"))
    monkeypatch.setattr("keygrip.training.fit.build_module", lambda *_: begun.append("module"))
    for root, said in [("hub:lab/cubes", r"hf download lab/cubes"), ("nowhere", "folder nowhere does not exist")]:
        with pytest.raises(FileNotFoundError, match=said):
            keygrip.train([f"data.root={root}"])
    assert begun == []
    assert not Path("runs").exists()


@pytest.mark.usefixtures("within_reach")
def test_without_a_network_one_line_says_what_to_do(
    robot_demos: Callable[..., RobotDemos], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def snapshot_download(**_: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        FileNotFoundError, match=r"no route to host.*hf download lab/cubes .*data\.root=FOLDER"
    ) as caught:
        robot_demos("hub:lab/cubes").prepare_data()
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):  # and the partial download is not used as the data set
        robot_demos("hub:lab/cubes").prepare_data()


@pytest.mark.parametrize("root", ["hub:cubes", "hub:lab/../cubes", "hub:/etc/passwd", "hub:lab/a/b", "hub:"])
def test_only_names_are_asked_for(root: str) -> None:
    assert hub_name("data/yam") is None
    with pytest.raises(ValueError, match="hub:OWNER/NAME"):
        hub_name(root)
