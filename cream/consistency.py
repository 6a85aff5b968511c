"""How far two rankings of the same responses agree: the consistency rate of CREAM (arXiv 2410.12735).

The current model M_t and the previous one M_{t-1} each rank the N responses to a prompt; their agreement, mapped to
c in [0, 1], says how much the pair drawn from the current ranking may be trusted. Random rankings average 1/2.
"""

import numpy as np
from numpy.typing import ArrayLike

from cream.errors import UserError, nearest
from cream.ranking import Array, kendall, spearman, top_order
from cream.records import RANKS

STATISTICS = dict(zip(RANKS, (kendall, spearman, top_order), strict=True))


def consistency(current: ArrayLike, previous: ArrayLike, rank: str = "kendall") -> tuple[Array, Array]:
    """Consistency c in [0, 1] and the statistic behind it, both (P,) float64, of two (P, N) arrays of rewards.

    c = (tau + 1) / 2 for Kendall, (rho + 1) / 2 for Spearman, and 1 or 0 for TopOrder. Both are NaN where there is no
    ranking to compare; `ranking.constant` on the `ranking.shared` arrays tells which of the two it was.

    Raises UserError for an unknown rank, ValueError when the shapes differ.
    """
    if rank not in STATISTICS:
        raise UserError(f"unknown rank {rank!r}{nearest(rank, RANKS)}; known are {', '.join(RANKS)}")
    statistic = STATISTICS[rank](current, previous)
    return (statistic if rank == "toporder" else (statistic + 1) / 2), statistic


def shuffled(c: ArrayLike, seed: int) -> Array:
    """The control: the defined values of c (P,) reassigned among the prompts that have one; NaN stays in its place.

    What still works with shuffled consistency is due to its distribution, not to its knowing which pairs to trust.
    """
    c = np.array(c, dtype=np.float64)
    defined = ~np.isnan(c)
    c[defined] = np.random.default_rng(seed).permutation(c[defined])
    return c


class Tally:
    """Statistics of c over prompts. Blocks are added, none is kept.

    `n` prompts have a defined c, `nulls` have none; `mean` and `below_half`, the share of c < 1/2, whose pairs are
    trained in reverse, are None without a value; `std`, of the sample (divisor n - 1), with fewer than two. `histogram`
    (11,): c nearest to 0, 0.1, ... 1, the very values that Kendall takes at N = 5.
    """

    def __init__(self, c: ArrayLike = ()):
        self.n = self.nulls = self._below = 0
        self._mean = self._squares = 0.0  # squares: of the distances to the mean, summed
        self.histogram = np.zeros(11, dtype=np.int64)
        self.add(c)

    def add(self, c: ArrayLike) -> None:
        """Add a block (P,), NaN where c is undefined. Mean and squares as in Chan, Golub & LeVeque 1979, eq. 2.1."""
        c = np.asarray(c, dtype=np.float64)
        defined = c[~np.isnan(c)]
        self.nulls += len(c) - len(defined)
        if not len(defined):
            return
        mean, whole = defined.mean(), self.n + len(defined)
        self._squares += ((defined - mean) ** 2).sum() + (mean - self._mean) ** 2 * self.n * len(defined) / whole
        self._mean += (mean - self._mean) * len(defined) / whole
        self.n = whole
        self._below += int((defined < 0.5).sum())
        self.histogram += np.bincount(np.rint(10 * defined).astype(np.int64), minlength=11)

    mean = property(lambda self: float(self._mean) if self.n else None)
    std = property(lambda self: float(np.sqrt(self._squares / (self.n - 1))) if self.n > 1 else None)
    below_half = property(lambda self: self._below / self.n if self.n else None)


def margin_cap(c: ArrayLike, beta: float) -> Array:
    """logit(c) / beta: the margin, in nats of log-ratio difference, at which a pair's loss has its optimum.

    From dL/dh = sigma(h) - C with h = beta * margin (see `losses.preference_loss`). Infinite at c = 1 (plain DPO),
    negative below 1/2, NaN where c is. A cap far above the margins that training reaches changes nothing.
    """
    c = np.asarray(c, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return (np.log(c) - np.log1p(-c)) / beta
