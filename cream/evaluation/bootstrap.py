"""95 % intervals by the bootstrap (B. Efron, Annals of Statistics 7, 1979), of any measure of weighted items.

A measure takes weights (R, n), a row for each draw with the number of times that an item was drawn, and gives R values.
Prompts are drawn, with all their items, within their subset: pairs of responses to one prompt are not independent.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cream.ranking import Array

RESAMPLES = 1000
AT_ONCE = 1 << 21  # weights in memory at once
Measure = Callable[[Array], Array]


class Estimate(NamedTuple):
    """A value with its 95 % interval, over n items; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None
    n: int


class Draws:
    """Draws of prompts. prompts: (n,) the prompt of each item; subsets: (n,) its subset, within which prompts are
    drawn; None: of all prompts."""

    def __init__(self, prompts: Sequence, subsets: Sequence | None = None, seed: int = 0, resamples: int = RESAMPLES):
        _, first, self.prompt = np.unique(np.asarray(prompts, dtype=str), return_index=True, return_inverse=True)
        own = np.zeros(len(first), int)
        if subsets is not None and len(first):
            own = np.unique(np.asarray(subsets, dtype=str)[first], return_inverse=True)[1]
        self.strata = [np.flatnonzero(own == s) for s in range(own.max(initial=-1) + 1)]
        self.seed, self.resamples = seed, resamples

    def weights(self) -> Iterator[Array]:
        """(R, n) weights, in parts; the same ones at each call."""
        rng, most = np.random.default_rng(self.seed), max(1, AT_ONCE // max(1, len(self.prompt)))
        for start in range(0, self.resamples, most):
            count = min(most, self.resamples - start)
            drawn = np.empty((count, sum(map(len, self.strata))))
            for members in self.strata:
                n = len(members)
                some = rng.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
                drawn[:, members] = np.bincount(some.ravel(), minlength=count * n).reshape(count, n)
            yield drawn[:, self.prompt]

    def estimate(self, measure: Measure) -> Estimate:
        """The measure of all items, and of the draws: percentiles of those in which it is defined."""
        n = len(self.prompt)
        value = measure(np.ones((1, n)))[0] if n else np.nan
        if not np.isfinite(value):
            return Estimate(None, None, None, n)
        values = np.concatenate([measure(weights) for weights in self.weights()])
        if not np.isfinite(values).any():
            return Estimate(float(value), None, None, n)
        low, high = np.quantile(values[np.isfinite(values)], [0.025, 0.975])
        return Estimate(float(value), float(low), float(high), n)


def ratio(parts: Array, wholes: Array) -> Array:
    """parts / wholes, NaN where the whole is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(wholes) > 0, parts / wholes, np.nan)


def ratio_interval(parts: Sequence[float], wholes: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """(sum of parts / sum of wholes, low, high): a share with its 95 % interval, of prompts that each have a part and a
    whole. NaN where all wholes are 0."""
    parts, wholes = np.asarray(parts, dtype=float), np.asarray(wholes, dtype=float)
    parts, wholes = parts[wholes > 0], wholes[wholes > 0]
    found = Draws(range(len(wholes)), seed=seed).estimate(lambda w: ratio(w @ parts, w @ wholes))
    return (np.nan,) * 3 if found.value is None else found[:3]


def mean_of(values: Array) -> Measure:
    """The weighted mean of (n,) values that are not NaN."""
    known = ~np.isnan(values)
    return lambda w: ratio(w[:, known] @ values[known], w[:, known].sum(axis=1))
