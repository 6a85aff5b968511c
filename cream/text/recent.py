"""Results that depend on texts alone, kept as long as they are recent: a loop's stages ask for the same ones."""

from collections.abc import Hashable

MOST = 1 << 22  # characters and tokens that are kept


class Recent:
    """key -> value, and how much that holds; beyond MOST the oldest ones go. A replica starts with an empty one."""

    def __init__(self):
        self._found: dict[Hashable, tuple[object, int]] = {}
        self._held = 0

    def get(self, key: Hashable) -> object | None:
        """The value, None if it is not here."""
        return self._found.get(key, (None,))[0]

    def add(self, key: Hashable, value: object, size: int) -> None:
        """Keep a value that holds `size` characters and tokens."""
        self._found[key] = value, size
        self._held += size
        while self._held > MOST:
            oldest = next(iter(self._found))
            self._held -= self._found.pop(oldest)[1]

    def __reduce__(self):
        return Recent, ()
