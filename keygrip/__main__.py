"""``python -m keygrip <command>``."""

from keygrip.cli import main

main()
