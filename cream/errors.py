"""The one exception a user is meant to see: what was wrong, where, and what to do about it."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend. Scripts print its message on stderr and exit with 2; nothing was written."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """'; did you mean a, b?' for the known words that look like `word`, or '' when none does."""
    lower = {k.lower(): k for k in known}
    close = [lower[k] for k in difflib.get_close_matches(word.lower(), lower, n=count, cutoff=0.5)]
    return f"; did you mean {', '.join(close)}?" if close else ""
