"""RewardBench 2 (arXiv 2506.01937): one correct response among four, in five domains, and Ties.

In Ties a prompt has two rows, "ref:n" with one correct response and "tied:n" with several equally good ones: a reward
should separate correct from wrong responses by more than correct ones from each other. The score is that of the package
rewardbench 0.1.4; where that divides by nothing, it is None.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from cream.evaluation.bootstrap import ratio
from cream.ranking import Array

DOMAINS = {"Factuality": 475, "Precise IF": 160, "Math": 183, "Safety": 450, "Focus": 495, "Ties": 102}  # rows
TIES = "Ties"
SHARES = np.array([0.3, 0.3, 0.2, 0.2, 0.01])  # of the parts of the Ties score
Number = float | None


def domain_of(name: str | None) -> str | None:
    """The domain that a subset's name means, whatever its case."""
    return next((domain for domain in DOMAINS if domain.casefold() == (name or "").casefold()), None)


def share_of_best(rewards: Sequence[Number], correct: int = 0) -> float:
    """1 / c if the correct response is one of c with the highest reward, else 0; 0 where one has no reward."""
    if None in rewards or rewards[correct] < max(rewards):
        return 0.0
    return 1 / rewards.count(rewards[correct])


def tie_parts(rows: Mapping[str, tuple[Sequence[Number], int]]) -> Array:
    """(P, 5) parts of the Ties score per prompt n, NaN where it has none. `rows`: "ref:n", "tied:n" -> (rewards, number
    of correct ones, which come first).

    With m(row) the lowest correct minus the highest wrong reward, and s the spread of correct ones in "tied:n":
    1[m(tied) > 0], 1[m(ref) > 0], 1[m(tied) > s], 1[min m > s], tanh(min m / s - 1); the last three where both rows are
    there and "tied:n" has two correct responses, the last one only where s > 0. A row of which a response has no reward
    is wrong in all.
    """
    found = {}
    for name, (rewards, count) in rows.items():
        kind, _, number = name.partition(":")
        found.setdefault(number, {})[kind] = _margin(rewards, count)
    parts = np.full((len(found), 5), np.nan)
    for own, rows_of in zip(parts, found.values(), strict=True):
        margins = {kind: margin for kind, (margin, _) in rows_of.items()}
        for i, kind in enumerate(("tied", "ref")):
            if kind in margins:
                own[i] = margins[kind] > 0
        spread = rows_of.get("tied", (0, None))[1]
        if "ref" in margins and spread is not None:
            smaller = min(margins.values())
            own[2], own[3] = margins["tied"] > spread, smaller > spread
            if spread > 0 and np.isfinite(smaller):
                own[4] = np.tanh(smaller / spread - 1)
    return parts


def _margin(rewards: Sequence[Number], correct: int) -> tuple[float, float | None]:
    """(lowest correct - highest wrong reward, spread of the correct ones or None for fewer than two)."""
    if not 0 < correct < len(rewards):
        return 0.0, None
    if None in rewards:
        return -np.inf, 0.0 if correct > 1 else None
    good, wrong = rewards[:correct], rewards[correct:]
    return min(good) - max(wrong), max(good) - min(good) if correct > 1 else None


def ties_score(parts: Array, weights: Array) -> Array:
    """(R,) Ties scores of weighted prompts, (R, P) weights: the sum of SHARES times the mean of each part, in about
    [-0.01, 1.01]; a last part that no prompt has counts 0, NaN where another has no prompt."""
    known = ~np.isnan(parts)
    means = ratio(weights @ np.where(known, parts, 0.0), weights @ known)
    means[:, 4] = np.nan_to_num(means[:, 4])
    return means @ SHARES
