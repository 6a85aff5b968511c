"""CREAM's pairs: the highest-rewarded response against the lowest-rewarded one (arXiv 2410.12735, Algorithm 1)."""

from dataclasses import dataclass

from cream.pairs.block import Block, Choice, best_against_worst

INPUTS = {"rewards": True, "previous": False}
ALL_EQUAL = "all rewards equal"


@dataclass
class Options:
    """--strategy extremes"""


def choose(block: Block, options: Options) -> list[list[Choice] | str]:
    """One pair a prompt; the first of ties wins."""
    found = []
    for record, usable in zip(block.records, block.usable, strict=True):
        pair = best_against_worst(record.reward, usable, usable)
        found.append([pair] if record.reward[pair.chosen] > record.reward[pair.rejected] else ALL_EQUAL)
    return found
