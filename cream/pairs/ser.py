"""SER's filter of pseudo-labels (Self-Evolved Reward Learning, arXiv 2411.00418). Pure functions.

With p = sigmoid((r - centre) / temperature) of the two responses of a pair, of which the one with the larger p wins:

    status 1   one is good and the other bad: p > high and q < low, or the other way round
    status 2   they are far apart: |p - q| > gap
    union      either; so the released code (microsoft/DKI_LLM), in one pass. A status for every pair by itself, 1 where
               it is met and else 2, keeps the same pairs
    paper      status 1 where enough pairs of the pool meet it, else status 2 where enough meet that, else none: stop

Comparisons are strict, with TOLERANCE: .80 - .50, which is .30000000000000004, is not above .3.

Departure: Bradley-Terry rewards are only defined up to a constant, and p is not. So the centre is the median of the
pool's rewards by default; the paper and the released code have 0.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

TOLERANCE = 1e-9
STOP = "stop"
STATUSES = ("paper", "union", "1", "2")
Number = TypeVar("Number", float, np.ndarray)


class Filter(NamedTuple):
    """What is kept of pairs of rewards: `status` is 1, 2, union, or stop, which keeps none."""

    status: str
    high: float = 0.55
    low: float = 0.45
    gap: float = 0.3
    centre: float = 0.0
    temperature: float = 1.0

    def keeps(self, first: Number, second: Number) -> Number:
        """Whether a pair is kept, by its two rewards, or arrays of them."""
        p, q = (sigmoid((reward - self.centre) / self.temperature) for reward in (first, second))
        met = {"1": self._good_and_bad(p, q), "2": self._far_apart(p, q)}
        met["union"] = met["1"] | met["2"]
        return met.get(self.status, met["1"] & False)

    def _good_and_bad(self, p: Number, q: Number) -> Number:
        high, low = self.high, self.low
        return above(p, high) & above(low, q) | above(q, high) & above(low, p)

    def _far_apart(self, p: Number, q: Number) -> Number:
        return above(abs(p - q), self.gap)


class Survey(NamedTuple):
    """What a pool is like: shares of its pairs that meet status 1 and status 2, the median of its rewards, and the
    filter that follows."""

    f1: float
    f2: float
    offset: float
    filter: Filter


def survey(
    rewards: Sequence[float],
    first: Sequence[float],
    second: Sequence[float],
    wanted: Filter,
    *,
    centred: bool = True,
    least: float = 0.02,
) -> Survey:
    """`rewards`: of the pool's responses; `first`, `second`: those of its pairs. `wanted` has the thresholds, and as
    status one of STATUSES. `least`: the share of the pairs, at least one, that must meet a status for `paper` to be in
    it."""
    offset = float(np.median(rewards)) if len(rewards) else 0.0
    base = wanted._replace(centre=offset if centred else 0.0)
    both = np.asarray(first, float), np.asarray(second, float)
    met = {status: int(base._replace(status=status).keeps(*both).sum()) for status in "12"}
    enough = max(1.0, least * len(first))
    of_pool = "1" if met["1"] >= enough else "2" if met["2"] >= enough else STOP
    f1, f2 = (met[status] / max(1, len(first)) for status in "12")
    return Survey(f1, f2, offset, base._replace(status=of_pool if wanted.status == "paper" else wanted.status))


def above(a: Number, b: Number) -> Number:
    """a > b, by more than TOLERANCE."""
    return a - b > TOLERANCE


def sigmoid(x: Number) -> Number:
    """1 / (1 + exp(-x)), without overflow."""
    return (1 + np.tanh(x / 2)) / 2
