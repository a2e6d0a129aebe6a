"""Where a run comes from: git revision, package versions, the machine."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

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


def provenance() -> dict[str, Any]:
    """``git`` (revision, ``+changes`` where the tree differs), ``packages``, ``python``, ``machine``."""
    return {
        "git": git_revision(),
        "packages": package_versions(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def git_revision() -> str | None:
    """Revision of the checkout that this package lies in; None where it is installed."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        revision = _git(folder, "rev-parse", "HEAD")
        return f"{revision}+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else revision
    except (OSError, subprocess.SubprocessError):
        return None


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide about results."""
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
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
