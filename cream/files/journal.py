"""A stage's output in the making: finished records survive a kill, the file itself appears whole or not at all.

While a stage runs it appends to `X.partial`. Run again with the same inputs and settings: finished -> X stands;
partial -> goes on. With others: an error that names the difference. What X's sidecar says stands in provenance.py.
"""

import logging
import os
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from typing import IO

import msgspec
import xxhash

from cream.errors import UserError
from cream.files import store
from cream.files.index import Index
from cream.files.lock import Lock
from cream.files.provenance import Provenance, fingerprint, meta_path, origin, read_meta
from cream.files.raw import named, sealed, unsealed
from cream.records import Record, encode

log = logging.getLogger("cream")
FORMAT = 1  # of a journal; counted on when the records of any stage get another shape
LONGEST = 250  # bytes of a name: most file systems take 255, and a temporary file's has 5 more
SYNC = 1.0  # seconds after which what a journal has gained is forced to disk


def differences(old: dict, new: dict) -> str:
    """'name: old -> new' for every key in which two flat maps differ."""
    return ", ".join(
        f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
    )


def free_path(path: Path) -> Path:
    """The first of X.2.json, X.3.json … (X-2, X-3 … for a folder) that does not exist."""
    stem, suffix = path.name, ""
    if not path.is_dir():
        while (ending := Path(stem).suffix) in store.RECORD_SUFFIXES:
            stem, suffix = stem.removesuffix(ending), ending + suffix
    number = 2
    while (candidate := path.with_name(f"{stem}{'.' if suffix else '-'}{number}{suffix}")).exists():
        number += 1
    return candidate


def difference(found: object, header: dict) -> str | None:
    """In what a `found` header ({"settings": …, "inputs": …}) is another than `header`; None when it is not."""
    if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in ("settings", "inputs")):
        return "it was not made by this command in this version, or it is damaged"
    old, new = ({**h["settings"], **h["inputs"]} for h in (found, header))
    told = differences(old, new)
    return f"it has other settings or inputs: {told}" if told else None


def same(path: Path, found: object, header: dict, what: str, advice: str = "", instead: str | None = None) -> None:
    """Raises UserError unless `found`, the header of what stands at `path`, equals `header`. `instead`: where else it
    could go; None: a free path is told."""
    if (other := difference(found, header)) is not None:
        instead = instead or f"another output, say {free_path(path)}"
        raise UserError(f"{path}: {what}, but {other}. {advice}Give {instead}, or --overwrite to replace it")


class Keys:
    """The uuids of many records, 8 bytes each: `in` takes two of equal xxh3-64 for the same (at 10^6, odds of 3e-8)."""

    def __init__(self, uuids: Iterable[str] = ()):
        import numpy as np

        self._hashes = array("Q", (xxhash.xxh3_64_intdigest(uuid.encode()) for uuid in uuids))
        np.asarray(self._hashes).sort()  # in place

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, uuid: str) -> bool:
        digest = xxhash.xxh3_64_intdigest(uuid.encode())
        at = bisect_left(self._hashes, digest)
        return at < len(self._hashes) and self._hashes[at] == digest


class Line(msgspec.Struct):
    """What is read of a journal's line to find it again."""

    uuid: str


WHOLE = msgspec.json.Decoder(Line)


class Output:
    """A record file in the making.

    `settings`, a flat map (flag -> value), and the hashes of the inputs decide what the output holds. `stands` says
    that it is finished already. Otherwise it is worked at within `with`, by one process at a time: `resume` takes up
    the journal, which `append` begins; nothing is written or removed before. `dropped` and `facts` enter the sidecar
    as they stand when the last row has been taken. `beside`: what else the stage writes; `instead`: see `same`.
    Raises UserError where the path is taken by an output of other settings or inputs, or another process writes it.
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
        self.facts: dict[str, object] = {}
        self.started = time.monotonic()
        self._file: IO[bytes] | None = None
        self._lock = Lock(path)
        self._synced = 0.0
        self._afresh = overwrite
        self._rejects = path.with_name(path.name + ".rejected.jsonl")
        self._staged = path.with_name(f".whole.{path.name}")
        self._staged_rejects = path.with_name(f".{self._rejects.name}")
        self._bad: Iterator[dict] = iter(())
        self._check_place([*beside])
        self.stands = not overwrite and self._finished()
        if self.stands and (self.partial.exists() or self._lock.path.exists()):
            self._tidy()

    def _check_place(self, beside: list[Path]) -> None:
        """Raises UserError where the output, or what is written beside it, would replace or change something else."""
        path = self.path
        if path.is_dir() or not store.is_record_file(path):
            raise UserError(f"{path}: an output is a file that ends in .json or .jsonl (.gz or .zst may follow)")
        if len(os.fsencode(self._staged_rejects.name)) > LONGEST:  # of what is written beside it the longest
            raise UserError(f"{path}: its name is too long for what is written beside it under longer ones; shorten it")
        sources = self.provenance.sources.values()
        written = {each.resolve() for each in (path, self.partial, meta_path(path), self._rejects, *beside)}
        if taken := [source for source in sources if source.resolve() in written]:
            raise UserError(f"{taken[0]} is an input, and would be replaced by this output; give another output")
        begun = self._afresh or path.exists() or self.partial.exists()
        for each in beside:
            if meta_path(each).exists():
                raise UserError(f"{each} is an output of its own, and {path} would replace it; give another output")
            if each.exists() and not begun:
                told = f"{each} stands already, and nothing says that it is of {path}, which would replace it"
                raise UserError(f"{told}; give another output, or --overwrite")
        if inside := [source for source in sources if source.resolve() == path.parent.resolve()]:
            raise UserError(f"{path}: lies in the folder of {inside[0]}, an input that it would change; give another")

    def _tidy(self) -> None:
        """Remove what a run leaves that is killed when its output stands already; the journal of a command that is
        to replace it, and was interrupted, stays."""
        with suppress(UserError, FileNotFoundError), self._lock:  # unless another process makes it anew
            self._unstage()
            with open(self.partial, "rb") as file:
                first = file.readline()
            if not difference(self._begun(first), self.header):
                self.partial.unlink()

    def __enter__(self) -> "Output":
        with ExitStack() as held:
            held.enter_context(self._lock)
            if not self._afresh and self._finished():
                raise UserError(
                    f"{self.path}: another process has just finished it; the same command goes on from there"
                )
            held.pop_all()
        return self

    def __exit__(self, *error) -> None:
        file, self._file = self._file, None
        with ExitStack() as ending:
            ending.push(self._lock)
            self._unstage()
            if file is not None:
                ending.enter_context(file)
                os.fsync(file.fileno())

    def _unstage(self) -> None:
        """Remove what this run staged, which failed, or one that was killed: it is never gone on with."""
        for staged in (self._staged, self._staged_rejects):
            with suppress(OSError):
                staged.unlink()

    def _finished(self) -> bool:
        if not self.path.exists():
            return False
        meta = read_meta(self.path)
        same(self.path, meta, self.header, "stands already", instead=self._instead)
        if meta.get("output") != fingerprint(self.path):
            raise UserError(
                f"{self.path}: is not what its sidecar describes: it was changed since, or replacing it was "
                "interrupted; --overwrite makes it again"
            )
        return True

    def resume(self) -> Keys:
        """Take up an unfinished run's journal, if there is one; returns the keys of the records that it holds.

        So does --overwrite, where the same command began it. Raises UserError where another did, without --overwrite.
        """
        if not self.partial.exists():
            return Keys()
        self._file = open(self.partial, "r+b")
        if not self._goes_on(self._file.readline()):
            self._file.close()
            self._file = None
            return Keys()
        keys = Keys(uuid for uuid, _ in self._lines())
        self._cut(len(keys))
        self._synced = time.monotonic()
        return keys

    def _goes_on(self, first: bytes) -> bool:
        """Whether the journal with this first line is to be gone on with."""
        if not first.endswith(b"\n"):  # killed within it
            return False
        found = self._begun(first)
        if self._afresh:
            return difference(found, self.header) is None
        what, advice = f"an unfinished run stands in {self.partial.name}", "Repeat its command to finish it. "
        same(self.path, found, self.header, what, advice if found else "", self._instead)
        return True

    @staticmethod
    def _begun(first: bytes) -> dict | None:
        """The header in a journal's first line; None where that is of another version, or damaged."""
        try:
            found = msgspec.json.decode(unsealed(first) or b"")
        except msgspec.DecodeError:
            return None
        return found if isinstance(found, dict) and found.get("journal") == FORMAT else None

    def _lines(self) -> Iterator[tuple[str, int]]:
        """(uuid, offset) of every record of the journal, up to the first that is not as it was written."""
        self._file.seek(0)
        self._end = len(self._file.readline())
        for line in self._file:
            text = unsealed(line) if line.endswith(b"\n") else None
            try:
                uuid = WHOLE.decode(text or b"").uuid
            except msgspec.DecodeError:  # killed within a line, without power, or changed: computed again from here on
                return
            yield uuid, self._end
            self._end += len(line)

    def _cut(self, count: int) -> None:
        """End the journal after its first `count` records, the whole ones, and say what is lost."""
        self._file.seek(self._end)
        if lost := sum(1 for _ in self._file):
            told = "%s: line %d is not as it was written; the %d lines from there on are computed again"
            log.warning(told, self.partial, count + 2, lost)
        self._file.truncate(self._end)

    def append(self, row: Record | dict) -> None:
        """Keep one finished record in the journal; it survives a kill from now on, a power cut SYNC seconds later."""
        with named(self.partial):
            if self._file is None:
                self._file = open(self.partial, "w+b")
                self._write(sealed({"journal": FORMAT, **self.header}))
                self._sync()
            self._file.seek(0, os.SEEK_END)
            self._write(sealed(encode(row) if isinstance(row, Record) else row))
            if time.monotonic() - self._synced > SYNC:
                self._sync()

    def _write(self, data: bytes) -> None:
        """To the file itself: what a full disk refuses must not stay in a buffer, to be refused again at its close."""
        while data:
            data = data[os.write(self._file.fileno(), data) :]

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def drop(self, reason: str, count: int = 1) -> None:
        """Count something left out of the output, and why."""
        self.dropped[reason] += count

    def reject(self, rows: Iterable[dict]) -> None:
        """Records that were left out as malformed, if there are any: counted, and written beside the output as it is
        finished."""
        self._bad = iter(rows)

    def _stage_rejects(self) -> bool:
        """Write and count the records that were left out as malformed, if there are any, under another name for now."""
        if (first := next(self._bad, None)) is None:
            return False
        count = store.write_rows(self._staged_rejects, chain([first], self._bad))
        log.warning("%d malformed records are left out; they stand in %s", count, self._rejects)
        self.drop(store.MALFORMED, count)
        return True

    def rows(self, order: Iterable[str]) -> Iterator[dict]:
        """The journal's records in the given order of keys; keys without a record are passed over."""
        if self._file is None:
            return
        index = Index(self._lines())
        for key in order:
            for offset in index.find(key)[:1]:
                self._file.seek(offset)
                yield msgspec.json.decode(unsealed(self._file.readline()))

    def finish(self, rows: Iterable[dict], **facts) -> int:
        """Write the output and its sidecar (sidecar first: data without one is never taken for finished)."""
        count = 0

        def counted():
            nonlocal count
            for row in rows:
                count += 1
                yield row

        store.write_rows(self._staged, counted())
        rejects = self._stage_rejects()
        self.provenance.check_unchanged()  # all that is read of them has been read
        meta = {
            **self.header,
            **origin(),
            "counts": {"out": count, "dropped": dict(sorted(self.dropped.items()))},
            "wall_seconds": round(time.monotonic() - self.started, 3),
            "output": fingerprint(self._staged),
            **self.provenance.record(self.path.parent),
            **facts,
            **self.facts,
        }
        store.write_json(meta_path(self.path), meta)
        if rejects:
            os.replace(self._staged_rejects, self._rejects)
        else:  # what stands there is of an earlier run
            self._rejects.unlink(missing_ok=True)
        os.replace(self._staged, self.path)
        store.sync(self.path.parent)
        if self._file is not None:
            self._file.close()
            self._file = None
        self.partial.unlink(missing_ok=True)
        return count
