"""How a stage talks to the person who runs it: log lines on stdout, one message and exit code 2 for their mistakes."""

import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from cream.cli import interrupts
from cream.errors import mendable
from cream.files.command import RUNNING, typed

log = logging.getLogger("cream")
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class Handler(logging.StreamHandler):
    """Lines that nobody reads any more (`| head`, a full disk) are lost; the work goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def start() -> None:
    """Log lines go to stdout as they are; the libraries keep to themselves unless the environment says otherwise."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not log.handlers:
        handler = Handler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    for name in ("accelerate", "DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    log.setLevel(logging.INFO)


def stage(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], None]:
    """A script's main, with the ways it may end early: what a user can mend exits with 2, SIGINT with 130, SIGTERM with
    143."""

    def wrapped(argv: Sequence[str] | None = None) -> None:
        start()
        RUNNING.append(typed() if argv is None else [f"{main.__module__}.py", *argv])
        try:
            with interrupts.listening():
                main(argv)
        except Exception as error:
            if (told := mendable(error)) is None:
                raise
            _tell(f"error: {told}")
            sys.exit(2)
        except KeyboardInterrupt as error:
            script, *words = typed()
            again = f"  {command(script)} {shlex.join(words)}".rstrip()
            but = "".join(f", {note}," for note in getattr(error, "__notes__", ()))
            _tell(f"interrupted: what is finished is kept; the same command{but} goes on from here:\n{again}")
            sys.exit(error.code if isinstance(error, interrupts.Interrupted) else 130)
        finally:
            RUNNING.pop()

    return wrapped


def _tell(text: str) -> None:
    """The last words on stderr. Where nobody reads a stream any more (a pipe is broken), it is closed off, so that the
    exit code stays what it is to be."""
    for stream, words in ((sys.stdout, ""), (sys.stderr, f"{text}\n")):
        try:
            stream.write(words)
            stream.flush()
        except OSError:
            with open(os.devnull, "wb") as nowhere, suppress(OSError):  # a test's stream has no number
                os.dup2(nowhere.fileno(), stream.fileno())
        except (AttributeError, ValueError):  # it was none, or closed, from the start
            pass


def command(script: str, **flags: object) -> str:
    """A literal command line; flags whose value is None are left out."""
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value is not None]
    return " ".join(["python", script, *words])


def bar(total: int, what: str, unit: str):
    """A progress bar on stderr that closes itself when full; nothing where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=f" {unit}", disable=None, leave=False, file=sys.stderr)
