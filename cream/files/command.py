"""The command line that made an output: what its sidecar records, and what a user repeats to resume."""

import sys
from pathlib import Path

RUNNING: list[list[str]] = []  # the stages of this process, the innermost last


def typed() -> list[str]:
    """The script that the user started, and its words."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def running() -> list[str]:
    """The script that is running, and its words: iterate.py runs others within its own process."""
    return RUNNING[-1] if RUNNING else typed()
