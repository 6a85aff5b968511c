"""Best-of-N: how good is the response that a reward picks among N of the M that there are to a prompt?

Not of the first N but in expectation over all subsets of N, which has the same mean and less variance. Gold values are
numbers, 1 and 0 where responses are right or wrong.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import combinations
from math import comb, lgamma, log

import numpy as np

from cream.ranking import Array

MOST = 1000  # subsets of a prompt's responses that a vote is taken in


def sizes(m: int) -> list[int]:
    """1, 2, 4 … and m."""
    return sorted({m} | {2**i for i in range(m.bit_length()) if 2**i <= m})


def chances(m: int, n: int) -> Array:
    """(m,) the chance that the i-th lowest of m is the highest of n drawn without replacement: C(i, n-1) / C(m, n)."""
    i = np.arange(m)
    with np.errstate(invalid="ignore"):
        logs = np.array([_log_comb(k, n - 1) if k >= n - 1 else -np.inf for k in i]) - _log_comb(m, n)
    return np.exp(logs)


def _log_comb(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def expected_best(rewards: Sequence[float], values: Sequence[float], n: int) -> float:
    """The mean over all subsets of n responses of the value of the one with the highest reward; of several with the
    highest one, their mean."""
    rewards, values = np.asarray(rewards, float), np.asarray(values, float)
    order = np.argsort(rewards, kind="stable")
    ordered = rewards[order]
    group = np.cumsum(np.r_[False, ordered[1:] != ordered[:-1]])
    means = np.bincount(group, values[order]) / np.bincount(group)
    return float(chances(len(rewards), n) @ means[group])


def oracle(values: Sequence[float], n: int) -> float:
    """The same of a reward that is gold itself: for right and wrong, 1 - C(M - c, n) / C(M, n)."""
    return expected_best(values, values, n)


def kl(n: int) -> float:
    """log n - (n - 1) / n nats: a bound of the divergence of best-of-n from the sampler (arXiv 2401.01879)."""
    return log(n) - (n - 1) / n


@lru_cache(maxsize=64)
def subsets(m: int, n: int, seed: int = 0) -> np.ndarray:
    """(S, n) indices, ascending: all subsets, or MOST of them at random."""
    if comb(m, n) <= MOST:
        return np.array([*combinations(range(m), n)])
    drawn = np.random.default_rng([seed, m, n]).random((MOST, m)).argsort(axis=1)[:, :n]
    return np.sort(drawn, axis=1)


WEIGHTS: dict[str, Callable[[Array], Array]] = {  # (S, n) rewards -> weights of their votes
    "softmax": lambda r: np.exp(r - r.max(axis=1, keepdims=True)),
    "sigmoid": lambda r: np.exp(-np.logaddexp(0, -r)),
    "reward": lambda r: r,
}


def vote(
    answers: Sequence[str | None],
    values: Sequence[float],
    n: int,
    weights: Callable[[Array], Array] | None = None,
    rewards: Sequence[float] | None = None,
    seed: int = 0,
) -> float:
    """The mean over `subsets` of the value of the answer with the most votes, each weighed by its reward if there are
    `weights` (arXiv 2203.11171; weighted: 2312.08935, section 3.4); a tie goes to the answer that comes first.

    An answer's value is that of its first response. A response without an answer has no vote; without any vote the
    value is 0.
    """
    known = list(dict.fromkeys(answer for answer in answers if answer is not None))
    worth = np.array([values[answers.index(answer)] for answer in known] + [0.0])
    some = subsets(len(answers), n, seed)
    each = np.ones(some.shape) if weights is None else weights(np.asarray(rewards, float)[some])
    votes, first = np.full((2, len(some), len(known) + 1), -1.0)
    first[:, -1] = votes[:, -1] = -0.5  # nobody
    for k, answer in enumerate(known):
        given = np.array([other == answer for other in answers])[some]
        present = given.any(axis=1)
        votes[:, k] = np.where(present, (each * given).sum(axis=1), -1.0)
        first[:, k] = given.argmax(axis=1)
    leads = votes == votes.max(axis=1, keepdims=True)
    return float(worth[np.where(leads, first, np.inf).argmin(axis=1)].mean())
