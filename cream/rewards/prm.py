"""A process reward model: the probability that each step of a response is right, and one number of them all (RLHFlow,
math-rm; Math-Shepherd, arXiv 2312.08935).

P(step) = π(+) / (π(+) + π(-)) where the step's sign stands (cream/text/steps.py). Departures from the released code: a
sign is one token, wherever the chat template puts it; one pass has all steps of all responses; empty steps are none.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from cream.cli.flags import flag
from cream.errors import UserError
from cream.records import Samples
from cream.rewards.base import GroupReward, RewardModelOptions, check_reward_model
from cream.scoring.driver import Pass
from cream.scoring.signs import Signed, StepGroup
from cream.text.chat import UNFINISHED
from cream.text.steps import SPLIT_HELP, split_steps
from cream.text.thoughts import ThoughtFlags, final_text

ROLE = "rm"
AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": fmean,
    "min": min,
    "prod": math.prod,
    "last": lambda steps: steps[-1],
}


@dataclass
class Options(ThoughtFlags, RewardModelOptions):
    """Rewards by a process reward model (prm)"""

    step_split: str = flag("lines", SPLIT_HELP)
    prm_aggregate: str = flag(
        "mean",
        "the reward of a response by its steps' probabilities: mean, min, prod (which prefers few steps), last",
        choices=tuple(AGGREGATES),
    )


def passes(options: ThoughtFlags) -> list[Pass]:
    return [Pass(ROLE, "reward_model", worker="signs", external=True, quotes=True)]


def check(options: Options) -> None:
    """Raises UserError where --reward_model is missing."""
    check_reward_model(options, "prm")


def objection(options: Options, folder: Path, about: dict) -> str | None:
    """Why the model in a folder, whose sidecar is `about`, should not sign these steps: it was trained on others."""
    check_trained("prm", folder, about)
    trained = about.get("steps", {}).get("split")
    if trained in (None, options.step_split):
        return None
    return f"{folder} was trained on steps by --step_split {trained}, here it is {options.step_split}; give that one"


def check_trained(reward: str, folder: Path, about: dict) -> None:
    """Raises UserError where a model that this project trained was not trained to sign."""
    stage = about.get("stage")
    if stage not in (None, reward):
        other = f"use --reward {stage}" if stage in ("prm", "orm") else f"train one: --train_stage {reward}"
        raise UserError(f"{folder}: --reward {reward} needs a model of --train_stage {reward}, not of {stage}; {other}")


def requests(role: str, sample: Samples, options: Options) -> list[StepGroup]:
    return group(sample, options, lambda text: split_steps(text, options.step_split))


def group(sample: Samples, options: ThoughtFlags, split: Callable[[str], list[str]]) -> list[StepGroup]:
    """A sample's responses, without their thoughts, in steps."""
    texts = (final_text(text, options.tags, sample.thought_opened) for text in sample.responses)
    return [StepGroup("", sample.prompt, [[] if text is None else split(text) for text in texts])]


def flags_for(about: dict) -> dict | None:
    return {"step_split": about["steps"]["split"]} if about.get("stage") == "prm" else None


def combine(sample: Samples, results: dict[str, list], options: Options) -> GroupReward:
    """The steps' probabilities are in `parts`."""
    steps, reason = probabilities(sample, results, options)
    aggregate = AGGREGATES[options.prm_aggregate]
    return GroupReward([None if p is None else aggregate(p) for p in steps], reason, parts={"steps": steps})


def probabilities(
    sample: Samples, results: dict[str, list], options: ThoughtFlags
) -> tuple[list[list[float] | None], list[str | None]]:
    """Of each response's steps, P(+), or None; and why it has none."""
    signed: Signed = results[ROLE][0]
    reason = [
        UNFINISHED if final_text(text, options.tags, sample.thought_opened) is None else why
        for text, why in zip(sample.responses, signed.reason, strict=True)
    ]
    return [None if odds is None else [*map(sigmoid, odds)] for odds in signed.log_odds], reason


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), for any x."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
