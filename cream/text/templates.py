"""The chat-template sandbox: a template is a program, so it renders under limits of time and memory.

Jinja's sandbox, which transformers uses, limits its access. Its resources are limited here, in three ways, none of
which is enough alone. A probe in a forked process, which the kernel ends at its limits, shows only one conversation.
Limits around each rendering cannot interrupt a single step of Python. So templates with a huge step are refused.
"""

import json
import os
import re
import resource
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cream.errors import UserError, nearest

LIMIT = 2.0  # seconds of computing per rendering
ROOM = 1 << 30  # bytes per rendering
SMALL = 1000  # the largest number in a product, quotient or power
GIVEN = {"messages", "tools", "documents", "add_generation_prompt"}  # variables of a template that no flag gives
WORDS = {"yes": "true", "no": "false", "true": "true", "false": "false", "none": "null"}  # of a variable -> JSON
TEMPLATE_FLAG = "--chat_template FILE"
PATIENCE = 60.0  # seconds after which a probe is ended that waits, or is slow on a busy machine


@contextmanager
def limit_rendering(what: str, flag: str = TEMPLATE_FLAG) -> Iterator[None]:
    """Raises UserError once the code within has computed for LIMIT, or takes more than ROOM; in the main thread only.
    `flag`: what gives another template.

    A single step of Python is not interrupted, however long it takes: see `check_numbers`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    started = time.thread_time()

    def on_alarm(*_):
        left = started + LIMIT - time.thread_time()
        if left <= 0:
            raise _refusal(what, True, flag)
        signal.setitimer(signal.ITIMER_REAL, max(left, 0.01))  # the machine is busy with something else

    before = signal.signal(signal.SIGALRM, on_alarm)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = _used() + ROOM
    if soft == resource.RLIM_INFINITY or most < soft:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    except MemoryError:
        raise _refusal(what, False, flag) from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def probe_in_subprocess(work: Callable[[], object], what: str, flag: str = TEMPLATE_FLAG) -> None:
    """Do the work in a fork of this process, under limits of the kernel. Raises UserError if it takes too long or too
    much memory; other errors occur again when the caller does the work itself."""
    child = os.fork()
    if not child:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_AS, (most := _used() + ROOM, most))
            resource.setrlimit(resource.RLIMIT_CPU, (int(LIMIT), int(LIMIT) + 1))
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            work()
            code = 0
        except MemoryError:
            code = 3
        finally:
            os._exit(code)
    pidfd = os.pidfd_open(child)
    late = not select.select([pidfd], [], [], PATIENCE)[0]
    os.close(pidfd)
    if late:  # it waits, for a lock that another thread held at the fork, say
        os.kill(child, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if late:
        raise UserError(
            f"{what} did not render a test conversation within {PATIENCE:g} s; the machine may be busy: try again"
        )
    if ended < 0 or ended == 3:
        raise _refusal(what, ended == -signal.SIGXCPU, flag)


def check_numbers(template: str, what: str, flag: str = TEMPLATE_FLAG) -> None:
    """Raises UserError if a step of a template may take very long: if it multiplies, divides, rounds or raises to a
    power numbers that may be huge. Repeating a text is not such a step."""
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template  # with its own tags

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
    for node in _compile_jinja_template(template).environment.parse(template).find_all((*fits, nodes.Filter)):
        if isinstance(node, nodes.Filter):  # round(x, p, 'ceil') multiplies by 10^p
            precision = [*node.args, *(each.value for each in node.kwargs if each.key == "precision")][:1]
            fine, sign = node.name != "round" or all(map(small, precision)), node.name
        else:
            fine, sign = fits[type(node)](node.left, node.right), node.operator
        if not fine:
            raise UserError(
                f"{what} computes with numbers that may be huge: `{sign}` on its line {node.lineno}; give another with "
                f"{flag}, with one of the numbers written out, {SMALL} at most"
            )


def is_template_name(template: str) -> bool:
    """Whether --chat_template names a template of the tokenizer, rather than a file."""
    return re.fullmatch(r"[\w-]+", template) is not None and not Path(template).exists()


def parse_variables(text: str | None) -> dict[str, object]:
    """The variables that --chat_template_kwargs gives: name=value,…, or a JSON object. Values are yes, no, JSON, or
    else texts. Raises UserError for anything else."""
    if text is None:
        return {}
    try:
        if text.lstrip().startswith("{"):
            return json.loads(text)
    except ValueError as error:
        raise UserError(f"--chat_template_kwargs {text!r}: not valid JSON: {error}") from None
    variables: dict[str, object] = {}
    for part in text.split(","):
        name, equals, value = (each.strip() for each in part.partition("="))
        if not name.isidentifier() or not equals or name in variables:
            raise UserError(f"--chat_template_kwargs {text!r}: expected name=value,…, such as enable_thinking=no")
        try:
            variables[name] = json.loads(WORDS.get(value.lower(), value))
        except ValueError:
            variables[name] = value
    return variables


def check_variables(template: str, known: Iterable[str], variables: Mapping[str, object], what: str) -> None:
    """Raises UserError for a variable that a template does not read: it would have no effect. `known` are the names of
    those that the tokenizer gives."""
    from jinja2 import meta
    from transformers.utils.chat_template_utils import _compile_jinja_template  # with its own tags

    environment = _compile_jinja_template(template).environment
    read = sorted(meta.find_undeclared_variables(environment.parse(template)) - {*GIVEN, *environment.globals, *known})
    if odd := [name for name in variables if name not in read]:
        reads = f"it reads {', '.join(read)}" if read else "it reads none"
        raise UserError(f"--chat_template_kwargs {odd[0]}: {what} has no such variable{nearest(odd[0], read)}; {reads}")


def _used() -> int:
    """Bytes of address space of this process."""
    handle = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(handle, 100).split()[0]) * resource.getpagesize()
    finally:
        os.close(handle)


def _refusal(what: str, slow: bool, flag: str) -> UserError:
    excess = f"more than {LIMIT:g} s" if slow else "too much memory"
    return UserError(f"{what} takes {excess} for one conversation; give another with {flag}")
