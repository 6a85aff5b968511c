"""CREAM's pairs: the highest-rewarded response against the lowest-rewarded one (arXiv 2410.12735, Algorithm 1)."""

from collections.abc import Sequence
from dataclasses import dataclass

from cream.pairs.choice import Choice, best_against_worst
from cream.pairs.inputs import PREVIOUS, REWARDS
from cream.records import Item, Rewards

INPUTS = {"rewards": REWARDS, "previous": PREVIOUS}
ALL_EQUAL = "all rewards equal"


@dataclass
class Options:
    """--strategy extremes"""


def choose(record: Rewards, usable: Sequence[int], item: Item | None, options: Options) -> list[Choice] | str:
    """One pair a prompt; the first of ties wins."""
    pair = best_against_worst(record.reward, usable, usable)
    return [pair] if record.reward[pair.chosen] > record.reward[pair.rejected] else ALL_EQUAL
