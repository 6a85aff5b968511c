"""Signals: within `deferred` the first one asks and the second one ends; elsewhere the first one ends."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cream.cli import interrupts
from cream.cli.interrupts import Interrupted


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The time that the handlers see. Without a signal nothing is left of them."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(interrupts._state, "clock", lambda: clock.now)
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    with interrupts.listening():
        yield clock
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before
    assert not interrupts.received()


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_signal_ends_at_once_where_nothing_is_in_flight(number):
    with pytest.raises(Interrupted) as ended:
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number and isinstance(ended.value, KeyboardInterrupt)


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_what_python_discards_comes_again(number, capfd):
    """In a callback of os.fork or a finaliser Python prints and forgets what is raised."""

    class Finaliser:
        def __del__(self):
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as ended:
        Finaliser()
        signal.pause()
    assert ended.value.signum == number and "Traceback" not in capfd.readouterr().err


def test_other_errors_that_python_discards_are_printed(capfd):
    class Finaliser:
        def __del__(self):
            raise ValueError("a bug")

    Finaliser()
    assert "a bug" in capfd.readouterr().err and not interrupts.received()


def test_what_is_in_flight_is_finished_first(clock, capfd):
    taken = []
    with interrupts.deferred():
        for item in interrupts.until_interrupted(range(10)):
            taken.append(item)
            if item == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                clock.now += 0.9
                os.kill(os.getpid(), signal.SIGTERM)  # a launcher's copy of the same
    assert taken == [0, 1, 2, 3]
    assert "finishing the current work" in capfd.readouterr().err
    with pytest.raises(Interrupted, match="SIGTERM"):
        interrupts.check()


def test_a_second_signal_ends_at_once(clock):
    with pytest.raises(Interrupted), interrupts.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.received()
        clock.now += 1.1
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_is_sent_on_to_those_who_do_the_work():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with interrupts.deferred([child.pid]):
        os.kill(os.getpid(), signal.SIGTERM)
        assert child.wait() == -signal.SIGTERM
    assert interrupts.received()
