"""One writer at a time, by a lock file next to the output that names the writer."""

import errno
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cream.errors import UserError

log = logging.getLogger("cream")
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # from a file system that has none


class Lock:
    """Held within `with`; the kernel releases it when the process ends in any way.

    `timeout`: seconds to wait for another process, -1 without limit; after that a UserError names the process. At the
    end the lock file is removed, and so are folders created for it that are empty. On a file system without locks a
    warning is logged.
    """

    def __init__(self, target: Path, timeout: float = 0):
        self.target = target
        self.path = target.with_name(f".{target.name}.lock")
        self._lock = FileLock(self.path, timeout, fallback_to_soft=False)
        self._made: list[Path] = []

    def __enter__(self) -> "Lock":
        while not self._acquire():
            pass  # its last holder removed the file, or the folder, just now
        with suppress(OSError):  # a full disk: it is locked all the same
            self.path.write_text(f"process {os.getpid()} on {socket.gethostname()} (since {time.ctime()})")
        return self

    def __exit__(self, *_) -> None:
        self.path.unlink(missing_ok=True)  # while it is held: a process that opened it before takes a new one
        self._lock.release()
        with suppress(OSError):  # not empty
            for folder in reversed(self._made):
                folder.rmdir()

    def _acquire(self) -> bool:
        folder = self.path.parent
        self._made += [each for each in (*reversed(folder.parents), folder) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except FileNotFoundError:
            return False
        except Timeout:
            try:
                holder = self.path.read_text(errors="replace") or "another process"
            except FileNotFoundError:
                return False
            raise UserError(
                f"{self.target}: {holder} is writing it; wait until it ends, or give another output"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning(
                "%s cannot be locked (%s): make sure that no other process writes it", self.target, error.strerror
            )
        return True
