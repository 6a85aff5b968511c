"""The processes of one world, in forks of a process that has imported the libraries: what a launcher starts.

As a script: `ranks.py PLACES SCRIPT FLAGS…` runs SCRIPT once for each of PLACES, a JSON list of environments, and
prints how each ended. HOST in an environment is a network namespace to enter, whose name becomes the host's.
"""

import ctypes
import json
import os
import select
import shlex
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from workspace import become

LIMIT = 300  # seconds, for processes that would otherwise hang
NEW_NETWORK, NEW_NAME = 0x40000000, 0x04000000  # CLONE_NEWNET, CLONE_NEWUTS


def run(workspace, command: str, places: list[dict] | None = None) -> list[tuple[int, str]]:
    """The exit code (-9 after SIGKILL) and the output of each process of a world that ran a command line."""
    done = workspace.run(f"{__file__} {shlex.quote(json.dumps(places or world()))} {command}")
    return [(code, out) for code, out in json.loads(done.out)]


def disturbed(what: str) -> str:
    """A command line of tests/disturbed.py, up to the flags of train.py."""
    return f"{Path(__file__).with_name('disturbed.py')} {shlex.quote(what)}"


def world(size: int = 2, address: str = "127.0.0.1", here: int = 2) -> list[dict]:
    """The environments of a world's processes, `here` of them on each host, the first of which has that address."""
    place = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(here), "MASTER_ADDR": address}
    place["MASTER_PORT"] = str(free_port())
    return [place | {"RANK": str(rank), "LOCAL_RANK": str(rank % here)} for rank in range(size)]


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(places: list[dict], argv: list[str]) -> None:
    """Run a script in each place, and print how each ended."""
    outputs = [tempfile.TemporaryFile("w+") for _ in places]
    children = [_start(place, argv, out.fileno()) for place, out in zip(places, outputs, strict=True)]
    until = time.monotonic() + LIMIT
    for child in children:
        ends = os.pidfd_open(child)
        if not select.select([ends], [], [], max(0, until - time.monotonic()))[0]:
            os.kill(child, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for out in outputs:
        out.seek(0)
    print(json.dumps([(code, out.read()) for code, out in zip(codes, outputs, strict=True)]))


def _start(place: dict, argv: list[str], output: int) -> int:
    """Start `python argv…` in a fork of this process; returns its id."""
    if child := os.fork():
        return child
    for stream in (1, 2):
        os.dup2(output, stream)

    def prepare() -> None:
        if host := place.pop("HOST", None):
            _enter(host)
        os.environ |= place

    become(argv, prepare)


def _enter(host: str) -> None:
    """See the network as that host does, and its name."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{host}") as namespace:
        if libc.setns(namespace.fileno(), NEW_NETWORK) or libc.unshare(NEW_NAME):
            raise OSError(ctypes.get_errno(), f"cannot enter {host}")
    socket.sethostname(host)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
