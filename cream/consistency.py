"""How far two rankings of the same answers agree: the consistency rate of CREAM (arXiv 2410.12735).

The current model M_t and the previous one M_{t-1} each rank the N answers to a prompt; their agreement, mapped to
c in [0, 1], says how much the pair drawn from the current ranking may be trusted. Random rankings average 1/2.
"""

from dataclasses import dataclass

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
    """The control: the defined values of c (P,) dealt out again to the prompts that have one; NaN stays in its place.

    What still works with shuffled consistency is due to its distribution, not to its knowing which pairs to trust.
    """
    c = np.array(c, dtype=np.float64)
    defined = ~np.isnan(c)
    c[defined] = np.random.default_rng(seed).permutation(c[defined])
    return c


@dataclass(frozen=True)
class Description:
    """Statistics of c over prompts. `mean` and `below_half` are None without a value, `std` with fewer than two."""

    n: int  # prompts with a defined c
    nulls: int  # prompts without one
    mean: float | None
    std: float | None  # of the sample, divisor n - 1
    below_half: float | None  # share of c < 1/2, whose pairs are trained in reverse
    histogram: tuple[int, ...]  # 11 counts: c nearest to 0, 0.1, ... 1, the very values that Kendall takes at N = 5


def describe(c: ArrayLike) -> Description:
    """Statistics of c (P,), NaN where undefined; works on no value at all."""
    c = np.asarray(c, dtype=np.float64)
    known = c[~np.isnan(c)]
    return Description(
        n=len(known),
        nulls=len(c) - len(known),
        mean=float(known.mean()) if len(known) else None,
        std=float(known.std(ddof=1)) if len(known) > 1 else None,
        below_half=float((known < 0.5).mean()) if len(known) else None,
        histogram=tuple(np.bincount(np.rint(10 * known).astype(np.int64), minlength=11).tolist()),
    )


def margin_cap(c: ArrayLike, beta: float) -> Array:
    """logit(c) / beta: the margin, in nats of log-ratio difference, at which a pair's loss has its optimum.

    From dL/dh = sigma(h) - C with h = beta * margin (see `losses.preference_loss`). Infinite at c = 1 (plain DPO),
    negative below 1/2, NaN where c is. A cap far above the margins that training reaches changes nothing.
    """
    c = np.asarray(c, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return (np.log(c) - np.log1p(-c)) / beta
