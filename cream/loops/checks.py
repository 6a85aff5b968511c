"""Checks of planned commands before the first one runs: their flags, and whether their inputs exist or will be made."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from cream.cli import names
from cream.cli.flag_fields import NULLS
from cream.cli.flags import find_problems, spell
from cream.errors import UserError
from cream.loops.plan import Command
from cream.text.templates import is_template_name

FILES = ("input_file", "file1", "file2", "rewards", "previous", "labels")  # flags that name a file
FILES += ("few_shot_file", "chat_template", "deepspeed")
IDLE = ("help", "print_config", "dry_run")  # with these a script makes nothing
WITH_DATA = ("train.py", "infer.py")  # they read what --name says, or --input_file
LookUps = Mapping[str, Callable[[str], Path | None]]


def look_ups(models: Mapping[str, str], datasets: Mapping[str, str], checkpoints: Path, dataset_names: Path) -> LookUps:
    """Flag -> the function that gives the path of its value (None: on a hub) or raises UserError. `models`, `datasets`:
    built-in names; `checkpoints`, `dataset_names`: the registries."""
    from cream.evaluation.tasks import TASKS

    def dataset(name: str) -> Path:
        path, per_task = names.dataset(name, datasets, dataset_names), [datasets[f"{task}_test"] for task in TASKS]
        return (
            next(filter(Path.exists, map(names.in_root, [path, *per_task])), path)
            if name.lower() == "all_test"
            else path
        )

    def model(name: str) -> Path | None:
        return None if names.HUB_ID.fullmatch(models.get(name.lower(), name)) else names.model(name, models)

    return {
        "model": model,
        "name": dataset,
        "checkpoint": lambda name: names.checkpoint(name, checkpoints),
        "ref_model_ckpt": lambda name: names.checkpoint(name, checkpoints, "--ref_model_ckpt"),
        **dict.fromkeys(FILES, Path),
        "chat_template": lambda name: None if is_template_name(name) else Path(name),
    }


def check_commands(
    commands: Sequence[Command], configs: Mapping[str, type], look_up: LookUps, outputs: set[Path]
) -> list[str]:
    """What is wrong with the commands' flags and inputs, each message with the steps that have it. `configs`: script ->
    dataclass of its flags. `outputs`: outputs of commands that run before these; theirs are added."""
    steps = defaultdict(list)
    for command in (each for each in commands if each.script in configs):
        refused = find_problems(configs[command.script], command.argv())
        for problem in (*refused, *_missing(command, look_up, outputs)):
            steps[command.script, problem].append(command.title)
        outputs.add(command.output)
    return [f"{', '.join(titles)} ({script}): {problem}" for (script, problem), titles in steps.items()]


def _missing(command: Command, look_up: LookUps, outputs: set[Path]) -> Iterator[str]:
    for name in command.flags.keys() & {*IDLE}:
        yield f"--{name}: with it the step makes no output"
    if command.script in WITH_DATA and not command.flags.keys() & {"name", "input_file"}:
        yield "--name is missing: the data that the step reads"
    for name, value in ((name, spell(value)) for name, value in command.flags.items() if name in look_up):
        if value.lower() in NULLS or "${" in value or outputs & {Path(value), *Path(value).parents}:
            continue  # "${": a reference that the plan has refused already
        try:
            path = look_up[name](value)
        except UserError as error:
            yield str(error)
        else:
            if path is not None and not path.exists():
                yield f"--{name} {value}: {path} does not exist, and no earlier step makes it"
