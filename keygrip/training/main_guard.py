"""Scripts that start processes without ``if __name__ == '__main__'``: said at once, in place of runs within runs."""

from __future__ import annotations

import multiprocessing


def refuse_unguarded_script() -> None:
    """Refuses to work in a process that is still importing the script of the one that started it.

    Recorders and rollouts are processes of their own; Python lets each import the caller's script first. A script that
    trains or evaluates when it is imported would do so in each of them again.

    Raises:
        RuntimeError: this is such a process.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "recording and evaluating start processes, which import the script that asked for it: put its work under "
            "if __name__ == '__main__'"
        )
