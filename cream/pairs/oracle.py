"""The Oracle baseline: labels say which answers are right, rewards only choose among the right and among the wrong.

The paper's Oracle ranks with an external reward model (arXiv 2410.12735); here the label itself is asked, the upper
bound of such a model.
"""

import numpy as np
from numpy.typing import NDArray

from cream.pairs.extremes import FEWER_THAN_TWO, Choice, best_against_worst
from cream.ranking import Array

NONE_CORRECT = "no correct answer"
NONE_WRONG = "no wrong answer"


def choose(rewards: Array, correct: NDArray[np.bool_]) -> Choice:
    """The best-rewarded correct answer against the worst-rewarded wrong one; the first of ties wins.

    rewards (P, N), NaN marks answers that may not be chosen; correct (P, N) bool. A pair stands even when the wrong
    answer has the higher reward: that is what the Oracle knows better.
    """
    right, wrong = np.where(correct, rewards, np.nan), np.where(correct, np.nan, rewards)
    reasons = {
        NONE_WRONG: np.isnan(wrong).all(axis=1),
        NONE_CORRECT: np.isnan(right).all(axis=1),
        FEWER_THAN_TWO: np.sum(~np.isnan(rewards), axis=1) < 2,
    }
    return best_against_worst(right, wrong, reasons)
