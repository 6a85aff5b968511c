"""Stop strings: texts that end a response once it has one of them."""

import re
from collections.abc import Sequence

from cream.errors import UserError

ESCAPES = {"n": "\n", "t": "\t", ",": ",", "\\": "\\"}


def parse_stops(text: str | None) -> tuple[str, ...]:
    r"""The stop strings that --stop gives. Raises UserError for an empty one, and for an unknown escape.

    >>> parse_stops(r"\n\nQuestion:,###,\,")
    ('\n\nQuestion:', '###', ',')
    """
    if text is None:
        return ()
    stops = [""]
    for escape, plain in re.findall(r"\\(.?)|([^\\])", text, re.DOTALL):
        if plain == ",":
            stops.append("")
        elif plain:
            stops[-1] += plain
        elif escape in ESCAPES:
            stops[-1] += ESCAPES[escape]
        else:
            raise UserError(rf"--stop {text}: \{escape} means nothing; write \n, \t, \, or, for a backslash, \\")
    if "" in stops:
        raise UserError(rf"--stop {text}: one of its texts is empty; they are separated by commas, and \, is a comma")
    return tuple(stops)


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string that ends first begins in a text; None if it has none of them."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None
