"""Whether the inputs that a planned command names are there, or will be when its turn comes."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from cream.cli import names
from cream.cli.flags import NULLS, spelled
from cream.errors import UserError
from cream.evaluation.tasks import TASKS
from cream.loops.plan import Command

FILES = ("input_file", "file1", "file2", "labels", "few_shot_file", "chat_template", "deepspeed")  # flags that name one
WITH_DATA = ("train.py", "infer.py")  # they read what --name says, or --input_file


def look_ups(
    models: Mapping[str, str], datasets: Mapping[str, str], checkpoints: Path, dataset_names: Path
) -> dict[str, Callable[[str], Path | None]]:
    """Flag -> the path that its value stands for (None: not to be looked for on this disk), or a UserError. `models`,
    `datasets`: built-in names; `checkpoints`, `dataset_names`: the registries."""

    def dataset(name: str) -> Path:
        path, per_task = names.dataset(name, datasets, dataset_names), [datasets[f"{task}_test"] for task in TASKS]
        return next(filter(Path.exists, map(names.in_root, [path, *per_task])), path) if name == "all_test" else path

    def model(name: str) -> Path | None:
        return None if names.HUB_ID.fullmatch(models.get(name.lower(), name)) else names.model(name, models)

    return {
        "model": model,
        "name": dataset,
        "checkpoint": lambda name: names.checkpoint(name, checkpoints),
        "ref_model_ckpt": lambda name: names.checkpoint(name, checkpoints, "--ref_model_ckpt"),
        **dict.fromkeys(FILES, Path),
    }


def missing(command: Command, made: Collection[Path], look_up: Mapping[str, Callable]) -> Iterator[str]:
    """One message for each input of a command that does not exist and is not `made` by an earlier one."""
    if command.script in WITH_DATA and not command.flags.keys() & {"name", "input_file"}:
        yield "--name is missing: the data that the step reads"
    for name, value in ((name, spelled(value)) for name, value in command.flags.items() if name in look_up):
        if value.lower() in NULLS or "${" in value or {Path(value), *Path(value).parents} & set(made):
            continue  # "${": a reference that the plan has refused already
        try:
            path = look_up[name](value)
        except UserError as error:
            yield str(error)
        else:
            if path is not None and not path.exists():
                yield f"--{name} {value}: {path} does not exist, and no earlier step makes it"
