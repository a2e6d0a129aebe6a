"""Command line ``keygrip <command>``, equivalent to ``python -m keygrip.<command>``."""

from __future__ import annotations

import difflib
import os
import re
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
COMPLETES = 'tab completion is for bash, of all commands together: eval "$(keygrip -sc install=bash)"'
# Hydra's own script calls the first word of the line, without the command that follows it.
COMPLETION = """\
_keygrip() {
    local found=$(COMP_LINE=${COMP_LINE:0:$COMP_POINT} keygrip --shell-completion query=bash 2>/dev/null)
    COMPREPLY=($(compgen -W "$found" -- "${COMP_WORDS[COMP_CWORD]}"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _keygrip keygrip
"""


def usage() -> str:
    """Return the text that ``keygrip --help`` prints."""
    listed = "\n".join(f"  {name:<10}{description}" for name, description in COMMANDS.items())
    return (
        "keygrip <command> [group=option ...] [setting=value ...]\n\n"
        f"Commands:\n{listed}\n\n"
        "keygrip <command> --help lists what a command reads; keygrip --version says the version."
    )


def main() -> None:
    """Run the command named in ``sys.argv``; for an unknown command exit with code 2."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in HELP and arguments and arguments[0] in COMMANDS:  # keygrip help train
        name, arguments = arguments[0], ["--help", *arguments[1:]]
    if name in HELP:
        sys.stdout.write(f"{usage()}\n")
    elif name == "--version":
        sys.stdout.write(f"keygrip {__version__}\n")
    elif name in ("-sc", "--shell-completion"):
        _print_completions(arguments)
    elif name in COMMANDS:
        _run(name, arguments)
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"the nearest is {close[0]!r}; " if close else ""
        sys.stderr.write(f"keygrip: there is no command {name!r}: {hint}commands are {', '.join(COMMANDS)}\n")
        sys.exit(2)


def _run(name: str, arguments: list[str]) -> None:
    sys.argv[1:] = arguments
    # As with `python -m`, so that processes started by a run find the module by its name.
    runpy.run_module(f"keygrip.{name}", run_name="__main__", alter_sys=True)


def _print_completions(arguments: list[str]) -> None:
    """Print the completion script for bash, or the completions of the line ``COMP_LINE``: the commands, or after a
    command Hydra's completions. For anything else exit with code 2."""
    if arguments == ["install=bash"]:
        sys.stdout.write(COMPLETION)
        return
    if arguments != ["query=bash"]:
        sys.stderr.write(f"keygrip: -sc {' '.join(arguments)}: {COMPLETES}\n")
        sys.exit(2)
    line = os.environ.get("COMP_LINE", "")
    typed = re.match(r"\s*\S+\s+(\S+)\s+(.*)", line, re.DOTALL)
    if typed is None:
        sys.stdout.write(f"{' '.join(COMMANDS)}\n")
    elif typed[1] in COMMANDS:
        os.environ["COMP_LINE"] = f"keygrip {typed[2]}"
        os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
        _run(typed[1], ["--shell-completion", "query=bash"])
