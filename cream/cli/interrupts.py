"""SIGINT and SIGTERM: the batch or step in flight is finished before a stage ends.

Within `deferred` a first signal is only noted, and the work checks for it between two batches (`received`, `check`). A
second one, and any outside `deferred`, ends the work at once, as Ctrl-C does in Python.
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
CODES = tuple(128 + number for number in SIGNALS)  # exit codes: 130 after SIGINT, 143 after SIGTERM, as in shells
ONE = 1.0  # seconds within which several signals count as one: a terminal signals all processes, a launcher forwards it


class Interrupted(KeyboardInterrupt):
    """Raised by a signal. `agreed`: all processes that train together end after the same step."""

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
    """Within it signals are handled as this module says; in another thread than the main one nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGINT] is _handle:  # a stage that another one runs in its process
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
    """Handle signals from now on; called again after a library has installed its own handlers."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # a background job of a shell
            signal.signal(number, _handle)


def _handle(signum: int, _frame) -> None:
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
            os.write(
                sys.__stderr__.fileno(),
                b"\ninterrupted: finishing the work in flight; a second signal ends it at once\n",
            )


@contextmanager
def deferred(children: Iterable[int] = ()) -> Iterator[None]:
    """Within it a first signal is only noted, and forwarded to these processes, which do the work."""
    before = _state.children
    _state.deferred += 1
    _state.children = (*before, *children)
    try:
        yield
    finally:
        _state.deferred -= 1
        _state.children = before


def received() -> bool:
    """Whether a signal has come."""
    return _state.signum is not None


def check() -> None:
    """Raises Interrupted if a signal has come."""
    if received():
        raise_interrupted()


def raise_interrupted(agreed: bool = False) -> NoReturn:
    """Raises Interrupted, by the signal that has come here or in a process that works with this one."""
    raise Interrupted(_state.signum or signal.SIGTERM, agreed)


def until_interrupted(items: Iterable[T]) -> Iterator[T]:
    """The items, until a signal comes."""
    items = iter(items)
    for item in items:
        yield item
        if received():
            return
