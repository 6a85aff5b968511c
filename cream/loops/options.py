"""Flags of iterate.py: which loop, and which part of it."""

from dataclasses import dataclass

from cream.cli.flags import flag
from cream.errors import UserError
from cream.loops.checks import find_place
from cream.loops.course import Course


@dataclass
class LoopFlags:
    """Loop"""

    config: str | None = flag(None, "loop or recipe file; several, separated by commas, share what they make alike")
    dry_run: bool = flag(
        False,
        "check everything; print the commands, which outputs are up to date, there, or made by other flags, and about "
        "how long the rest takes and what disk space; and exit",
    )
    from_step: str | None = flag(
        None,
        "start at this round, or at this step (its id, or ID@ROUND); earlier outputs are used as they are",
        aliases=("from",),
    )
    until: str | None = flag(None, "end after this round or step, before there is a result")
    keep: str | None = flag(
        None,
        "best,last (last, for a loop that keeps no best): delete the checkpoints of its other rounds as soon as no "
        "step needs them; none: all stay",
    )
    seed: int | None = flag(None, "seed instead of the loop's", low=0, high=2**32 - 1)
    output_root: str | None = flag(None, "folder to put in front of all of the loop's folders")
    jobs: int | None = flag(
        None,
        "stages that run at the same time, of small models (50 MB) on a CPU: each begins when what it reads has been "
        "made, and has its share of the threads; default: one a core, up to 4; of large models, and on GPUs, 1",
        low=1,
    )
    report: bool = flag(
        True,
        "write report.html, a page about all loops, into the output_dir of the last one; beside a page there that "
        "shows others as well, report.FOLDER.html",
    )

    @property
    def kept(self) -> tuple[str, ...]:
        """The names in --keep."""
        return tuple(name.strip() for name in self.keep.split(",")) if self.keep else ()

    def set_range(self, course: Course) -> None:
        """Which commands run. Raises UserError where a flag names no round or step."""
        for name, word in (("from", self.from_step), ("until", self.until)):
            try:
                place = word and find_place(word, course, end=name == "until")
            except UserError as error:
                raise UserError(f"--{name} {error}") from None
            if place:
                course.first, course.last = (place, course.last) if name == "from" else (course.first, place)
        if course.first > course.last:
            raise UserError(f"--from {self.from_step} is after --until {self.until}")

    def check_kept(self, course: Course) -> None:
        """Raises UserError where --keep names something else, or would delete the loop's result."""
        wanted = "best,last" if course.loop.keep else "last"
        if odd := [name for name in self.kept if name not in ("best", "last")]:
            raise UserError(f"--keep {self.keep}: {odd[0]!r} is neither best nor last; give {wanted}")
        if self.kept and course.loop.keep and "best" not in self.kept:
            raise UserError(f"--keep {self.keep}: the result would be deleted; give {wanted}")
        if "best" in self.kept and not course.loop.keep:
            raise UserError(f"--keep {self.keep}: without the key `keep` this loop has no best round; give {wanted}")
