"""The quality output of an ODIN reward model (arXiv 2402.07319), which is trained to say nothing of the length; the
other output, of the length, is kept as a part."""

from pathlib import Path

from cream.records import Samples
from cream.rewards.base import GroupReward, RewardModelOptions, check_head, check_reward_model, reward_model_pass
from cream.scoring.driver import Pass

Options = RewardModelOptions


def check(options: Options) -> None:
    check_reward_model(options, "odin")


def passes(options: Options) -> list[Pass]:
    return [reward_model_pass()]


def objection(options: Options, folder: Path, about: dict) -> None:
    """Raises UserError where the head has other than two outputs."""
    check_head(folder, 2, "odin", ", of length and of quality (a model with one: --reward bradley_terry)")


def flags_for(about: dict) -> dict | None:
    return {} if about.get("stage") == "odin" else None


def combine(sample: Samples, results: dict[str, list], options: Options) -> GroupReward:
    (read,) = results["rm"]
    length, quality = ([outputs and outputs[i] for outputs in read.outputs] for i in range(2))
    return GroupReward(quality, read.reason, parts={"length": length})
