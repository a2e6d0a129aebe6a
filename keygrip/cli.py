"""The command line ``keygrip <command>``, the same as ``python -m keygrip.<command>``."""

from __future__ import annotations

import difflib
import runpy
import sys

from keygrip import __version__

COMMANDS = {
    "train": "trains a model: model=... data=..., or experiment=...",
    "evaluate": "evaluates a checkpoint: checkpoint=RUN",
    "prepare": "prepares data: step=record|import|doctor|...",
    "sample": "draws images from text and a reference image",
    "generate": "answers a question about a video",
    "run": "drives an arm with a policy: robot=sim_yam|yam checkpoint=RUN",
    "serve": "plans for a robot on another machine, over HTTP or openpi's websockets",
    "export": "writes a trained model in a format that others read",
    "bench": "measures what keygrip costs on this machine",
    "demo": "records, trains and evaluates a policy in simulation",
}

HELP = ("--help", "-h", "help")


def usage() -> str:
    """What ``keygrip --help`` prints."""
    listed = "\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items())
    return (
        "keygrip <command> [group=option ...] [setting=value ...]\n\n"
        f"Commands:\n{listed}\n\n"
        "keygrip <command> --help lists what a command reads; keygrip --version says the version."
    )


def main() -> None:
    """Runs the command that ``sys.argv`` names; an unknown one ends with exit code 2."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in HELP and rest and rest[0] in COMMANDS:  # keygrip help train
        name, rest = rest[0], ["--help", *rest[1:]]
    if name in HELP:
        sys.stdout.write(f"{usage()}\n")
    elif name == "--version":
        sys.stdout.write(f"keygrip {__version__}\n")
    elif name in COMMANDS:
        sys.argv[1:] = rest
        # As `python -m` does it: processes that a run starts then find the module by its name.
        runpy.run_module(f"keygrip.{name}", run_name="__main__", alter_sys=True)
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"the nearest is {close[0]!r}; " if close else ""
        sys.stderr.write(f"keygrip: there is no command {name!r}: {hint}commands are {', '.join(COMMANDS)}\n")
        sys.exit(2)
