"""CREAM's pairs: the best-rewarded answer against the worst-rewarded one (arXiv 2410.12735, Algorithm 1)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cream.ranking import Array, best, constant, worst

FEWER_THAN_TWO = "fewer than two answers"
ALL_EQUAL = "all rewards equal"


class Choice(NamedTuple):
    """One pair a prompt: indices of answers (P,) int64, -1 where there is none, and then the reason why."""

    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]
    reason: NDArray[np.object_]  # (P,) str, or None where there is a pair


def choose(rewards: Array) -> Choice:
    """Highest against lowest of rewards (P, N); NaN marks answers that may not be chosen; the first of ties wins."""
    reasons = {
        ALL_EQUAL: constant(rewards),
        FEWER_THAN_TWO: np.sum(~np.isnan(rewards), axis=1) < 2,
    }
    return best_against_worst(rewards, rewards, reasons)


def best_against_worst(good: Array, bad: Array, reasons: dict[str, NDArray[np.bool_]]) -> Choice:
    """The first best answer of `good` against the first worst of `bad`, both (P, N), unless a reason forbids the pair.

    reasons: why -> (P,) bool, where it holds; a later reason overrides an earlier one.
    """
    reason = np.full(len(good), None, dtype=object)
    for why, holds in reasons.items():
        reason[holds] = why
    paired = np.equal(reason, None)
    return Choice(np.where(paired, _first(best(good)), -1), np.where(paired, _first(worst(bad)), -1), reason)


def _first(marked: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(P,) column of the first true entry of (P, N); meaningless in a row without one."""
    return marked.argmax(axis=1) if marked.shape[1] else np.zeros(len(marked), dtype=np.int64)
