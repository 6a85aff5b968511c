"""The commands that follow a training run, printed at its end."""

from pathlib import Path

from cream.cli.advice import again, recipe, round_before
from cream.cli.console import command, log
from cream.files.provenance import POLICY, read_kind
from cream.rewards import REWARDS

SIGNING = ("prm", "orm")  # stages of policies that are trained to sign steps


def print_next(last: Path, name: str, flags: dict[str, object]) -> None:
    """How to sample from the policy in `last`, and how to evaluate it, or how to reward by it if it is a reward model
    or signs steps; `flags` name it and its place, `name` is the data set that it was trained on."""
    about = read_kind(last)
    if about["kind"] != POLICY or about.get("stage") in SIGNING:
        if about.get("stage") in REWARDS:
            log.info("next, reward sampled responses by it (SAMPLES stands for their file):")
            shared = {key: value for key, value in flags.items() if key != "checkpoint"}
            shared |= {"step_split": about["steps"]["split"]} if about["stage"] == "prm" else {}
            more = {"reward": about["stage"], "reward_model": flags["checkpoint"], "input_file": "SAMPLES"}
            log.info("  %s", command("rewarding.py", **shared, **more))
        return
    before, shipped = round_before(last), recipe(str(flags["model"]))
    if not before and name != shipped.get("sft", {}).get("name"):
        shipped = {}  # a model trained on other data: its recipe's prompts and questions are not for it
    sampled = before["samples"][1].get("name") if before else None
    prompts = _fresh(shipped.get("prompts", []), sampled)
    note = " (PROMPTS stands for prompts that no round has used)" * (prompts == "PROMPTS")
    log.info("next, sample its responses for the next round%s:", note)
    now = flags | {"mode": "sampling", "name": prompts}
    log.info("  %s", again(before, "samples", "infer.py", shipped.get("sampling", {}), **now))
    if form := read_kind(last).get("judge"):
        log.info("or judge responses as it was trained to (SAMPLES stands for sampled ones):")
        asked = {"input_file": "SAMPLES", "reward": "judge", "judge_prompt": form["judge_prompt"]}
        log.info("  %s", command("rewarding.py", **flags, **asked))
    questions = {"name": "QUESTIONS"} | shipped.get("evaluation", {})
    note = " (QUESTIONS stands for labelled ones)" * (questions["name"] == "QUESTIONS")
    log.info("or measure its accuracy%s:", note)
    log.info("  %s", command("infer.py", **flags, mode="evaluation", **questions))


def _fresh(prompts: list[str], used: str | None) -> str:
    """The recipe's prompt set after the one that was used, its first where none was."""
    if used is not None and used not in prompts:
        return "PROMPTS"
    return next(iter(prompts[0 if used is None else prompts.index(used) + 1 :]), "PROMPTS")
