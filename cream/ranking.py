"""Ranks of the N responses to each of P prompts, and how well two rankings of the same responses agree.

Every array is (P, N) float64: one row a prompt, one column a response, the higher the better, NaN where a prompt has no
such response or the response no reward. A response that is NaN in either of two arrays leaves both rankings.

Kendall and Spearman are one formula over different scores of a pair of responses i, j (H. E. Daniels, Biometrika 33,
1944): gamma = sum a_ij b_ij / sqrt(sum a_ij^2 sum b_ij^2), with a_ij = sign(a_i - a_j) for Kendall's tau-b and
a_ij = rank(a_i) - rank(a_j) for Spearman's rho. Ties score 0, so they are ties and no invented order.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

COMPARISONS_AT_ONCE = 1 << 18  # prompts x N x N signs in flight: small enough for the processor's cache


def padded(rows: Iterable[Sequence[float | None]]) -> Array:
    """Ragged rows of rewards as one (P, N) array; N is the longest row; None and the missing end of a row are NaN."""
    rows = list(rows)
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    array = np.full((len(rows), lengths.max(initial=0)), np.nan)
    array[np.arange(array.shape[1]) < lengths[:, None]] = np.array([x for row in rows for x in row], dtype=np.float64)
    return array


def shared(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    """Both (P, N) arrays with NaN wherever either is NaN. Raises ValueError unless both are (P, N)."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"two (prompts, responses) arrays of one shape are needed, got {a.shape} and {b.shape}")
    missing = np.isnan(a) | np.isnan(b)
    return np.where(missing, np.nan, a), np.where(missing, np.nan, b)


def best(x: Array) -> NDArray[np.bool_]:
    """(P, N) bool: which responses have their prompt's highest value; several when they tie, none when all are NaN."""
    return x == np.fmax.reduce(x, axis=1, keepdims=True, initial=np.nan)


def worst(x: Array) -> NDArray[np.bool_]:
    """(P, N) bool: which responses have their prompt's lowest value; several when they tie, none when all are NaN."""
    return x == np.fmin.reduce(x, axis=1, keepdims=True, initial=np.nan)


def constant(x: Array) -> NDArray[np.bool_]:
    """(P,) bool: no two responses differ, so there is no ranking. True with fewer than two responses."""
    return ~np.any(best(x) & ~worst(x), axis=1)


def kendall(a: ArrayLike, b: ArrayLike) -> Array:
    """(P,) Kendall's tau-b in [-1, 1] (M. G. Kendall, Biometrika 33, 1945; CREAM, arXiv 2410.12735, where no ties are).

    NaN where a prompt has fewer than two shared responses or either ranking is constant. Raises ValueError on shapes.
    """
    return _gamma(a, b, lambda signs: signs)


def spearman(a: ArrayLike, b: ArrayLike) -> Array:
    """(P,) Spearman's rho in [-1, 1]: Pearson's correlation of the average ranks. NaN and ValueError as `kendall`."""
    return _gamma(a, b, lambda signs: signs.sum(axis=1, dtype=np.float64))  # twice the centred ranks: exact integers


def top_order(current: ArrayLike, previous: ArrayLike) -> Array:
    """(P,) 1.0 where both rankings name the same best and the same worst response, else 0.0 (CREAM's TopOrder).

    With ties, every best response of `current` must be among the best of `previous`, and likewise the worst, so that
    the value holds for whichever of them becomes the preference pair. NaN and ValueError as `kendall`.
    """
    current, previous = shared(current, previous)
    agree = ~np.any(best(current) & ~best(previous) | worst(current) & ~worst(previous), axis=1)
    return np.where(constant(current) | constant(previous), np.nan, agree)


def _chunks(prompts: int, responses: int) -> Iterator[slice]:
    """Slices of prompts whose N x N comparisons fit into COMPARISONS_AT_ONCE."""
    step = max(1, COMPARISONS_AT_ONCE // max(1, responses**2))
    return (slice(start, start + step) for start in range(0, prompts, step))


def _signs(x: Array) -> NDArray[np.int8]:
    """(P, N) -> (N, N, P) int8, entry [i, j, p] = sign(x[p, i] - x[p, j]), 0 where either is NaN.

    Prompts come last so that sums over responses run along contiguous memory; comparing instead of subtracting keeps
    infinite rewards in order.
    """
    columns = np.ascontiguousarray(x.T)
    above = (columns[:, None] > columns[None, :]).view(np.int8)
    return above - above.swapaxes(0, 1)


def _gamma(a: ArrayLike, b: ArrayLike, score: Callable[[NDArray[np.int8]], NDArray]) -> Array:
    """Daniels' coefficient (P,) of two rankings; `score` turns signs (N, N, P) into scores (..., P)."""
    a, b = shared(a, b)
    gamma = np.empty(len(a))
    for rows in _chunks(*a.shape):
        u, v = score(_signs(a[rows])), score(_signs(b[rows]))
        responses = tuple(range(u.ndim - 1))
        uv, uu, vv = (np.sum(product, axis=responses, dtype=np.float64) for product in (u * v, u * u, v * v))
        with np.errstate(invalid="ignore"):  # a constant ranking is 0 / 0 = NaN, as promised
            gamma[rows] = uv / np.sqrt(uu * vv)
    return gamma
