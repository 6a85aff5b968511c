"""Choosing preference pairs among a prompt's responses. One file per strategy, listed in PAIRS.

A strategy is a module with

    INPUTS     the files that it reads, by flag, and whether it needs them: {"rewards": True, "previous": False, …}.
               Where `previous` is among them, a pair has its prompt's consistency c; else what confidence is stated
    Options    a dataclass of its own flags; its docstring is their title in make_pairs.py --help
    choose     (block, options) -> per prompt of the block a list of pairs, or why it has none (block.py)

Which responses may enter a pair, --margin, --max_pairs_per_prompt and uuids are the same for all (build.py).
"""

from cream.pairs import all_pairs, extremes, oracle, random, threshold

PAIRS = {"extremes": extremes, "oracle": oracle, "all_pairs": all_pairs, "threshold": threshold, "random": random}
