"""What there is of a command's output: the file that stands for it, and whether the same flags made it."""

import os
from collections.abc import Collection
from pathlib import Path

from cream.cli.flags import as_dict, deciding, try_parse
from cream.files.identity import list_differences
from cream.files.provenance import place_of, read_meta
from cream.loops.plan import MEASURE, Command
from cream.pairs import all_inputs

FILES = ("input_file", "file1", "file2", "gold", "against", *all_inputs())  # flags that name a file
FILES += ("few_shot_file", "chat_template", "deepspeed", "ranks", "without")
SEVERAL = ("exclude", "data", *(role for role, file in all_inputs().items() if file.several))  # separated by commas
MODELS = ("model", "checkpoint", "ref_model_ckpt", "judge_model", "reward_model")  # flags that name a model's folder
DATA = ("name", "seed_data", "labels", "eval_name")  # flags that name a data set
WORDS = "words"  # of prepare_data.py, its command and files: as if they were a flag
INPUTS = {*FILES, *SEVERAL, *MODELS, *DATA, WORDS} - {"deepspeed"}


def main_file(command: Command) -> Path:
    """What its sidecar describes: its output; of evaluate_reward.py, once it has run, the rows in that folder."""
    rows = [*command.output.glob("*.rows.jsonl")] if command.script == MEASURE else []
    return rows[0] if len(rows) == 1 else command.output


def read_made(command: Command) -> dict | None:
    """The sidecar of a command's finished output; None where there is none. Raises UserError on a damaged one."""
    place = main_file(command)
    return read_meta(place) if place.exists() else None


def changed_flags(command: Command, about: dict) -> str:
    """By which settings and inputs a command differs from the one that made its output, whose sidecar is `about`; "" by
    none. Other flags decide nothing; a file that was moved together with the output is the same."""
    script, *argv = about.get("command") or ["not recorded"]
    if Path(script).name != command.script:
        return f"command: {script} -> {command.script}"
    if argv == command.argv():  # by far the most: not parsed
        return ""
    old, new = (_identity(command.config, words) for words in (argv, command.argv()))
    if old is None or new is None:
        return "its command is refused by this version"
    home = command.output if command.output.is_dir() else command.output.parent
    sources = {place_of(home, each).resolve() for each in about.get("sources", {}).values()}
    same = {name for name in INPUTS & old.keys() & new.keys() if _are_same(old[name], new[name], sources)}
    return list_differences(*({name: each[name] for name in each if name not in same} for each in (old, new)))


def _identity(config: type | None, argv: list[str]) -> dict | None:
    """The flags of a command line that decide its output, and those that name inputs; None where it is refused."""
    words: list[str] = []
    parsed = config and try_parse(config, argv, words)[0]
    if parsed is None:
        return None
    inputs = {name: value for name, value in as_dict(parsed).items() if name in INPUTS}
    return deciding(parsed) | inputs | ({WORDS: ",".join(words)} if words else {})


def _are_same(old: object, new: object, sources: Collection[Path]) -> bool:
    """Whether two values name the same inputs: alike, or by a path among `sources`, or with the same end."""
    if not isinstance(old, str) or not isinstance(new, str) or old.count(",") != new.count(","):
        return old == new
    pairs = zip(old.split(","), new.split(","), strict=True)
    return all(a == b or (os.sep in b and _is_same_file(Path(a.strip()), Path(b.strip()), sources)) for a, b in pairs)


def _is_same_file(old: Path, new: Path, sources: Collection[Path]) -> bool:
    return new.resolve() in sources or old.parts[-2:] == new.parts[-2:]
