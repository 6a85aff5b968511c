"""Reading and writing record files: streamed in, atomic out. journal.py builds on it what a running stage needs."""

import gzip
import io
import os
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import IO

import msgspec
import xxhash

from cream.errors import UserError
from cream.records import R, Record, decode, encode, kind_of

PACKED = {".gz", ".zst"}
RECORD_SUFFIXES = {".json", ".jsonl"} | PACKED


# Reading ------------------------------------------------------------------------------------------------------------


def read(path: Path, kind: type[R], limit: int | None = None) -> Iterator[R]:
    """The records of a file, one by one, each of layout `kind`; only its first `limit`, if that is given.

    A `.jsonl` file is streamed, and 8 bytes a record stay in memory; a `.json` file is held as bytes and decoded record
    by record. Raises UserError (file, uuid, JSON path) on a missing file, a malformed record, a duplicate uuid. That of
    a duplicate may come after further records, but before the iteration ends.
    """
    hashes = array("Q")
    for uuid, value in islice(_raw_records(path), limit):
        hashes.append(xxhash.xxh3_64_intdigest(uuid.encode()))
        yield decode(kind, uuid, value, str(path))
        if not len(hashes) & (len(hashes) - 1):  # at every doubling, so that checking costs no more than reading
            _check_unique(path, hashes)
    _check_unique(path, hashes)


def _check_unique(path: Path, hashes: array) -> None:
    """Raises UserError when two of the file's first uuids are equal, whose xxh3-64 hashes these are; sorts them.

    Where two hashes are equal, that part of the file is read a second time, to compare and to name the uuids.
    """
    import numpy as np

    ordered = np.asarray(hashes)
    ordered.sort()  # in place: their order is of no other use
    if not len(doubled := ordered[1:][ordered[1:] == ordered[:-1]]):
        return
    suspects, seen = {*doubled.tolist()}, set()
    for uuid, _ in islice(_raw_records(path), len(hashes)):
        if uuid in seen:
            raise UserError(f"{path}: uuid {uuid!r} stands there twice; uuids must be unique")
        if xxhash.xxh3_64_intdigest(uuid.encode()) in suspects:
            seen.add(uuid)


def read_rows(path: Path) -> Iterator[dict]:
    """The records of a file as plain JSON objects with their uuid, unchecked: for files just written."""
    for uuid, value in _raw_records(path):
        yield {"uuid": uuid, **(value if isinstance(value, dict) else {"messages": value})}


def is_record_file(path: Path) -> bool:
    """Whether a path's suffix says that it is a record file and not a folder."""
    return [s for s in path.suffixes if s not in PACKED][-1:] in ([".json"], [".jsonl"])


def detect(path: Path) -> type[Record]:
    """The layout of a file's first record. Raises UserError when it is none that the stages exchange."""
    for uuid, value in _raw_records(path):
        kind = kind_of(value)
        if kind is None:
            raise UserError(f"{path}: record {uuid!r} follows no known layout; docs/formats.md shows them")
        return kind
    raise UserError(f"{path}: the file holds no records")


def _raw_records(path: Path) -> Iterator[tuple[str, object]]:
    """(uuid, plain JSON value) of each record, before validation."""
    form = [s for s in path.suffixes if s not in PACKED][-1:]
    if form == [".jsonl"]:
        yield from _raw_lines(path)
    elif form == [".json"]:
        yield from _raw_object(path)
    else:
        raise UserError(f"{path}: a record file ends in .json or .jsonl (.gz or .zst may follow)")


def _raw_lines(path: Path) -> Iterator[tuple[str, object]]:
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            value = _parse(line, f"{path}, line {number}")
            if not isinstance(value, dict) or not isinstance(value.get("uuid"), str):
                raise UserError(f"{path}, line {number}: a line is an object with its `uuid`")
            uuid = value.pop("uuid")
            yield uuid, value


class _Key(str):
    """An object's key; a type of its own so that msgspec shows us every one, duplicates included."""


def _raw_object(path: Path) -> Iterator[tuple[str, object]]:
    with open_file(path) as file:
        data = file.read()
    if data.lstrip()[:1] == b"[":
        for index, raw in enumerate(_parse(data, path, list[msgspec.Raw])):
            value = _parse(raw, f"{path}, element {index}")
            if not isinstance(value, dict) or not isinstance(value.get("uuid"), str):
                raise UserError(f"{path}, element {index}: expected an object with a `uuid`")
            uuid = value.pop("uuid")
            yield uuid, value
        return
    seen: set[str] = set()

    def note(_type, key: str) -> _Key:
        if key in seen:
            raise ValueError(f"uuid {key!r} stands there twice")
        seen.add(key)
        return _Key(key)

    for uuid, raw in _parse(data, path, dict[_Key, msgspec.Raw], note).items():
        yield str(uuid), _parse(raw, f"{path}: record {str(uuid)!r}")


def _parse(data: bytes, where: object, kind: type = object, hook=None) -> object:
    try:
        return msgspec.json.decode(data, type=kind, dec_hook=hook)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None


def read_json(path: Path) -> object:
    """A whole JSON file of any layout."""
    with open_file(path) as file:
        return _parse(file.read(), path)


@contextmanager
def open_file(path: Path) -> Iterator[IO[bytes]]:
    """A file open for reading bytes, unpacked by its suffix. Raises UserError when it cannot be opened."""
    try:
        with open(path, "rb") as plain:
            if path.suffix == ".gz":
                yield io.BufferedReader(gzip.GzipFile(fileobj=plain))
            elif path.suffix == ".zst":
                import zstandard

                try:
                    yield io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(plain, read_across_frames=True))
                except zstandard.ZstdError as error:
                    raise UserError(f"{path}: damaged, it cannot be unpacked: {error}") from None
            else:
                yield plain
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder where a file is expected") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged, it cannot be unpacked: {error}") from None


# Writing ------------------------------------------------------------------------------------------------------------


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears whole under its name, or not at all: temporary file, fsync, rename, fsync of the folder.

    On an error nothing stays behind, nor do folders that were made for it.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as plain:
            with _packer(plain, path.suffix) as file:
                yield file
            plain.flush()
            os.fsync(plain.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        with suppress(OSError):  # another process may have put something there
            for folder in made:
                folder.rmdir()
        raise


@contextmanager
def _packer(plain: IO[bytes], suffix: str) -> Iterator[IO[bytes]]:
    if suffix == ".gz":
        with gzip.GzipFile(fileobj=plain, mode="wb", mtime=0, filename="") as file:
            yield file
    elif suffix == ".zst":
        import zstandard

        with zstandard.ZstdCompressor().stream_writer(plain, closefd=False) as file:
            yield file
    else:
        yield plain


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: object) -> None:
    """One JSON value, indented, atomically."""
    with atomic(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def write(path: Path, records: Iterable[Record]) -> int:
    """A record file, atomically, in the form that its suffix names; returns the number of records."""
    return write_rows(path, (encode(record) for record in records))


def write_rows(path: Path, rows: Iterable[dict]) -> int:
    """Encoded records, one a line in every form, atomically: `.jsonl` lines; a `.json` list for evaluation data, an
    object keyed by uuid for all else (there a conversation is its bare list of messages)."""
    count = 0
    lines, opening, closing = ".jsonl" in path.suffixes, b"", b""
    rows = iter(rows)
    first = list(islice(rows, 1))  # before the file is opened: what fails at its first record touches nothing
    with atomic(path) as file:
        for count, row in enumerate(chain(first, rows), 1):
            if lines:
                file.write(msgspec.json.encode(row) + b"\n")
                continue
            if count == 1:
                opening, closing = (b"[\n", b"\n]\n") if _in_list(row) else (b"{\n", b"\n}\n")
            file.write(opening if count == 1 else b",\n")
            file.write(msgspec.json.encode(row) if opening == b"[\n" else _keyed(row))
        file.write(closing or (b"" if lines else b"{}\n"))
    return count


def _in_list(row: dict) -> bool:
    return "question" in row and "final_prediction" not in row


def _keyed(row: dict) -> bytes:
    """`"uuid": value`, as the method's files have it: evaluation records keep their uuid inside as well."""
    key = msgspec.json.encode(row["uuid"])
    if row.keys() == {"uuid", "messages"}:
        return key + b":" + msgspec.json.encode(row["messages"])
    value = row if "question" in row else {name: v for name, v in row.items() if name != "uuid"}
    return key + b":" + msgspec.json.encode(value)
