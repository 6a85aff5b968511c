"""Every pair of responses with different rewards: N responses without ties give N (N - 1) / 2 (InstructGPT, arXiv
2203.02155, §3.5, which trains on all comparisons of a prompt)."""

from dataclasses import dataclass
from itertools import permutations

from cream.pairs.block import Block, Choice
from cream.pairs.extremes import ALL_EQUAL

INPUTS = {"rewards": True, "previous": False}


@dataclass
class Options:
    """--strategy all_pairs"""


def choose(block: Block, options: Options) -> list[list[Choice] | str]:
    """All (i, j) with reward i > reward j."""
    found = []
    for record, usable in zip(block.records, block.usable, strict=True):
        reward = record.reward
        found.append([Choice(i, j) for i, j in permutations(usable, 2) if reward[i] > reward[j]] or ALL_EQUAL)
    return found
