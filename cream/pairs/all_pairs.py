"""Every pair of responses with different rewards: N responses without ties give N (N - 1) / 2 (InstructGPT, arXiv
2203.02155, §3.5, which trains on all comparisons of a prompt)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from cream.pairs.choice import Choice
from cream.pairs.extremes import ALL_EQUAL
from cream.pairs.inputs import PREVIOUS, REWARDS
from cream.records import Item, Rewards

INPUTS = {"rewards": REWARDS, "previous": PREVIOUS}


@dataclass
class Options:
    """--strategy all_pairs"""


def choose(record: Rewards, usable: Sequence[int], item: Item | None, options: Options) -> list[Choice] | str:
    """All (i, j) with reward i > reward j."""
    reward = record.reward
    return [Choice(i, j) for i, j in permutations(usable, 2) if reward[i] > reward[j]] or ALL_EQUAL
