"""Choosing preference pairs among a prompt's responses. A strategy is a file here and a line in PAIRS.

A strategy is a module (extremes.py is the example) that holds

    INPUTS     the files that it reads, by flag, and whether it needs them: {"rewards": True, "previous": False, …}.
               With `previous` a pair's confidence is its prompt's consistency c, else what the strategy states
    Options    a dataclass of its own flags; its docstring is their title in make_pairs.py --help
    choose(record, usable, item, options) -> [Choice] or str    a prompt's pairs, or why it has none, for the report

`record` is the prompt's Rewards, `usable` the indices of the two or more responses that may enter a pair, `item` its
labelled question, None unless INPUTS has `labels`. Which responses are usable, --margin, --max_pairs_per_prompt and
uuids are the same for all strategies (build.py).
"""

from cream.pairs import all_pairs, extremes, oracle, random, threshold

PAIRS = {"extremes": extremes, "oracle": oracle, "all_pairs": all_pairs, "threshold": threshold, "random": random}
