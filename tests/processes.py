"""Processes that end with the test that started them, and all that they started with them."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil

RAY = {  # the environment of a Ray that a test starts
    "RAY_worker_niceness": "0",  # not 15: the other tests would leave it no time
    "RAY_USAGE_STATS_ENABLED": "0",
}


@contextmanager
def started(argv: Sequence[str], **options) -> Iterator[subprocess.Popen]:
    """A command, its output (stderr with it) in a pipe. At the end it is killed with all below it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(argv, **pipes | options)
    below: list[psutil.Process] = []
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            below = psutil.Process(process.pid).children(recursive=True)
        for each in [process, *below]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
