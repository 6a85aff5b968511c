"""The log file of a loop's stage, beside its output: what the terminal does not show."""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cream.cli import screen

END, LINES = 20_000, 20  # of a log's end: characters that are looked at, lines that are shown
OWN = (".log", ".lock")


class StageLog:
    """X.log beside an output X.json or a folder X. A stage that writes nothing leaves it as it was.

    No stage reads it, and no output depends on it.
    """

    def __init__(self, output: Path):
        self.output = output
        self.path = output.with_name(f"{output.name.partition('.json')[0]}.log")
        self.new_folders = [folder for folder in self.path.parents if not folder.exists()]
        self.before = self.path.stat() if self.path.exists() else None
        self.files = self._files()

    def _files(self) -> dict[Path, int]:
        """When the output, and all that is named after it, was changed, in ns."""
        name = glob.escape(self.output.name.partition(".json")[0])
        found = {}
        for path in (*self.output.parent.glob(f"*{name}*"), *self.output.rglob("*")):
            with suppress(FileNotFoundError):  # another loop has moved it meanwhile
                if path.suffix not in OWN and not path.is_dir():
                    found[path] = path.lstat().st_mtime_ns
        return found

    @contextmanager
    def opened(self, first_line: str) -> Iterator[None]:
        """Within it messages go to the file, which begins with this line or adds it. Without a file that can be opened
        they stay where they are."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "a", buffering=1)
        except OSError:
            yield
            return
        try:
            with suppress(OSError):
                file.write(f"{first_line}\n")
            with screen.stage_log(file, self.path):
                yield
        finally:
            with suppress(OSError):  # the disk is full
                file.close()

    def wrote(self) -> bool:
        """Whether the stage has changed a file."""
        return self._files() != self.files

    def has_more(self) -> bool:
        """Whether the stage's messages are in it."""
        return self.path.exists() and self.path.stat().st_size > (self.before.st_size if self.before else 0)

    def undo(self) -> None:
        """Remove what was added."""
        with suppress(OSError):
            if self.before is None:
                self.path.unlink()
            else:
                os.truncate(self.path, self.before.st_size)
                os.utime(self.path, ns=(self.before.st_atime_ns, self.before.st_mtime_ns))
        for folder in self.new_folders:
            with suppress(OSError):
                folder.rmdir()

    def end(self) -> str:
        """Its last lines, from the last traceback on."""
        with suppress(OSError):
            text = self.path.read_text(errors="replace")[-END:]
            return "\n".join(text[max(0, text.rfind("Traceback (")) :].splitlines()[-LINES:])
        return ""
