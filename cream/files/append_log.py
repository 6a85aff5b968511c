"""Append-only files of JSON lines with checksums: a running stage's journal, and the score cache."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import xxhash
from filelock import lock_descriptor, unlock_descriptor


def add_checksum(value: object) -> bytes:
    """A line: the JSON value, a tab, and 16 hex digits, xxh3-64 of the value's bytes."""
    data = msgspec.json.encode(value)
    return data + b"\t" + xxhash.xxh3_64_hexdigest(data).encode() + b"\n"


def strip_checksum(line: bytes) -> bytes | None:
    """The JSON text of a line, with or without its newline; None if it was truncated or changed."""
    data, _, digest = line.removesuffix(b"\n").rpartition(b"\t")
    return data if data and digest == xxhash.xxh3_64_hexdigest(data).encode() else None


class AppendLog:
    """An open file; `writable` creates it if it is missing.

    A killed process may leave a truncated last line; the next append starts a new line, so that only that one is lost.
    Several processes may append at once: each locks the file meanwhile, and on a file system without locks the
    checksums show which lines are mixed up.
    """

    def __init__(self, path: Path, *, writable: bool = False):
        self._file = open(path, "a+b" if writable else "rb")

    def __enter__(self) -> "AppendLog":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def lines(self, start: int = 0) -> Iterator[tuple[int, bytes]]:
        """(byte offset, line with its newline) of every line from an offset on."""
        self._file.seek(start)
        for line in self._file:
            yield start, line
            start += len(line)

    def read(self, offset: int = 0) -> bytes | None:
        """The JSON text of the line at an offset; None if it was truncated or changed."""
        self._file.seek(offset)
        return strip_checksum(self._file.readline())

    def append(self, *values: object) -> None:
        """Write values at the end. Once this returns they survive a kill, and after `sync` a power cut.

        Nothing is buffered, so that an error on a full disk does not occur again when the file is closed.
        """
        data, handle = b"".join(map(add_checksum, values)), self._file.fileno()
        with suppress(OSError):
            lock_descriptor(handle, poll_interval=0.001)
        try:
            end = self._file.seek(0, os.SEEK_END)
            if end and os.pread(handle, 1, end - 1) != b"\n":
                data = b"\n" + data
            while data:
                data = data[os.write(handle, data) :]
        finally:
            with suppress(OSError):
                unlock_descriptor(handle)

    def truncate(self, end: int) -> None:
        """Remove everything from a byte offset on."""
        self._file.truncate(end)

    def sync(self) -> None:
        """Make all appended lines survive a power cut."""
        os.fsync(self._file.fileno())
