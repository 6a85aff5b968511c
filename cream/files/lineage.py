"""The chain of an output, as lines to read: how each file of it was made, and whether it is still what was recorded."""

from collections.abc import Iterator
from pathlib import Path

from cream.files import provenance
from cream.files.provenance import Step, chain


def describe(path: Path) -> Iterator[str]:
    """A line for each file of the chain, inputs below what was made of them, and for what a reader should not miss.
    Raises UserError as `chain` does."""
    for step in chain(path):
        role = f"{step.name}: " if step.name else ""
        yield _printable(step, f"{role}{step.path}{_made(step)}{', as above' if step.again else ''}")
        yield from _notes(step)


def verify(path: Path) -> Iterator[tuple[str, bool]]:
    """(line, whether the file is not what was recorded) for each file of the chain, hashed again, and each note."""
    for step in chain(path):
        if step.again:
            continue
        found = provenance.verify(step)
        verdict = found or ("verified" if step.proof else _unproved(step))
        yield _printable(step, f"{step.path}: {verdict}"), found is not None
        for note in _notes(step):
            yield note, False


def _printable(step: Step, line: str) -> str:
    """An indented line, unprintable characters, which might control a terminal, as escapes."""
    return "  " * step.depth + "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def _unproved(step: Step) -> str:
    """In place of "verified" where no sidecar has a hash."""
    why = "its sidecar has no hash of it" if step.about else "it has no sidecar"
    return f"{'as it was used, ' if step.recorded else ''}unverified: {why}"


def _made(step: Step) -> str:
    """How it was made."""
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
    return "  (raw: it has no sidecar)" if step.path.exists() else "  (does not exist any more)"


def _notes(step: Step) -> Iterator[str]:
    """What a reader should not miss."""
    forced = (f"! --force overrode: {text}" for text in step.about.get("forced", []))
    unverified = (f"! unverified: {name}" for name in step.about.get("unverified", []))
    yield from (_printable(step, f"  {note}") for note in (*forced, *unverified))
