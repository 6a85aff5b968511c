"""The numbers that people or models gave a response, per attribute, mapped to one scale. Pure functions."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cream.data.preferences import number
from cream.errors import UserError


class Scale(NamedTuple):
    """How ratings are written: `prefix` before an attribute's name, and `ranges`, (low, high) of all attributes or of
    each in turn, which become 0 and 1; none: as they are."""

    prefix: str = ""
    ranges: tuple[tuple[float, float], ...] = ()


def parse_ranges(text: str) -> tuple[tuple[float, float], ...]:
    """The ranges in a flag's text, "0..4" or "1..10,1..5". Raises UserError for other texts."""
    ranges = []
    for part in text.split(","):
        try:
            low, high = (number("bound", bound.strip()) for bound in part.split(".."))
            if low is None or high is None or low >= high:
                raise ValueError
        except ValueError:
            raise UserError(
                f"--rating_range {part!r}: expected LOW..HIGH, or one for each rating, with commas"
            ) from None
        ranges.append((low, high))
    return tuple(ranges)


def scaled(values: Mapping[str, object], scale: Scale) -> dict[str, float | None]:
    """attribute -> its number on the scale, None where there is none: (x - low) / (high - low). Raises ValueError for
    a value that is not a number, or is outside its range."""
    ranges = scale.ranges * len(values) if len(scale.ranges) == 1 else scale.ranges
    if ranges and len(ranges) != len(values):
        raise ValueError(f"--rating_range has {len(ranges)} ranges for {len(values)} ratings")
    found = {}
    for i, (name, value) in enumerate(values.items()):
        x = number(name, value)
        if x is not None and ranges:
            low, high = ranges[i]
            if not low <= x <= high:
                raise ValueError(f"{name} {x:g} is outside its --rating_range, {low:g}..{high:g}")
            x = (x - low) / (high - low)
        found[scale.prefix + name] = x
    return found


def of_each(values: Mapping[str, object], count: int) -> list[dict[str, object]]:
    """attribute -> value, for each of `count` responses. Raises ValueError unless each attribute has that many."""
    for name, each in values.items():
        if not isinstance(each, Sequence) or isinstance(each, str) or len(each) != count:
            raise ValueError(f"{name}: expected a list of {count} ratings, one for each response, found {each!r:.60}")
    return [{name: each[i] for name, each in values.items()} for i in range(count)]
