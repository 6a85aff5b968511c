"""How the stages of a loop run: what a runner is, and the one that runs them one after another."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cream.cli import interrupts, screen
from cream.loops.loop import Loop
from cream.loops.outcome import outcome
from cream.loops.plan import Command
from cream.loops.stage_log import StageLog

log = logging.getLogger("cream")
RESUME = "the same command resumes from there"
CHANGED = (  # what a stage advises, another output of its own, cannot be said in a loop
    "; where a setting was changed give the file another {key} than {folder}, or replace this output, then those of "
    "the later stages that read it:\n  {again} --overwrite"
)

Start = Callable[[Command, Loop], "int | None"]  # runs a stage; its exit code, None or 0 where it succeeded


class Runner(AbstractContextManager, Protocol):
    """Runs stages; a stage that fails ends this process with its exit code. When it is left by an exception, what it
    has started ends."""

    def run(self, stage: Stage) -> None:
        """Run a stage, now or as soon as what it reads has been made."""

    def wait(self, command: Command | None = None) -> None:
        """Return when this command has run; by default, when all have."""


@dataclass(eq=False)
class Stage:
    """One command of a loop as it runs; `number` of `total`."""

    command: Command
    loop: Loop
    number: int
    total: int
    log: StageLog | None = None
    began: float = 0.0

    @property
    def name(self) -> str:
        """What begins its lines on the terminal."""
        return f"[{self.loop.title} {self.number}/{self.total}]"

    @property
    def title(self) -> str:
        """The name with what the stage does."""
        return f"{self.name} {self.command.title}"

    @property
    def line(self) -> str:
        """Its command line, as log files begin with it."""
        return f"$ {shlex.join(['python', self.command.script, *self.command.argv()])}"

    def begin(self) -> None:
        """To be called before it runs."""
        self.began, self.log = time.monotonic(), StageLog(self.command.output)

    def end(self, code: int | None) -> None:
        """Say what came of it; a log file to which it added nothing but its command is as before."""
        wrote, failed = self.log.wrote(), code and code not in interrupts.CODES  # else it has said how to resume
        if not wrote and code in (None, 0, 2):
            self.log.undo()
        if failed:
            self._say_failed(code)
        elif not code:
            came, seconds = outcome(self.command), time.monotonic() - self.began
            log.info("    %s%s; %.1f s", "" if wrote else "up to date: ", came, seconds)

    def _say_failed(self, code: int) -> None:
        folder, base = self.command.output.parent, self.loop.base_dir
        key = "base_dir" if base is not None and folder == Path(base) else "output_dir"
        changed = CHANGED.format(key=key, folder=folder, again=self.line.removeprefix("$ ")) if code == 2 else ""
        more = f"\nlog: {self.log.path}" if self.log.has_more() else ""
        end = "" if code == 2 else f"{self.log.end()}\n"  # an error that the user can fix is on the terminal
        screen.show_error(f"{end}{self.command.title} ended with {code}; {RESUME}{changed}{more}")


class InTurn(AbstractContextManager):
    """One stage after another, by `start`; what a stage says while it runs is on the terminal."""

    def __init__(self, start: Start):
        self.start = start

    def run(self, stage: Stage) -> None:
        """As any runner's: now."""
        log.info("%s", f"\n{stage.title}\n{stage.line}" if screen.is_verbose() else stage.title)
        stage.begin()
        try:
            with stage.log.opened(stage.line):
                code = self.start(stage.command, stage.loop)
        except Exception as error:
            error.add_note(f"while it ran: {stage.command.title}, log: {stage.log.path}")
            raise
        stage.end(code)
        if code:
            sys.exit(code)

    def wait(self, command: Command | None = None) -> None:
        """As any runner's: all have run."""

    def __exit__(self, *_) -> None:
        """Nothing runs by now."""
