"""The commands of the stages that take a file of prepare_data.py, which it prints at its end."""

from pathlib import Path

from cream.cli.console import command
from cream.records import Conversation, Item, Pair, Prompt, Ratings, Record, Samples, Steps

STAGES = {  # layout -> script and flags that take it; NAME and the words in capitals stand for files and models
    Conversation: [("train.py", {"train_stage": "sft", "name": "NAME"})],
    Pair: [
        ("train.py", {"train_stage": "dpo", "name": "NAME"}),
        ("train.py", {"train_stage": "bradley_terry", "name": "NAME", "eval_share": 0.1}),
    ],
    Prompt: [("infer.py", {"mode": "sampling", "name": "NAME"})],
    Item: [("infer.py", {"mode": "evaluation", "name": "NAME"})],
    Samples: [("rewarding.py", {"reward": "judge", "input_file": "NAME"})],
    Ratings: [("train_armo.py", {"reward_model": "RM", "ratings": "NAME", "pairs": "PAIRS"})],
    Steps: [("train.py", {"train_stage": "prm", "name": "NAME"}), ("train.py", {"train_stage": "orm", "name": "NAME"})],
}


def next_stages(kind: type[Record], path: Path, held_out: Path | None = None) -> list[str]:
    """The commands that take the records of `path`; of pairs with a held-out file, that of a reward model."""
    commands = [(script, {k: path if v == "NAME" else v for k, v in flags.items()}) for script, flags in STAGES[kind]]
    if kind is Pair and held_out is not None:
        commands = [("train.py", {"train_stage": "bradley_terry", "name": path, "eval_name": held_out})]
    return [command(script, **flags) for script, flags in commands]
