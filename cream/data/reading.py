"""Rows of a data set: on the hub, in a folder with the hub's layout, or in one file.

plain.py reads local JSON and CSV files, `datasets` everything else: .parquet, other archives, parts of splits, and
folders whose card has settings other than a separator. What it caches of local data is removed after reading.
"""

import glob
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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

LOADERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv"}
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
def open_rows(place: Place) -> "Iterator[Dataset | plain.FileRows]":
    """The rows of a place, open within `with`. Raises UserError if it does not exist, or cannot be reached or read."""
    local = Path(place.path).exists()
    if not local and not HUB_ID.fullmatch(place.path):
        raise UserError(f"{place.path}: no such file or folder, and not an id of a data set on the hub (owner/name)")
    with tempfile.TemporaryDirectory() as cache:
        yield _file(place, cache) if place.file else _load(place, cache if local else None)


def _file(place: Place, cache: str) -> "Dataset | plain.FileRows":
    form = LOADERS.get(_suffix(place.file))
    if form is None:
        raise UserError(f"{place.path}: expected a file that ends in {', '.join(LOADERS)} (.gz or .zst may follow)")
    if form in plain.READERS:
        return plain.rows(place, [place.file], plain.READERS[form])
    import datasets

    with _explain_errors(place, local=True):
        name = glob.escape(os.path.abspath(place.path))
        return datasets.load_dataset(form, data_files=name, split=place.split, cache_dir=cache)


def _load(place: Place, cache: str | None) -> "Dataset | plain.FileRows":
    """The rows of a data set on the hub (`cache` None), or in a folder."""
    import datasets

    path = os.path.abspath(place.path) if cache else place.path  # "." has no name
    with _explain_errors(place, local=cache is not None):
        if cache is None:
            return _warn_of_guesses(place, datasets.load_dataset(path, place.subset, split=place.split))
        builder = datasets.load_dataset_builder(path, place.subset, cache_dir=cache)
        files = builder.config.data_files or {}
        if read := files.get(place.split):
            more = f" and {len(read) - FEW} more" if len(read) > FEW else ""  # if there are several forms, of one
            names = ", ".join(os.path.relpath(each, place.path) for each in read[:FEW])
            log.info("%s: its files are %s%s", place, names, more)
        reader = plain.reader(builder.config, builder.name) if read and all(map(_is_plain, read)) else None
        if reader is None:
            table = datasets.load_dataset(path, place.subset, split=place.split, cache_dir=cache)
            return _warn_of_guesses(place, table)
    return plain.rows(place, [Path(each) for each in read], reader)


def _is_plain(file: str) -> bool:
    return LOADERS.get(_suffix(Path(file))) in plain.READERS or _suffix(Path(file)) == ".tsv"


def _warn_of_guesses(place: Place, table: "Dataset") -> "Dataset":
    """The rows as given, with a warning where `datasets` guessed types."""
    guessed = [name for name, feature in table.features.items() if "string" not in getattr(feature, "dtype", "")]
    if table.info.builder_name == "csv" and guessed:
        log.warning(
            "%s: its files are .csv; in %s texts such as 009 may have become numbers. A downloaded copy of the file, "
            "imported by its path, is read as it is",
            place,
            ", ".join(guessed),
        )
    return table


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
