"""The command line that makes an output: its sidecar records it, and a user repeats it to resume."""

import sys
from pathlib import Path

RUNNING: list[list[str]] = []  # the stages of this process, the innermost last


def typed_command() -> list[str]:
    """The script that the user started, and its arguments."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def running_command() -> list[str]:
    """The script that is running, and its arguments: iterate.py runs others within its own process."""
    return RUNNING[-1] if RUNNING else typed_command()
