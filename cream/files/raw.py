"""Files as bytes and as JSON: unpacked by suffix, read with clear errors, written atomically."""

import errno
import gzip
import io
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import msgspec

from cream.errors import UserError, alike

LIKE = 0.7  # a folder has many names, and some is always a little like another
BESIDE = (".meta.json", ".partial", ".log", ".lock")  # endings of what is beside an output
PACKED = {".gz", ".zst"}
BLOCK = 1 << 20  # unpacked bytes of a packed file that are in memory at a time
FEED = 1 << 10  # packed bytes that are unpacked at a time, to at most 32 MB
MOST = 1 << 30  # bytes of a line, and of a packed file that is read as a whole
WIDE = "requires too much memory"  # zstandard's words for a frame whose window exceeds its limit
BOM = b"\xef\xbb\xbf"
LONE = re.compile(
    rb"(?<!\\)(?:\\\\)*(?:\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]..)"
)  # a surrogate without its other half

AT_BYTE, NOT_A_NUMBER = re.compile(r"\(byte (\d+)\)"), re.compile(rb".?(?:NaN|Infinity)\b", re.DOTALL)


def did_you_mean(path: Path, known: Iterable[str] = ()) -> str:
    """'; did you mean outputs/samples.json?' for what a path that is not there may stand for, a file or folder with a
    similar name, or a name that is `known`; '' where nothing is like it."""
    folder, found = next((each for each in path.parents if each.is_dir()), Path()), {}
    with suppress(OSError, ValueError):
        first, *rest = path.relative_to(folder).parts
        there = [name for name in os.listdir(folder) if not name.endswith(BESIDE)]
        found = {Path(name).stem: place for name in there if (place := folder.joinpath(name, *rest)).exists()}
    close = [
        *alike(str(path), known, likeness=LIKE),
        *(str(found[stem]) for stem in (alike(Path(first).stem, found, likeness=LIKE) if found else ())),
    ]
    return f"; did you mean {', '.join(close[:3])}?" if close else ""


@contextmanager
def open_file(path: Path) -> Iterator[IO[bytes]]:
    """A file open for reading bytes, unpacked by its suffix. Raises UserError if it cannot be opened or unpacked."""
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            raise UserError(
                f"{path}: is not a regular file (but a pipe or device), and it is read more than once; give a file"
            )
        with open(path, "rb") as plain:
            if path.suffix == ".gz":
                yield io.BufferedReader(gzip.GzipFile(fileobj=plain))
            elif path.suffix == ".zst":
                yield io.BufferedReader(_Zstd(plain), BLOCK)
            else:
                yield plain
    except (FileNotFoundError, NotADirectoryError):
        hint = "" if path.suffix else "; give a file, names of data sets are not known here"
        raise UserError(f"{path}: no such file{did_you_mean(path) or hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: expected a file, found a folder") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        if WIDE in str(error):
            raise UserError(
                f"{path}: was packed with a window of more than 128 MB, all of it in memory (zstd --long); unpack it: "
                f"zstd -d --long=31 {path.name}"
            ) from None
        raise UserError(f"{path}: damaged, it cannot be unpacked: {error}") from None


class _Zstd(io.RawIOBase):
    """Unpacks all frames, one after another: of the library's own readers some stop after the first, and the others do
    not notice that a file is truncated."""

    def __init__(self, packed: IO[bytes]):
        self._packed, self._unpacked, self._rest, self._frame = packed, memoryview(b""), b"", None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        import zstandard

        while not self._unpacked:
            if not (data := self._rest or self._packed.read(FEED)):
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                self._unpacked, self._rest = memoryview(self._frame.decompress(data)), b""
            except zstandard.ZstdError as error:
                raise zlib.error(str(error)) from None
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._unpacked))
        buffer[:count], self._unpacked = self._unpacked[:count], self._unpacked[count:]
        return count


def read_lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """The lines of an open file. Raises UserError on one of more than MOST bytes, before it is read as a whole."""
    number = 0
    while line := file.readline(MOST + 1):
        number += 1
        if len(line) > MOST:
            raise UserError(f"{path}, line {number}: has more than {MOST} bytes")
        yield line


def read_whole(path: Path) -> bytes:
    """A file as a whole. Raises UserError on a packed one that unpacks to more than MOST bytes."""
    with open_file(path) as file:
        if path.suffix not in PACKED:
            return file.read()
        if len(data := file.read(MOST + 1)) > MOST:
            raise UserError(f"{path}: unpacks to more than {MOST} bytes, which only a .jsonl file may")
        return data


def parse(data: bytes, where: object, kind: type = object, hook=None) -> object:
    """The JSON value in some bytes. Raises UserError with `where` and the problem."""
    try:
        return msgspec.json.decode(data, type=kind, dec_hook=hook)
    except RecursionError:
        raise UserError(f"{where}: not valid JSON: nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {_explain(data, error)}") from None


def _explain(data: bytes, error: Exception) -> str:
    if data.startswith(BOM):
        return "begins with a byte-order mark; save it as UTF-8 without one"
    if isinstance(error, UnicodeDecodeError):
        return f"not valid UTF-8: {error}"
    if LONE.search(data):
        return "not valid JSON: a lone surrogate, half of a character (\\uD800 to \\uDFFF)"
    at = AT_BYTE.search(str(error))
    if at and NOT_A_NUMBER.match(data, max(0, int(at[1]) - 1)):
        return f"not valid JSON: {error}; NaN and Infinity are not JSON: write null"
    return f"not valid JSON: {error}"


def read_json(path: Path) -> object:
    """A whole JSON file of any layout."""
    return parse(read_whole(path), path)


@contextmanager
def with_filename(path: Path) -> Iterator[None]:
    """Within it an OSError of writing to an open file names the file, and a library's own error on a full disk becomes
    an OSError."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise error if error.filename else OSError(error.errno, error.strerror, str(path)) from None
    except Exception as error:
        if any(sign in str(error) for sign in ("No space left", "PytorchStreamWriter", "inline_container")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears whole under its name, or not at all: temporary file, fsync, rename, fsync of the folder.

    After an error nothing is left, not even new folders; after a kill the next writer overwrites the temporary file.
    Only one process at a time may write a file: see cream.files.lock.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with with_filename(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as plain:
                with _packer(plain, path.suffix) as file:
                    yield file
                plain.flush()
                os.fsync(plain.fileno())
            os.replace(temporary, path)
            sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        with suppress(OSError):  # another process may have put something there
            for folder in missing:
                folder.rmdir()
        raise


@contextmanager
def _packer(plain: IO[bytes], suffix: str) -> Iterator[IO[bytes]]:
    if suffix == ".gz":
        with gzip.GzipFile(fileobj=plain, mode="wb", mtime=0, filename="") as file:
            yield file
    elif suffix == ".zst":
        import zstandard

        with zstandard.ZstdCompressor().stream_writer(plain, closefd=False) as file:
            yield file
    else:
        yield plain


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: object) -> None:
    """One JSON value, indented, atomically."""
    with atomic(path) as file:
        file.write(_indented(value))


def update_json(path: Path, value: object) -> None:
    """`write_json`, unless the file has exactly this content."""
    with suppress(OSError):
        if path.read_bytes() == _indented(value):
            return
    write_json(path, value)


def _indented(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
