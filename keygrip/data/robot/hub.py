"""Data sets of the Hugging Face hub, downloaded once into a folder."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from keygrip.artifacts import make_once, write_text
from keygrip.hub_network import unreachable

log = logging.getLogger(__name__)

PREFIX = "hub:"
FOLDER = Path("data/hub")
COMPLETE = ".complete"
_NAME = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}")


def hub_name(root: str | Path | None) -> str | None:
    """Return OWNER/NAME of a root given as `hub:OWNER/NAME`; None: it is a folder.

    Raises:
        ValueError: it begins with `hub:`, but the rest is not such a name.
    """
    text = str(root)
    if not text.startswith(PREFIX):
        return None
    name = text.removeprefix(PREFIX)
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"data.root={text} names no data set of the hub: write data.root=hub:OWNER/NAME")
    return name


def folder_of(name: str) -> Path:
    """Return the folder in which a data set of the hub is stored."""
    return FOLDER / name


def refuse_missing(name: str, make_missing: bool = True) -> None:
    """Raise an error if a data set of the hub is missing and cannot be downloaded. Called before any slow work.

    Args:
        make_missing: False: downloading is not allowed.

    Raises:
        FileNotFoundError: as for `download`.
    """
    folder = folder_of(name)
    if (folder / COMPLETE).is_file():
        return
    if not make_missing:
        raise FileNotFoundError(
            f"{folder} is missing, the data set {name} of the hub that the run was trained on: a checkpoint's data are "
            "not downloaded unasked. Fetch it with data.make_missing=true, or evaluate with open_loop=false"
        )
    if (reason := unreachable()) is not None:
        raise FileNotFoundError(_unavailable_message(name, reason))


def _unavailable_message(name: str, reason: str) -> str:
    return (
        f"the data set {name} cannot be had from the hub ({reason}): where there is a network, run `hf download {name} "
        "--repo-type dataset --local-dir FOLDER`, and give data.root=FOLDER"
    )


def download(name: str, make_missing: bool = True) -> Path:
    """Download a data set of the hub if it is not complete. Return its folder.

    Args:
        make_missing: False: nothing is downloaded.

    Raises:
        FileNotFoundError: the data set is not available; the message says what to download by hand.
    """
    refuse_missing(name, make_missing)
    folder = folder_of(name)

    def make(target: Path) -> None:
        log.info("downloading https://huggingface.co/datasets/%s into %s", name, target)
        try:
            from huggingface_hub import snapshot_download

            snapshot_download(repo_id=name, repo_type="dataset", local_dir=target)
        except Exception as error:  # network, response of the hub, missing package: one error for all
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise FileNotFoundError(_unavailable_message(name, reason)) from error
        write_text(target / COMPLETE, name + "\n")

    make_once(folder, lambda target: (target / COMPLETE).is_file(), make)
    return folder
