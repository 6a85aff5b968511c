"""An outcome reward model: the probability that a response is right, P = π(+) / (π(+) + π(-)) where its one sign stands
(RLHFlow, math-rm). It is a process reward model whose one step is the whole response."""

from dataclasses import dataclass
from pathlib import Path

from cream.records import Samples
from cream.rewards import prm
from cream.rewards.base import GroupReward, RewardModelOptions, check_reward_model
from cream.rewards.prm import passes
from cream.scoring.signs import StepGroup
from cream.text.thoughts import ThoughtFlags

__all__ = ["passes"]  # as of a PRM, with those below


@dataclass
class Options(ThoughtFlags, RewardModelOptions):
    """Rewards by an outcome reward model (orm)"""


def check(options: Options) -> None:
    """Raises UserError where --reward_model is missing."""
    check_reward_model(options, "orm")


def objection(options: Options, folder: Path, about: dict) -> None:
    """Raises UserError where the model in a folder, whose sidecar is `about`, was trained to another end."""
    prm.check_trained("orm", folder, about)


def requests(role: str, sample: Samples, options: Options) -> list[StepGroup]:
    return prm.group(sample, options, lambda text: [text.strip()] if text.strip() else [])


def flags_for(about: dict) -> dict | None:
    return {} if about.get("stage") == "orm" else None


def combine(sample: Samples, results: dict[str, list], options: Options) -> GroupReward:
    """The probability is the reward."""
    steps, reason = prm.probabilities(sample, results, options)
    return GroupReward([None if p is None else p[0] for p in steps], reason)
