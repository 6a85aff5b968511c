"""Record files: read as a stream, written atomically; journal.py is for files that a stage is writing."""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from cream.errors import UserError
from cream.files.raw import (
    PACKED,
    atomic,
    open_file,
    parse,
    read_json,
    read_lines,
    read_whole,
    sync,
    update_json,
    write_json,
)
from cream.records import R, Record, decode, encode, kind_of, nouns

__all__ = ["atomic", "open_file", "read_json", "sync", "update_json", "write_json"]  # re-exported

RECORD_SUFFIXES = {".json", ".jsonl"} | PACKED
BLOCK = 1 << 16  # hashes that are compared at once
DEPTH = 100  # levels of lists and objects in a record
MALFORMED = "malformed record"  # the reason under which skipped ones are counted
NONE = "the file holds no records"
SKIP = "To skip such records: --on_bad_record skip"


# Reading ------------------------------------------------------------------------------------------------------------


class Raw(NamedTuple):
    """A record before validation: place in the file, uuid, plain JSON value."""

    where: str
    uuid: str
    value: object


class Bad(NamedTuple):
    """A malformed record: place in the file, uuid if known, reason, bytes."""

    where: str
    uuid: str | None
    reason: str
    data: bytes


def read(
    path: Path,
    kind: type[R],
    limit: int | None = None,
    *,
    skip: bool = False,
    unique: bool = True,
    refused: Mapping[str, str] = {},
) -> Iterator[R]:
    """The records of a file, or its first `limit`, one by one, of layout `kind`.

    A `.jsonl` file is streamed, with 8 bytes per record kept in memory; a `.json` file is read as bytes and decoded
    record by record. Raises UserError (file, line, uuid, JSON path) on a missing or damaged file and, without `skip`,
    on a malformed record, with the number of further ones, and on a duplicate uuid, at the latest at the end. With
    `unique` False nothing is kept in memory, and the caller rules out duplicates, or calls `check_unique`. `refused`:
    uuids of further malformed records, and why they are.
    """
    unique &= not skip  # skipped duplicates are bad records
    hashes = array("Q")
    records = _checked(path, kind, limit, _doubled(path, limit) if skip else frozenset(), refused)
    for record in records:
        if isinstance(record, Bad):
            if skip:
                continue
            more = sum(isinstance(other, Bad) for other in records)
            further = f"; {more} more bad records follow" if more else ""
            raise UserError(f"{record.where}: {record.reason}{further}. {SKIP}")
        yield record
        if unique:
            hashes.append(_hash(record.uuid))
            if not len(hashes) & (len(hashes) - 1):  # at every doubling, so that checking takes no longer than reading
                _refuse_doubles(path, hashes)
    _refuse_doubles(path, hashes)


def check_unique(path: Path) -> None:
    """Raises UserError if two records of a file have the same uuid. Reads the whole file, at 8 bytes per record."""
    _refuse_doubles(path, _hashes(path))


def rejected(path: Path, kind: type[R], limit: int | None = None, refused: Mapping[str, str] = {}) -> Iterator[dict]:
    """The records that `read` skips with `skip`: {"uuid" (else the place), "where", "reason", "record" (its text)}."""
    for bad in _checked(path, kind, limit, _doubled(path, limit), refused):
        if isinstance(bad, Bad):
            text = bad.data.decode(errors="backslashreplace")
            yield {"uuid": bad.uuid or bad.where, "where": bad.where, "reason": bad.reason, "record": text}


def nothing_left(path: Path, kind: type[Record], what: str, limit: int | None = None) -> UserError:
    """The error if all records of a file are skipped, with the reason for the first."""
    bad = next(rejected(path, kind, limit), None)
    return UserError(f"{path}: " + (f"no {what}; the first: {bad['where']}: {bad['reason']}" if bad else NONE))


def _checked(
    path: Path, kind: type[R], limit: int | None, doubled: frozenset[int], refused: Mapping[str, str] = {}
) -> Iterator[R | Bad]:
    """Each record of a file, as Bad if it cannot be used, or is among the `refused`, which say why. `doubled`: hashes
    of uuids that may occur more than once."""
    seen = set()
    for raw in islice(_entries(path), limit):
        if isinstance(raw, Bad):
            yield raw
            continue
        if doubled and _hash(raw.uuid) in doubled:
            if raw.uuid in seen:
                yield Bad(raw.where, raw.uuid, f"uuid {raw.uuid!r} occurs twice", msgspec.json.encode(raw.value))
                continue
            seen.add(raw.uuid)
        try:
            if raw.uuid in refused:
                raise UserError(f"record {raw.uuid!r}: {refused[raw.uuid]}")
            yield decode(kind, raw.uuid, raw.value, raw.where)
        except UserError as error:
            reason = str(error).removeprefix(f"{raw.where}: ")
            yield Bad(raw.where, raw.uuid, reason, msgspec.json.encode(raw.value))


def _hash(uuid: str) -> int:
    return xxhash.xxh3_64_intdigest(uuid.encode())


def _sort_and_find_doubles(hashes: array):
    """Sorts hashes in place; returns repeated ones as a numpy array."""
    import numpy as np

    ordered = np.asarray(hashes)
    ordered.sort()
    twice = [ordered[:0]]
    for start in range(0, len(ordered), BLOCK):  # comparing all at once would take a byte each
        block = ordered[start : start + BLOCK + 1]
        twice.append(block[1:][block[1:] == block[:-1]])
    return np.concatenate(twice)


def _hashes(path: Path, limit: int | None = None) -> array:
    return array("Q", (_hash(raw.uuid) for raw in islice(_entries(path), limit) if isinstance(raw, Raw)))


def _doubled(path: Path, limit: int | None) -> frozenset[int]:
    """The hashes that are shared by several uuids of a file's first `limit` records, which are read."""
    return frozenset(_sort_and_find_doubles(_hashes(path, limit)).tolist())


def _refuse_doubles(path: Path, hashes: array) -> None:
    """Raises UserError if two of the file's first uuids, whose xxh3-64 are `hashes`, are equal; sorts `hashes`. If two
    hashes are equal, that part of the file is read again to compare the uuids."""
    if not len(doubled := _sort_and_find_doubles(hashes)):
        return
    suspects, seen = {*doubled.tolist()}, set()
    for raw in islice((raw for raw in _entries(path) if isinstance(raw, Raw)), len(hashes)):
        if raw.uuid in seen:
            raise UserError(f"{raw.where}: uuid {raw.uuid!r} occurs twice; uuids must be unique. {SKIP}")
        if _hash(raw.uuid) in suspects:
            seen.add(raw.uuid)


def read_rows(path: Path) -> Iterator[dict]:
    """The records of a file as plain JSON objects with their uuid, unchecked."""
    for _, uuid, value in _entries(path):
        yield {"uuid": uuid, **(value if isinstance(value, dict) else {"messages": value})}


def is_record_file(path: Path) -> bool:
    """Whether a path has the suffix of a record file."""
    return _form(path) in (".json", ".jsonl")


def _form(path: Path) -> str | None:
    """The suffix that gives a file's layout."""
    return next((s for s in reversed(path.suffixes) if s not in PACKED), None)


def detect(path: Path, *, skip: bool = False) -> type[Record]:
    """The layout of a file's first record; with `skip`, of the first record with a known one. Otherwise raises a
    UserError that says what is wrong with the first record."""
    first = None
    for raw in _entries(path):
        kind = None if isinstance(raw, Bad) else kind_of(raw.value)
        if kind is not None:
            return kind
        why = raw.reason if isinstance(raw, Bad) else f"record {raw.uuid!r} has no known layout"
        first = first or f"{raw.where}: {why}; docs/formats.md shows them, prepare_data.py import reads other forms"
        if not skip:
            raise UserError(f"{first}. {SKIP}")
    raise UserError(f"{path}: {NONE}" + (f" of a known layout. The first: {first}" if first else ""))


def kind_in(path: Path) -> type[Record] | None:
    """The layout of the first record of a file that has a uuid; None if it has none, or is of no known layout."""
    return next((kind_of(raw.value) for raw in _entries(path) if isinstance(raw, Raw)), None)


def refuse_other_kind(flag: str, path: Path, kind: type[Record], made_by: str) -> None:
    """Raises UserError if the first record of a known layout in a file is of another kind than `flag` reads; what is
    wrong within a record of the right kind, or of none, is said by `read`."""
    for raw in _entries(path):
        held = None if isinstance(raw, Bad) else kind_of(raw.value)
        if held is not None:
            if held is not kind:
                text = f"holds {nouns(held)}; it should hold {nouns(kind)}, {made_by}"
                raise UserError(f"{flag} {path} {text}")
            return


def _entries(path: Path) -> Iterator[Raw | Bad]:
    """Each record of a file before validation; a record that is not JSON, or has no uuid, as Bad."""
    form = _form(path)
    if form == ".jsonl":
        with open_file(path) as file:
            for number, line in enumerate(read_lines(file, path), 1):
                if not line.isspace():
                    yield _entry(f"{path}, line {number}", line)
    elif form == ".json":
        data = read_whole(path)
        if data.lstrip()[:1] == b"[":
            for index, raw in enumerate(parse(data, path, list[msgspec.Raw])):
                yield _entry(f"{path}, element {index}", bytes(raw))
            return
        for uuid, raw in parse(data, path, dict[_Key, msgspec.Raw], lambda _type, key: _Key(key)).items():
            yield _entry(str(path), bytes(raw), str(uuid))
    else:
        raise UserError(f"{path}: expected a record file, which ends in .json or .jsonl (.gz or .zst may follow)")


class _Key(str):
    """An object's key that equals no other, so that a dict keeps duplicates."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


def _entry(where: str, data: bytes, uuid: str | None = None) -> Raw | Bad:
    """A record from its bytes, which include its uuid unless `uuid` is given."""
    try:
        value = parse(data, where)
        if too_deep(value, data):
            raise UserError(f"{where}: nested too deeply: in more than {DEPTH} levels")
    except UserError as error:
        reason = str(error).removeprefix(f"{where}: ")
        return Bad(where, uuid, reason if uuid is None else f"record {uuid!r}: {reason}", data)
    if uuid is None:
        if not isinstance(value, dict) or not isinstance(value.get("uuid"), str):
            return Bad(where, None, "expected an object with a `uuid`, a text", data)
        uuid = value.pop("uuid")
    return Raw(where, uuid, value)


def too_deep(value: object, data: bytes) -> bool:
    """Whether a value, whose JSON text is `data`, has more than DEPTH levels. Python's own limit depends on the call
    stack, so that one pass might read a record and the next one refuse it."""
    if data.count(b"[") + data.count(b"{") <= DEPTH:
        return False
    level, depth = [value], 0
    while level := [part for part in level if isinstance(part, dict | list)]:
        if (depth := depth + 1) > DEPTH:
            return True
        level = [part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole)]
    return False


# Writing ------------------------------------------------------------------------------------------------------------


def write(path: Path, records: Iterable[Record]) -> int:
    """Write a record file atomically, as its suffix says; returns the number of records."""
    return write_rows(path, (encode(record) for record in records))


def write_rows(path: Path, rows: Iterable[dict]) -> int:
    """Write encoded records atomically, one per line: `.jsonl` lines; a `.json` list for evaluation data, otherwise an
    object keyed by uuid (in which a conversation is its bare list of messages)."""
    count = 0
    lines, opening, closing = _form(path) == ".jsonl", b"", b""
    rows = iter(rows)
    first = list(islice(rows, 1))  # before the file is opened: an error at the first record writes nothing
    with atomic(path) as file:
        for count, row in enumerate(chain(first, rows), 1):
            if lines:
                file.write(msgspec.json.encode(row) + b"\n")
                continue
            if count == 1:
                in_list = "question" in row and "final_prediction" not in row
                opening, closing = (b"[\n", b"\n]\n") if in_list else (b"{\n", b"\n}\n")
            file.write(opening if count == 1 else b",\n")
            file.write(msgspec.json.encode(row) if opening == b"[\n" else _keyed(row))
        file.write(closing or (b"" if lines else b"{}\n"))
    return count


def _keyed(row: dict) -> bytes:
    """`"uuid": value`, as in CREAM's files: evaluation records keep their uuid inside as well."""
    key = msgspec.json.encode(row["uuid"])
    if row.keys() == {"uuid", "messages"}:
        return key + b":" + msgspec.json.encode(row["messages"])
    value = row if "question" in row else {name: v for name, v in row.items() if name != "uuid"}
    return key + b":" + msgspec.json.encode(value)
