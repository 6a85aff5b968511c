"""Results that depend on texts alone, kept as long as they are recent: a loop's stages ask for the same ones."""

from collections.abc import Hashable

MOST = 1 << 22  # characters and tokens that are kept


class Recent:
    """key -> value, and how much that holds; beyond MOST the oldest ones go."""

    def __init__(self):
        self._values: dict[Hashable, tuple[object, int]] = {}
        self._size = 0

    def get(self, key: Hashable) -> object | None:
        """The value, None if it is not here."""
        return self._values.get(key, (None,))[0]

    def add(self, key: Hashable, value: object, size: int) -> None:
        """Keep a value that holds `size` characters and tokens."""
        self._values[key] = value, size
        self._size += size
        while self._size > MOST:
            oldest = next(iter(self._values))
            self._size -= self._values.pop(oldest)[1]
