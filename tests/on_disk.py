"""What stages have on disk: finished outputs without times and speeds, and how far unfinished ones are."""

import json
import os
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

from cream.files.append_log import strip_checksum

MEASURED = ("wall_seconds", "peak_memory_gb", "resumed", "reuse")  # of one course of events, as rates are


def contents(root: Path, *patterns: str) -> dict[str, object]:
    """path -> what it holds, of every file and link below the paths that the patterns match."""
    found = [path for pattern in patterns for path in root.glob(pattern)]
    paths = [path for top in found for path in ([top] if not top.is_dir() else top.rglob("*"))]
    return {str(path.relative_to(root)): content(path) for path in paths if path.is_symlink() or not path.is_dir()}


def content(path: Path) -> object:
    """What a file holds, but for times and speeds; of a score cache the whole lines, which may be in any order."""
    if path.is_symlink():
        return os.readlink(path)
    if path.name == "report.html" or path.suffix == ".log":
        return "a page with times and speeds"
    if path.name == "log.jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name.endswith(".scores.jsonl"):
        return sorted(filter(strip_checksum, path.read_bytes().splitlines()))
    return _timeless(json.loads(path.read_bytes())) if path.name.endswith("meta.json") else path.read_bytes()


def _timeless(value: object) -> object:
    if not isinstance(value, dict):
        return value
    kept = {k: v for k, v in value.items() if not k.endswith("_per_second") and k not in MEASURED}
    return {k: _timeless(v) for k, v in kept.items()}


def journalled(journal: Path) -> list[bytes]:
    """The lines of a journal, but for its header, up to the first that is damaged."""
    return list(takewhile(strip_checksum, journal.read_bytes().splitlines()[1:]))


def recorded(folder: Path) -> int:
    """Records in the journals below a folder."""
    return sum(len(journalled(journal)) for journal in folder.rglob("*.partial"))


def progress(folder: Path):
    """(steps in its log, steps in its saved state) of each unfinished training run below a folder."""
    for log in folder.rglob("log.jsonl"):
        if not (log.parent / "meta.json").exists():
            yield log.read_bytes().count(b"\n"), saved_step(log.parent)


def saved_step(run: Path) -> int:
    """The step after which a training run resumes; 0: it starts."""
    state = run / "state/whole"
    return json.loads(state.read_bytes())["step"] if state.exists() else 0


def so_far(done, folder: Path) -> int:
    """What is `done` in a folder that a stage is changing: nothing while it moves or removes what is being read."""
    with suppress(FileNotFoundError):
        return done(folder)
    return 0
