"""Rows of a data set: of the hub by its id, of a folder laid out as the hub's are, or of one file; all by one call.

`datasets.load_dataset` reads them all. What it makes of the hub's stays in its usual cache; what it makes of local
files and folders goes when they have been read. It guesses the types of columns; of what those guesses would rewrite in
local ones (009, NA, 2023-01-01) it is told to keep the text.
"""

import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import xxhash

from cream.errors import UserError
from cream.names import HUB_ID
from cream.sources import Source

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger("cream")

LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
PACKED = (".gz", ".zst", ".xz", ".bz2")  # as `datasets` unpacks them
WHOLE = 1 << 28  # bytes of JSON of which the types of nested values are found together
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
def opened(place: Place) -> "Iterator[Dataset]":
    """The rows of a place, open within `with`. Raises UserError where it is not there, cannot be reached or read."""
    local = Path(place.path).exists()
    if not local and not HUB_ID.fullmatch(place.path):
        raise UserError(f"{place.path}: no such file or folder, and no id of a data set on the hub (owner/name)")
    with tempfile.TemporaryDirectory() as cache:
        yield _load(place, cache if local else None)


def _load(place: Place, cache: str | None) -> "Dataset":
    import datasets

    call = _call(place)
    with _told(place, local=cache is not None):
        if cache is None:
            return _told_of_guesses(place, datasets.load_dataset(**call))
        call["cache_dir"] = cache
        builder = datasets.load_dataset_builder(**{key: value for key, value in call.items() if key != "split"})
        if not place.file and (read := (builder.config.data_files or {}).get(place.split)):
            more = f" and {len(read) - FEW} more" if len(read) > FEW else ""  # of files of several forms it takes one
            told = ", ".join(os.path.relpath(each, place.path) for each in read[:FEW])
            log.info("%s: its files are %s%s", place, told, more)
        if builder.name == "csv":  # all cells are texts, which need their columns' names
            columns = _columns(builder.as_streaming_dataset(split=place.split))
            texts = datasets.Features({name: datasets.Value("string") for name in columns})
            return datasets.load_dataset(**call, keep_default_na=False, features=texts)
        if builder.name == "json":
            call |= {"chunksize": WHOLE, "parse_agent_traces": False}
        found = datasets.load_dataset(**call)
        if builder.name == "json" and (typed := _as_written(found.features)) != found.features:
            return datasets.load_dataset(**call, features=datasets.Features(typed))
        return found


def _columns(stream: "IterableDataset") -> list[str]:
    """The columns of all files of a stream. Raises StopIteration where none has a row, ValueError where they differ."""
    shards = (stream.shard(stream.num_shards, index) for index in range(stream.num_shards))
    firsts = [row for shard in shards for row in islice(shard, 1)]
    if not firsts:
        raise StopIteration
    for row in firsts:
        if differing := firsts[0].keys() ^ row.keys():
            raise ValueError(f"not all of its files have the columns {', '.join(sorted(differing))}")
    return [*firsts[0]]


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


def _as_written(feature: object) -> object:
    """Column types, in which texts that were taken for times are any JSON, which is kept as it stands."""
    import datasets

    if isinstance(feature, dict):
        return {name: _as_written(each) for name, each in feature.items()}
    if isinstance(feature, datasets.List):
        return datasets.List(_as_written(feature.feature))
    return datasets.Json() if getattr(feature, "dtype", "").startswith("timestamp") else feature


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


def _call(place: Place) -> dict:
    """The arguments of load_dataset."""
    if place.file is None:
        path = os.path.abspath(place.path) if Path(place.path).is_dir() else place.path  # "." has no name
        return {"path": path, "name": place.subset, "split": place.split}
    loader = LOADERS.get(_suffix(place.file))
    if loader is None:
        raise UserError(f"{place.path}: expected a file that ends in {', '.join(LOADERS)} (.gz or .zst may follow)")
    return {"path": loader, "data_files": _literal(place.path), "split": place.split}


def _suffix(path: Path) -> str:
    return next((suffix for suffix in reversed(path.suffixes) if suffix not in PACKED), "").lower()


def _literal(path: str) -> str:
    """A path whose signs are no pattern of several."""
    return re.sub(r"([*?\[])", r"[\1]", os.path.abspath(path))


def _why(error: Exception, local: bool) -> str:
    """What went wrong, in one line, and what to do."""
    cause = error.__cause__ or error
    told = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    if isinstance(cause, StopIteration):
        return "it holds no rows"
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
        return datasets.get_dataset_split_names(mirror.path, mirror.subset, cache_dir=cache)


def _named(text: str, names: tuple[str, ...], word: str) -> bool:
    """Whether a name or path holds one of the names, and the word, as words of its own."""
    spaced = _spaced(text)
    return _spaced(word) in spaced and any(_spaced(name) in spaced for name in names)


def _spaced(text: str) -> str:
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "
