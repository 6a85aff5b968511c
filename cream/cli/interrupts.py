"""SIGINT and SIGTERM: a stage finishes the current batch or step before it ends.

Within `deferred` the first signal is only noted, and the stage checks for it between batches (`received`, `check`). A
second signal, and any outside `deferred`, ends the stage at once, as Ctrl-C does in Python.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from types import SimpleNamespace
from typing import NoReturn, TypeVar

from cream.cli import screen

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
CODES = tuple(128 + number for number in SIGNALS)  # exit codes: 130 after SIGINT, 143 after SIGTERM, as in shells
ONE = 1.0  # seconds within which several signals count as one: a terminal signals all processes, a launcher forwards it

SOON = 0.02  # seconds; a callback that Python runs itself is over by then


class Interrupted(KeyboardInterrupt):
    """Raised by a signal. `agreed`: all training processes end after the same step."""

    def __init__(self, signum: int, agreed: bool = False):
        super().__init__(signal.Signals(signum).name)
        self.signum, self.agreed = signum, agreed

    @property
    def code(self) -> int:
        """The exit code, one of CODES."""
        return 128 + self.signum


_state = SimpleNamespace(signum=None, since=0.0, deferred=0, whole=0, children=(), clock=time.monotonic)  # depths


@contextmanager
def listening() -> Iterator[None]:
    """Within it signals are handled as above, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGINT] is _handle:  # a stage run by another one in the same process
        yield
        return
    listen()
    hook, sys.unraisablehook = sys.unraisablehook, _raise_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        _state.signum = None


def listen() -> None:
    """Install the handlers; to be called again after a library has installed its own."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # a background job of a shell
            signal.signal(number, _handle)


def _raise_again(unraisable) -> None:
    """Python discards what is raised in a finaliser or in a callback of os.fork, and prints it with a traceback. An
    Interrupted is not to be lost, nor printed: its signal comes again as soon as that callback has ended."""
    if not isinstance(unraisable.exc_value, Interrupted):
        sys.__unraisablehook__(unraisable)
        return
    _state.signum = None
    again = threading.main_thread().ident, unraisable.exc_value.signum  # that thread's system calls end, too
    threading.Timer(SOON, signal.pthread_kill, again).start()


def _handle(signum: int, _frame) -> None:
    first, now = _state.signum is None, _state.clock()
    if not first and now - _state.since < ONE:
        return
    if first:
        _state.signum, _state.since = signum, now
    for child in chain.from_iterable(_state.children):
        with suppress(ProcessLookupError):
            os.kill(child, signum)
    if not first or not _state.deferred:
        raise Interrupted(_state.signum)
    if not any(_state.children):
        text = b"\ninterrupted: finishing the current work; a second signal ends it at once\n"
        with suppress(OSError, ValueError, AttributeError):  # stderr may be closed: `| tee log` gets the signal, too
            stream = screen.err_stream() if screen.in_stage_of_loop() else sys.__stderr__
            os.write(stream.fileno(), text)


@contextmanager
def deferred(children: Collection[int] = ()) -> Iterator[None]:
    """Within it a first signal is only noted, and forwarded to `children`, the ids of processes that do the work, as
    they are by then."""
    before = _state.children
    _state.deferred += 1
    _state.children = (*before, children)
    try:
        yield
    finally:
        _state.deferred -= 1
        _state.children = before


@contextmanager
def held() -> Iterator[None]:
    """Within it signals wait, in a fork until it has called `forked`, so that none is lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def forked() -> None:
    """In a fork: it defers nothing and has received no signal, whatever the process that it was forked from has."""
    _state.signum, _state.deferred, _state.whole, _state.children = None, 0, 0, ()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def whole() -> Iterator[None]:
    """Within it a signal that was received does not show: work within a step, which is finished with the step."""
    _state.whole += 1
    try:
        yield
    finally:
        _state.whole -= 1


def received() -> bool:
    """Whether a signal was received."""
    return _state.signum is not None and not _state.whole


def check() -> None:
    """Raises Interrupted if a signal was received."""
    if received():
        raise_interrupted()


def raise_interrupted(agreed: bool = False) -> NoReturn:
    """Raises Interrupted for the signal received here, or for SIGTERM if another process received one."""
    raise Interrupted(_state.signum or signal.SIGTERM, agreed)


def until_interrupted(items: Iterable[T]) -> Iterator[T]:
    """The items, until a signal is received."""
    items = iter(items)
    for item in items:
        yield item
        if received():
            return
