"""One writer at a time: who is refused, who waits, what is left behind, and file systems without locks."""

import errno
import fcntl
import os
import sys
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from processes import started

from cream.errors import UserError
from cream.files.lock import Lock

HOLD = """
import sys
from pathlib import Path
from cream.files.lock import Lock
with Lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold(repo):
    """Start a process that holds the lock of a path until its stdin is closed; returns once it does."""
    with ExitStack() as ends:

        def start(path):
            process = ends.enter_context(started([sys.executable, "-c", HOLD, str(path)], cwd=repo))
            assert process.stdout.readline() == "held\n"
            return process

        yield start


@pytest.fixture
def clock(monkeypatch):
    """The time that passes when somebody waits, a second each time, and what happens meanwhile."""
    clock = SimpleNamespace(now=0, meanwhile=lambda: None)

    def sleep(_):
        clock.now += 1
        clock.meanwhile()

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_a_second_process_is_refused_at_once_and_told_of_the_first(tmp_path, hold, clock):
    path = tmp_path / "x.json"
    first = hold(path)
    for _ in range(2):  # being refused does not change what the next one is told
        with pytest.raises(UserError, match=rf"x\.json: process {first.pid} on .* is writing it"), Lock(path):
            pass
    assert clock.now == 0
    first.kill()
    first.wait()
    with Lock(path):  # the kernel released it
        assert Lock(path).path.read_text().startswith(f"process {os.getpid()} on ")
    assert not [*tmp_path.iterdir()]


def test_one_that_waits_gets_it_when_the_first_ends(tmp_path, hold, clock):
    path = tmp_path / "new" / "x.json"
    first = hold(path)
    with pytest.raises(UserError, match="is writing it"), Lock(path, timeout=9):
        pass
    assert clock.now in (9, 10)
    clock.meanwhile = lambda: clock.now == 999 and (first.stdin.close(), first.wait())
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
