"""What the rest of a loop takes, in time and on disk; and models that it no longer needs.

A step that has run says in its sidecar how long it took, and its output how large it is: the next round's takes about
the same.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cream.cli.names import in_root, read_registry
from cream.errors import UserError
from cream.files.lock import Lock
from cream.files.provenance import KIND
from cream.loops.course import Course
from cream.loops.decisions import DecisionFile, read_by
from cream.loops.made import changed_flags, read_made
from cream.loops.plan import TRAIN, Command

log = logging.getLogger("cream")
UP_TO_DATE = "up to date"
BETWEEN = 2  # models at once beside those that later steps read: the best one, and the one that is being trained


# What it takes --------------------------------------------------------------------------------------------------------


@dataclass
class Need:
    """Of the commands `left` to run: seconds, bytes; those of which one is not known, by title. `made`: output -> what
    there is of it, in words, "" for nothing."""

    left: list[Command] = field(default_factory=list)
    seconds: float = 0
    bytes: float = 0
    unknown: list[str] = field(default_factory=list)
    made: dict[Path, str] = field(default_factory=dict)

    def __str__(self) -> str:
        took = f"about {self.seconds / 3600:.1f} h" if self.seconds > 7200 else f"about {self.seconds / 60:.1f} min"
        if self.unknown:
            took += f", without {len(self.unknown)} of which none has run before"
        if self.left and len(self.unknown) == len(self.left):
            took = "how long is not known, for none has run before"
        if not self.left:
            return "no step is left to run"
        return f"{len(self.left)} step{'s' * (len(self.left) > 1)} to run: {took}; about {size(self.bytes)} on disk"


def size(count: float) -> str:
    """Bytes as text."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def estimate(course: Course, keep: Sequence[str], model_size: Callable[[Command], float | None]) -> Need:
    """What is still to run, by the last run of the same steps; also what would be made again, in the space that it has.
    With --keep, models that are deleted in time count once; `model_size`: bytes of a training that has not run yet,
    None where they are not known."""
    need, models, last = Need(), 0.0, {}
    deleted = DecisionFile(Path(course.loop.output_dir)).held.deleted
    commands = course.expected()
    need.made = describe_made(course, commands)
    for command in commands:
        if taken := _taken(command):
            gone = deleted.get(command.output.name) if _is_own_model(command, course) else None
            last[command.step] = taken[0], taken[1] + (gone.bytes if gone else 0)
        if need.made.get(command.output, UP_TO_DATE) == UP_TO_DATE:
            continue
        seconds, space = last.get(command.step, (None, None))
        if space is None and command.script == TRAIN:
            space = model_size(command)
        need.left.append(command)
        need.seconds += seconds or 0
        need.unknown += [command.title] * (seconds is None)
        if taken:
            continue
        if command.script == TRAIN and command.place.part == 1:
            models += space or 0
        else:
            need.bytes += space or 0
    if keep and models:
        trained = [each for each in commands if _is_own_model(each, course)]
        most = BETWEEN + max(_read_after(commands, each, trained) for each in trained)
        models = min(models, models / max(1, sum(_taken(each) is None for each in trained)) * most)
    need.bytes += models
    return need


def _read_after(commands: Sequence[Command], training: Command, trained: Sequence[Command]) -> int:
    """How many models of rounds so far are read after a training."""
    read = {path for each in commands if each.place > training.place for path in read_by(each)}
    return sum(each.place <= training.place and bool(read & {each.output, Path(each.result)}) for each in trained)


def _taken(command: Command) -> tuple[float, int] | None:
    """(seconds, bytes) of a finished command; None of any other."""
    if (about := read_made(command)) is None:
        return None
    files = command.output.rglob("*") if command.output.is_dir() else [command.output]
    return about.get("wall_seconds", 0), sum(file.stat().st_size for file in files if file.is_file())


def describe_made(course: Course, commands: Sequence[Command]) -> dict[Path, str]:
    """Output -> what there is of it, in words, of the commands that are to run: by which other flags it was made;
    "there" where it reads what is still to be made, or made again."""
    made, ahead = {}, set()
    for command in commands:
        if not course.first <= command.place <= course.last:
            continue
        if (about := read_made(command)) is None:
            text = ""
        elif difference := changed_flags(command, about):
            text = f"there, but made by other flags ({difference})"
        else:
            text = UP_TO_DATE if ahead.isdisjoint(read_by(command)) else "there"
        made[command.output] = text
        if text != UP_TO_DATE:
            ahead |= {command.output, Path(command.result)}
            ahead |= {course.loop.best} if course.loop.keep and command.place.part < 2 else set()
    return made


def check(course: Course, need: Need) -> None:
    """Raises UserError where the disk of the loop's outputs has less room than they take."""
    place = Path(course.loop.output_dir).absolute()
    free = shutil.disk_usage(next(each for each in (place, *place.parents) if each.is_dir())).free
    if need.bytes > free:
        raise UserError(
            f"{place}: {size(free)} are free, and the loop takes about {size(need.bytes)} more; free some, give "
            "--output_root on another disk, or --keep best,last, which deletes the models of other rounds"
        )


# Models that are not needed -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cleaner:
    """Deletes the checkpoints of rounds that are neither best nor last, as `keep` has them, once no command needs them.

    Only those that the loop itself trained, in its own output_dir, in this run: not shared ones, not those that
    `registry` names, nor those that a command of another loop reads (`others`). In a dry run it says which, of rounds
    that have been measured.
    """

    keep: Sequence[str]
    registry: Path
    others: Sequence[Command] = ()
    said: set[Path] = field(default_factory=set)

    def __call__(self, course: Course, ahead: Sequence[Command]) -> None:
        """Delete what is not needed by the commands `ahead`."""
        for command in course.ran if not course.dry else ():
            course.wait(command)
        kept = {course.best.round} if course.best else set()
        if ahead or "last" in self.keep or not course.done:
            kept.add(course.round)
        if course.best is None and "best" in self.keep:
            return  # nothing has been measured yet
        needed = {path for each in (*ahead, *self.others) for path in read_by(each)}
        needed |= {in_root(path) for path in read_registry(self.registry).values()}
        whole = {path.resolve() for path in needed} | {path.absolute() for path in needed}
        for command in course.ran:
            if not _is_own_model(command, course) or command.place.round in kept or command.place < course.first:
                continue
            run = command.output.resolve()
            if any(path == run or run in path.parents for path in whole):
                continue
            if not course.dry:
                self._delete(course, command.output)
            elif course.is_measured(command.place.round):
                self._say(command.output)

    def _say(self, run: Path) -> None:
        if run not in self.said and (total := sum(map(_size, _checkpoints(run)))):
            self.said.add(run)
            log.info("\n--keep %s: would delete the checkpoints of %s, %s", ",".join(self.keep), run, size(total))

    def _delete(self, course: Course, run: Path) -> None:
        if not (files := list(_checkpoints(run))):
            return
        total = sum(map(_size, files))
        try:
            with Lock(run):
                course.file.delete(run, total)
                for file in files:
                    file.unlink()
            log.info("\n--keep %s: deleted the checkpoints of %s, %s", ",".join(self.keep), run, size(total))
        except UserError as error:
            log.warning("%s; its checkpoints stay", error)


def _is_own_model(command: Command, course: Course) -> bool:
    """Whether it is a training of a round, with its output in output_dir, and not behind a link."""
    own = command.output.parent == Path(course.loop.output_dir) and not command.output.is_symlink()
    shared = course.loop.base_dir and command.output.parent == Path(course.loop.base_dir)
    return command.script == TRAIN and command.place.part == 1 and own and not shared


def _size(file: Path) -> int:
    return file.stat().st_size


def _checkpoints(run: Path) -> Iterable[Path]:
    """The files of a run's checkpoints, but for what says where these are from."""
    return (
        file
        for folder in run.glob("checkpoint-*")
        if folder.is_dir() and not folder.is_symlink()
        for file in folder.rglob("*")
        if file.is_file() and file.name != KIND
    )
