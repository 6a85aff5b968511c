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
ROOM = 1 << 30  # bytes that one may take
SMALL = 1000  # by such numbers a template may multiply, divide and raise to a power
PATIENCE = 60.0  # seconds for the same on a machine that is busy with something else


@contextmanager
def limited(what: str) -> Iterator[None]:
    """Raises UserError once what is within has computed for LIMIT, or takes more than ROOM; another thread than the
    main one is left alone.

    One step of Python's is not interrupted, however long it takes: `tried` and `check_numbers` are for those.
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
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = _used() + ROOM
    if soft == resource.RLIM_INFINITY or most < soft:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    except MemoryError:
        raise UserError(_greedy(what)) from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
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
        raise UserError(_told(what) if ended == -signal.SIGXCPU else _greedy(what))


def check_numbers(template: str, what: str) -> None:
    """Raises UserError where a template could compute for long within one step: where it multiplies, divides or raises
    to a power what may be huge numbers. Repeating a text is no such step."""
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template  # with the tags that it knows

    def small(node: nodes.Expr) -> bool:
        node = node.node if isinstance(node, nodes.Neg) else node
        return isinstance(node, nodes.Const) and isinstance(node.value, int | float) and node.value <= SMALL

    def text(node: nodes.Expr) -> bool:
        return isinstance(node, nodes.Const) and isinstance(node.value, str)

    fits = {
        nodes.Pow: lambda a, b: small(a) and small(b),
        nodes.Mul: lambda a, b: small(a) or small(b) or text(a) or text(b),
        nodes.Mod: lambda a, b: small(b) or text(a),
        nodes.Div: lambda a, b: small(b),
        nodes.FloorDiv: lambda a, b: small(b),
    }
    for node in _compile_jinja_template(template).environment.parse(template).find_all(tuple(fits)):
        if not fits[type(node)](node.left, node.right):
            raise UserError(
                f"{what} computes with numbers that may be huge: `{node.operator}` on its line {node.lineno}; give "
                f"another with --chat_template FILE, in which one of the two is written out, {SMALL} at most"
            )


def _bound() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (most := _used() + ROOM, most))
    resource.setrlimit(resource.RLIMIT_CPU, (int(LIMIT), int(LIMIT) + 1))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)


def _used() -> int:
    """Bytes of address space of this process."""
    handle = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(handle, 100).split()[0]) * resource.getpagesize()
    finally:
        os.close(handle)


def _greedy(what: str) -> str:
    return f"{what} takes too much memory for one conversation; it is not used"


def _told(what: str) -> str:
    return f"{what} takes more than {LIMIT:g} s for one conversation; it is not used"
