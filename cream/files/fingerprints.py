"""Hashes of texts, files and model folders. A folder's files are read once, then recognised by size, times and inode.

Their hashes are cached in `fingerprints.json`, in $CREAM_CACHE or else in `cream` in the user's cache folder. If the
cache is missing, damaged or cannot be written, every file is read again.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path

import msgspec
import xxhash

from cream.errors import UserError
from cream.files import store
from cream.files.lock import Lock

# weights, configs and tokenizer, template, vocabularies (merges.txt, vocab.txt), own code
SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"}
TEMPLATES = "additional_chat_templates"  # a folder of those that are not the default
NOTES = {"cream.json", "args.json"}  # our own files, which do not affect a model's output
SETTLED = 2 * 10**9  # ns; a younger file may change again within one tick of its file system's clock, unseen
BLOCK = 1 << 22  # bytes read at a time

State = tuple[int, int, int, int]  # size, st_mtime_ns, st_ctime_ns, inode


class Cached(msgspec.Struct):
    """The state that a file was in when it had this hash."""

    state: State
    hash: str


class Cache(msgspec.Struct):
    """The cache file: files by resolved path, and `check`, the hash of `files`."""

    check: str
    files: dict[str, Cached]


def fingerprint_text(text: str) -> str:
    """xxh3-128 of a text, 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def fingerprint_file(path: str | Path) -> str:
    """xxh3-128 of a file's bytes, 32 hex digits. Raises UserError when there is no such file."""
    digest = xxhash.xxh3_128()
    with store.open_file(Path(path)), open(path, "rb") as file:  # the first checks, the second does not unpack
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_folder(folder: Path, *, cached: bool = True) -> str:
    """xxh3-128, 32 hex digits, over names and contents of the files that affect a model's output; links are followed.

    `cached` False reads every file again. Raises UserError if one cannot be read.
    """
    paths, file = _deciding(folder), _cache_file()
    entries = _read(file) if cached else {}
    known = [entries.get(str(path.resolve())) for path in paths]
    if None in known:
        with ThreadPoolExecutor() as pool:  # reading and hashing release the GIL
            hashes = list(pool.map(_hash, paths, known))
    else:
        hashes = list(map(_hash, paths, known))
    new = {str(path.resolve()): entry for path, (entry, settled) in zip(paths, hashes, strict=True) if settled}
    if any(entries.get(path) != entry for path, entry in new.items()):
        _keep(file, new)
    names = "".join(f"{path.name}\0{entry.hash}\0" for path, (entry, _) in zip(paths, hashes, strict=True))
    return xxhash.xxh3_128_hexdigest(names.encode())


def _deciding(folder: Path) -> list[Path]:
    places = [folder.iterdir(), (folder / TEMPLATES).glob("*")]
    return sorted(p for p in chain(*places) if p.suffix in SUFFIXES and p.name not in NOTES and not p.is_dir())


def states(path: Path) -> dict[str, State]:
    """name -> state of a file, if it exists, or of the files in a folder that affect a model's output."""
    by_name = {}
    for each in _deciding(path) if path.is_dir() else [path]:
        with suppress(OSError):
            by_name[each.name] = _state(os.stat(each))
    return by_name


def verified(folder: Path, expected: str, make: Callable[[str], object], device: str) -> object:
    """make(device), if the folder exists on this machine with the expected fingerprint; else raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder here; every node needs the model at this path")
    if (found := fingerprint_folder(folder)) != expected:
        raise UserError(
            f"{folder}: this node has another model (fingerprint {found[:8]}) than the node where the command runs"
        )
    return make(device)


def _hash(path: Path, entry: Cached | None) -> tuple[Cached, bool]:
    """A file's hash (`entry`, if its state is the same), and whether any later change would show in its state."""
    started = time.time_ns()
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a regular file (a pipe or device)")
    try:
        with open(path, "rb", buffering=0) as file:
            state = _state(os.fstat(file.fileno()))
            if entry is not None and entry.state == state:
                return entry, True
            digest, block = xxhash.xxh3_128(), memoryview(bytearray(min(BLOCK, state[0] + 1)))
            while count := file.readinto(block):
                digest.update(block[:count])
            settled = started - max(state[1:3]) > SETTLED and _state(os.fstat(file.fileno())) == state
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return Cached(state, digest.hexdigest()), settled


def _state(found: os.stat_result) -> State:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


# The cache file -------------------------------------------------------------------------------------------------------


def _cache_file() -> Path | None:
    if own := os.environ.get("CREAM_CACHE"):
        return Path(own) / "fingerprints.json"
    with suppress(RuntimeError):  # a user without a home
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cream/fingerprints.json"


def _read(file: Path | None) -> dict[str, Cached]:
    """The cache file's entries; none if it is damaged."""
    with suppress(UserError, OSError, msgspec.ValidationError):
        if file is not None and file.exists():
            cache = msgspec.convert(store.read_json(file), Cache)
            return cache.files if cache.check == _check(cache.files) else {}
    return {}


def _keep(file: Path | None, new: dict[str, Cached]) -> None:
    """Add entries to the cache file if it can be written, and remove those of deleted files."""
    if file is None:
        return
    with suppress(OSError, UserError):  # a full or read-only disk, or another process holds the lock
        file.parent.mkdir(parents=True, exist_ok=True)
        with Lock(file, timeout=10):
            files = {path: entry for path, entry in (_read(file) | new).items() if os.path.exists(path)}
            store.write_json(file, Cache(_check(files), files))


def _check(files: dict[str, Cached]) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(files))
