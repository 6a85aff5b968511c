"""Rows of a data set: of the hub by its id, of a folder laid out as the hub's are, or of one file.

Local files of JSON and of cells are read here, value by value as they stand. `datasets` reads the others; what it makes
of the hub's stays in its usual cache, what it makes of local ones goes when they have been read. It guesses the types
of columns, fills rows that are too short, shifts those that are too long, and ends the process on lists nested too
deeply; of local files only .parquet, which has types, is left to it.
"""

import bz2
import csv
import io
import json
import logging
import lzma
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import msgspec
import xxhash

from cream.errors import UserError
from cream.files import BOM, MOST, open_file, parse, read_lines
from cream.names import HUB_ID
from cream.sources import Source
from cream.store import DEPTH, _too_deep

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

log = logging.getLogger("cream")

LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
UNPACK = {".xz": lzma.open, ".bz2": bz2.open}  # what tables alone may be packed as
PACKED = (".gz", ".zst", *UNPACK)
FEW = 5  # files that are named
OFFLINE = "unset HF_HUB_OFFLINE and check the network, or read local files"


class Place(NamedTuple):
    """Where rows stand: a hub id, a folder or a file, and which part of it."""

    path: str
    subset: str | None = None
    split: str = "train"

    @property
    def file(self) -> Path | None:
        """The file, where it is one."""
        return Path(self.path) if Path(self.path).is_file() else None

    def __str__(self) -> str:
        if self.file:
            return self.path
        return f"{self.path} ({', '.join(part for part in (self.subset, self.split) if part)})"


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


@contextmanager
def opened(place: Place) -> "Iterator[Dataset | FileRows]":
    """The rows of a place, open within `with`. Raises UserError where it is not there, cannot be reached or read."""
    local = Path(place.path).exists()
    if not local and not HUB_ID.fullmatch(place.path):
        raise UserError(f"{place.path}: no such file or folder, and no id of a data set on the hub (owner/name)")
    with tempfile.TemporaryDirectory() as cache:
        yield _file(place, cache) if place.file else _load(place, cache if local else None)


def _file(place: Place, cache: str) -> "Dataset | FileRows":
    form = LOADERS.get(_suffix(place.file))
    if form is None:
        raise UserError(f"{place.path}: expected a file that ends in {', '.join(LOADERS)} (.gz or .zst may follow)")
    if form in OURS:
        return _table(place, [place.file], OURS[form])
    import datasets

    with _told(place, local=True):
        return datasets.load_dataset(form, data_files=_literal(place.path), split=place.split, cache_dir=cache)


def _load(place: Place, cache: str | None) -> "Dataset | FileRows":
    """The rows of the hub's (`cache` None), or of a folder."""
    import datasets

    path = os.path.abspath(place.path) if cache else place.path  # "." has no name
    with _told(place, local=cache is not None):
        if cache is None:
            return _told_of_guesses(place, datasets.load_dataset(path, place.subset, split=place.split))
        builder = datasets.load_dataset_builder(path, place.subset, cache_dir=cache)
        files = builder.config.data_files or {}
        if read := files.get(place.split):
            more = f" and {len(read) - FEW} more" if len(read) > FEW else ""  # of files of several forms it takes one
            told = ", ".join(os.path.relpath(each, place.path) for each in read[:FEW])
            log.info("%s: its files are %s%s", place, told, more)
        if builder.name not in OURS:
            return datasets.load_dataset(path, place.subset, split=place.split, cache_dir=cache)
    if not read:
        raise UserError(f"{place}: has no split {place.split!r}; it has: {', '.join(map(str, files))}")
    return _table(place, [Path(each) for each in read], _reader(place, builder))


def _told_of_guesses(place: Place, found: "Dataset") -> "Dataset":
    """The rows of a data set on the hub, as the library's cache has them; a warning where that guessed their types."""
    guessed = [name for name, feature in found.features.items() if "string" not in getattr(feature, "dtype", "")]
    if found.info.builder_name == "csv" and guessed:
        log.warning(
            "%s: its files are .csv; in %s texts such as 009 may have become numbers. In a downloaded copy of its "
            "folder every cell is read as it stands",
            place,
            ", ".join(guessed),
        )
    return found


@contextmanager
def _told(place: Place, local: bool) -> Iterator[None]:
    """The library keeps to itself within it; what it raises, of a dozen kinds, becomes a UserError."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt
    try:
        yield
    except Exception as error:
        raise UserError(f"{place}: {_why(error, local)}") from None


def _suffix(path: Path) -> str:
    return next((suffix for suffix in reversed(path.suffixes) if suffix not in PACKED), "").lower()


def _literal(path: str) -> str:
    """A path whose signs are no pattern of several."""
    return re.sub(r"([*?\[])", r"[\1]", os.path.abspath(path))


def _why(error: Exception, local: bool) -> str:
    """What went wrong, in one line, and what to do."""
    cause = error.__cause__ or error
    told = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    if not local and isinstance(error, ConnectionError | OSError):
        return f"not in the cache, and the hub cannot be reached ({told}); {OFFLINE}"
    return f"cannot be read: {told}"


def rows(place: Place, columns: tuple[str, ...] | None = None) -> list[dict]:
    """All rows, of those `columns` that are there. Raises UserError as `opened` does, and where there are none."""
    with opened(place) as found:
        kept = [name for name in found.column_names if columns is None or name in columns]
        if not kept or not len(found):
            told = ", ".join(found.column_names[:20])
            raise UserError(f"{place}: has no rows, or none of the columns {', '.join(columns or ())} (it has: {told})")
        return list(found.select_columns(kept))


def digest(table: Iterable[dict]) -> str:
    """xxh3-128 of the rows' JSON, 32 hex digits: the same for one content, whatever holds it."""
    hashed = xxhash.xxh3_128()
    for row in table:
        hashed.update(msgspec.json.encode(row) + b"\n")
    return hashed.hexdigest()


# Local files ----------------------------------------------------------------------------------------------------------


def _table(place: Place, paths: Sequence[Path], read: Callable[[Path], Iterator[dict]]) -> FileRows:
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


def _reader(place: Place, builder: "DatasetBuilder") -> Callable[[Path], Iterator[dict]]:
    """What reads a folder's files as its card says. Raises UserError for what only `datasets` could heed."""
    config, read = builder.config, OURS[builder.name]
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
        if _too_deep(row, data):
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


OURS = {"json": _objects, "csv": _cells}  # by the names of `datasets`
HEEDED = ("name", "data_dir", "data_files", "description", "features", "version", "sep", "delimiter")


# Local copies ---------------------------------------------------------------------------------------------------------


def find(folder: Path, source: Source, split: str) -> Place | None:
    """Where a folder has a split: as a mirror of the hub's data set, else as a file that its name tells. None: nowhere.

    A mirror is FOLDER/owner/name or FOLDER/name, a folder with README.md. A file's name holds one of the source's names
    and one of the split's words; where none does, its path below FOLDER may. Case and signs between words do not count.
    Raises UserError where two files fit equally well, or there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"--from {folder}: no such folder")
    about = source.splits[split]
    for mirror in (folder / source.hub, folder / source.hub.partition("/")[2]):
        if (mirror / "README.md").is_file():
            place = Place(str(mirror), source.subset, about.hub)
            return place if about.hub in _splits(place) else None
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _holds_rows(path))
    for part in (lambda path: path.name, lambda path: str(path.relative_to(folder))):
        for word in about.words or (about.hub,):
            fits = [path for path in files if _named(part(path), source.names, word)]
            if len(fits) > 1:
                told = ", ".join(map(str, fits))
                raise UserError(f"{folder}: {source.name}, {split}: several files fit: {told}; leave one there")
            if fits:
                return Place(str(fits[0]))
    return None


def _holds_rows(path: Path) -> bool:
    """Whether a file may be data: by its suffix, and not what stages leave beside their outputs."""
    return _suffix(path) in LOADERS and not path.name.endswith((".meta.json", ".rejected.jsonl"))


def _splits(mirror: Place) -> list[str]:
    """The splits that a mirror has of a configuration; none where it lacks that. Raises UserError for a damaged one."""
    import datasets

    with tempfile.TemporaryDirectory() as cache, _told(mirror, local=True):
        if mirror.subset not in (None, *datasets.get_dataset_config_names(mirror.path)):
            return []
        builder = datasets.load_dataset_builder(mirror.path, mirror.subset, cache_dir=cache)
        return [*map(str, builder.config.data_files or {})]  # without a look into them


def _named(text: str, names: tuple[str, ...], word: str) -> bool:
    """Whether a name or path holds one of the names, and the word, as words of its own."""
    spaced = _spaced(text)
    return _spaced(word) in spaced and any(_spaced(name) in spaced for name in names)


def _spaced(text: str) -> str:
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "
