"""What several sections compute: means with intervals, bins, histograms."""

from collections.abc import Sequence
from math import sqrt

import numpy as np

from cream.evaluation.bootstrap import Draws
from cream.evaluation.rewards import correlation
from cream.ranking import Array

NORMAL = 1.96  # standard errors of a 95 % interval
BINS = 10


def mean(values: Array) -> dict:
    """n, mean, and its 95 % normal interval, of the values that are not NaN; None without one."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    if not len(values):
        return {"n": 0, "mean": None, "low": None, "high": None}
    middle = float(values.mean())
    half = NORMAL * float(values.std(ddof=1)) / sqrt(len(values)) if len(values) > 1 else None
    bounds = (None, None) if half is None else (middle - half, middle + half)
    return {"n": len(values), "mean": middle, "low": bounds[0], "high": bounds[1]}


def by_bins(x: Array, y: Array, bins: int = BINS) -> list[dict]:
    """Mean of y in bins of x with about equally many values: `x`, the mean there, and `mean` of y. Equal values of x
    are in one bin."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = x[known], y[known]
    if not len(x):
        return []
    bin_of = np.searchsorted(np.sort(x), x) * bins // len(x)
    return [{"x": float(x[bin_of == b].mean()), **mean(y[bin_of == b])} for b in np.unique(bin_of)]


def rank_correlation(x: Array, y: Array) -> float | None:
    """Spearman's, over the pairs of which both are known; None where one is constant."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    known = ~(np.isnan(x) | np.isnan(y))
    return _plain(correlation.spearman(np.ones((1, known.sum())), x[known], y[known])[0]) if known.sum() > 1 else None


def estimate(values: Sequence[Array], prompts: Sequence[int], seed: int, measure=correlation.pearson) -> dict:
    """A measure of several arrays with its 95 % bootstrap interval, prompts drawn."""
    return Draws(prompts, seed=seed).estimate(correlation.of(measure, *values))._asdict()


def histogram(values: Array, low: float | None = None, high: float | None = None, bins: int = BINS) -> dict:
    """`middles` of bins of equal width, and `counts`."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if not len(values):
        return {"middles": [], "counts": []}
    span = (values.min() if low is None else low, values.max() if high is None else high)
    counts, edges = np.histogram(values, bins, span)
    return {"middles": ((edges[1:] + edges[:-1]) / 2).tolist(), "counts": counts.tolist()}


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
