"""Weighted correlations, (R, n) weights, and what a reward has to do with length."""

import numpy as np

from cream.evaluation.bootstrap import Measure
from cream.evaluation.rewards.calibration import groups
from cream.ranking import Array


def pearson(w: Array, x: Array, y: Array) -> Array:
    """(R,) Pearson's correlation of x and y, (n,) or (R, n); NaN where one is constant."""
    total = w.sum(axis=1, keepdims=True)
    x, y = (v - (w * v).sum(axis=1, keepdims=True) / total for v in (x, y))
    xy, xx, yy = ((w * a * b).sum(axis=1) for a, b in ((x, y), (x, x), (y, y)))
    scale = np.sqrt(xx * yy)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 1e-12 * total[:, 0], xy / scale, np.nan)


def ranks(w: Array, x: Array) -> Array:
    """(R, n) average ranks of x among the weighted items, from 0 on."""
    order, starts = groups(x)
    mass = np.add.reduceat(w[:, order], starts, axis=1)
    middle = np.cumsum(mass, axis=1) - mass / 2
    sizes = np.diff(np.r_[starts, len(x)])
    found = np.empty_like(w)
    found[:, order] = np.repeat(middle, sizes, axis=1)
    return found


def spearman(w: Array, x: Array, y: Array) -> Array:
    """(R,) Spearman's correlation; NaN where one is constant."""
    return pearson(w, ranks(w, x), ranks(w, y))


def partial(w: Array, x: Array, y: Array, given: Array) -> Array:
    """(R,) Pearson's correlation of x and y, given a third: of what is left of both after regression on it. A constant
    one explains nothing."""
    xy, xz, yz = pearson(w, x, y), *(np.nan_to_num(pearson(w, v, given)) for v in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        left = np.sqrt((1 - xz**2) * (1 - yz**2))
        return np.where(left > 1e-6, (xy - xz * yz) / left, np.nan)


def centred(values: Array, prompts: np.ndarray) -> Array:
    """The values minus the mean of their prompt; `prompts`: (n,) 0, 1, 2 …"""
    return values - (np.bincount(prompts, values) / np.bincount(prompts))[prompts]


def of(measure, *arrays: Array) -> Measure:
    """The measure of these arrays."""
    return lambda w: measure(w, *arrays)
