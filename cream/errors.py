"""UserError, the one exception that users see: what is wrong, where, and what to do about it."""

import difflib
import sys
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix. Scripts print its message on stderr and exit with 2; nothing was written."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """'; did you mean a, b?' for the known words that look like `word`, or '' when none does."""
    close = alike(word, known, count)
    return f"; did you mean {', '.join(close)}?" if close else ""


def alike(word: str, known: Iterable[str], count: int = 3, likeness: float = 0.5) -> list[str]:
    """The known words that look like `word`, in any case, the most similar first; `likeness`: of difflib, at least."""
    lower = {k.lower(): k for k in known}
    return [lower[k] for k in difflib.get_close_matches(word.lower(), lower, n=count, cutoff=likeness)]


def user_error(error: Exception) -> UserError | None:
    """The error as a UserError if the user can fix it (an unreadable file, a full disk, out of memory), or None."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.filename is not None:  # no space, no permission, a file for a folder
        return UserError(f"{error.filename}: {error.strerror}")
    if isinstance(error, MemoryError):
        return UserError("this machine is out of memory")
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # from pathlib
        return UserError(f"{error}; give another path, or remove the link")
    if isinstance(error, RuntimeError) and out_of_memory(error):
        advice = "another program may use it; else --bf16 yes, a smaller --max_tokens_per_batch, or more devices"
        return UserError(f"the device is out of memory: {str(error).splitlines()[0]}; {advice}")
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or this machine, is out of memory."""
    torch = sys.modules.get("torch")  # its error can only come from an imported torch
    text = str(error)
    return (
        (torch is not None and isinstance(error, torch.OutOfMemoryError))
        or "can't allocate memory" in text
        or "not enough memory" in text
    )
