"""Messages to the user: log lines on stdout; one message and exit code 2 for an error that the user can fix."""

import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache

from cream.cli import interrupts, screen
from cream.cli.flags import as_words
from cream.cli.imports import import_quickly
from cream.cli.screen import PROGRESS
from cream.cli.screen import say_result as say_result
from cream.errors import user_error
from cream.files.provenance import RUNNING, typed_command

log = logging.getLogger("cream")
EVERY = 30.0  # seconds between two lines of progress
UNTIMED = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}]"  # a bar before its speed is known


def set_up_process() -> None:
    """Log to stdout, without prefixes, as cream/cli/screen.py says."""
    import_quickly()
    screen.set_up()
    log.setLevel(logging.INFO)


def stage(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], None]:
    """A script's main with exit codes: 2 for an error that the user can fix, 130 after SIGINT, 143 after SIGTERM."""

    def wrapped(argv: Sequence[str] | None = None) -> None:
        set_up_process()
        RUNNING.append(typed_command() if argv is None else [f"{main.__module__}.py", *argv])
        try:
            with screen.as_before(), interrupts.listening():
                main(argv)
        except Exception as error:
            if (fixable := user_error(error)) is None:
                raise
            _print_last(f"error: {fixable}")
            sys.exit(2)
        except KeyboardInterrupt as error:
            script, *words = typed_command()
            again = f"  {command(script)} {shlex.join(words)}".rstrip()
            but = "".join(f", {note}," for note in getattr(error, "__notes__", ()))
            _print_last(f"interrupted: finished work is kept; the same command{but} resumes from here:\n{again}")
            sys.exit(error.code if isinstance(error, interrupts.Interrupted) else 130)
        finally:
            RUNNING.pop()

    return wrapped


def _print_last(text: str) -> None:
    """Print the last message on stderr. A broken pipe is replaced by the null device, so that flushing it at exit does
    not change the exit code."""
    shown = f"{screen.plain(text)}\n"
    more = [(screen.err_stream(), shown)] if screen.in_stage_of_loop() else []
    for stream, words in ((sys.stdout, ""), (sys.stderr, shown), *more):
        try:
            stream.write(words)
            stream.flush()
        except OSError:
            with open(os.devnull, "wb") as nowhere, suppress(OSError):  # in tests, streams have no descriptor
                os.dup2(nowhere.fileno(), stream.fileno())
        except (AttributeError, ValueError):  # no stream, or one closed from the start
            pass


def command(script: str, **flags: object) -> str:
    """A literal command line; flags whose value is None are omitted."""
    words = [word for name, value in flags.items() if value is not None for word in as_words(name, value)]
    return shlex.join(["python", script, *words])


def bar(total: int, what: str, unit: str, done: int = 0):
    """A progress bar on stderr that closes itself when full; a line in the log now and then where that is no terminal.
    Both are context managers with `update(n)`, for units that are done, and `set_description`; `done` were before."""
    if screen.is_quiet() or not screen.has_terminal():
        return Progress(total, what, unit, done)
    stream = screen.err_stream()
    return _bar()(total=total, desc=what, unit=f" {unit}", leave=False, file=stream, initial=done, dynamic_ncols=True)


@cache
def _bar() -> type:
    """tqdm, whose speed and time left are without the first update, which also warms up."""
    from tqdm import tqdm
    from tqdm.std import EMA

    class Bar(tqdm):
        warm = False

        def update(self, n=1):
            shown = super().update(n)
            if not self.warm:
                self.warm, self._ema_dn, self._ema_dt = True, EMA(self.smoothing), EMA(self.smoothing)
                self.last_print_n, self.last_print_t = self.n, self._time()
            return shown

        @property
        def format_dict(self):
            values = super().format_dict
            return values if values["rate"] else values | {"bar_format": UNTIMED}

    return Bar


class Progress(AbstractContextManager):
    """How far a piece of work is, how long it took and how long it may still take: a line every EVERY seconds. The
    first update also warms up: the estimate is without it."""

    def __init__(self, total: int, what: str, unit: str, done: int = 0, clock: Callable[[], float] = time.monotonic):
        self.total, self.what, self.unit, self.clock = total, what, unit, clock
        self.done, self.began = done, clock()
        self.first: tuple[int, float] | None = None  # how many were done after the first update, and when
        self.due = self.began + EVERY

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is to be closed; a bar that is not full is."""

    def set_description(self, what: str) -> None:
        """What is done from here on."""
        self.what = what

    def update(self, n: int = 1) -> None:
        """`n` more are done."""
        self.done += n
        now = self.clock()
        taken = self.done - (self.first or (self.done,))[0]
        self.first = self.first or (self.done, now)
        if now >= self.due and self.done < self.total:
            self.due = now + EVERY
            left = (now - self.first[1]) / taken * (self.total - self.done) if taken else None
            times = describe_times(now - self.began, left)
            log.log(PROGRESS, "%s: %d of %d %s, %s", self.what, self.done, self.total, self.unit, times)


def describe_times(passed: float, left: float | None) -> str:
    """Seconds that have passed and that are left, if known: '90 s, about 12 min left'."""
    return _duration(passed) if left is None else f"{_duration(passed)}, about {_duration(left)} left"


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"
