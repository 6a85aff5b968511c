"""What a stage has on disk before each change of a file, and what a power cut at that moment may leave of it.

`record` works in the process that makes the changes. Python reports most of them before they happen (audit events);
os.write, os.fsync and the libraries' own writers are wrapped. A file that was not forced to disk since it was written
may have lost any end of what was written last, so each state comes with torn ones, in which one such file is shorter or
ends in zeros. Not modelled: several files torn at once, and renames that are lost or in another order, which journaling
file systems keep. What libraries write from C++ or Rust is seen at the next event.
"""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

EVENTS = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate"}  # besides "open"
CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC  # flags of the event "open"
LOCK = ".lock"  # a file whose content, who holds it since when, does not matter

State = dict[str, list[str]]  # path below the root -> [kind, hash of the content or target of the link]


class Recorder:
    """Writes the states of some folders and files below `root` to `store`: states.jsonl, and contents by their hash."""

    def __init__(self, root: Path, watched: list[str], store: Path):
        self.root, self.watched, self.store = root, watched, store
        store.mkdir(parents=True)
        self.states = open(store / "states.jsonl", "w")
        self.seen: set[str] = set()
        self.last: State = {}
        self.contents: dict[int, tuple[int, str]] = {}  # by inode, which may be another file's later: size and hash
        self.synced: dict[int, tuple[int, int]] = {}  # by inode: (bytes, st_mtime_ns) when it was forced to disk
        self.looking = threading.Lock()
        for path in self._paths():  # what is there at the start is safe
            if path.is_file() and not path.is_symlink():
                status = path.stat()
                self.contents[status.st_ino] = status.st_size, self._keep(path.read_bytes())
                self.synced[status.st_ino] = status.st_size, status.st_mtime_ns

    def before(self, event: str) -> None:
        """Look at the files; another thread's change, or this one's own writing, waits for the next look."""
        if self.looking.acquire(blocking=False):
            try:
                self._look(event)
            finally:
                self.looking.release()

    def forced(self, handle: int) -> None:
        """A file was forced to disk."""
        status = os.fstat(handle)
        self.synced[status.st_ino] = status.st_size, status.st_mtime_ns

    def _look(self, event: str) -> None:
        state, torn, contents = {}, [], {}
        for path in self._paths():
            name, status = str(path.relative_to(self.root)), path.lstat()
            if path.is_symlink():
                state[name] = ["link", os.readlink(path)]
            elif path.is_dir():
                state[name] = ["folder", ""]
            else:
                data = b"" if path.suffix == LOCK else path.read_bytes()
                state[name] = ["file", self._keep(data)]
                contents[status.st_ino] = len(data), state[name][1]
                safe, before = self._safe(status, data)
                if safe == len(data) or "/." in name:  # a temporary file: nobody reads it again
                    continue
                if self.last.get(name) != state[name]:
                    torn += [(name, end) for end in torn_ends(data, safe, before)]
                else:
                    torn += [(name, data[:safe])]
        self._say(event, state)
        for name, data in torn:
            if state.keys() != self.last.keys() or self.last.get(name) != state[name]:
                self._say(f"{event}; {name} torn", state | {name: ["file", self._keep(data)]})
        self.last, self.contents = state, contents
        self.synced = {inode: forced for inode, forced in self.synced.items() if inode in contents}

    def _safe(self, status: os.stat_result, data: bytes) -> tuple[int, int]:
        """How many bytes of a file survive a power cut, and how many it had at the last look."""
        forced = self.synced.get(status.st_ino, (0, 0))
        before, digest = self.contents.get(status.st_ino, (0, ""))
        if before > len(data) or _hash(data[:before]) != digest:  # another file had this number
            before = 0
        return len(data) if forced == (len(data), status.st_mtime_ns) else min(forced[0], before), before

    def _paths(self) -> Iterator[Path]:
        for name in self.watched:
            for path in self.root.glob(name):
                yield path
                yield from path.rglob("*") if path.is_dir() and not path.is_symlink() else ()

    def _keep(self, data: bytes) -> str:
        digest = _hash(data)
        if not (path := self.store / digest).exists():
            path.write_bytes(data)
        return digest

    def _say(self, event: str, state: State) -> None:
        line = json.dumps(state, sort_keys=True)
        if line not in self.seen:
            self.seen.add(line)
            self.states.write(json.dumps([event, state]) + "\n")
            self.states.flush()


def _hash(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def torn_ends(data: bytes, safe: int, before: int) -> Iterator[bytes]:
    """What may be left of a file of which `safe` bytes were forced to disk and `before` were there at the last look: of
    what came last nothing, half, all but a byte, or zeros; if it was appended also one byte, or what was safe alone."""
    size = len(data)
    start = before if before < size else safe  # of what came last: a file that was only renamed has another beginning
    ends = {start, (start + size) // 2, size - 1} | ({safe, start + 1} if start else set())
    yield from (data[:end] for end in sorted(ends) if end < size)
    yield data[:start] + bytes(size - start)


def record(root: Path, watched: list[str], store: Path) -> None:
    """From now on record every state of `watched` (patterns of paths below `root`) in this process; each but the last:
    that is there when it has ended."""
    recorder = Recorder(root, watched, store)

    def hook(event: str, args: tuple) -> None:
        if event in EVENTS or (event == "open" and isinstance(args[2], int) and args[2] & CHANGING):
            path = args[0]
            if isinstance(path, int) or "__pycache__" in (path := os.fsdecode(path)):
                return
            if not os.path.isabs(path) or path.startswith(str(root)):
                recorder.before(f"{event} {path}")

    def looking_first(function: Callable, what: str) -> Callable:
        def wrapped(*args, **options):
            recorder.before(what)
            return function(*args, **options)

        return wrapped

    def fsync(handle: int) -> None:
        recorder.before("fsync")
        real_fsync(handle)
        recorder.forced(handle)

    real_fsync, os.fsync = os.fsync, fsync
    os.write = looking_first(os.write, "write")
    for module, name in (("torch", "save"), ("safetensors.torch", "serialize_file")):
        if module in sys.modules:
            setattr(sys.modules[module], name, looking_first(getattr(sys.modules[module], name), name))
    sys.addaudithook(hook)


def states(store: Path) -> list[tuple[str, State]]:
    """(what was about to happen, the state) of each distinct state, in the order in which they were seen."""
    return [tuple(json.loads(line)) for line in (store / "states.jsonl").read_text().splitlines()]


def restore(root: Path, watched: list[str], store: Path, state: State) -> None:
    """Put a state in place of what is there."""
    for name in watched:
        for path in root.glob(name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, (kind, value) in sorted(state.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "folder":
            path.mkdir(exist_ok=True)
        elif kind == "link":
            path.symlink_to(value)
        else:
            shutil.copyfile(store / value, path)
