"""Metadata of a run: git revision, package versions, the machine."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
PACKAGES = (
    "keygrip",
    "torch",
    "torchvision",
    "lightning",
    "timm",
    "numpy",
    "mujoco",
    "gymnasium",
    "hydra-core",
    "omegaconf",
)


def run_metadata() -> dict[str, Any]:
    """Return ``git`` (revision, with ``+changes`` if the tree differs), ``packages`` and ``machine``."""
    return {
        "git": git_revision(),
        "packages": package_versions(),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """Describe this machine: system, processor, cores, GPU, versions."""
    import torch

    return {
        "system": platform.system(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a str subclass that weights_only loading rejects
    }


def processor() -> str:
    """Return the processor's name if the system provides it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_revision(package: Path = PACKAGE, records_count: bool = True) -> str | None:
    """Return the git revision of the checkout whose folder contains `package`, with ``+changes`` if its tracked files
    are modified; None if git fails or that folder is no checkout.

    A package that is installed inside another project's repository has no revision: that of the project says nothing
    about it.

    Args:
        package: folder of the package. records_count: False: changed records in ``benchmarks/`` are no modification.
    """
    folder = package.resolve().parent
    if not (folder / ".git").exists():
        return None
    paths = () if records_count else ("--", ":/", ":/!benchmarks")
    try:
        revision = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", *paths)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{revision}+changes" if changed else revision


@functools.cache
def package_versions() -> dict[str, str]:
    """Return the versions of the packages that affect results."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "keygrip" not in versions:
        from keygrip import __version__

        versions["keygrip"] = __version__
    return versions


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
