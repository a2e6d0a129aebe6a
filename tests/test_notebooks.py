"""Notebooks run from top to bottom, contain no outputs, and use the package instead of redefining it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import pytest
from nbclient import NotebookClient

from keygrip.envs.yam.tasks import TaskOptions
from keygrip.recording.demonstrations import record

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} >= {"one_demo", "heatmaps"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs, f"{path.name} holds outputs: clear them before committing"
            assert cell.execution_count is None
        assert not cell.metadata


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_define_nothing(path: Path) -> None:
    cells = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
    for source in cells:
        defined = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert not defined, f"{path.name} defines {[node.name for node in defined]}: that belongs in the package"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_that_reads_a_checkpoint_builds_nothing_from_it_unchecked(path: Path) -> None:
    """A checkpoint may be another person's: Hydra's instantiate would call whatever function it names."""
    cells = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
    names = {node.id for source in cells for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert not {"read_checkpoint", "instantiate"} <= names, f"{path.name}: use keygrip.training.parts.build_stored"


# Settings of a notebook, and those that make it quick: its own backbone and 40 steps take most of a minute.
SMALLER = {
    "one_demo": {'TaskOptions("pick_place")': 'TaskOptions("reach")'},
    "heatmaps": {
        '"backbone.image_size=96", "data.record.image_size=112", "model.network.pred_size=24",': (
            '"backbone.image_size=64", "data.record.image_size=72", "model.network.pred_size=16",'
            '"backbone.width=32", "backbone.depth=1", "backbone.heads=2",'
        ),
        '"max_steps=40", "val_every_n_steps=40"': '"max_steps=2", "val_every_n_steps=2"',
        '"data.record.demos=3"': '"data.record.demos=2"',
    },
}


@pytest.mark.parametrize(("name", "figures"), [("one_demo", 6), ("heatmaps", 4)])
def test_the_cells_of_notebooks_run_in_this_process(
    name: str, figures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With settings that make them small; a notebook as it is, in Jupyter's kernel, is a slow test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KEYGRIP_RUN", raising=False)
    monkeypatch.delenv("KEYGRIP_DEMOS", raising=False)
    cells = [cell.source for cell in read(ROOT / "notebooks" / f"{name}.ipynb").cells if cell.cell_type == "code"]
    source = "\n".join(cells)
    for usual, small in SMALLER[name].items():
        assert source.count(usual) == 1
        source = source.replace(usual, small)
    try:
        exec(compile(source, name, "exec"), {"__name__": "__main__"})
        assert len(plt.get_fignums()) == figures
    finally:
        plt.close("all")
    assert not list(tmp_path.iterdir())
    assert_printed(name, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pictures"), [("one_demo", 6), ("heatmaps", 5)])
def test_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pictures: int) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("KEYGRIP_RUN", raising=False)
    monkeypatch.delenv("KEYGRIP_DEMOS", raising=False)
    notebook = read(ROOT / "notebooks" / f"{name}.ipynb")
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(shown) == pictures
    assert not list(tmp_path.iterdir())  # everything went to a temporary folder
    assert_printed(
        name,
        "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"),
    )


def assert_printed(name: str, said: str) -> None:
    """Check the figures that a notebook prints."""
    if name == "one_demo":
        # Exact pixels and heights give the point exactly; cells and bins are off by millimetres.
        (means,) = (line.split() for line in said.splitlines() if line.startswith("mean "))
        exact, floor = float(means[1]), float(means[3])  # mean 0.0000 mm 3.76 mm
        assert exact < 0.05 < floor < 20
    else:
        decoders = [line.split()[0] for line in said.splitlines() if " cm " in line]
        assert decoders == ["argmax", "soft_argmax", "viterbi", "sample"]


@pytest.mark.slow
def test_a_folder_of_yours_is_named_from_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started as with `KEYGRIP_DEMOS="data/Übung 1" jupyter lab notebooks`; the name contains characters that Hydra
    needs in quotes."""
    record(TaskOptions("reach"), tmp_path / "Übung 1", demos=1, processes=1)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("KEYGRIP_DEMOS", "Übung 1")
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    notebook = read(ROOT / "notebooks" / "one_demo.ipynb")
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
