"""The reward of an ArmoRM (2406.12845), as train_armo.py makes it: a mixture of attributes, debiased of length, whose
weights a gate chooses by the prompt.

`parts` has each attribute's own number by name, and `coefficients`: in the same order what each counts for this prompt.
The reward is the sum of attribute times coefficient, which shows what a response is rewarded for.
"""

from dataclasses import dataclass, field
from pathlib import Path

from cream.errors import UserError
from cream.records import Samples
from cream.rewards.base import GroupReward, RewardModelOptions, check_reward_model, reward_model_pass
from cream.scoring.driver import Pass

COEFFICIENTS = "coefficients"


@dataclass
class Options(RewardModelOptions):
    """Rewards by an ArmoRM (armo)"""

    attributes: list[str] = field(init=False, default_factory=list)  # of the model, read by `objection`


def check(options: Options) -> None:
    check_reward_model(options, "armo")


def passes(options: Options) -> list[Pass]:
    return [reward_model_pass("armo")]


def objection(options: Options, folder: Path, about: dict) -> None:
    """Reads the names of the attributes. Raises UserError where the model is not an ArmoRM."""
    from cream.model.armo import ABOUT, read_facts

    if (facts := read_facts(folder)) is None:
        raise UserError(
            f"--reward armo: {folder} is a reward model without {ABOUT}; train_armo.py makes an ArmoRM of it"
        )
    options.attributes = facts.attributes


def combine(sample: Samples, results: dict[str, list], options: Options) -> GroupReward:
    (read,) = results["rm"]
    count = len(options.attributes)
    parts = {
        name: [outputs and outputs[1 + k] for outputs in read.outputs] for k, name in enumerate(options.attributes)
    }
    parts[COEFFICIENTS] = [outputs and outputs[1 + count :] for outputs in read.outputs]
    return GroupReward([outputs and outputs[0] for outputs in read.outputs], read.reason, parts=parts)
