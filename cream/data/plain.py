"""Rows of local JSON and CSV files, one at a time, with unchanged values.

`datasets` would guess the types of columns, fill rows that are too short, shift rows that are too long, and crash on
lists nested too deeply.
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
from typing import IO, TYPE_CHECKING, NamedTuple

import msgspec

from cream.errors import UserError
from cream.files.raw import BOM, MOST, open_file, parse, read_lines
from cream.files.store import DEPTH, too_deep

if TYPE_CHECKING:
    from datasets import BuilderConfig

BLANK, VALUE = re.compile(r"\s*"), json.JSONDecoder()
UNPACK = {".xz": lzma.open, ".bz2": bz2.open}  # for tables only
PACKED = (".gz", ".zst", *UNPACK)


class Cells(NamedTuple):
    """What separates the cells of .csv files (None: a tab in .tsv files, else a comma), and whether their first line
    has the names of the columns; without it these are #1, #2, …"""

    sep: str | None = None
    header: bool = True


USUAL = Cells()


@dataclass
class FileRows:
    """The rows of local files, read again by each iteration. A row that lacks a column has null there."""

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
    """The rows of files, in their order, after a first pass that has checked them all.

    Raises UserError if a file cannot be read, there are no rows, or .csv files differ in their columns.
    """
    count, headers = 0, []
    for path in paths:
        columns = {}
        for row in read(path):
            columns |= row
            count += 1
        headers += [columns.keys()] if columns else []
    if not count:
        raise UserError(f"{place}: it holds no rows")
    every = dict.fromkeys(name for columns in headers for name in columns)
    differing = {name for columns in headers for name in every.keys() - columns}
    if differing and isinstance(read, partial) and read.func is _cells:
        raise UserError(f"{place}: not all of its files have the columns {', '.join(sorted(differing))}")
    return FileRows(lambda: (row for path in paths for row in read(path)), [*every], count)


def reader(form: str, cells: Cells = USUAL) -> Callable[[Path], Iterator[dict]] | None:
    """The reader of files of a form, as `datasets` names it; None: there is none here."""
    return {"json": _objects, "csv": partial(_cells, form=cells)}.get(form)


def card_reader(config: "BuilderConfig", form: str, cells: Cells) -> Callable[[Path], Iterator[dict]] | None:
    """The reader of a folder's files by the settings in the folder's card; None if they ask for more than is supported
    here."""
    usual, sep = vars(type(config)()), str(getattr(config, "sep", ","))
    odd = [name for name, value in vars(config).items() if name not in HARMLESS and value != usual[name]]
    if odd == ["field"]:  # of a JSON file, whose rows are the value of this key
        return partial(_objects, field=config.field)
    declared = cells._replace(sep=cells.sep or (sep if sep != "," else None))
    return None if odd or len(sep) != 1 else reader(form, declared)


@contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    with open_file(path) as file:
        if path.suffix not in UNPACK:
            yield file
            return
        try:
            yield UNPACK[path.suffix](file)
        except (lzma.LZMAError, OSError) as error:  # bz2 raises a plain OSError
            raise UserError(f"{path}: damaged, it cannot be unpacked: {error}") from None


def _cells(path: Path, form: Cells = USUAL) -> Iterator[dict[str, str]]:
    """The rows of a .csv file, each value a text. Raises UserError for one without a cell per column."""
    csv.field_size_limit(MOST)
    sep = form.sep or ("\t" if ".tsv" in path.suffixes else ",")
    columns, start = [], 1  # the line at which a row begins
    with _unpacked(path) as file:
        reader = csv.reader(_decoded(file, path), delimiter=sep, strict=True)
        try:
            for cells in reader:
                where, start = f"{path}, line {start}", reader.line_num + 1
                if not columns and form.header:
                    columns = _columns(cells, where)
                    continue
                columns = columns or [f"#{number}" for number, _ in enumerate(cells, 1)]
                if not cells or (len(cells) == 1 < len(columns) and not cells[0].strip()):  # an empty line
                    continue
                if len(cells) != len(columns):
                    raise UserError(
                        f"{where}: has {len(cells)} cells where the {'header' if form.header else 'first line'} has "
                        f"{len(columns)} columns; quote a cell that holds {sep!r}"
                    )
                yield dict(zip(columns, cells, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}, line {start}: cannot be read: {error}") from None


def _columns(names: list[str], where: str) -> list[str]:
    """The names of columns, unnamed ones as pandas would name them. Raises UserError for a repeated name."""
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


def _objects(path: Path, field: str | None = None) -> Iterator[dict]:
    """The rows of a JSON file, or of the list under a key of it. Raises UserError for other values, and for a repeated
    key in one object."""
    for where, data in _texts(path) if field is None else _texts_in(path, field):
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
    """Raises ValueError for a repeated key, since one of its values would be lost."""
    if len(keys := [key for key, _ in pairs]) > len({*keys}):
        raise ValueError(f"a key occurs twice in one object: {', '.join(keys):.200}")


def _texts(path: Path) -> Iterator[tuple[str, bytes]]:
    """(place, JSON text) of each row: of a list; of lines, if the first one is a whole value; or of values that follow
    each other."""
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


def _texts_in(path: Path, field: str) -> Iterator[tuple[str, bytes]]:
    with _unpacked(path) as file:
        parts = parse(file.read(), path, dict[str, msgspec.Raw])
    if field not in parts:
        raise UserError(f"{path}: has no key {field!r}, in which its folder's card says that the rows are")
    elements = parse(bytes(parts[field]), path, list[msgspec.Raw])
    yield from ((f"{path}, element {i} of {field}", bytes(raw)) for i, raw in enumerate(elements))


def _whole(line: bytes) -> bool:
    """Whether a line is one value, or invalid, rather than the beginning of a value or several of them."""
    try:
        parse(line, "")
    except UserError as error:
        after = re.search(r"trailing characters \(byte (\d+)\)", str(error))
        return "truncated" not in str(error) and (after is None or line[int(after[1]) :][:1] not in b'{["')
    return True


def _values(data: bytes, path: Path, number: int) -> Iterator[tuple[str, bytes]]:
    """(place, JSON text) of values that follow each other; the first line is `number`."""
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
        except ValueError:  # Python reads at most 4300 digits
            raise UserError(f"{where}: not valid JSON: a number has too many digits") from None
        yield where, text[start:end].encode()
        number += text.count("\n", start, end)


HARMLESS = ("name", "data_dir", "data_files", "description", "features", "version", "sep", "delimiter")  # settings
