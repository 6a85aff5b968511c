"""Choosing one preference pair a prompt. One file per strategy, listed here.

A strategy is called as `PAIRS[name](rewards, **options)` with rewards (P, N) in which every answer that may not enter a
pair is NaN (`admissible` makes them so), and returns an `extremes.Choice`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from cream.pairs import extremes, oracle
from cream.ranking import Array

PAIRS = {"extremes": extremes.choose, "oracle": oracle.choose}


def distinct(texts: Sequence[str], usable: Sequence[bool]) -> list[bool]:
    """For the answers to one prompt: usable, and the first usable answer with this text."""
    first = {text: i for i, text in reversed(list(enumerate(texts))) if usable[i]}
    return [first.get(text) == i for i, text in enumerate(texts)]


def admissible(rewards: ArrayLike, texts: Sequence[Sequence[str]], truncated: ArrayLike | None = None) -> Array:
    """A copy of rewards (P, N) with NaN also where an answer was cut at the length limit or repeats an earlier one.

    texts: per prompt its own answers, at most N. truncated: (P, N) bool, true where generation ended by `length`;
    None keeps such answers. Equal texts count once, at their first admissible occurrence, so that no strategy can
    return a pair of equal texts. Raises ValueError when there are not P lists of texts.
    """
    rewards = np.array(rewards, dtype=np.float64)
    if truncated is not None:
        rewards[np.asarray(truncated, dtype=bool)] = np.nan
    usable = (~np.isnan(rewards)).tolist()
    for row, answers, ok in zip(rewards, texts, usable, strict=True):
        if len(set(answers)) < len(answers):
            row[: len(answers)][~np.array(distinct(answers, ok))] = np.nan
    return rewards
