"""What a pair strategy chooses."""

from collections.abc import Sequence
from typing import NamedTuple


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
