"""Notebooks run from top to bottom, contain no outputs, and use the package instead of redefining it."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

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
def test_what_notebooks_import_is_there(path: Path) -> None:
    """Running the notebooks is slow, and the names that they import may move."""
    cells = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
    imported = [node for source in cells for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    of_the_package = [node for node in imported if node.module and node.module.split(".")[0] == "keygrip"]
    assert of_the_package
    for node in of_the_package:
        module = importlib.import_module(node.module or "")
        missing = [each.name for each in node.names if not hasattr(module, each.name)]
        assert not missing, f"{path.name} imports {missing} from {node.module}, which has no such names"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_that_reads_a_checkpoint_builds_nothing_from_it_unchecked(path: Path) -> None:
    """A checkpoint may be another person's: Hydra's instantiate would call whatever function it names."""
    cells = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
    names = {node.id for source in cells for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert not {"read_checkpoint", "instantiate"} <= names, f"{path.name}: use keygrip.training.parts.build_stored"


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        pytest.param("one_demo", 6, marks=pytest.mark.slow),
        pytest.param("heatmaps", 5, marks=pytest.mark.slow),
    ],
)
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
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
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
