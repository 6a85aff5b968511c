"""One writer at a time: a lock file beside what is written, which says who writes."""

import fcntl
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from cream.errors import UserError

log = logging.getLogger("cream")


class Lock:
    """Held within `with`; the kernel lets go of it when its process is gone, however it ends.

    Raises UserError, naming the process, when another holds it. Folders that are made for it and stay empty go again.
    """

    def __init__(self, target: Path):
        self.target = target
        self.path = target.with_name(f".{target.name}.lock")
        self._file = None
        self._made: list[Path] = []

    def __enter__(self) -> "Lock":
        while self._file is None:
            self._made += [folder for folder in self.path.parent.parents if not folder.exists()][::-1]
            self._made += [] if self.path.parent.exists() else [self.path.parent]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._held()
        with suppress(OSError):  # a full disk: it is locked all the same
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}".encode())
        return self

    def __exit__(self, *_) -> None:
        self.path.unlink(missing_ok=True)  # while it is held: who opened it before takes a new one
        self._file.close()
        self._file = None
        with suppress(OSError):  # not empty
            for folder in reversed(self._made):
                folder.rmdir()

    def _held(self):
        """The file, locked; None if its last holder has just removed it."""
        file = open(self.path, "a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                return file
        except BlockingIOError:
            file.seek(0)
            who = file.read().decode(errors="replace") or "another process"
            file.close()
            raise UserError(f"{self.target}: {who}, writes it; wait for that, or give another output") from None
        except FileNotFoundError:
            pass
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s): see that no other process writes it", self.target, error.strerror)
            return file
        file.close()
        return None
