"""Pseudo-labels: pairs that the rewarding model is sure of, with its probability as their confidence.

With Bradley-Terry rewards P(i is better than j) = sigmoid(r_i - r_j) (semi-supervised reward modelling, arXiv
2409.06903, keeps such predictions above a threshold); a model that compared the responses states P itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp, isnan

from cream.cli.flags import flag
from cream.pairs.choice import Choice
from cream.pairs.inputs import REWARDS
from cream.preferences import comparisons
from cream.records import Item, Rewards

INPUTS = {"rewards": REWARDS}  # no previous ranking: the confidence is the model's own
NONE_SURE = "no pair as sure as --threshold"


@dataclass
class Options:
    """--strategy threshold"""

    threshold: float = flag(
        0.7,
        "keep pairs with at least this confidence, the probability that the chosen response is the better one",
        low=0.5,
        high=1,
    )


def choose(record: Rewards, usable: Sequence[int], item: Item | None, options: Options) -> list[Choice] | str:
    """All pairs with a confidence of at least the threshold, chosen being what the model prefers; 1/2 is no pair."""
    pairs = (Choice(i, j, p) for i, j, p in _preferences(record, usable) if p > 0.5 and p >= options.threshold)
    return list(pairs) or NONE_SURE


def _preferences(record: Rewards, usable: Sequence[int]) -> Iterator[tuple[int, int, float]]:
    """(i, j, P(i is better than j) >= 1/2) of every two responses that the model compared: from the record's
    `preferences` where it has them, else from the rewards."""
    compared = None if record.preferences is None else comparisons(record.preferences)
    for i, j in combinations(usable, 2):
        if compared is None:
            if record.reward[i] < record.reward[j]:
                i, j = j, i
            yield i, j, 1 / (1 + exp(min(0.0, record.reward[j] - record.reward[i])))
            continue
        if not isnan(p := float(compared[i, j])):
            yield (i, j, p) if p >= 0.5 else (j, i, 1 - p)
