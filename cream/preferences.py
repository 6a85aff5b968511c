"""Preferences between the N responses to a prompt -> a number for each, so that pairwise judges rank like any reward.

`preferences` is N x N: [i][j] is the probability that i is better than j, None where it is unknown and on the diagonal.
[i][j] and [j][i] may come from two orders of presentation and contradict each other; a comparison is their mean, or the
one that there is: P_ij = 1 - P_ji, a tie 1/2. Unknown comparisons are no ties: nothing is added for them.

Numbers of responses that no chain of comparisons joins cannot be compared. So only the largest group of responses that
are joined has numbers (of groups of equal size, that of the first response), the others None; all None where nothing
is compared.
"""

from collections.abc import Callable, Sequence

import numpy as np

from cream.ranking import Array

Preferences = Sequence[Sequence[float | None]]

NOT_JOINED = "no comparison joins it with most of the other responses"  # the reason where a response has no number
PRIOR = 1e-4  # precision of each strength's normal prior: a standard deviation of 100 nats
STEPS = 100  # of Newton's method at most; about ten are taken
DIGITS = 9  # so that equal strengths are equal numbers, whatever the rounding


def comparisons(preferences: Preferences) -> Array:
    """(N, N) P_ij, the mean over both orders or the one that there is; NaN where unknown, and on the diagonal."""
    n = len(preferences)
    stated = np.array([[np.nan if p is None else p for p in row] for row in preferences], float).reshape(n, n)
    other = 1 - stated.T
    return np.where(np.isnan(stated), other, np.where(np.isnan(other), stated, (stated + other) / 2))


def win_rates(preferences: Preferences) -> list[float | None]:
    """Expected wins over known comparisons: the mean of P_ij over j, so that an unknown one is no loss. Where not every
    two are compared, it depends on the strength of those that are: `bradley_terry` does not."""
    return _of_joined(preferences, _rates)


def bradley_terry(preferences: Preferences) -> list[float | None]:
    """Bradley-Terry strengths s in nats, of mean 0 (R. A. Bradley and M. E. Terry, Biometrika 39, 1952): those that
    maximise

        sum_{i<j} P_ij log sigma(s_i - s_j) + P_ji log sigma(s_j - s_i)  -  PRIOR / 2 sum_i s_i^2

    by Newton's method. The prior is weak; it keeps strengths finite where a response wins or loses all comparisons.
    """
    return _of_joined(preferences, _strengths)


SCORES: dict[str, Callable[[Preferences], list[float | None]]] = {"wins": win_rates, "bradley_terry": bradley_terry}


def _of_joined(preferences: Preferences, numbers: Callable[[Array], Array]) -> list[float | None]:
    """The numbers (n,) of the comparisons (n, n) among the largest joined group; None for the other responses."""
    p = comparisons(preferences)
    group = _largest_group(~np.isnan(p))
    found: list[float | None] = [None] * len(p)
    for i, value in zip(group, np.round(numbers(p[np.ix_(group, group)]), DIGITS) + 0.0, strict=True):  # no -0
        found[i] = float(value)
    return found


def _largest_group(joined: np.ndarray) -> list[int]:
    """Indices of the largest connected group of two or more, given which two are joined (N, N); [] if there is none."""
    groups, left = [], dict.fromkeys(range(len(joined)))
    while left:
        group = ahead = [next(iter(left))]
        while ahead:
            for i in ahead:
                left.pop(i, None)
            ahead = [j for j in left if joined[ahead, j].any()]
            group = group + ahead
        groups.append(sorted(group))
    largest = max(groups, key=len, default=[])
    return largest if len(largest) > 1 else []


def _rates(p: Array) -> Array:
    """(n,) means of (n, n) comparisons, with NaN where unknown, of which each row has one at least."""
    return np.nanmean(p, axis=1) if len(p) else np.zeros(0)


def _strengths(p: Array) -> Array:
    """(n,) the maximum above, of (n, n) comparisons with NaN where unknown."""
    known = ~np.isnan(p)
    wins, s = np.nansum(p, axis=1), np.zeros(len(p))
    value = _objective(p, known, s)
    for _ in range(STEPS if len(p) else 0):
        q = known / (1 + np.exp(s[None, :] - s[:, None]))  # sigma(s_i - s_j)
        gradient, weights = wins - q.sum(axis=1) - PRIOR * s, q * (known - q)
        step = np.linalg.solve(np.diag(weights.sum(axis=1) + PRIOR) - weights, gradient)
        if np.abs(step).max() < 10.0 ** -(DIGITS + 2):
            break
        while (new := _objective(p, known, s + step)) < value and np.abs(step).max() > 1e-12:  # too far
            step /= 2
        s, value = s + step, new
    return s


def _objective(p: Array, known: np.ndarray, s: Array) -> float:
    terms = np.where(known, -np.nan_to_num(p) * np.logaddexp(0, s[None, :] - s[:, None]), 0)
    return float(terms.sum() - PRIOR / 2 * (s * s).sum())
