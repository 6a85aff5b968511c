"""Read what stages leave behind. PATH is a file, a checkpoint's folder, or a registered name.

lineage PATH  the chain of an output or checkpoint down to the raw data: how each was made, of what
verify PATH   the same chain, every file of it hashed again: exit code 1 where one is not what was recorded
compare A B   two evaluations of the same data: differences in accuracy per task, how sure they are, what flipped
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from config import CHECKPOINTS, DATASETS, Run, group
from cream.cli import console, names
from cream.cli.console import log
from cream.cli.flags import flag, parse
from cream.errors import UserError
from cream.evaluation.compare import Joined, flip_row, format_comparison, format_flips, join
from cream.evaluation.compare import compare as compared
from cream.files import journal, store
from cream.files.provenance import Step, chain, wrong
from cream.records import Answer

EXAMPLE = """\
  python report.py lineage tiny_m2
  python report.py verify outputs/sampling.json
  python report.py compare outputs/evaluation/tiny_m1-tiny_test/results.json \\
      outputs/evaluation/tiny_m2-tiny_test/results.json"""


@dataclass
class Compare:
    """compare"""

    show: int = flag(5, "flipped items that are printed, of each direction", low=0)
    output: str | None = flag(None, "file for all flipped items with both answers, .jsonl or .json", aliases=("o",))
    seed: int = flag(0, "of the bootstrap intervals", low=0)


@dataclass
class ReportConfig:
    """report.py"""

    compare: Compare = group(Compare)
    run: Run = group(Run)


@console.stage
def main(argv=None):
    words: list[str] = []
    config = parse(ReportConfig, argv, description=__doc__, example=EXAMPLE, files=False, words=words)
    command, *places = words or [""]
    if command == "compare" and len(places) == 2:
        compare(config, *map(Path, places))
    elif command not in ("lineage", "verify") or len(places) != 1:
        raise UserError("expected a command and what it is for: lineage PATH, verify PATH, or compare A.json B.json")
    elif config != ReportConfig():
        raise UserError(f"{command} takes no flags; those of --help are for compare")
    else:
        (lineage if command == "lineage" else verify)(_place(places[0]))


def _place(word: str) -> Path:
    """A path, or what a registered name stands for."""
    registered = names.read_registry(DATASETS) | names.read_registry(CHECKPOINTS)
    if Path(word).exists() or word not in registered:
        return Path(word)
    return Path(os.path.relpath(names.in_root(registered[word])))


def lineage(path: Path) -> None:
    """Print the chain, inputs below what was made of them."""
    for step in chain(path):
        _say(_line(step))
        for note in _notes(step):
            _say(f"{'  ' * step.depth}  {note}")


def verify(path: Path) -> None:
    """Print what is found of each file of the chain; exit code 1 where one is not what was recorded."""
    bad = 0
    for step in chain(path):
        if step.again:
            continue
        found = wrong(step)
        bad += found is not None
        _say(f"{'  ' * step.depth}{step.path}: {found or ('verified' if step.proof else _unproved(step))}")
        for note in _notes(step):
            _say(f"{'  ' * step.depth}  {note}")
    if bad:
        print(f"{bad} of these are not what was recorded", file=sys.stderr)
        sys.exit(1)
    log.info("all of it is as it was recorded")


def _say(line: str) -> None:
    """Print a line; what is no printable character, and might tell a terminal something, as an escape."""
    log.info("%s", "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line))


def compare(config: ReportConfig, a: Path, b: Path) -> None:
    """Print how two evaluations differ and the first of the items that flipped; all of those into --output."""
    run, provenance = config.run, config.run.provenance()
    made = [provenance.output(name, path).get("settings") for name, path in (("a", a), ("b", b))]
    joined = join(*(store.read(path, Answer, skip=run.skip) for path in (a, b)))
    bad = [bad for path in (a, b) for bad in store.rejected(path, Answer)] if run.skip else []
    target, output = config.compare.output, None
    if target is not None:
        decides = {"seed": config.compare.seed, "on_bad_record": run.on_bad_record}
        output = journal.Output(Path(target), decides, provenance, overwrite=run.overwrite)
    log.info("A: %s\nB: %s", a, b)
    if bad:
        log.info("%d malformed records are left out, the first %s", len(bad), bad[0]["where"])
    for note in _apart(joined, *made):
        log.info("%s", note)
    rows, flipped = compared(joined, config.compare.seed), joined.flipped()
    log.info("%s\n%s", format_comparison(rows), format_flips(flipped, config.compare.show))
    if output is None or run.dry_run:
        return
    if not output.stands:
        with output:
            if run.skip:
                output.reject(bad)
            output.finish((flip_row(*item) for item in flipped), comparison=rows)
    log.info("flipped items: %s%s", target, " stands already" if output.stands else "")


def _apart(joined: Joined, settings_a: dict | None, settings_b: dict | None) -> list[str]:
    """In what two evaluations are not alike, but for the model: a reader should know before the numbers."""
    notes = [
        f"{len(only)} items are only in {name} and left out: {', '.join(only[:3])}{' …' if len(only) > 3 else ''}"
        for name, only in (("A", joined.only_a), ("B", joined.only_b))
        if only
    ]
    if joined.reworded:
        notes.append(f"{joined.reworded} questions were put with another text around them (--sysprompt)")
    a, b = settings_a or {}, settings_b or {}
    both = a.keys() & b.keys()  # a file that was graded again has none of its generation's
    if differences := journal.differences(*({key: made[key] for key in both} for made in (a, b))):
        notes.append(f"made by other settings, A -> B: {differences}")
    return notes


def _unproved(step: Step) -> str:
    """What stands for "verified" where no sidecar has a hash."""
    why = "its sidecar has no hash of it" if step.about else "it has no sidecar"
    return f"{'as it was used, ' if step.recorded else ''}unverified: {why}"


def _line(step: Step) -> str:
    """Depth, role, path, and how it was made."""
    about, role = step.about, f"{step.name}: " if step.name else ""
    made = ""
    if about.get("command"):
        made = f"  <- {about['command'][0]}, {about.get('counts', {}).get('out', '?')} records"
        if "trained_on" in about.get("counts", {}):
            made = f"  <- {about['command'][0]}, on {about['counts']['trained_on']} examples"
    elif about.get("stage"):
        made = f"  <- train.py, {about['stage']}, {about.get('step', '?')} steps"
    elif not about:
        made = "  (raw: it has no sidecar)" if step.path.exists() else "  (not there any more)"
    return f"{'  ' * step.depth}{role}{step.path}{made}{', as above' if step.again else ''}"


def _notes(step: Step) -> list[str]:
    """What a reader should not miss."""
    notes = [f"! --force overrode: {text}" for text in step.about.get("forced", [])]
    return notes + [f"! unverified: {name}" for name in step.about.get("unverified", [])]


if __name__ == "__main__":
    main()
