"""Checks of planned commands before the first one runs: their flags, and whether their inputs are there or will be."""

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from cream.cli import names
from cream.cli.flag_fields import NULLS
from cream.cli.flags import spell, try_parse
from cream.errors import UserError
from cream.evaluation.options import READS
from cream.evaluation.tasks import is_all_test
from cream.files import store
from cream.files.fingerprints import fingerprint_file
from cream.files.folders import check_folder
from cream.loops.plan import PAIRS, PREPARE, TRAIN, Command
from cream.pairs import all_inputs
from cream.records import METHODS
from cream.text.templates import is_template_name
from cream.training.stages import STAGES

BUILT = ("oasst1.sft.json", "oasst1.ranked.json")  # by prepare_data.py
FILES = ("input_file", "file1", "file2", *all_inputs())  # flags that name a file
FILES += ("few_shot_file", "chat_template", "deepspeed", "ranks", "without")
SEVERAL = (
    "exclude",
    "data",
    *(role for role, file in all_inputs().items() if file.several),
)  # several, separated by commas
MODELS = ("model", "checkpoint", "ref_model_ckpt", "judge_model", "reward_model")  # flags that name a model's folder
IDLE = ("help", "print_config", "dry_run")  # with these a script makes nothing
WITH_DATA = (TRAIN, "infer.py")  # they read what --name says, or --input_file
SAMPLED = {mode: kinds for mode, (kinds, _) in READS.items()}  # --mode -> records that infer.py reads
LookUps = Mapping[str, Callable[[str], Path | None]]


def look_ups(models: Mapping[str, str], datasets: Mapping[str, str], checkpoints: Path, dataset_names: Path) -> LookUps:
    """Flag -> the function that gives the path of its value (None: on a hub) or raises UserError. `models`, `datasets`:
    built-in names; `checkpoints`, `dataset_names`: the registries."""
    from cream.evaluation.tasks import TASKS

    def dataset(name: str, flag: str = "--name") -> Path:
        try:
            return found_dataset(name)
        except UserError as error:
            raise UserError(str(error).replace("--name", flag, 1)) from None

    def found_dataset(name: str) -> Path:
        path = names.dataset(name, datasets, dataset_names)
        parts = [datasets[f"{part}_test"] for part, task in TASKS.items() if task.IN_ALL_TEST]
        places = [path, *map(names.in_root, parts)] if is_all_test(path) else [path]
        if found := next(filter(Path.exists, places), None):
            return found
        raise names.missing_data(name, path)

    def model(name: str, flag: str = "--model") -> Path | None:
        source = models.get(name.lower(), name)
        hub = source not in names.ASSETS and names.HUB_ID.fullmatch(source)
        return None if hub and not os.environ.get("HF_HUB_OFFLINE") else names.model(name, models, flag)

    def any_model(name: str, flag: str) -> Path | None:
        known = names.is_checkpoint(name, checkpoints)
        return names.checkpoint(name, checkpoints, flag) if known else model(name, flag)

    return {
        "model": model,
        **{each: partial(dataset, flag=f"--{each}") for each in ("name", "exclude", "seed_data")},
        "checkpoint": lambda name: names.checkpoint(name, checkpoints),
        "ref_model_ckpt": lambda name: names.checkpoint(name, checkpoints, "--ref_model_ckpt"),
        **dict.fromkeys(FILES, Path),
        "data": lambda name: Path(name) if store.is_record_file(Path(name)) else None,  # else it may be on the hub
        **{name: partial(any_model, flag=f"--{name}") for name in ("judge_model", "reward_model")},
        "chat_template": lambda name: None if is_template_name(name) else Path(name),
    }


def check_commands(
    commands: Sequence[Command],
    configs: Mapping[str, type],
    check: Mapping[str, Callable[[object, dict], None]],
    look_up: LookUps,
    outputs: set[Path],
) -> list[str]:
    """What is wrong with the commands' flags and inputs, each message with the steps that have it.

    `configs`: script -> dataclass of its flags; `check`: script -> what raises UserError where they contradict each
    other. `outputs`: outputs of commands that run before these; theirs are added.
    """
    steps, methods, files = defaultdict(list), {}, Files(look_up)
    for command in (each for each in commands if each.script in configs):
        words = [] if command.script == PREPARE else None
        config, problems = try_parse(configs[command.script], command.argv(), words)
        if config is not None:
            about = {"method": method} if (method := methods.get(command.flags.get("name"))) else {"words": words}
            problems += _refused(check[command.script], config, about)
        if command.script in PAIRS and command.flags.get("method") in METHODS:
            methods[command.result] = command.flags["method"]
        for problem in (*problems, *files.missing(command, outputs)):
            steps[command.script, problem].append(command.title)
        outputs.add(command.output)
    problems = [f"{', '.join(titles)} ({script}): {problem}" for (script, problem), titles in steps.items()]
    return [*problems, *files.used_again([command for command in commands if command.fresh])]


def _refused(call: Callable, *args) -> list[str]:
    """The message of the UserError that a call raises, if it does."""
    try:
        call(*args)
    except UserError as error:
        return [str(error)]
    return []


class Files:
    """The files and models that commands read. Each file is read once, however many commands name it."""

    def __init__(self, look_up: LookUps):
        self.look_up = look_up
        self.read: dict[tuple, list[str]] = {}

    def missing(self, command: Command, outputs: set[Path]) -> Iterator[str]:
        """What is wrong with a command's inputs; those among `outputs`, or in them, will be made."""
        for name in command.flags.keys() & {*IDLE}:
            yield f"--{name}: with it the step makes no output"
        if command.script in WITH_DATA and not command.flags.keys() & {"name", "input_file"}:
            yield "--name is missing: the data that the step reads"
        for word in (word for word in command.words if store.is_record_file(Path(word)) and "${" not in word):
            if not outputs & {Path(word)} and not Path(word).exists():
                yield f"{word} does not exist, and no earlier step makes it"
        for name, value in self._named(command):
            if value.lower() in NULLS or "${" in value or outputs & {Path(value), *Path(value).parents}:
                continue  # "${": a reference that the plan has refused already
            try:
                path = self.look_up[name](value)
            except UserError as error:
                yield str(error)
                continue
            if path is not None and not path.exists():
                made = " (`python prepare_data.py build oasst1` does)" if path.name in BUILT else ""
                yield f"--{name} {value}: {path} does not exist, and no earlier step makes it{made}"
            elif path is not None and name in MODELS and not (path / "adapter_config.json").exists():
                yield from _refused(check_folder, path, None)
            elif path is not None and name == "name":
                yield from self._unread(command, value, path)

    def _named(self, command: Command) -> Iterator[tuple[str, str]]:
        """(flag, value) of what names a file or model; a flag with several files has each."""
        for name, value in command.flags.items():
            if name in self.look_up:
                text = spell(value)
                yield from ((name, part.strip()) for part in (text.split(",") if name in SEVERAL else [text]))

    def _unread(self, command: Command, value: str, path: Path) -> list[str]:
        """What is wrong with the records of a data set."""
        mode = command.flags.get("mode", "sampling")
        stage = STAGES.get(command.flags.get("train_stage"))
        kinds = SAMPLED.get(mode) if command.script != TRAIN else stage.RECORDS if stage else None
        limit = command.flags.get("limit_size")
        skip = command.flags.get("on_bad_record") == "skip"
        if isinstance(limit, int | None) and (key := (path, kinds, limit, skip)) not in self.read:
            self.read[key] = _refused(_read, value, *key)
        return self.read.get((path, kinds, limit, skip), [])

    def used_again(self, commands: Sequence[Command]) -> Iterator[str]:
        """Data sets that several of the commands read, by their content."""
        users = defaultdict(list)
        for command in commands:
            try:
                path = self.look_up["name"](spell(command.flags.get("name")))
                users[fingerprint_file(path)].append(command)
            except (UserError, OSError):
                continue  # it is reported otherwise
        for again in (each for each in users.values() if len(each) > 1):
            titles = ", ".join(command.title for command in again)
            sets = ", ".join(dict.fromkeys(str(command.flags["name"]) for command in again))
            yield (
                f"{titles}: the same prompts ({sets}), though a round should sample from prompts that no earlier one "
                "has used; give other sets, or allow it: `reuse_prompts: yes` in a recipe, `fresh: []` in a loop"
            )


def _read(value: str, path: Path, kinds: tuple[type, ...] | None, limit: int | None, skip: bool) -> None:
    """Read a data set. Raises UserError where it is damaged, or its records are of none of the `kinds`."""
    held = store.detect(path, skip=skip)
    if kinds and held not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"--name {value}: {path} holds {held.__name__} records; the step reads {wanted} records")
    deque(store.read(path, held, limit, skip=skip), maxlen=0)
