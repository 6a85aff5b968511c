"""The control: two responses drawn at random, whatever their rewards. What still works is not due to the ranking."""

from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from cream.cli.flags import flag
from cream.pairs.choice import Choice
from cream.pairs.inputs import PREVIOUS, REWARDS
from cream.records import Item, Rewards

INPUTS = {"rewards": REWARDS, "previous": PREVIOUS}


@dataclass
class Options:
    """--strategy random"""

    seed: int = flag(0, "seed; each prompt's draw depends on it and on the prompt's uuid", low=0, high=2**32 - 1)


def choose(record: Rewards, usable: Sequence[int], item: Item | None, options: Options) -> list[Choice] | str:
    """One of a prompt's N (N - 1) ordered pairs, each as likely, by the seed and the uuid: neither the order of prompts
    nor their number decides."""
    others = len(usable) - 1
    drawn = xxhash.xxh3_64_intdigest(record.uuid.encode(), options.seed) % (len(usable) * others)
    chosen, rejected = divmod(drawn, others)
    return [Choice(usable[chosen], usable[rejected + (rejected >= chosen)])]
