"""The Oracle baseline: labels say which responses are correct, rewards only choose among the correct and the wrong.

The paper's Oracle ranks with an external reward model (arXiv 2410.12735); here the label itself decides, the upper
bound of such a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cream.evaluation.tasks import grade_record
from cream.pairs.choice import Choice, best_against_worst
from cream.pairs.inputs import LABELS, PREVIOUS, REWARDS
from cream.records import Item, Rewards

INPUTS = {"rewards": REWARDS, "previous": PREVIOUS, "labels": LABELS}
NONE_CORRECT = "no correct response"
NONE_WRONG = "no wrong response"


@dataclass
class Options:
    """--strategy oracle"""


def choose(record: Rewards, usable: Sequence[int], item: Item | None, options: Options) -> list[Choice] | str:
    """The highest-rewarded correct response against the lowest-rewarded wrong one, even where that has the higher
    reward: the Oracle knows better. The first of ties wins."""
    texts = record.responses()
    correct = [i for i in usable if grade_record(item, texts[i])[1]]
    wrong = [i for i in usable if i not in correct]
    if correct and wrong:
        return [best_against_worst(record.reward, correct, wrong)]
    return NONE_WRONG if correct else NONE_CORRECT
