"""What is known of many records by uuid, in temporary files on disk: memory does not grow with their number."""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import msgspec

from cream.errors import UserError


def _database() -> sqlite3.Connection:
    """One in a temporary file, which goes with it."""
    return sqlite3.connect("", isolation_level=None, check_same_thread=False)


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise UserError(f"no room for temporary files: {error}; SQLITE_TMPDIR=FOLDER names another place") from None


class Index:
    """uuid -> byte offsets of its lines in a file, from (uuid, offset) pairs. Raises UserError where it has no room."""

    def __init__(self, found: Iterable[tuple[str, int]]):
        self._db = _database()
        with _room():
            self._db.execute("CREATE TABLE line (uuid TEXT, offset INTEGER)")
            self._db.execute("BEGIN")
            self._db.executemany("INSERT INTO line VALUES (?, ?)", found)
            self._db.execute("COMMIT")
            self._db.execute("CREATE INDEX by_uuid ON line (uuid, offset)")

    def find(self, uuid: str) -> list[int]:
        """Where its lines start, in the order of the file."""
        rows = self._db.execute("SELECT offset FROM line WHERE uuid = ? ORDER BY offset", (uuid,))
        return [offset for (offset,) in rows]


class Waiting:
    """uuid -> JSON value of records that come before their turn: MOST in memory, further ones on disk. Raises UserError
    where they have no room."""

    MOST = 1024

    def __init__(self):
        self._near: dict[str, object] = {}
        self._far: sqlite3.Connection | None = None

    def add(self, uuid: str, value: object) -> None:
        """Keep a value; of several for one uuid the first."""
        if len(self._near) < self.MOST:
            self._near.setdefault(uuid, value)
            return
        with _room():
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
