"""The chain of an output: all files that it was made from, and whether they are still as recorded."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cream.errors import UserError
from cream.files.fingerprints import fingerprint_file, fingerprint_folder
from cream.files.provenance import KIND, LAST, RUN, meta_path, place_of, read_sidecar
from cream.files.raw import did_you_mean


class Step(NamedTuple):
    """An output or one of its inputs: depth, name, path, sidecar ({} without one), and its hash in the sidecar of the
    output made from it (None for the first)."""

    depth: int
    name: str
    path: Path
    about: dict
    recorded: str | None
    again: bool  # it, and its inputs, came before

    @property
    def proof(self) -> str | None:
        """Its hash in its own sidecar; None without one."""
        checkpoint = self.path.is_dir() and not (self.path / RUN).exists()
        return self.about.get("fingerprint" if checkpoint else "output")


def chain(path: Path) -> Iterator[Step]:
    """An output or checkpoint, and all its inputs down to the raw data, each before its own inputs.

    Raises UserError if there is nothing at `path`, or a sidecar is damaged.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder{did_you_mean(path)}")
    seen: set[tuple[Path, str | None]] = set()
    ahead: list[tuple[int, str, Path, str | None]] = [(0, "", path, None)]
    while ahead:
        depth, name, path, recorded = ahead.pop()
        home = meta_path(path) if path.is_file() or (path / RUN).exists() else path / KIND
        about = read_sidecar(home) if home.exists() else {}
        again = (path.resolve(), recorded) in seen
        seen.add((path.resolve(), recorded))
        yield Step(depth, name, path, about, recorded, again)
        inputs = {} if again else about.get("inputs", {})
        for part in reversed([part for part in inputs if part in about["sources"]]):  # the first is the next
            place, here = place_of(home.parent, about["sources"][part]), Path.cwd()
            shown = place.relative_to(here) if place.is_relative_to(here) else place
            ahead.append((depth + 1, part, shown, inputs[part]))


def describe(path: Path) -> Iterator[str]:
    """A line for each file of the chain, inputs below the outputs made from them, and its notes. Raises UserError as
    `chain` does."""
    for step in chain(path):
        role = f"{step.name}: " if step.name else ""
        yield _line(step, f"{role}{step.path}{_made_by(step)}{', as above' if step.again else ''}")
        yield from _notes(step)


def verify(path: Path) -> Iterator[tuple[str, bool]]:
    """(line, whether the file is not as recorded) for each file of the chain, hashed again, and each note."""
    for step in chain(path):
        if step.again:
            continue
        problem = find_change(step)
        verdict = "verified"
        if step.proof is None:
            why = "its sidecar has no hash of it" if step.about else "it has no sidecar"
            verdict = f"{'as it was used, ' if step.recorded else ''}unverified: {why}"
        yield _line(step, f"{step.path}: {problem or verdict}"), problem is not None
        yield from ((note, False) for note in _notes(step))


def find_change(step: Step) -> str | None:
    """How a step differs from its record, found by hashing all of it again; None if it does not."""
    path = step.path
    if not path.exists():
        return "no longer exists"
    if path.is_dir() and (path / RUN).exists():  # a run: its last checkpoint is its output
        path = path / LAST
        if not path.exists():
            return f"no longer has {LAST}"
    if not path.is_dir() and not path.is_file():
        return "is not a regular file, and is not read"
    digest = fingerprint_folder(path, cached=False) if path.is_dir() else fingerprint_file(path)
    if step.recorded not in (None, digest):
        return "changed since it was used"
    return None if step.proof in (None, digest) else "is not what its sidecar describes"


def _line(step: Step, text: str) -> str:
    """An indented line, with unprintable characters, which might control a terminal, as escapes."""
    return "  " * step.depth + "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _made_by(step: Step) -> str:
    about = step.about
    if about.get("command"):
        counts = about.get("counts", {})
        how = f"{counts.get('out', '?')} records"
        if "trained_on" in counts:
            how = f"on {counts['trained_on']} examples"
        return f"  <- {about['command'][0]}, {how}"
    if about.get("stage"):
        return f"  <- train.py, {about['stage']}, {about.get('step', '?')} steps"
    if about:
        return ""
    return "  (raw: it has no sidecar)" if step.path.exists() else "  (no longer exists)"


def _notes(step: Step) -> Iterator[str]:
    forced = (f"! --force overrode: {text}" for text in step.about.get("forced", []))
    unverified = (f"! unverified: {name}" for name in step.about.get("unverified", []))
    yield from (_line(step, f"  {note}") for note in (*forced, *unverified))
