"""One writer at a time: who is refused, who waits, what is left behind, and file systems without locks."""

import errno
import fcntl
import os
import subprocess
import sys
import time

import pytest

from cream.errors import UserError
from cream.files.lock import Lock

HOLD = """
import sys, time
from pathlib import Path
from cream.files.lock import Lock
with Lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def hold(repo):
    """A function: start a process that holds the lock of a path for so many seconds; returns once it does."""
    started = []

    def start(path, seconds):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path), str(seconds)], cwd=repo, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_at_once_and_told_of_the_first(tmp_path, hold):
    path = tmp_path / "x.json"
    first, began = hold(path, 600), time.monotonic()
    for _ in range(2):  # being refused does not change what the next one is told
        with pytest.raises(UserError, match=rf"x\.json: process {first.pid} on .* is writing it"), Lock(path):
            pass
    assert time.monotonic() - began < 5
    first.kill()
    first.wait()
    with Lock(path):  # the kernel released it
        assert Lock(path).path.read_text().startswith(f"process {os.getpid()} on ")
    assert not [*tmp_path.iterdir()]


def test_one_that_waits_gets_it_when_the_first_ends(tmp_path, hold):
    path = tmp_path / "new" / "x.json"
    hold(path, 0.5)
    with pytest.raises(UserError, match="is writing it"), Lock(path, timeout=0.1):
        pass
    with Lock(path, timeout=-1):  # the first one removes its file and folder meanwhile
        with pytest.raises(UserError, match="is writing it"), Lock(path):
            pass
    assert not [*tmp_path.iterdir()]


def test_folders_that_hold_something_stay(tmp_path):
    with Lock(tmp_path / "a" / "b" / "x.json"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        caplog.clear()
        with Lock(tmp_path / "x.json"):
            pass
        assert f"cannot be locked ({os.strerror(number)})" in caplog.text
        assert not [*tmp_path.iterdir()]


def test_other_errors_are_not_taken_for_that(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), Lock(tmp_path / "file" / "x.json"):
        pass
