"""Read what stages leave behind. PATH is a file, a checkpoint's folder, or a registered name.

lineage PATH  the chain of an output or checkpoint down to the raw data: how each was made, of what
verify PATH   the same chain, every file of it hashed again: exit code 1 where one is not what was recorded
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from config import CHECKPOINTS, DATASETS
from cream import console, names
from cream.console import log
from cream.errors import UserError
from cream.flags import parse
from cream.provenance import Step, chain, wrong

EXAMPLE = """\
  python report.py lineage tiny_m2
  python report.py verify outputs/sampling.json"""


@dataclass
class ReportConfig:
    """report.py"""


@console.stage
def main(argv=None):
    words: list[str] = []
    parse(ReportConfig, argv, description=__doc__, example=EXAMPLE, files=False, words=words)
    commands = {"lineage": lineage, "verify": verify}
    if len(words) != 2 or words[0] not in commands:
        raise UserError("expected a command and a path: lineage PATH, or verify PATH")
    commands[words[0]](_place(words[1]))


def _place(word: str) -> Path:
    """A path, or what a registered name stands for."""
    registered = names.read_registry(DATASETS) | names.read_registry(CHECKPOINTS)
    if Path(word).exists() or word not in registered:
        return Path(word)
    return Path(os.path.relpath(names.in_root(registered[word])))


def lineage(path: Path) -> None:
    """Print the chain, inputs below what was made of them."""
    for step in chain(path):
        log.info("%s", _line(step))
        for note in _notes(step):
            log.info("%s  %s", "  " * step.depth, note)


def verify(path: Path) -> None:
    """Print what is found of each file of the chain; exit code 1 where one is not what was recorded."""
    bad = 0
    for step in chain(path):
        if step.again:
            continue
        found = wrong(step)
        bad += found is not None
        log.info("%s%s: %s", "  " * step.depth, step.path, found or ("verified" if step.proof else _unproved(step)))
        for note in _notes(step):
            log.info("%s  %s", "  " * step.depth, note)
    if bad:
        print(f"{bad} of these are not what was recorded", file=sys.stderr)
        sys.exit(1)
    log.info("all of it is as it was recorded")


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
