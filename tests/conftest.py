"""Fixtures for all tests: one torch thread per process, a clean Hydra, and the toy model's configs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import gc
import importlib
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from _pytest.pathlib import import_path

for variable in [name for name in os.environ if name.startswith("SLURM_")]:
    del os.environ[variable]  # else a test that is stopped by a signal would requeue the Slurm job that runs the tests

ROOT = Path(__file__).resolve().parents[1]
SUPPORT = ROOT / "tests" / "support"


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Where several processes collect all tests, let each import its share of the test files first: pytest then
    rewrites the assertions of a file in one process, and the others read the result from the disk."""
    worker = getattr(session.config, "workerinput", None)
    if worker is None or [Path(path).resolve() for path in session.config.args] != [ROOT / "tests"]:
        return
    number, count = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
    for path in sorted((ROOT / "tests").rglob("test_*.py"))[number::count]:
        with contextlib.suppress(Exception, pytest.skip.Exception):  # collecting the file reports it
            import_path(path, mode="importlib", root=session.config.rootpath, consider_namespace_packages=False)


@pytest.hookimpl(tryfirst=True)  # before the choice by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark parameter sets of a test with ``quick_sets(number)`` as slow, except that many.

    They are drawn with a fixed seed: a regular choice would leave out values of parameters that are combined."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("quick_sets") and not item.get_closest_marker("slow"):
            groups.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for group in groups.values():
        marker = group[0].get_closest_marker("quick_sets")
        assert marker is not None
        (number,) = marker.args
        quick = random.Random(0).sample(range(len(group)), min(number, len(group)))
        for index, item in enumerate(group):
            if index not in quick:
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Freeze the about one million objects of imported libraries, so that the garbage collector skips them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # some libraries check at exit for objects that were not freed


@pytest.fixture
def two_without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate one of two processes that were started together, on a disk without file locks."""

    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.fixture(scope="session", autouse=True)
def computed_once() -> Iterator[None]:
    """Cache what Hydra and OmegaConf compute identically at each of the thousand compositions of a session."""
    from composing import memoized

    with pytest.MonkeyPatch.context() as patch:
        memoized(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def on_no_disk_that_fails() -> Iterator[None]:
    """Disable `os.fsync`: test files need not survive a power cut, so no test waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def pictures_of_figures_are_small() -> Iterator[None]:
    """Write matplotlib's figures with few pixels and without the search for a layout, which takes most of a second. A
    test of what a picture shows restores ``savefig.__wrapped__``."""
    figure = importlib.import_module("matplotlib.figure").Figure
    save = figure.savefig

    @functools.wraps(save)
    def savefig(self: Any, *arguments: Any, **named: Any) -> None:
        layout = self.get_layout_engine()
        self.set_layout_engine("none")
        save(self, *arguments, **named | {"dpi": 20})
        self.set_layout_engine(layout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "savefig", savefig)
        yield


@pytest.fixture(scope="session", autouse=True)
def what_was_imported_stays_frozen() -> Iterator[None]:
    """Disable `gc.unfreeze`: a server that ends unfreezes all objects, and each later collection would then scan the
    million objects of the libraries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def seeds_of_absent_devices_keep_no_trace() -> Iterator[None]:
    """Disable the stack traces of `manual_seed`. torch formats the stack three times per call, to show it if a device
    that is used later refuses the seed; this costs a millisecond per training batch."""
    torch = sys.modules.get("torch")  # not imported if no test needs it
    with pytest.MonkeyPatch.context() as patch:
        for device in () if torch is None else (torch.cuda, torch.xpu, torch.mtia):
            patch.setattr(device, "traceback", SimpleNamespace(format_stack=list), raising=False)
        yield


@pytest.fixture(autouse=True)
def clean_hydra() -> Iterator[None]:
    """Clear Hydra's global state after each test, so that no test sees the state of another one."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    yield
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


@pytest.fixture
def toy_overrides(tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that gives overrides: the toy model is trained into ``tmp_path / name`` for two and a half
    epochs of 5 batches."""

    def overrides(name: str, *more: str) -> list[str]:
        return [
            f"hydra.searchpath=[file://{SUPPORT / 'conf'}]",
            "model=toy",
            "data=toy",
            "strategy=cpu",
            "strategy.precision=32-true",
            "logger=none",
            "max_steps=13",
            "val_every_n_steps=4",
            "log_every_n_steps=1",
            f"run_dir={tmp_path / name}",
            *more,
        ]

    return overrides


class Outcome(NamedTuple):
    """The result of a command: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Restore the root logger after each test: commands add a handler for the present standard output and change the
    level, which would change what later tests capture."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)  # also clears the cache of enabled levels


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Return a function that runs the train command, or another one by name, in this process and in an empty folder."""
    from keygrip import command, train

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, of: str = "train") -> Outcome:
        monkeypatch.setattr(sys, "argv", [of, *arguments])
        try:
            if of == "train":
                command.entry_point(of, train.run)
            else:
                importlib.import_module(f"keygrip.{of}").main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs ``python -m <module> <arguments>`` in an empty folder, as a user would."""

    def run(module: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = dict(os.environ) | variables
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(SUPPORT)])
        environment["OMP_NUM_THREADS"] = "1"
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run
