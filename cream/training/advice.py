"""The commands that follow a training run, printed at its end."""

from collections.abc import Mapping
from pathlib import Path

from cream.cli.advice import again, recipe, round_before, say
from cream.cli.console import command
from cream.files.provenance import POLICY, read_kind
from cream.rewards import REWARDS


def print_next(last: Path, name: str, flags: dict[str, object]) -> None:
    """How to sample from the policy in `last`, and how to evaluate it, or how to reward by it if it was trained for
    that; `flags` name it and its place, `name` is the data set that it was trained on."""
    about = read_kind(last)
    if reward := _reward_by(about):
        shared = {key: value for key, value in flags.items() if key != "checkpoint"}
        by = shared | reward | {"reward_model": flags["checkpoint"]}
        say("next, reward sampled responses by it (SAMPLES stands for their file):")
        say("  %s", command("rewarding.py", **by, input_file="SAMPLES"))
        say("or measure it on responses of which some are known to be better (DATA stands for their file):")
        say("  %s", command("evaluate_reward.py", **by, data="DATA"))
    if reward or about["kind"] != POLICY:
        return
    before, shipped = round_before(last), recipe(str(flags["model"]))
    if not before and name != shipped.get("sft", {}).get("name"):
        shipped = {}  # a model trained on other data: its recipe's prompts and questions are not for it
    sampled = before["samples"][1].get("name") if before else None
    prompts = _fresh(shipped.get("prompts", []), sampled)
    note = " (PROMPTS stands for prompts that no round has used)" * (prompts == "PROMPTS")
    say("next, sample its responses for the next round%s:", note)
    now = flags | {"mode": "sampling", "name": prompts}
    say("  %s", again(before, "samples", "infer.py", shipped.get("sampling", {}), **now))
    if form := about.get("judge"):
        say("or judge responses as it was trained to (SAMPLES stands for sampled ones):")
        asked = {"input_file": "SAMPLES", "reward": "judge", "judge_prompt": form["judge_prompt"]}
        say("  %s", command("rewarding.py", **flags, **asked))
    questions = {"name": "QUESTIONS"} | shipped.get("evaluation", {})
    note = " (QUESTIONS stands for labelled ones)" * (questions["name"] == "QUESTIONS")
    say("or measure its accuracy%s:", note)
    say("  %s", command("infer.py", **flags, mode="evaluation", **questions))


def _reward_by(about: Mapping) -> dict[str, object]:
    """The flags of rewarding.py for a model with this sidecar; {} of one that no source of rewards takes."""
    sources = ((name, source) for name, source in REWARDS.items() if hasattr(source, "flags_for"))
    found = ({"reward": name} | own for name, source in sources if (own := source.flags_for(about)) is not None)
    return next(found, {})


def _fresh(prompts: list[str], used: str | None) -> str:
    """The recipe's prompt set after the one that was used, its first where none was."""
    if used is not None and used not in prompts:
        return "PROMPTS"
    return next(iter(prompts[0 if used is None else prompts.index(used) + 1 :]), "PROMPTS")
