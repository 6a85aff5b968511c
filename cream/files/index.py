"""Many records by uuid, in little memory: values are in temporary files on disk."""

import sqlite3
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import msgspec
import xxhash

from cream.errors import UserError


class Keys:
    """A set of uuids at 8 bytes each: two uuids with equal xxh3-64 are the same to it (3e-8 likely among 10^6)."""

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


def _database() -> sqlite3.Connection:
    """A database in a temporary file, removed on closing."""
    return sqlite3.connect("", isolation_level=None, check_same_thread=False)


@contextmanager
def _explain_full_disk() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise UserError(f"no room for temporary files: {error}; SQLITE_TMPDIR=FOLDER names another place") from None


class Index:
    """uuid -> byte offsets of its lines in a file. Raises UserError on a full disk."""

    def __init__(self, offsets: Iterable[tuple[str, int]]):
        self._db = _database()
        with _explain_full_disk():
            self._db.execute("CREATE TABLE line (uuid TEXT, offset INTEGER)")
            self._db.execute("BEGIN")
            self._db.executemany("INSERT INTO line VALUES (?, ?)", offsets)
            self._db.execute("COMMIT")
            self._db.execute("CREATE INDEX by_uuid ON line (uuid, offset)")

    def find(self, uuid: str) -> list[int]:
        """The offsets of a uuid's lines, in the order of the file."""
        rows = self._db.execute("SELECT offset FROM line WHERE uuid = ? ORDER BY offset", (uuid,))
        return [offset for (offset,) in rows]


class Waiting:
    """uuid -> JSON value of records that arrive early, MOST in memory, others on disk. UserError on a full disk."""

    MOST = 1024

    def __init__(self):
        self._near: dict[str, object] = {}
        self._far: sqlite3.Connection | None = None

    def add(self, uuid: str, value: object) -> None:
        """Keep a value, unless there is one for this uuid."""
        if len(self._near) < self.MOST:
            self._near.setdefault(uuid, value)
            return
        with _explain_full_disk():
            if self._far is None:
                self._far = _database()
                self._far.execute("CREATE TABLE waiting (uuid TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID")
                self._far.execute("BEGIN")
            self._far.execute("INSERT OR IGNORE INTO waiting VALUES (?, ?)", (uuid, msgspec.json.encode(value)))

    def take(self, uuid: str) -> object | None:
        """The value, once; None if there is none."""
        if uuid in self._near:
            return self._near.pop(uuid)
        if self._far is None:
            return None
        found = self._far.execute("DELETE FROM waiting WHERE uuid = ? RETURNING value", (uuid,)).fetchone()
        return found and msgspec.json.decode(found[0])
