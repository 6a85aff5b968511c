"""Rows of local files of JSON and of cells, value by value as they stand, a row at a time.

`datasets` would guess the types of columns, fill rows that are too short, shift those that are too long, and end the
process on lists nested too deeply; what is left to it of local files, reading.py says.
"""

import bz2
import csv
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from cream.errors import UserError
from cream.files.raw import BOM, MOST, open_file, parse, read_lines
from cream.files.store import DEPTH, too_deep

if TYPE_CHECKING:
    from datasets import BuilderConfig

BLANK, VALUE = re.compile(r"\s*"), json.JSONDecoder()
UNPACK = {".xz": lzma.open, ".bz2": bz2.open}  # what tables alone may be packed as
PACKED = (".gz", ".zst", *UNPACK)


@dataclass
class FileRows:
    """The rows of local files, read anew whenever they are gone through. Each has every column, null where it
    lacks that."""

    read: Callable[[], Iterator[dict]]
    column_names: list[str]
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict]:
        for row in self.read():
            yield {name: row.get(name) for name in self.column_names}

    def select_columns(self, names: list[str]) -> "FileRows":
        return replace(self, column_names=names)


def rows(place: object, paths: Sequence[Path], read: Callable[[Path], Iterator[dict]]) -> FileRows:
    """The rows of files, in their order, all of which can be read: a pass of its own looks at each.

    Raises UserError where one cannot, there are none, or files of cells differ in their columns.
    """
    count, found = 0, []
    for path in paths:
        columns = {}
        for row in read(path):
            columns |= row
            count += 1
        found += [columns.keys()] if columns else []
    if not count:
        raise UserError(f"{place}: it holds no rows")
    every = dict.fromkeys(name for columns in found for name in columns)
    if read is not _objects and (differing := {name for columns in found for name in every.keys() - columns}):
        raise UserError(f"{place}: not all of its files have the columns {', '.join(sorted(differing))}")
    return FileRows(lambda: (row for path in paths for row in read(path)), [*every], count)


def reader(config: "BuilderConfig", form: str) -> Callable[[Path], Iterator[dict]] | None:
    """What reads a folder's files of a form, `datasets`' name of it, as the card says; None where it asks for more than
    is read here."""
    usual, sep = vars(type(config)()), str(getattr(config, "sep", ","))
    odd = [name for name, value in vars(config).items() if name not in NAMES and value != usual[name]]
    if odd or len(sep) != 1 or form not in READERS:
        return None
    return partial(_cells, sep=sep) if form == "csv" else READERS[form]


@contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    with open_file(path) as file:
        if path.suffix not in UNPACK:
            yield file
            return
        try:
            yield UNPACK[path.suffix](file)
        except (lzma.LZMAError, OSError) as error:  # that of bz2 is a plain OSError
            raise UserError(f"{path}: damaged, it cannot be unpacked: {error}") from None


def _cells(path: Path, sep: str = ",") -> Iterator[dict[str, str]]:
    """The rows of a file of cells, each a text. Raises UserError for one that has not a cell for each column."""
    csv.field_size_limit(MOST)
    columns, start = [], 1  # the line at which a row begins
    with _unpacked(path) as file:
        reader = csv.reader(_decoded(file, path), delimiter=sep, strict=True)
        try:
            for cells in reader:
                where, start = f"{path}, line {start}", reader.line_num + 1
                if not columns:
                    columns = _columns(cells, where)
                elif not cells or (len(cells) == 1 < len(columns) and not cells[0].strip()):  # an empty line
                    continue
                elif len(cells) != len(columns):
                    raise UserError(
                        f"{where}: has {len(cells)} cells where the header has {len(columns)} columns; a cell that "
                        f"holds {sep!r} stands in quotes"
                    )
                else:
                    yield dict(zip(columns, cells, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}, line {start}: cannot be read: {error}") from None


def _columns(names: list[str], where: str) -> list[str]:
    """The names of columns; one without gets that which pandas would give it. Raises UserError where one is twice."""
    named, columns = [name for name in names if name], []
    if len(named) > len({*named}):
        raise UserError(f"{where}: two columns have one name: {', '.join(names)}")
    for index, name in enumerate(names):
        while not name or name in columns or (name != names[index] and name in named):
            name = f"{name}.1" if name else f"Unnamed: {index}"
        columns.append(name)
    return columns


def _decoded(file: IO[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(read_lines(file, path), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid UTF-8: {error}") from None
        yield from io.StringIO(text, newline="")  # lines may end with a bare \r


def _objects(path: Path) -> Iterator[dict]:
    """The rows of a file of JSON. Raises UserError for what is none, or has a key twice in one object."""
    for where, data in _texts(path):
        row = parse(data, where)
        if too_deep(row, data):
            raise UserError(f"{where}: nested too deeply: in more than {DEPTH} levels")
        if not isinstance(row, dict | str):
            raise UserError(f"{where}: expected an object with the columns of a row, found {row!r:.60}")
        try:
            json.loads(data, object_pairs_hook=_once, parse_int=str, parse_float=str)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        yield {"text": row} if isinstance(row, str) else row


def _once(pairs: list[tuple[str, object]]) -> None:
    """Raises ValueError where a key stands twice, of which one value would be lost."""
    if len(keys := [key for key, _ in pairs]) > len({*keys}):
        raise ValueError(f"a key stands twice in one object: {', '.join(keys):.200}")


def _texts(path: Path) -> Iterator[tuple[str, bytes]]:
    """(the place, the JSON text) of each row: of a list, line by line where the first is a whole one, or of values that
    lines do not part."""
    with _unpacked(path) as file:
        lines = enumerate(read_lines(file, path), 1)
        number, first = next(((n, line) for n, line in lines if line.removeprefix(BOM).strip()), (1, b""))
        first = first.removeprefix(BOM) if number == 1 else first
        if first.lstrip()[:1] != b"[" and _whole(first):
            for at, line in chain([(number, first)], lines):
                if not line.isspace():
                    yield f"{path}, line {at}", line
            return
        data = first + file.read(MOST + 1 if path.suffix in PACKED else -1)
    if path.suffix in PACKED and len(data) > MOST:
        raise UserError(f"{path}: unpacks to more than {MOST} bytes; give one row a line")
    if data.lstrip()[:1] == b"[":
        yield from ((f"{path}, element {i}", bytes(raw)) for i, raw in enumerate(parse(data, path, list[msgspec.Raw])))
    else:
        yield from _values(data, path, number)


def _whole(line: bytes) -> bool:
    """Whether a line ends no later than the value that begins in it: that is one, or is wrong before its end, or what
    follows it is no value."""
    try:
        parse(line, "")
    except UserError as error:
        after = re.search(r"trailing characters \(byte (\d+)\)", str(error))
        return "truncated" not in str(error) and (after is None or line[int(after[1]) :][:1] not in b'{["')
    return True


def _values(data: bytes, path: Path, number: int) -> Iterator[tuple[str, bytes]]:
    """Values that follow each other, with the line that each begins in; the first line is `number`."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8: {error}") from None
    end = 0
    while (start := BLANK.match(text, end).end()) < len(text):
        number += text.count("\n", end, start)
        where = f"{path}, line {number}"
        try:
            _, end = VALUE.raw_decode(text, start)
        except RecursionError:
            raise UserError(f"{where}: nested too deeply: in more than {DEPTH} levels") from None
        except json.JSONDecodeError as error:
            at = number + text.count("\n", start, error.pos)
            raise UserError(f"{path}, line {at}: not valid JSON: {error.msg}") from None
        except ValueError:  # of digits Python reads 4300
            raise UserError(f"{where}: not valid JSON: a number has too many digits") from None
        yield where, text[start:end].encode()
        number += text.count("\n", start, end)


READERS = {"json": _objects, "csv": _cells}  # by the names of `datasets`
NAMES = ("name", "data_dir", "data_files", "description", "features", "version", "sep", "delimiter")  # decide no more
