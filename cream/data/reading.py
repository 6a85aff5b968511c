"""Rows of a data set: on the hub, in a folder with the hub's layout, or in one file.

plain.py reads local JSON and CSV files, `datasets` everything else: .parquet, the hub, and folders whose card has
settings other than a separator. What it caches of local data is removed after reading.
"""

import glob
import itertools
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import xxhash

from cream.cli.names import HUB_ID
from cream.data import Source, plain
from cream.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("cream")

LOADERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
SPLITS = re.compile(r"(?:^|\+)\s*([\w.-]+)")  # the names in train[:10]+test
FEW = 5  # files that are named
OFFLINE = "unset HF_HUB_OFFLINE and check the network, or read local files"


class Place(NamedTuple):
    """A hub id, a folder or a file, and the part of it."""

    path: str
    subset: str | None = None
    split: str = "train"

    @property
    def file(self) -> Path | None:
        """The file, if it is one."""
        return Path(self.path) if Path(self.path).is_file() else None

    def __str__(self) -> str:
        if self.file:
            return self.path
        return f"{self.path} ({', '.join(part for part in (self.subset, self.split) if part)})"


@contextmanager
def open_rows(place: Place, cells: plain.Cells = plain.USUAL) -> "Iterator[Dataset | plain.FileRows]":
    """The rows of a place, open within `with`; `cells`: the form of its .csv files. Raises UserError if it does not
    exist, or cannot be reached or read."""
    local = Path(place.path).exists()
    if not local and not HUB_ID.fullmatch(place.path):
        raise UserError(f"{place.path}: no such file or folder, and not an id of a data set on the hub (owner/name)")
    with tempfile.TemporaryDirectory() as cache:
        if place.file:
            table = _file(place, cache, cells)
        else:
            table = _folder(place, cache, cells) if local else _as_written(place, {})
        if cells != plain.USUAL and not isinstance(table, plain.FileRows):
            raise UserError(f"{place}: --sep and columns by number (#1) are for local .csv files")
        yield table


def _file(place: Place, cache: str, cells: plain.Cells) -> "Dataset | plain.FileRows":
    form = LOADERS.get(_suffix(place.file))
    if form is None:
        raise UserError(f"{place.path}: expected a file that ends in {', '.join(LOADERS)} (.gz or .zst may follow)")
    if read := plain.reader(form, cells):
        return plain.rows(place, [place.file], read)
    import datasets

    with _explain_errors(place, local=True):
        name = glob.escape(os.path.abspath(place.path))
        return datasets.load_dataset(form, data_files=name, split=place.split, cache_dir=cache)


def _folder(place: Place, cache: str, cells: plain.Cells) -> "Dataset | plain.FileRows":
    """The rows of a folder with the hub's layout, or of a part of them."""
    import datasets

    path = os.path.abspath(place.path)  # "." has no name
    with _explain_errors(place, local=True):
        builder = datasets.load_dataset_builder(path, place.subset, cache_dir=cache)
        files = {str(split): read for split, read in (builder.config.data_files or {}).items()}
        splits = [*files] if place.split == "all" else [name for name in files if name in SPLITS.findall(place.split)]
        for split in splits:
            read = files[split]
            more = f" and {len(read) - FEW} more" if len(read) > FEW else ""  # if there are several forms, of one
            names = ", ".join(os.path.relpath(each, place.path) for each in read[:FEW])
            log.info("%s: its files are %s%s", place, names, more)
        local = {split: _unzipped(files[split], cache) for split in splits}
    reader = plain.card_reader(builder.config, builder.name, cells)
    if not local or reader is None or not all(_is_plain(each) for read in local.values() for each in read):
        return _as_written(place, {"cache_dir": cache})
    return _part(place, {split: plain.rows(place, read, reader) for split, read in local.items()})


def _unzipped(files: Iterable[str], cache: str) -> list[Path]:
    """The files, with those inside .zip archives in place of the archives."""
    import datasets

    manager = datasets.DownloadManager(download_config=datasets.DownloadConfig(cache_dir=cache))
    inside = (manager.iter_files(manager.extract(each)) if each.endswith(".zip") else [each] for each in files)
    return [Path(each) for every in inside for each in every]


def _part(place: Place, splits: dict[str, plain.FileRows]) -> plain.FileRows:
    """The rows of an instruction such as train[:10] or train+test[50%:]."""
    import datasets

    if place.split in splits:
        return splits[place.split]
    with _explain_errors(place, local=True):
        text = "+".join(splits) if place.split == "all" else place.split
        parts = datasets.ReadInstruction.from_spec(text).to_absolute({name: len(rows) for name, rows in splits.items()})
    columns = list(dict.fromkeys(name for part in parts for name in splits[part.splitname].column_names))

    def read() -> Iterator[dict]:
        for part in parts:
            yield from itertools.islice(splits[part.splitname].read(), part.from_, part.to)

    return plain.FileRows(read, columns, sum(part.to - part.from_ for part in parts))


def _as_written(place: Place, cache: dict) -> "Dataset":
    """The rows of a data set on the hub, or in a folder that plain.py cannot read, by `datasets`: cells of .csv files
    as texts. Raises UserError for columns of JSON files in which it changes texts."""
    import datasets

    path = os.path.abspath(place.path) if cache else place.path
    with _explain_errors(place, local=bool(cache)):
        load = partial(datasets.load_dataset, path, place.subset, split=place.split, **cache)
        table = load()
        if table.info.builder_name == "csv":
            texts = datasets.Features(dict.fromkeys(table.column_names, datasets.Value("string")))
            return load(features=texts, keep_default_na=False)
    guessed = [name for name, feature in table.features.items() if _is_guessed(feature)]
    if table.info.builder_name == "json" and guessed:
        raise UserError(
            f"{place}: `datasets` takes texts in {', '.join(guessed)} for other values (1.50 for a number, 2024-01-05 "
            "for a time). Import a downloaded copy of the file by its path"
        )
    return table


def _is_guessed(feature: object) -> bool:
    """Whether a column, or a part of it, has a type that `datasets` gives to texts of JSON files: a time, or its type
    Json, by which the text "true" becomes true."""
    import datasets

    if isinstance(feature, datasets.Value):
        return feature.dtype.startswith(("timestamp", "date", "time", "duration"))
    parts = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return isinstance(feature, datasets.Json) or any(_is_guessed(part) for part in parts if part is not None)


def _is_plain(file: Path) -> bool:
    return plain.reader(LOADERS.get(_suffix(file), "")) is not None


@contextmanager
def _explain_errors(place: Place, local: bool) -> Iterator[None]:
    """Within it `datasets` is quiet, and its errors, of a dozen kinds, become UserErrors."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every attempt
    try:
        yield
    except Exception as error:
        raise UserError(f"{place}: {_why(error, local)}") from None


def _suffix(path: Path) -> str:
    return next((suffix for suffix in reversed(path.suffixes) if suffix not in plain.PACKED), "").lower()


def _why(error: Exception, local: bool) -> str:
    """The cause in one line, and what to do."""
    cause = error.__cause__ or error
    text = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    if not local and isinstance(error, ConnectionError | OSError):
        return f"not in the cache, and the hub cannot be reached ({text}); {OFFLINE}"
    return f"cannot be read: {text}"


def rows(place: Place, columns: tuple[str, ...] | None = None) -> list[dict]:
    """All rows, with those of the `columns` that exist. Raises UserError as `open_rows` does, and if there are none."""
    with open_rows(place) as table:
        names = [name for name in table.column_names if columns is None or name in columns]
        if not names or not len(table):
            has = ", ".join(table.column_names[:20])
            raise UserError(f"{place}: has no rows, or none of the columns {', '.join(columns or ())} (it has: {has})")
        return list(table.select_columns(names))


def digest(table: Iterable[dict]) -> str:
    """xxh3-128 of the rows' JSON, 32 hex digits; independent of the file format."""
    hashed = xxhash.xxh3_128()
    for row in table:
        hashed.update(msgspec.json.encode(row) + b"\n")
    return hashed.hexdigest()


# Local copies ---------------------------------------------------------------------------------------------------------


def find(folder: Path, source: Source, split: str) -> Place | None:
    """A split in a folder: in a mirror of the hub's data set, else in a file recognised by its name; None: not there.

    A mirror is FOLDER/owner/name or FOLDER/name, with a README.md. A file's name (if no file's does, its path below
    FOLDER) holds one of the source's names and one of the split's words, whatever their case and punctuation. Raises
    UserError if two files fit equally well, or there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"--from {folder}: no such folder")
    about = source.splits[split]
    for mirror in (folder / source.hub, folder / source.hub.partition("/")[2]):
        if (mirror / "README.md").is_file():
            place = Place(str(mirror), source.subset, about.hub)
            return place if about.hub in _splits(place) else None
    ours = (".meta.json", ".rejected.jsonl")  # next to outputs of stages
    files = [path for path in folder.rglob("*") if path.is_file() and _suffix(path) in LOADERS]
    files = sorted(path for path in files if not path.name.endswith(ours))
    for part in (lambda path: path.name, lambda path: str(path.relative_to(folder))):
        for word in about.words or (about.hub,):
            fits = [path for path in files if _named(part(path), source.names, word)]
            if len(fits) > 1:
                names = ", ".join(map(str, fits))
                raise UserError(f"{folder}: {source.name}, {split}: several files fit: {names}; keep one of them")
            if fits:
                return Place(str(fits[0]))
    return None


def _splits(mirror: Place) -> list[str]:
    """The splits of a mirror's configuration; none if it lacks that. Raises UserError for a damaged mirror."""
    import datasets

    with tempfile.TemporaryDirectory() as cache, _explain_errors(mirror, local=True):
        if mirror.subset not in (None, *datasets.get_dataset_config_names(mirror.path)):
            return []
        builder = datasets.load_dataset_builder(mirror.path, mirror.subset, cache_dir=cache)
        return [*map(str, builder.config.data_files or {})]  # without reading them


def _named(text: str, names: tuple[str, ...], word: str) -> bool:
    """Whether a name or path has one of the names, and the word, as separate words."""
    text, word, *names = (f" {' '.join(re.findall(r'[a-z0-9]+', each.lower()))} " for each in (text, word, *names))
    return word in text and any(name in text for name in names)
