"""Fingerprints of model folders: what changes them, what is read again, and that the cache never decides one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cream.errors import UserError
from cream.files import fingerprints
from cream.files.fingerprints import fingerprint_folder

FILES = ("chat_template.jinja", "config.json", "merges.txt", "model.safetensors", "tokenizer.model", "vocab.tiktoken")


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text(f"this is {name}")
    return folder


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "model")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache file; files count as settled at once, so that a test need not wait two seconds."""
    monkeypatch.setenv("CREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "SETTLED", -(10**18))
    return tmp_path / "cache/fingerprints.json"


@pytest.fixture
def read(monkeypatch, cache):
    """Names of the files whose contents were read."""
    names, real = [], fingerprints._hash

    def noted(path, known):
        entry, settled = real(path, known)
        names.extend([path.name] if entry is not known else [])
        return entry, settled

    monkeypatch.setattr(fingerprints, "_hash", noted)
    return names


def tick():
    """Let the file system's clock move on."""
    time.sleep(0.05)


def test_names_and_contents_decide_and_nothing_else(folder, cache):
    first = fingerprint_folder(folder)
    assert len(first) == 32 and int(first, 16)
    for name in ("cream.json", "args.json", "README.md"):
        (folder / name).write_text("a note")
    (folder / "original.model").mkdir()
    folder = folder.rename(folder.with_name("moved"))
    assert fingerprint_folder(folder) == first
    seen = {first}
    for name in FILES:
        tick()
        (folder / name).write_text(f"That is {name}"[: len(f"this is {name}")])
        seen.add(fingerprint_folder(folder))
    (folder / "config.json").rename(folder / "other.json")
    seen.add(fingerprint_folder(folder))
    (folder / "more.json").write_text("")
    seen.add(fingerprint_folder(folder))
    assert len(seen) == 1 + len(FILES) + 2


def test_files_are_read_once(folder, cache, read):
    first = fingerprint_folder(folder)
    assert sorted(read) == sorted(FILES)
    read.clear()
    assert fingerprint_folder(folder) == first and not read
    (folder / "more.json").write_text("")
    fingerprint_folder(folder)
    assert read == ["more.json"]


def in_place(path, text):
    path.write_text(text)


def replaced(path, text):
    (path.parent / "staged").write_text(text)
    os.replace(path.parent / "staged", path)


@pytest.mark.parametrize("change", [in_place, replaced])
def test_a_change_that_keeps_size_and_mtime_is_noticed(folder, cache, change):
    path = folder / "model.safetensors"
    first, before = fingerprint_folder(folder), path.stat()
    tick()
    change(path, path.read_text().upper())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert fingerprint_folder(folder) != first


def test_a_young_file_is_read_again(folder, cache, monkeypatch):
    """Two writes within one tick of the clock leave the same size, times and inode."""
    monkeypatch.setattr(fingerprints, "SETTLED", 10**12)
    os.utime(folder / "config.json", ns=(0, 0))  # its ctime stays young
    fingerprint_folder(folder)
    assert not cache.exists()


def test_a_file_that_changes_while_it_is_read_is_not_kept(folder, cache, monkeypatch):
    path, real = folder / "config.json", fingerprints._state

    def then_changed(found):
        state = real(found)
        if found.st_ino == path.stat().st_ino:
            tick()
            path.write_text("new")
        return state

    monkeypatch.setattr(fingerprints, "_state", then_changed)
    fingerprint_folder(folder)
    assert {Path(name).name for name in json.loads(cache.read_bytes())["files"]} == {*FILES} - {"config.json"}


def test_links_are_followed(folder, cache, read, tmp_path):
    """checkpoint-last is a link to a folder; a hub snapshot is a folder of links to blobs."""
    first = fingerprint_folder(folder)
    (tmp_path / "last").symlink_to(folder)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in FILES:
        (snapshot / name).symlink_to(Path("../model") / name)
    read.clear()
    assert fingerprint_folder(tmp_path / "last") == fingerprint_folder(snapshot) == first and not read
    tick()
    (folder / "config.json").write_text("something else")
    assert fingerprint_folder(tmp_path / "last") == fingerprint_folder(snapshot) != first
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="snapshot/config.json: cannot be read: No such file"):
        fingerprint_folder(snapshot)


def altered(data: bytes) -> bytes:
    entry = json.loads(data)
    next(iter(entry["files"].values()))["hash"] = "0" * 32
    return json.dumps(entry).encode()


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-40],
    "not text": lambda data: b"\xff\xfe" + data,
    "another layout": lambda data: b'{"files": []}',
    "altered": altered,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_decides_nothing(folder, cache, read, damage):
    first = fingerprint_folder(folder)
    cache.write_bytes(DAMAGE[damage](cache.read_bytes()))
    read.clear()
    assert fingerprint_folder(folder) == first and sorted(read) == sorted(FILES)
    read.clear()
    assert fingerprint_folder(folder) == first and not read  # it was mended


def test_it_works_where_nothing_can_be_kept(folder, cache, monkeypatch):
    first = fingerprint_folder(folder)
    monkeypatch.setenv("CREAM_CACHE", str(folder / "config.json"))  # a file where a folder is due
    assert fingerprint_folder(folder) == first


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name, place in (("HOME", ".cache/cream"), ("XDG_CACHE_HOME", "cream"), ("CREAM_CACHE", "")):
        monkeypatch.setenv("HOME", "/nowhere")
        for other in ("CREAM_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, str(tmp_path))
        assert fingerprints._cache_file() == tmp_path / place / "fingerprints.json"


def test_files_that_are_gone_are_forgotten(folder, cache, tmp_path):
    fingerprint_folder(folder)
    other = fill(tmp_path / "other")
    for name in FILES:
        (folder / name).unlink()
    fingerprint_folder(other)
    assert {Path(name).parent for name in json.loads(cache.read_bytes())["files"]} == {other}


def test_processes_share_the_cache(cache, tmp_path):
    folders = [fill(tmp_path / f"model-{i}") for i in range(4)]
    code = "import sys, pathlib; from cream.files import fingerprints as f; f.SETTLED = -(10**18); "
    code += "print(f.fingerprint_folder(pathlib.Path(sys.argv[1])))"
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
        for folder in folders
    ]
    printed = {process.communicate()[0].strip() for process in started}
    assert printed == {fingerprint_folder(folders[0])}  # they hold the same
    kept = json.loads(cache.read_bytes())["files"]
    assert {Path(name) for name in kept} == {folder / name for folder in folders for name in FILES}


def test_it_needs_no_torch():
    code = "import sys, cream.files.fingerprints; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
