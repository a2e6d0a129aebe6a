"""The structure of the package: sizes, import cycles, layers, and networks that neither read files nor start
processes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from syntax_trees import nodes_of, tree

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "keygrip"
LONGEST_FILE = 500
# Imports of keygrip inside functions: for fast entry points and optional packages. Never raise this number.
MOST_LAZY_IMPORTS = 26
# Imports of required packages inside functions, by reason; all others are at the top of their modules.
IMPORTED_LATE = {
    "a command or a client imports this module before it needs the package, which takes long to import": {
        "keygrip.bench": {"torch"},
        "keygrip.evaluate": {"torch"},
        "keygrip.launch": {"lightning", "psutil"},
        "keygrip.training.metadata": {"torch"},
        "keygrip.training.strategies": {"lightning", "torch"},
        "keygrip.training.sweeps": {"torch"},
    },
    "Hydra imports this callback when a command begins": {
        "keygrip.evaluation.shift_report": {"matplotlib", "numpy"},
        "keygrip.training.loss_curves": {"matplotlib", "tensorboard"},
    },
    "Python environments of simulators import this module and lack the package": {
        "keygrip.data.parquet_pages": {"pyarrow"},
        "keygrip.data.parquet_tables": {"pyarrow"},
        "keygrip.data.robot.formats.frames": {"h5py"},
        "keygrip.data.robot.formats.lerobot_v3": {"pyarrow"},
        "keygrip.training.parts": {"hydra", "omegaconf"},
    },
    "I2RT's own driver needs packages that are installed with a real arm": {"keygrip.runtime.i2rt_yam": {"i2rt"}},
    "private names, which a release may remove: only what needs them fails then": {
        "keygrip.training.compilation": {"torch"},
        "keygrip.training.sweeps": {"hydra"},
    },
    "the function is sent to other processes with its imports": {"keygrip.command": {"hydra"}},
}
# Modules that import keygrip's modules by name: public names, the command table, and the declared parts of checkpoints.
IMPORT_BY_NAME = {"keygrip", "keygrip.command", "keygrip.training.parts"}
# Modules that open videos; the last one names PyAV's errors, so that a broken video is a bad sample.
USES_PYAV = {"keygrip.data.video", "keygrip.data.video_containers", "keygrip.data.bad_samples"}
VIDEO_LIBRARIES = {"av", "cv2", "imageio", "imageio_ffmpeg", "decord", "torchcodec", "moviepy"}
SYSTEMS = sorted(path.parent.name for path in PACKAGE.glob("models/*/module.py"))
# Calls that access files or start processes; a network or a LightningModule must not contain any of them.
OUTSIDE = {
    "open",
    "write_text",
    "write_bytes",
    "read_text",
    "read_bytes",
    "mkdir",
    "unlink",
    "rename",
    "Popen",
    "system",
}
OUTSIDE |= {
    "atomic_write",
    "write_json",
    "locked",
    "make_once",
    "urlopen",
    "check_call",
    "check_output",
    "savez",
    "save_file",
}

# Methods that PyTorch, Lightning and Hydra describe, in addition to all named on_...
LIGHTNING_HOOKS = {
    "close",
    "configure_gradient_clipping",
    "configure_optimizers",
    "forward",
    "load_state_dict",
    "state_dict",
    "test_dataloader",
    "train_dataloader",
    "training_step",
    "val_dataloader",
    "validation_step",
}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(name: str) -> dict[str, bool]:
    """Return the modules of keygrip that a module imports, without those for type checking only; True: inside a
    function."""
    found: dict[str, bool] = {}

    def visit(node: ast.AST, lazy: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom) and child.module and child.level == 0:
                inner = [f"{child.module}.{alias.name}" for alias in child.names]
                names = [each if each in MODULES else child.module for each in inner]
            for each in names:
                if each in MODULES and each != name:
                    found[each] = lazy and found.get(each, True)
            visit(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(tree(MODULES[name]), False)
    return found


@cache
def graph() -> dict[str, dict[str, bool]]:
    """Return the imports of every module. They are not computed at import: every process of a test run imports this
    file."""
    return {name: imports(name) for name in MODULES}


def circles() -> list[list[str]]:
    """Return groups of modules that import each other (Tarjan), including imports inside functions."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph()[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = []
            while True:
                group.append(stack.pop())
                if group[-1] == name:
                    break
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph():
        if name not in index:
            visit(name)
    return found


def test_no_file_is_long() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES.values()}
    assert {name: lines for name, lines in long.items() if lines > LONGEST_FILE} == {}


def test_there_are_no_import_circles() -> None:
    assert circles() == []


def test_few_imports_hide_in_functions() -> None:
    lazy = [f"{name} -> {other}" for name, others in graph().items() for other, inside in others.items() if inside]
    assert len(lazy) <= MOST_LAZY_IMPORTS, "\n".join(lazy)


def test_required_packages_are_imported_in_functions_only_for_a_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {re.match(r"[\w-]+", requirement).group() for requirement in project["dependencies"]}  # type: ignore[union-attr]
    packages = {name for name, distributions in packages_distributions().items() if required & set(distributions)}
    assert {"hydra", "h5py", "PIL", "sklearn"} <= packages
    found: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        functions = [node for node in nodes_of(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        for node in (inner for function in functions for inner in ast.walk(function)):
            given = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            given += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if late := {each.partition(".")[0] for each in given} & packages:
                found.setdefault(name, set()).update(late)
    listed: dict[str, set[str]] = {}
    for modules in IMPORTED_LATE.values():
        for name, late in modules.items():
            listed.setdefault(name, set()).update(late)
    assert found == listed


def test_no_line_is_broken_for_the_comment_behind_it() -> None:
    """A formatter puts brackets around a number, a name or an exception if the comment after it does not fit the
    line."""
    broken = re.compile(r"\(\n +[\w.-]+(?:  # [^\n]+)?\n *\)")
    found = {name: broken.findall(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_modules_are_imported_by_name_in_few_places() -> None:
    named = {
        name
        for name, path in MODULES.items()
        for node in nodes_of(path)
        if "import_module" in (getattr(node, "attr", ""), getattr(node, "id", ""), getattr(node, "name", ""))
        or getattr(node, "id", "") == "__import__"
    }
    assert named == IMPORT_BY_NAME


def test_videos_are_decoded_and_written_in_one_place() -> None:
    """No other library for videos is used; only data/video.py and data/video_containers.py open a container."""
    users: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        for node in nodes_of(path):
            if isinstance(node, ast.Import | ast.ImportFrom):
                given = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                for package in {each.partition(".")[0] for each in given} & VIDEO_LIBRARIES:
                    users.setdefault(package, set()).add(name)
    assert users == {"av": USES_PYAV, "cv2": {"keygrip.data.robot.charuco"}}  # finds boards, opens no video
    errors = tree(MODULES["keygrip.data.bad_samples"])
    taken = [n.attr for n in ast.walk(errors) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "av"]
    assert taken == ["FFmpegError"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_model_imports_another_model(system: str) -> None:
    others = tuple(f"keygrip.models.{each}" for each in SYSTEMS if each != system)
    own = [name for name in graph() if name.startswith(f"keygrip.models.{system}.")]
    assert own
    assert [(name, other) for name in own for other in graph()[name] if other.startswith(others)] == []


def module_classes() -> list[tuple[Path, ast.ClassDef]]:
    """Return classes that derive from `nn.Module` or `LightningModule`, by the names of their bases, with their
    files."""
    files = MODULES.values()
    nodes = [(path, node) for path in files for node in nodes_of(path) if isinstance(node, ast.ClassDef)]
    bases: dict[str, set[str]] = {}
    for _, node in nodes:  # a plain class may have the name of a module
        bases.setdefault(node.name, set()).update(ast.unparse(base).rpartition(".")[2] for base in node.bases)
    known: set[str] = set()
    while more := {name for name, above in bases.items() if above & (known | {"Module", "LightningModule"})} - known:
        known |= more
    return [(path, node) for path, node in nodes if node.name in known]


def test_networks_and_modules_touch_no_files_and_start_no_processes() -> None:
    """Their own files contain no such call, and in other files such classes contain none."""
    files = [*PACKAGE.glob("models/*/network.py"), *PACKAGE.glob("models/*/module.py"), *PACKAGE.glob("models/nn/*.py")]
    assert len(files) > 10
    classes = module_classes()
    assert len(classes) > 60
    places: list[tuple[Path, ast.AST]] = [*((file, tree(file)) for file in files), *classes]
    found = []
    for file, place in places:
        for node in ast.walk(place):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if called in OUTSIDE:
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno} {called}")
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [f"{file.relative_to(ROOT)}:{node.lineno} {name}" for name in names if name == "subprocess"]
    assert found == []


def test_public_names_say_what_they_are() -> None:
    """A method may be described by the method of the same name in its protocol, base class or PyTorch Lightning."""
    described, silent = set(LIGHTNING_HOOKS), []

    def visit(body: list[ast.stmt], place: str, owner: str) -> None:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith(
                ("_", "on_")
            ):
                continue
            decorators = {ast.unparse(each).rpartition(".")[2] for each in node.decorator_list}
            if ast.get_docstring(node):
                described.update({node.name} if owner else ())
            elif not decorators & {"overload", "setter"}:
                silent.append((f"{place}:{node.lineno}", owner, node.name))
            if isinstance(node, ast.ClassDef):
                visit(node.body, place, node.name)

    for name, path in MODULES.items():
        visit(tree(path).body, name, "")
    left = [entry for entry in silent if not entry[1] or entry[2] not in described]
    assert not left, left


def test_the_layers_hold() -> None:
    """The contracts of pyproject.toml, as `make lint` checks them."""
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([str(program), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_the_source_distribution_holds_what_the_makefile_and_the_tests_read() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = [entry.strip("/") for entry in project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]]
    read = set(re.findall(r"constraints[\w-]*\.txt|plugins|tests", (ROOT / "Makefile").read_text()))
    for path in ROOT.glob("tests/**/*.py"):
        named = re.findall(r'(?:ROOT|parents\[\d\]) / "([\w.-]+)|ROOT\.glob\("([\w*.-]+)', path.read_text())
        read |= {first or second for first, second in named}
    top = {found.name for name in read for found in ROOT.glob(name)} - {"pyproject.toml"}
    assert {"constraints-metaworld.txt", "benchmarks", "notebooks"} <= top
    assert sorted(name for name in top if not any(fnmatch(name, entry) for entry in included)) == []
