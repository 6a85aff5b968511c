"""A stage's output X: finished records survive a kill, and X appears whole or not at all.

A running stage appends to `X.partial`. The same command skips a finished X, and resumes an interrupted run; another
command gets an error that names the difference. provenance.py describes X's sidecar.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path

import msgspec

from cream.errors import UserError
from cream.files import store
from cream.files.append_log import AppendLog, strip_checksum
from cream.files.fingerprints import fingerprint_file
from cream.files.identity import check_same, describe_difference
from cream.files.index import Index, Keys
from cream.files.lock import Lock
from cream.files.provenance import Provenance, meta_path, origin, read_meta
from cream.files.raw import with_filename
from cream.records import Record, encode

log = logging.getLogger("cream")
FORMAT = 2  # of a journal; increased when the records of any stage change their layout
LONGEST = 250  # bytes of a name: most file systems allow 255, and temporary files add 5
SYNC = 1.0  # seconds after which appended records are forced to disk


class Line(msgspec.Struct):
    """The part of a journal's line that the index needs."""

    uuid: str


LINE = msgspec.json.Decoder(Line)


class Output:
    """A record file that a stage writes.

    `settings`, a flat map (flag -> value), and the hashes of the inputs decide its content. If it is not `up_to_date`,
    it is written within `with`, by one process at a time: `resume` opens the journal of an interrupted run, `append`
    starts one; nothing is written or removed before. `dropped` and `facts` enter the sidecar as they are after the last
    row. `beside`: other files that the stage writes; `instead`: see `check_same`. Raises UserError if the path has an
    output of other settings or inputs, or another process is writing it.
    """

    def __init__(
        self,
        path: Path,
        settings: dict,
        provenance: Provenance,
        *,
        overwrite: bool = False,
        beside: Iterable[Path] = (),
        instead: str | None = None,
    ):
        self.path, self.provenance, self._instead = path, provenance, instead
        header = {"settings": settings, "inputs": provenance.inputs}
        self.header = msgspec.json.decode(msgspec.json.encode(header))  # as in files
        self.partial = path.with_name(path.name + ".partial")
        self.dropped: Counter[str] = Counter()
        self.resumed = 0  # requests that an interrupted run had finished: keys of its journal
        self.facts: dict[str, object] = {}
        self.started = time.monotonic()
        self._journal: AppendLog | None = None
        self._lock = Lock(path)
        self._synced = 0.0
        self._overwrite = overwrite
        self._rejects = path.with_name(path.name + ".rejected.jsonl")
        self._staged = path.with_name(f".whole.{path.name}")
        self._staged_rejects = path.with_name(f".{self._rejects.name}")
        self._bad: Iterator[dict] = iter(())
        self._check_place([*beside])
        self.up_to_date = not overwrite and self._is_finished()
        if self.up_to_date and (self.partial.exists() or self._lock.path.exists()):
            self._remove_leftovers()

    def _check_place(self, beside: list[Path]) -> None:
        """Raises UserError if the output, or a file written with it, would replace or change another file."""
        path = self.path
        if path.is_dir() or not store.is_record_file(path):
            raise UserError(f"{path}: an output is a file that ends in .json or .jsonl (.gz or .zst may follow)")
        if len(os.fsencode(self._staged_rejects.name)) > LONGEST:  # the longest of the names
            raise UserError(f"{path}: the name is too long, since temporary files add to it; shorten it")
        sources = self.provenance.sources.values()
        written = {each.resolve() for each in (path, self.partial, meta_path(path), self._rejects, *beside)}
        if taken := [source for source in sources if source.resolve() in written]:
            raise UserError(f"{taken[0]} is an input, and would be replaced by this output; give another output")
        started = self._overwrite or path.exists() or self.partial.exists()
        for each in beside:
            if meta_path(each).exists():
                raise UserError(f"{each} is an output of its own, and {path} would replace it; give another output")
            if each.exists() and not started:
                raise UserError(
                    f"{each} exists, and nothing says that it belongs to {path}, which would replace it; "
                    "give another output, or --overwrite"
                )
        if inside := [source for source in sources if source.resolve() == path.parent.resolve()]:
            raise UserError(f"{path}: is in the folder of {inside[0]}, an input that it would change; give another")

    def _remove_leftovers(self) -> None:
        """Remove the leftovers of a run that was killed after finishing its output, but not the journal of another
        command, interrupted while replacing it."""
        with suppress(UserError, FileNotFoundError), self._lock:  # unless another process is replacing it
            self._unstage()
            with AppendLog(self.partial) as journal:
                header = self._read_header(journal)
            if not describe_difference(header, self.header):
                self.partial.unlink()

    def __enter__(self) -> "Output":
        with ExitStack() as held:
            held.enter_context(self._lock)
            if not self._overwrite and self._is_finished():
                raise UserError(f"{self.path}: another process has just finished it; run the same command again")
            held.pop_all()
        return self

    def __exit__(self, *error) -> None:
        journal, self._journal = self._journal, None
        with ExitStack() as ending:
            ending.push(self._lock)
            self._unstage()
            if journal is not None:
                ending.enter_context(journal)
                journal.sync()

    def _unstage(self) -> None:
        """Remove the staged files of a failed or killed run, which are never resumed from."""
        for staged in (self._staged, self._staged_rejects):
            with suppress(OSError):
                staged.unlink()

    def _is_finished(self) -> bool:
        if not self.path.exists():
            return False
        meta = read_meta(self.path)
        check_same(self.path, meta, self.header, "exists", instead=self._instead)
        if meta.get("output") != fingerprint_file(self.path):
            raise UserError(
                f"{self.path}: is not what its sidecar describes: it was changed since, or replacing it was "
                "interrupted; --overwrite writes it again"
            )
        return True

    # The journal ----------------------------------------------------------------------------------------------------

    def resume(self) -> Keys:
        """Open the journal of an interrupted run, if there is one; returns the keys of its records.

        Another command's journal is ignored with --overwrite, and a UserError without it.
        """
        if not self.partial.exists():
            return Keys()
        with ExitStack() as opened:
            journal = opened.enter_context(AppendLog(self.partial, writable=True))
            if not self._resumes(journal):
                return Keys()
            opened.pop_all()
        self._journal = journal
        keys = Keys(uuid for uuid, _ in self._lines())
        self._drop_damaged_lines(len(keys))
        self._synced = time.monotonic()
        self.resumed = len(keys)
        return keys

    def _resumes(self, journal: AppendLog) -> bool:
        """Whether to resume the run that wrote this journal."""
        _, first = next(journal.lines(), (0, b""))
        if strip_checksum(first) is None and not first.endswith(b"\n"):  # killed while it wrote its header
            return False
        header = self._read_header(journal)
        if self._overwrite:
            return describe_difference(header, self.header) is None
        what, advice = f"found an interrupted run in {self.partial.name}", "Repeat its command to finish it. "
        check_same(self.path, header, self.header, what, advice if header else "", self._instead)
        return True

    @staticmethod
    def _read_header(journal: AppendLog) -> dict | None:
        """The header in a journal's first line; None if it is damaged or of another version."""
        try:
            header = msgspec.json.decode(journal.read() or b"")
        except msgspec.DecodeError:
            return None
        return header if isinstance(header, dict) and header.get("journal") == FORMAT else None

    def _lines(self) -> Iterator[tuple[str, int]]:
        """(uuid, offset) of every record of the journal, up to the first damaged line."""
        lines = self._journal.lines()
        self._end = len(next(lines)[1])
        for offset, line in lines:
            try:
                uuid = LINE.decode(strip_checksum(line) or b"").uuid
            except msgspec.DecodeError:  # a kill, a power cut, or a change
                return
            yield uuid, offset
            self._end = offset + len(line)

    def _drop_damaged_lines(self, count: int) -> None:
        """Truncate the journal after its first `count` records, and log how many lines are lost."""
        if lost := sum(1 for _ in self._journal.lines(self._end)):
            what = "%s: line %d is damaged; it and all lines after it, %d in total, are computed again"
            log.warning(what, self.partial, count + 2, lost)
        self._journal.truncate(self._end)

    def append(self, row: Record | dict) -> None:
        """Add a finished record to the journal; it survives a kill from now on, a power cut SYNC seconds later."""
        with with_filename(self.partial):
            if self._journal is None:
                self._journal = AppendLog(self.partial, writable=True)
                self._journal.truncate(0)
                self._journal.append({"journal": FORMAT, **self.header})
                self._sync()
            self._journal.append(encode(row) if isinstance(row, Record) else row)
            if time.monotonic() - self._synced > SYNC:
                self._sync()

    def _sync(self) -> None:
        self._journal.sync()
        self._synced = time.monotonic()

    def rows(self, order: Iterable[str]) -> Iterator[dict]:
        """The journal's records in the given order of keys; keys without a record are skipped."""
        if self._journal is None:
            return
        index = Index(self._lines())
        for key in order:
            for offset in index.find(key)[:1]:
                yield msgspec.json.decode(self._journal.read(offset))

    # The end --------------------------------------------------------------------------------------------------------

    def drop(self, reason: str, count: int = 1) -> None:
        """Count records that are not in the output, by reason."""
        self.dropped[reason] += count

    def reject(self, rows: Iterable[dict]) -> None:
        """Set the malformed records that were skipped; they are counted and written to a file when the output is."""
        self._bad = iter(rows)

    def _stage_rejects(self) -> bool:
        """Write and count skipped malformed records, under a temporary name; returns whether there are any."""
        if (first := next(self._bad, None)) is None:
            return False
        count = store.write_rows(self._staged_rejects, chain([first], self._bad))
        log.warning("%d malformed records are skipped; they are in %s", count, self._rejects)
        self.drop(store.MALFORMED, count)
        return True

    def finish(self, rows: Iterable[dict], **facts) -> int:
        """Write the sidecar and then the output, which without it would never count as finished."""
        count = store.write_rows(self._staged, rows)
        rejects = self._stage_rejects()
        self.provenance.check_unchanged()  # now that all inputs have been read
        meta = {
            **self.header,
            **origin(),
            "counts": {"out": count, "dropped": dict(sorted(self.dropped.items()))},
            "wall_seconds": round(time.monotonic() - self.started, 3),
            **({"resumed": self.resumed} if self.resumed else {}),
            "output": fingerprint_file(self._staged),
            **self.provenance.record(self.path.parent),
            **facts,
            **self.facts,
        }
        store.write_json(meta_path(self.path), meta)
        if rejects:
            os.replace(self._staged_rejects, self._rejects)
        else:  # existing ones belong to an earlier run
            self._rejects.unlink(missing_ok=True)
        os.replace(self._staged, self.path)
        store.sync(self.path.parent)
        if self._journal is not None:
            with self._journal:
                self._journal = None
        self.partial.unlink(missing_ok=True)
        return count
