"""Test whether the Hugging Face hub can be reached, before its client tries each file for half a minute."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

PATIENCE_S = 5.0  # time limit for an answer, including name resolution
REMEMBERED_S = 60.0
_last: tuple[float, str | None] | None = None


def unreachable() -> str | None:
    """Return why the hub cannot be reached, from one request without retries; None if it answers, even with an error.
    The result is cached for a minute."""
    global _last
    if _last is None or time.monotonic() - _last[0] > REMEMBERED_S:
        _last = time.monotonic(), _request_hub()
    return _last[1]


def cache_only_without_network(source: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return options of a loader for files of a folder or the hub. If the hub cannot be reached, they restrict the
    loader to its cache.

    Args:
        source: a local folder or a name on the hub. options: for `from_pretrained` or `cached_file`.
    """
    if options.get("local_files_only") or Path(source).is_dir() or unreachable() is None:
        return options
    return {**options, "local_files_only": True}


def kept_without_network(name: str, file: str) -> Path | None:
    """Return a previously downloaded file of the hub if the hub cannot be reached; None if it can be reached.

    Raises:
        FileNotFoundError: the hub cannot be reached, and the file is not in its cache.
    """
    if (reason := unreachable()) is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file)
    if not isinstance(found, str):
        raise FileNotFoundError(f"{reason}; and it is not in its cache")
    return Path(found)


def _request_hub() -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answers: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE_S)
        except Exception as error:  # any error of its HTTP library
            answers.append((str(error).splitlines() or [""])[0][:120] or type(error).__name__)
        else:
            answers.append(None)

    asking = threading.Thread(target=ask, daemon=True)  # a request's time-out does not cover name resolution
    asking.start()
    asking.join(PATIENCE_S)
    if not answers:
        return f"no answer from {constants.ENDPOINT} within {PATIENCE_S:g} s"
    return None if answers[0] is None else f"{constants.ENDPOINT} cannot be reached: {answers[0]}"
