"""Which of several responses are a pair's, by columns that say how good they are. Pure functions.

Scores (higher is better) and ranks (lower is better) order the responses, and a Selection says which two of them make a
pair; `best` names the better one of two.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import isfinite
from statistics import fmean
from typing import NamedTuple

import xxhash

from cream.errors import UserError

HOW = ("extremes", "best_random", "all")

RATIO = "the ratio of the two scores is not above --min_ratio"
UNKNOWN = ("", "n/a")  # texts in place of a number that is not there
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


class Selection(NamedTuple):
    """Which pairs a prompt's responses make.

    how: `extremes`, the best and the worst (the first of equals); `best_random`, the best and one that is worse, drawn
    by `seed`; `all`, every two that are not equally good. min_ratio: only two whose scores, both positive, have a
    ratio above it. max_pairs: at most as many of a prompt, drawn by `seed`.
    """

    how: str = "extremes"
    min_ratio: float | None = None
    max_pairs: int | None = None
    seed: int = 0


USUAL = Selection()


def number(name: str, value: object) -> float | None:
    """A score or rank; true is 1, a text its number, an empty one or N/A None. Raises ValueError for other values."""
    if value is None or isinstance(value, str) and value.lower() in UNKNOWN:
        return None
    with suppress(TypeError, ValueError, OverflowError):
        found = float(BOOLEANS.get(value.lower(), value) if isinstance(value, str) else value)
        if isfinite(found):
            return found
    raise ValueError(f"{name} {value!r:.40} is not a number")


def truth(value: object) -> bool | None:
    """A value that says yes or no, as true, 1 or "yes"; None for others."""
    return BOOLEANS.get(_word(value).lower())


def scores(fields: Mapping, count: int) -> list[float | None]:
    """The scores of a row's `count` responses; ranks count as their negatives. Of several columns with a score for
    each response, the mean of those that are known. Raises ValueError unless there are as many scores as responses."""
    name, sign = ("score", 1) if "score" in fields else ("rank", -1)
    values = fields.get(name)
    values = values if isinstance(values, list) else [values]
    columns = [values]  # of a score per response
    if count == 1:
        columns = [[value] for value in values]
    elif values and all(isinstance(value, list) for value in values):
        columns = values
    if odd := [column for column in columns if len(column) != count]:
        raise ValueError(f"{count} responses, but {len(odd[0])} scores or ranks")
    found = []
    for each in zip(*columns, strict=True):
        known = [value for value in (number(name, one) for one in each) if value is not None]
        found.append(sign * fmean(known) if known else None)
    return found


def select(
    values: Sequence[float | None], texts: Sequence[object], selection: Selection, key: str
) -> list[tuple[int, int]] | str:
    """(chosen, rejected) of the pairs that a prompt's responses make, as indices, or the reason why there are none.

    `values`: the higher the better, None is unknown; `texts`: a random one has another text than the best. `key` is
    what `seed` draws by, so that a prompt's draw depends on itself alone.
    """
    known = [i for i, value in enumerate(values) if value is not None and texts[i] is not None]
    pairs = [(i, j) for i in known for j in known if values[i] > values[j]]
    if not pairs:
        return TIED
    best, worst = max(known, key=values.__getitem__), min(known, key=values.__getitem__)
    if selection.how == "extremes":
        pairs = [(best, worst)]
    elif selection.how == "best_random":
        worse = [pair for pair in pairs if pair[0] == best and texts[pair[1]] != texts[best]]
        pairs = worse and [worse[xxhash.xxh3_64_intdigest(key.encode(), selection.seed) % len(worse)]]
    if selection.min_ratio is not None:
        pairs = [(i, j) for i, j in pairs if values[j] > 0 and values[i] > selection.min_ratio * values[j]]
        return pairs or RATIO
    return pairs or TIED


def choose(fields: Mapping, best: Mapping[str, int], selection: Selection, key: str) -> dict[str, dict] | str:
    """suffix of its uuid -> fields with `chosen` and `rejected` of each pair that a row's `responses` make, and their
    scores as `chosen_score` and `rejected_score`; or why there are none. Raises ValueError if its columns do not say
    which response is better."""
    responses = fields.get("responses")
    if not isinstance(responses, list) or len(responses) < 2:
        raise ValueError(f"responses: expected a list of two or more, found {responses!r:.60}")
    if "score" in fields or "rank" in fields:
        values = scores(fields, len(responses))
        pairs = select(values, responses, selection, key)
    else:
        values, ends = None, _named(fields.get("best"), responses, best)
        pairs = TIED if ends is None else [ends]
    if isinstance(pairs, str):
        return pairs
    rest = {name: value for name, value in fields.items() if name not in ("responses", "score", "rank", "best")}
    made = {}
    for i, j in pairs:
        suffix = f"-{i}-{j}" if selection.how == "all" and len(responses) > 2 else ""
        made[suffix] = rest | {"chosen": responses[i], "rejected": responses[j]}
        if "score" in fields:
            made[suffix] |= {"chosen_score": values[i], "rejected_score": values[j]}
    return made


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
