"""Stages of a loop side by side: several at a time, each in a fork of this process."""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path

from cream.cli import console, interrupts, screen
from cream.errors import UserError
from cream.loops.decisions import read_by
from cream.loops.plan import TRAIN, Command
from cream.loops.running import Stage, Start

log = logging.getLogger("cream")
FORK = multiprocessing.get_context("fork")
GRACE = 5.0  # seconds until a process that was told to end is killed
CHUNK = 65536  # bytes of a pipe
PDEATHSIG = 1  # of prctl: the signal that a process gets when its parent ends
TICK = 1.0  # seconds between two looks at the clock


@dataclass(eq=False)
class Job:
    """A stage with those that must have ended before it begins; once it runs, its process, and the pipes in which its
    stdout and stderr arrive, each with what has been read of a line."""

    stage: Stage
    needs: list[Job]
    repeats: bool = False  # a loop before had the same command
    height: int = 0  # stages in the longest chain that waits for it
    process: multiprocessing.process.BaseProcess | None = None
    pipes: dict[int, bytes] = field(default_factory=dict)
    ended: bool = False

    @property
    def waits(self) -> bool:
        """Whether it has not begun."""
        return self.process is None and not self.ended

    @property
    def running(self) -> bool:
        """Whether its process works."""
        return self.process is not None and not self.ended


class SideBySide(AbstractContextManager):
    """Up to `count` stages at a time, each in a fork of this process, as soon as what it reads has been made; those
    first that have the longest chain of others waiting. `warm` imports what they need, once for all; they divide the
    threads; the lines that they show are relayed, each with its stage's name."""

    def __init__(self, start: Start, count: int, warm: Callable[[], object]):
        self.start, self.count, self.warm, self.jobs = start, count, warm, []
        self.pids: list[int] = []
        self.failed: int | None = None
        self.told = False  # that they end, after a signal
        self.deferred = interrupts.deferred(self.pids)

    def __enter__(self) -> SideBySide:
        """Signals go to the stages, and end the loop when these have ended."""
        self.deferred.__enter__()
        return self

    def __exit__(self, kind, *error) -> None:
        """No stage outlives an exception, such as a second signal."""
        running = [job for job in self.jobs if job.running] if kind else []
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.join(GRACE)
            job.process.kill()
        self.deferred.__exit__(kind, *error)

    def run(self, stage: Stage) -> None:
        """As any runner's: not yet."""
        if not self.jobs:
            self.warm()
            gc.freeze()  # else a fork that looks for garbage would copy all of this process's memory
        job = Job(stage, [job for job in self.jobs if _must_follow(stage.command, job.stage.command)])
        job.repeats = stage.line in [earlier.stage.line for earlier in job.needs]
        self.jobs.append(job)

    def wait(self, command: Command | None = None) -> None:
        """As any runner's."""
        wanted = [job for job in self.jobs if command is None or job.stage.command.output == command.output]
        if not wanted:
            return
        for job in reversed(self.jobs):
            for earlier in job.needs:
                earlier.height = max(earlier.height, job.height + 1)
        with console.bar(len(wanted), "running", "stages") as bar:
            while self._ends() or not all(job.ended for job in wanted):
                before = sum(job.ended for job in wanted)
                self._turn()
                bar.set_description(", ".join(job.stage.command.title for job in self.jobs if job.running))
                bar.update(sum(job.ended for job in wanted) - before)

    def _ends(self) -> bool:
        """Whether nothing begins any more, for a stage has failed, or a signal was received."""
        return self.failed is not None or interrupts.received()

    def _turn(self) -> None:
        """Start what can start, wait until something happens, and see to it."""
        if not self._ends():
            ready = [job for job in self.jobs if job.waits and all(each.ended for each in job.needs)]
            if again := next((job for job in ready if job.repeats), None):
                again.ended = True
                again.stage.begin()
                return self._say_end(again, 0)
            free = self.count - sum(job.running for job in self.jobs)
            for job in sorted(ready, key=lambda job: -job.height)[:free]:
                self._start(job)
        if not (running := [job for job in self.jobs if job.running]):
            interrupts.check()
            sys.exit(self.failed)
        if interrupts.received() and not self.told:
            self.told = True
            _show_error("interrupted: stages finish their current work; a second signal ends them at once")
        connection.wait([each for job in running for each in (job.process.sentinel, *job.pipes)], TICK)
        for job in running:
            ended = not job.process.is_alive()
            self._relay(job, whole=ended)
            if ended:
                self._end(job)

    def _start(self, job: Job) -> None:
        if screen.is_verbose():
            log.info("\n%s\n%s", job.stage.title, job.stage.line)
        job.stage.begin()
        (out, to_out), (err, to_err) = os.pipe(), os.pipe()
        for pipe in (out, err):
            os.set_blocking(pipe, False)
            job.pipes[pipe] = b""
        process = FORK.Process(target=_work, args=(job.stage, self.start, (to_out, to_err), self.count, os.getpid()))
        with interrupts.held():
            process.start()
            self.pids.append(process.pid)
            job.process = process
        for pipe in (to_out, to_err):
            os.close(pipe)

    def _relay(self, job: Job, whole: bool) -> None:
        """Show the lines that a stage has said, `whole`: the last one too if it does not end; not that it was
        interrupted, which this process says."""
        for (pipe, line), show in zip([*job.pipes.items()], (log.warning, _show_error), strict=True):
            with suppress(BlockingIOError):
                while new := os.read(pipe, CHUNK):
                    line += new
            lines = line.split(b"\n")
            job.pipes[pipe] = b"" if whole else lines.pop()
            advice = False
            for each in lines:
                advice |= each.startswith(b"interrupted: ") and interrupts.received()
                if each.strip() and not advice:
                    show(f"{job.stage.name} {each.decode(errors='replace')}")

    def _end(self, job: Job) -> None:
        job.process.join()
        self.pids.remove(job.process.pid)
        for pipe in job.pipes:
            os.close(pipe)
        job.ended, code = True, job.process.exitcode
        job.process.close()
        code = 128 - code if code < 0 else code  # as shells have it for a process that a signal killed
        self._say_end(job, code)
        if code and self.failed is None:
            self.failed = code

    def _say_end(self, job: Job, code: int) -> None:
        if not code:
            log.info("%s", job.stage.title)
        job.stage.end(code)


def _show_error(line: str) -> None:
    """On stderr, if that can be written."""
    with suppress(OSError):
        screen.show_error(line)


def _must_follow(command: Command, earlier: Command) -> bool:
    """Whether a command has to wait for an earlier one: it reads what that makes or registers, makes or registers the
    same, registers what that reads, or uses the same cache: of scores, beside samples, or of a reference, beside
    pairs."""
    if _reads(command, earlier) or command.output == earlier.output:
        return True
    name, other = command.flags.get("register"), earlier.flags.get("register")
    if (name and (name == other or name in _names(earlier))) or (other and other in _names(command)):
        return True
    beside = "name" if command.script == TRAIN else "input_file"
    cached = command.script == earlier.script and command.flags.get(beside)
    return bool(cached) and cached == earlier.flags.get(beside)


def _names(command: Command) -> list[str]:
    return [str(path) for path in read_by(command)]


def _reads(command: Command, earlier: Command) -> bool:
    """Whether a command names the output of an earlier one, a file beside or below it, or a folder that it is in."""
    output = os.path.abspath(earlier.output.with_name(earlier.output.name.partition(".json")[0]))
    for path in (os.path.abspath(name) for name in _names(command) if name != "."):
        if path == output or path.startswith((f"{output}.", f"{output}/")) or output.startswith(f"{path}/"):
            return True
    return False


def _work(stage: Stage, start: Start, streams: tuple[int, int], count: int, parent: int) -> None:
    """The process of a stage, with `streams` for its stdout and stderr."""
    import torch

    ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL)  # killed, a loop is killed with all its stages
    if os.getppid() != parent:
        os._exit(1)
    try:
        interrupts.forked()
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
        with stage.log.opened(stage.line):
            sys.exit(_code_of(start, stage))
    except interrupts.Interrupted as error:
        sys.exit(error.code)


def _code_of(start: Start, stage: Stage) -> int | None:
    try:
        return start(stage.command, stage.loop)
    except Exception:
        traceback.print_exc()
        return 1


def import_for_models(folders: Iterable[Path]) -> None:
    """Import what stages need to train, sample with and score with the models in these folders, by loading these
    without memory. Nothing is computed or tokenised: threads do not survive a fork."""
    import torch

    import cream.engines.hf
    import cream.rewards.stage
    import cream.scoring.team
    import cream.training.run  # noqa: F401
    from cream.model.load import load_policy

    for folder in {*folders}:
        with suppress(UserError):  # what is wrong with a model its stage says
            load_policy(folder, torch.float32, torch.device("meta"))
