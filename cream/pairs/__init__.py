"""Choosing preference pairs among a prompt's responses. A strategy is a file here and a line in PAIRS.

A strategy is a module (extremes.py is the example) that holds

    INPUTS     the files that it reads, by the flag of make_pairs.py that names each: {"rewards": REWARDS, …}, with
               the layout of their records (inputs.py). The sidecar of the first says for which policy the pairs are.
               With `previous` a pair's confidence is its prompt's consistency c, else what the strategy states
    Options    a dataclass of its own flags; its docstring is their title in make_pairs.py --help

and, where rewards say which response is better,

    choose(record, usable, item, options) -> [Choice] or str    a prompt's pairs, or why it has none, for the report

and perhaps (threshold.py is the example)

    check(options)                 raises UserError where the flags alone are wrong
    survey(pool, options)          a look at all prompts before the first choice; `pool` yields (record, usable). What
                                   `choose` needs of it is kept in fields of Options with init=False, but no texts
    facts(options, kept, gold)     keys for the sidecar after the last choice, given the number of pairs and their Gold;
                                   `table`: {name: number or text}, columns of a loop's table

`record` is the prompt's Rewards, `usable` the indices of the two or more responses that may enter a pair, `item` its
labelled question, None unless INPUTS has `labels`. Which responses are usable, --margin, --max_pairs_per_prompt and
uuids are the same for all of these strategies (build.py). Where the origin of a response says it (spin.py is the
example), in place of `choose`

    candidates(files, options) -> iterator of Candidates or str    each prompt's possible pairs, or why it has none

`files` has the records of the INPUTS that are given. Which candidates become pairs (complete, of different texts),
--max_pairs_per_prompt and uuids are the same for all of these (candidates.py).
"""

from types import ModuleType

from cream.pairs import all_pairs, contrast, extremes, oracle, random, spin, threshold
from cream.pairs.inputs import Input

PAIRS: dict[str, ModuleType] = {
    "extremes": extremes,
    "oracle": oracle,
    "all_pairs": all_pairs,
    "threshold": threshold,
    "random": random,
    "spin": spin,
    "contrast": contrast,
}


def all_inputs() -> dict[str, Input]:
    """The INPUTS of all strategies, by flag."""
    return {role: kind for strategy in PAIRS.values() for role, kind in strategy.INPUTS.items()}
