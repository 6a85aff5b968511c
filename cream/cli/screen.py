"""Where messages go: what the terminal shows, and the log file of a stage that runs in a loop.

By hand a stage shows all its messages; --quiet leaves what came of it (SUMMARY), alarms and errors. In a loop it shows
alarms, errors and progress; all else, and what libraries print, goes to the log file beside its output: for as long as
the stage runs, stdout and stderr of its processes are that file. The environment has the state, for processes that a
stage starts.
"""

import fcntl
import logging
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

log = logging.getLogger("cream")
PROGRESS, SUMMARY = 22, 25  # levels of messages, above INFO: how far work is, and what came of a stage
MODE = "CREAM_MESSAGES"  # quiet or verbose, as the flags say
TERMINAL = "CREAM_TERMINAL"  # in a loop's stages: paths of the stdout and stderr that the loop was started with
LOG = "CREAM_LOG"  # the same with --verbose: the path of the log file
LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
LOGGERS = ("accelerate", "DeepSpeed", "deepspeed")
TALKATIVE = ("TRANSFORMERS_VERBOSITY", "VLLM_LOGGING_LEVEL")  # what their own defaults print fits into a log file
JOINERS = "\u200c\u200d"  # of letters and emoji; format characters that change nothing else
_state = SimpleNamespace(out=None, err=None, set=set())  # streams of the terminal; environment variables set here


def plain(text: str) -> str:
    """A text with its control characters, which a terminal would obey, as escapes; lines and tabs stay."""
    return "".join(c.encode("unicode_escape").decode() if _is_control(c) else c for c in text)


def _is_control(c: str) -> bool:
    if c.isprintable() or c in "\n\t" or c in JOINERS:
        return False
    return unicodedata.category(c)[0] == "C" or unicodedata.category(c) in ("Zl", "Zp")


class Handler(logging.StreamHandler):
    """Lines that cannot be written (a closed pipe, a full disk) are lost; the stage continues. `whole`: a log file,
    which gets all messages."""

    def __init__(self, stream: TextIO, whole: bool = False):
        super().__init__(stream)
        self.whole = whole

    def filter(self, record: logging.LogRecord) -> bool:
        return (self.whole or _is_shown(record.levelno)) and super().filter(record)

    def emit(self, record: logging.LogRecord) -> None:
        bars = sys.modules.get("tqdm") if _is_terminal(self.stream) else None
        with bars.tqdm.external_write_mode(err_stream()) if bars else nullcontext():
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _is_shown(level: int) -> bool:
    """Whether the terminal shows messages of a level."""
    quiet = is_quiet()
    if in_stage_of_loop():
        return level >= logging.WARNING or (level == PROGRESS and not quiet)
    return not quiet or level >= SUMMARY


def say_result(text: str, *arguments: object) -> None:
    """Log what came of a stage: --quiet shows it, too."""
    log.log(SUMMARY, text, *arguments)


def in_stage_of_loop() -> bool:
    """Whether stdout and stderr are a log file, for the details of a loop's stage."""
    return TERMINAL in os.environ


def set_up() -> None:
    """Handlers of messages, if there are none yet; libraries print errors only, unless the environment or the flags say
    otherwise."""
    if not is_verbose():
        for name in LIBRARIES.keys() - os.environ.keys() - ({*TALKATIVE} if in_stage_of_loop() else set()):
            os.environ[name] = LIBRARIES[name]
            _state.set.add(name)
        for name in () if in_stage_of_loop() else LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
    if log.handlers:
        return
    log.addHandler(Handler(sys.stdout, whole=in_stage_of_loop()))
    if in_stage_of_loop() and (out := out_stream()):
        log.addHandler(Handler(out))
    if LOG in os.environ:
        with suppress(OSError):
            log.addHandler(Handler(open(os.environ[LOG], "a"), whole=True))
    log.propagate = False


def choose(quiet: bool, verbose: bool) -> None:
    """What the flags of a command line say, for this process and those it starts."""
    if verbose:
        for name in _state.set:
            os.environ.pop(name, None)
        _state.set.clear()
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.NOTSET)
    if quiet or verbose:
        os.environ[MODE] = "verbose" if verbose else "quiet"


def is_verbose() -> bool:
    """Whether --verbose was given."""
    return os.environ.get(MODE) == "verbose"


def is_quiet() -> bool:
    """Whether --quiet was given."""
    return os.environ.get(MODE) == "quiet"


@contextmanager
def as_before() -> Iterator[None]:
    """Afterwards the flags of a command line that was run within it have no effect any more."""
    before = os.environ.get(MODE)
    try:
        yield
    finally:
        _set(MODE, before)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


# The terminal, while stdout and stderr are a log file -----------------------------------------------------------------


def out_stream() -> TextIO | None:
    """What stdout is by hand; None where a process that the stage started cannot open it."""
    return _opened("out", 0) if in_stage_of_loop() else sys.stdout


def err_stream() -> TextIO | None:
    """What stderr is by hand."""
    return (_opened("err", 1) or sys.stderr) if in_stage_of_loop() else sys.stderr


def _opened(name: str, number: int) -> TextIO | None:
    if getattr(_state, name) is None:
        with suppress(OSError, IndexError):  # a socket, or the loop has ended
            path = os.environ[TERMINAL].split(":")[number]
            setattr(_state, name, open(os.open(path, os.O_WRONLY | os.O_APPEND), "w", buffering=1))
    return getattr(_state, name)


def has_terminal() -> bool:
    """Whether stderr is a terminal by hand, where a bar can be drawn."""
    return _is_terminal(err_stream())


def show_error(text: str) -> None:
    """A last line of a process, on stderr and in the log file if there is one."""
    for stream in {id(each): each for each in (sys.stderr, err_stream())}.values():
        print(plain(text), file=stream, flush=True)


@contextmanager
def stage_log(file: TextIO, path: Path) -> Iterator[None]:
    """Within it stdout and stderr of this process, and of those that it starts, are a log file. With --verbose they
    stay, and messages go to the file as well."""
    set_up()
    with _beside(file, path) if is_verbose() else _instead(file):
        yield


@contextmanager
def _beside(file: TextIO, path: Path) -> Iterator[None]:
    handler = Handler(file, whole=True)
    log.addHandler(handler)
    os.environ[LOG] = str(path.resolve())
    try:
        yield
    finally:
        del os.environ[LOG]
        log.removeHandler(handler)


@contextmanager
def _instead(file: TextIO) -> Iterator[None]:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    kept = [_duplicate(number) for number in (1, 2)]
    lifted = {name: os.environ.pop(name) for name in TALKATIVE if name in _state.set and name in os.environ}
    handlers = [each for each in log.handlers if isinstance(each, Handler)]
    try:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        os.environ[TERMINAL] = ":".join(f"/proc/{os.getpid()}/fd/{number}" for number in kept)
        _state.out, _state.err = (open(number, "w", buffering=1, closefd=False) for number in kept)
        for each in handlers:
            each.whole = True
        log.addHandler(terminal := Handler(_state.out))
        yield
    finally:
        for stream in (sys.stdout, sys.stderr, _state.out, _state.err):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        log.removeHandler(terminal)
        for each in handlers:
            each.whole = False
        _state.out = _state.err = None
        os.environ.pop(TERMINAL, None)
        os.environ.update(lifted)
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)


def _duplicate(number: int) -> int:
    """A duplicate of a descriptor; of a file all processes add to its end."""
    try:
        kept = os.dup(number)
        fcntl.fcntl(kept, fcntl.F_SETFL, fcntl.fcntl(kept, fcntl.F_GETFL) | os.O_APPEND)
        return kept
    except OSError:  # closed from the start
        return os.open(os.devnull, os.O_WRONLY)
