"""Detect scripts that start processes without ``if __name__ == '__main__'``, before they start runs inside runs."""

from __future__ import annotations

import multiprocessing


def refuse_unguarded_script() -> None:
    """Raise an error in a process that is still importing the script of its parent process.

    Recorders and rollouts run in separate processes, each of which first imports the caller's script. A script that
    trains or evaluates when it is imported would do so again in each of them.

    Raises:
        RuntimeError: this is such a process.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "recording and evaluating start processes, which import the script that asked for it: put its work under "
            "if __name__ == '__main__'"
        )
