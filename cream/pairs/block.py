"""What a pair strategy sees, a block of prompts, and what it gives for each: its pairs, or why it has none."""

from collections.abc import Sequence
from typing import NamedTuple

from cream.records import Item, Rewards


class Choice(NamedTuple):
    """One pair of a prompt, as indices of its responses.

    `confidence`: the probability in [0, 1] that `chosen` is the better one; None where the strategy knows of none.
    """

    chosen: int
    rejected: int
    confidence: float | None = None


class Block(NamedTuple):
    """P prompts with two or more responses that may enter a pair."""

    records: Sequence[Rewards]
    usable: Sequence[Sequence[int]]  # per prompt those responses: rewarded, complete, each text once
    labels: Sequence[Item] | None  # per prompt its labelled question, for a strategy that reads `labels`


def best_against_worst(reward: Sequence[float], good: Sequence[int], bad: Sequence[int]) -> Choice:
    """The highest-rewarded response of `good` against the lowest-rewarded of `bad`, both indices; the first of ties."""
    return Choice(max(good, key=reward.__getitem__), min(bad, key=reward.__getitem__))
