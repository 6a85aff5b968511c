"""SIGINT and SIGTERM: what is in flight is finished before a stage ends.

Within `deferred` a first signal only asks, and the work looks with `asked` or `check` between two batches. A second
one, and any elsewhere, ends the work where it stands, as Ctrl-C does in Python.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, TypeVar

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
CODES = tuple(128 + number for number in SIGNALS)  # exit codes: 130 after SIGINT, 143 after SIGTERM, as shells have it
ONE = 1.0  # seconds within which several are one: a terminal sends it to all, a launcher sends it on


class Interrupted(KeyboardInterrupt):
    """Raised by a signal. `agreed`: all processes that train together have come to end after the same step."""

    def __init__(self, signum: int, agreed: bool = False):
        super().__init__(signal.Signals(signum).name)
        self.signum, self.agreed = signum, agreed

    @property
    def code(self) -> int:
        """The exit code, one of CODES."""
        return 128 + self.signum


class _State:
    signum: int | None = None
    since = 0.0
    deferred = 0
    children: tuple[int, ...] = ()


_state = _State()


@contextmanager
def listening() -> Iterator[None]:
    """Within it signals are taken as this module says; in another thread than the main one nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGINT] is _take:  # a stage that another one runs in its process
        yield
        return
    listen()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _state.signum = None


def listen() -> None:
    """Take signals from now on: also after a library has put its own handlers in place."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # of a job in a shell's background
            signal.signal(number, _take)


def _take(signum: int, _frame) -> None:
    first, now = _state.signum is None, time.monotonic()
    if not first and now - _state.since < ONE:
        return
    if first:
        _state.signum, _state.since = signum, now
    for child in _state.children:
        with suppress(ProcessLookupError):
            os.kill(child, signum)
    if not first or not _state.deferred:
        raise Interrupted(_state.signum)
    if not _state.children:
        with suppress(OSError, ValueError, AttributeError):  # nobody reads it any more: `| tee log` got the signal, too
            os.write(sys.__stderr__.fileno(), b"\ninterrupted: finishing what is in flight; once more ends at once\n")


@contextmanager
def deferred(children: Iterable[int] = ()) -> Iterator[None]:
    """Within it a first signal only asks; it is also sent on to these processes, which do the work."""
    before = _state.children
    _state.deferred += 1
    _state.children = (*before, *children)
    try:
        yield
    finally:
        _state.deferred -= 1
        _state.children = before


def asked() -> bool:
    """Whether a signal has come."""
    return _state.signum is not None


def check() -> None:
    """Raises Interrupted if a signal has come."""
    if asked():
        stop()


def stop(agreed: bool = False) -> NoReturn:
    """Raises Interrupted by the signal that has come, here or in a process that works with this one."""
    raise Interrupted(_state.signum or signal.SIGTERM, agreed)


def until_asked(items: Iterable[T]) -> Iterator[T]:
    """The items, as long as no signal has come."""
    items = iter(items)
    for item in items:
        yield item
        if asked():
            return
