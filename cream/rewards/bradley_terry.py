"""The output of a reward model's scalar head at the end of the conversation, the raw number without an activation: r of
arXiv 2203.02155, eq. 1, trained on preferences as log-odds (R. A. Bradley and M. E. Terry, Biometrika 39, 1952)."""

from pathlib import Path

from cream.records import Samples
from cream.rewards.base import GroupReward, RewardModelOptions, check_head, check_reward_model, reward_model_pass
from cream.scoring.driver import Pass

Options = RewardModelOptions


def check(options: Options) -> None:
    check_reward_model(options, "bradley_terry")


def passes(options: Options) -> list[Pass]:
    return [reward_model_pass()]


def objection(options: Options, folder: Path, about: dict) -> None:
    """Raises UserError where the head has several outputs."""
    check_head(folder, 1, "bradley_terry", ", the reward (an ODIN model has two: --reward odin)")


def flags_for(about: dict) -> dict | None:
    return {} if about.get("stage") == "bradley_terry" else None


def combine(sample: Samples, results: dict[str, list], options: Options) -> GroupReward:
    (read,) = results["rm"]
    return GroupReward([outputs and outputs[0] for outputs in read.outputs], read.reason)
