"""Templates are programs from elsewhere: they run in a sandbox (transformers' own, of Jinja), and not for long."""

import os
import resource
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cream.errors import UserError

LIMIT = 2.0  # seconds of computing that a rendering may take
ROOM = 1 << 30  # bytes that one may take when it is tried
PATIENCE = 60.0  # seconds for the same on a machine that is busy with something else


@contextmanager
def limited(what: str) -> Iterator[None]:
    """Raises UserError once what is within has computed for LIMIT; another thread than the main one is left alone.

    One step of Python's is not interrupted, however long it takes: `tried` is for those.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    began = time.thread_time()

    def late(*_):
        left = began + LIMIT - time.thread_time()
        if left <= 0:
            raise UserError(_told(what))
        signal.setitimer(signal.ITIMER_REAL, max(left, 0.01))  # the machine was busy with something else

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tried(work: Callable[[], object], what: str) -> None:
    """Do the work in a copy of this process that the kernel ends: raises UserError when it takes too long, or too much
    memory. What else it raises is not told: it will be raised again."""
    child = os.fork()
    if not child:
        code = 1
        try:
            _bound()
            work()
            code = 0
        except MemoryError:
            code = 3
        finally:
            os._exit(code)
    pidfd = os.pidfd_open(child)
    late = not select.select([pidfd], [], [], PATIENCE)[0]
    os.close(pidfd)
    if late:  # it waits for something: a lock that another thread held when it was copied, say
        os.kill(child, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if late:
        raise UserError(f"{what} was not tried within {PATIENCE:g} s; the machine may be busy: try again")
    if ended < 0 or ended == 3:
        raise UserError(_told(what) if ended == -signal.SIGXCPU else f"{what} takes too much memory; it is not used")


def _bound() -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    resource.setrlimit(resource.RLIMIT_CPU, (int(LIMIT), int(LIMIT) + 1))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)


def _told(what: str) -> str:
    return f"{what} takes more than {LIMIT:g} s for one conversation; it is not used"
