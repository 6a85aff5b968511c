"""Which of several responses is the chosen one, by columns that say so. Pure functions.

Of scores the highest is chosen and the lowest rejected, of ranks the other way round (the first of equals); `best`
names the better one of two.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import isfinite

from cream.errors import UserError

TIED = "no response is better than another to the same prompt"
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_best(text: str) -> dict[str, int]:
    """The meaning of the values of `best` in a flag's text, "a=1,b=2,tie=0". Raises UserError for other texts."""
    meaning = {}
    for part in text.split(","):
        value, equals, number = (word.strip() for word in part.rpartition("="))
        if not equals or number not in ("0", "1", "2") or value in meaning:
            raise UserError(f"--best {part!r}: expected value=1 or value=2, the better response, or value=0, a tie")
        meaning[value] = int(number)
    return meaning


def number(name: str, value: object) -> float | None:
    """A score or rank; true is 1, a text its number, an empty one None. Raises ValueError for other values."""
    if value is None or value == "":
        return None
    with suppress(TypeError, ValueError, OverflowError):
        found = float(BOOLEANS.get(value.lower(), value) if isinstance(value, str) else value)
        if isfinite(found):
            return found
    raise ValueError(f"{name} {value!r:.40} is not a number")


def truth(value: object) -> bool | None:
    """A value that says yes or no, as true, 1 or "yes"; None for others."""
    return BOOLEANS.get(_word(value).lower())


def scores(fields: Mapping) -> list[float | None]:
    """A row's scores, one per response; ranks count as their negatives."""
    name, sign = ("score", 1) if "score" in fields else ("rank", -1)
    values = fields.get(name)
    values = values if isinstance(values, list) else [values]
    return [each if each is None else sign * each for each in (number(name, value) for value in values)]


def extremes(values: Sequence[float | None]) -> tuple[int, int] | None:
    """Indices of the highest and the lowest value, the first of equals; None unless two differ."""
    known = [i for i, value in enumerate(values) if value is not None]
    if not known:
        return None
    best, worst = max(known, key=values.__getitem__), min(known, key=values.__getitem__)
    return None if values[best] == values[worst] else (best, worst)


def choose(fields: Mapping, best: Mapping[str, int]) -> dict | None:
    """The fields of a row with `chosen` and `rejected` of its `responses`; None if none is better. Raises ValueError if
    its columns do not say which."""
    responses = fields.get("responses")
    if not isinstance(responses, list) or len(responses) < 2:
        raise ValueError(f"responses: expected a list of two or more, found {responses!r:.60}")
    ends = _named(fields.get("best"), responses, best) if "score" not in fields and "rank" not in fields else None
    if "score" in fields or "rank" in fields:
        values = scores(fields)
        if len(values) != len(responses):
            raise ValueError(f"{len(responses)} responses, but {len(values)} scores or ranks")
        ends = extremes([None if text is None else value for text, value in zip(responses, values, strict=True)])
    if ends is None:
        return None
    rest = {name: value for name, value in fields.items() if name not in ("responses", "score", "rank", "best")}
    return rest | {"chosen": responses[ends[0]], "rejected": responses[ends[1]]}


def ranked(fields: Mapping) -> dict:
    """`responses` and `ranks` of a row. Raises ValueError unless there are as many of both, two or more."""
    responses, ranks = fields["responses"], fields["ranks"]
    for name, values in (("responses", responses), ("ranks", ranks)):
        if not isinstance(values, list) or len(values) < 2:
            raise ValueError(f"{name}: expected a list of two or more, found {values!r:.60}")
    if len(responses) != len(ranks):
        raise ValueError(f"{len(responses)} responses, but {len(ranks)} ranks")
    return {"responses": responses, "ranks": [number("rank", rank) for rank in ranks]}


def _named(value: object, responses: Sequence, best: Mapping[str, int]) -> tuple[int, int] | None:
    word = _word(value)
    if word not in best:
        known = f"it knows {', '.join(best)}" if best else f"say --best {word}=1,…"
        raise ValueError(
            f"best is {value!r:.40}: --best says which response each value means (1, 2, or 0 for a tie); {known}"
        )
    if len(responses) != 2:
        raise ValueError(f"best names one of two responses, found {len(responses)}")
    return {0: None, 1: (0, 1), 2: (1, 0)}[best[word]]


def _word(value: object) -> str:
    """A value as one types it: true, 1 (of 1.0 as well), a text; nothing for null."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
