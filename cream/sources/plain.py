"""Rows of local files of JSON and of cells, value by value as they stand, a row at a time.

`datasets` would guess the types of columns, fill rows that are too short, shift those that are too long, and end the
process on lists nested too deeply; of local files only .parquet, which has types, is left to it.
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
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from cream.errors import UserError
from cream.files import BOM, MOST, open_file, parse, read_lines
from cream.store import DEPTH, too_deep

if TYPE_CHECKING:
    from datasets import DatasetBuilder

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


def reader(place: object, builder: "DatasetBuilder") -> Callable[[Path], Iterator[dict]]:
    """What reads a folder's files as its card says. Raises UserError for what only `datasets` could heed."""
    config, read = builder.config, READERS[builder.name]
    plain, sep = vars(type(config)()), str(getattr(config, "sep", ","))
    odd = [name for name, value in vars(config).items() if name not in HEEDED and value != plain[name]]
    if odd := odd + ["sep"] * (len(sep) != 1):
        raise UserError(f"{place}: its README.md sets {', '.join(odd)}, heeded on the hub only; import its files")
    return partial(read, sep=sep) if read is _cells else read


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
                if not columns:  # a column without a name gets the one that pandas would give it
                    columns = [name or f"Unnamed: {index}" for index, name in enumerate(cells)]
                    if len({*columns}) < len(columns):
                        raise UserError(f"{where}: two columns have one name: {', '.join(columns)}")
                elif cells and len(cells) != len(columns):  # without any it is an empty line
                    raise UserError(
                        f"{where}: has {len(cells)} cells where the header has {len(columns)} columns; a cell that "
                        f"holds {sep!r} stands in quotes"
                    )
                elif cells:
                    yield dict(zip(columns, cells, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}, line {start}: cannot be read: {error}") from None


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
    """(the place, the JSON text) of each row: of a list, of objects that have several lines each, or line by line."""
    with _unpacked(path) as file:
        head = re.match(rb"\[|{\s*\n", file.peek(1).removeprefix(BOM).lstrip())
        if head is None:
            for number, line in enumerate(read_lines(file, path), 1):
                text = line.removeprefix(BOM) if number == 1 else line
                if not text.isspace():
                    yield f"{path}, line {number}", text
            return
        data = file.read(MOST + 1 if path.suffix in PACKED else -1)
    if path.suffix in PACKED and len(data) > MOST:
        raise UserError(f"{path}: unpacks to more than {MOST} bytes; give one row a line")
    data = data.removeprefix(BOM).strip()
    if head[0] == b"[":
        yield from ((f"{path}, element {i}", bytes(raw)) for i, raw in enumerate(parse(data, path, list[msgspec.Raw])))
    else:
        yield from ((f"{path}, object {i}", text) for i, text in enumerate(re.split(rb"(?<=\n})\s*\n(?={)", data)))


READERS = {"json": _objects, "csv": _cells}  # by the names of `datasets`
HEEDED = ("name", "data_dir", "data_files", "description", "features", "version", "sep", "delimiter")
