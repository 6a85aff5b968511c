"""What a pair strategy chooses, and the uuids of a prompt's pairs."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from cream.errors import UserError

NUMBERED = re.compile(r"#([2-9]|[1-9][0-9]+)\Z")  # how the uuids of a prompt's second and further pairs end


class Choice(NamedTuple):
    """One pair of a prompt, as indices of its responses.

    `confidence`: the probability in [0, 1] that `chosen` is the better one; None where the strategy states none.
    """

    chosen: int
    rejected: int
    confidence: float | None = None


def best_against_worst(reward: Sequence[float], good: Sequence[int], bad: Sequence[int]) -> Choice:
    """The highest-rewarded response of `good` against the lowest-rewarded of `bad`, both indices; the first of ties."""
    return Choice(max(good, key=reward.__getitem__), min(bad, key=reward.__getitem__))


def pair_uuid(uuid: str, number: int) -> str:
    """The uuid of a prompt's pair `number`, from 1: the prompt's own, then UUID#2, UUID#3 …"""
    return uuid if number == 1 else f"{uuid}#{number}"


class PairUuids:
    """Whether the uuids of all pairs are unique, given those of the prompts are."""

    def __init__(self):
        self._numbered: str | None = None  # the uuid of a prompt that may be that of another's further pair
        self._several = False

    def check(self, uuid: str, pairs: int) -> None:
        """To be called for every prompt with its number of pairs. Raises UserError where two pairs may get one uuid."""
        self._several |= pairs > 1
        if self._numbered is None and NUMBERED.search(uuid):
            self._numbered = uuid
        if self._numbered is not None and self._several:
            raise UserError(
                f"record {self._numbered!r}: a prompt's second and further pairs are named UUID#2, UUID#3 …, so no "
                "prompt may have such a uuid; give it another one, or --max_pairs_per_prompt 1"
            )
