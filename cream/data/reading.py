"""Rows of a data set: of the hub by its id, of a folder laid out as the hub's are, or of one file.

`datasets` reads them, but for local files of JSON and of cells (plain.py). Of local ones it reads .parquet, archives
that plain.py does not unpack, parts of splits, and what a card asks for beside a separator; what it makes of them goes
when they have been read, what it makes of the hub's stays in its usual cache.
"""

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


@contextmanager
def opened(place: Place) -> "Iterator[Dataset | plain.FileRows]":
    """The rows of a place, open within `with`. Raises UserError where it is not there, cannot be reached or read."""
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

    with _told(place, local=True):
        return datasets.load_dataset(form, data_files=_literal(place.path), split=place.split, cache_dir=cache)


def _load(place: Place, cache: str | None) -> "Dataset | plain.FileRows":
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
        reader = plain.reader(builder.config, builder.name) if read and all(map(_is_plain, read)) else None
        if reader is None:
            found = datasets.load_dataset(path, place.subset, split=place.split, cache_dir=cache)
            return _told_of_guesses(place, found)
    return plain.rows(place, [Path(each) for each in read], reader)


def _is_plain(file: str) -> bool:
    return LOADERS.get(_suffix(Path(file))) in plain.READERS or _suffix(Path(file)) == ".tsv"


def _told_of_guesses(place: Place, found: "Dataset") -> "Dataset":
    """The rows of a data set that `datasets` read; a warning where that guessed their types."""
    guessed = [name for name, feature in found.features.items() if "string" not in getattr(feature, "dtype", "")]
    if found.info.builder_name == "csv" and guessed:
        log.warning(
            "%s: its files are .csv; in %s texts such as 009 may have become numbers. A downloaded copy of the file, "
            "imported by its path, is read as it is",
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
    return next((suffix for suffix in reversed(path.suffixes) if suffix not in plain.PACKED), "").lower()


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
