"""Checks of planned commands before the first one runs: their flags, and whether their inputs are there or will be."""

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from cream.cli import names
from cream.cli.flag_fields import NULLS
from cream.cli.flags import spell, try_parse
from cream.errors import UserError, nearest
from cream.evaluation.options import READS
from cream.evaluation.tasks import is_all_test
from cream.files import store
from cream.files.fingerprints import fingerprint_file
from cream.files.folders import check_folder
from cream.loops import facts
from cream.loops.course import Course
from cream.loops.made import FILES, MODELS, SEVERAL
from cream.loops.plan import PAIRS, PREPARE, TRAIN, Command, Place
from cream.loops.trials import model_of
from cream.records import METHODS, nouns
from cream.text.templates import is_template_name
from cream.training.stages import STAGES

BUILT = ("oasst1.sft.json", "oasst1.ranked.json")  # by prepare_data.py
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
            problems += refused(check[command.script], config, about)
        if command.script in PAIRS and command.flags.get("method") in METHODS:
            methods[command.result] = command.flags["method"]
        for problem in (*problems, *files.missing(command, outputs)):
            steps[command.script, problem].append(command.title)
        outputs.add(command.output)
    problems = [f"{', '.join(titles)} ({script}): {problem}" for (script, problem), titles in steps.items()]
    return [*problems, *files.used_again([command for command in commands if command.fresh])]


def check_steering(course: Course, data: Callable[[str], Path]) -> Iterator[str]:
    """What is wrong with a loop's keys `keep`, `eval_every` and `stop_if`; `data`: the file of a data set's name."""
    loop, keep = course.loop, course.loop.keep
    names = [] if keep is None else [("keep: metric", keep.metric, 1)]
    names += [("keep: start", keep.start, 0)] if keep and keep.start else []
    for key, name, part in (*names, *(("stop_if", name, 1) for name in loop.stop_if)):
        try:
            step, path = facts.split(name, [each.id for each in loop.steps()])
        except ValueError as error:
            yield f"{key}: {error}"
            continue
        command = next(each for each in course.planned if each.step == step)
        if command.place.part != part:
            yield f"{key}: {step} is not a step {'of `repeat`' if part else 'before the rounds'}"
        elif why := facts.refusal(command, path, data):
            yield f"{key}: {name}: {why}"
        elif key == "keep: metric" and model_of(command, course.planned) not in _trained(course.planned):
            yield f"{key}: {step} does not measure a model that a step of `repeat` trains"
    if loop.eval_every > 1 and not any(each.evaluates and each.place.part == 1 for each in course.planned):
        yield "eval_every: no step of `repeat` evaluates a model"
    if keep and keep.roll_back and loop.rounds > 1 + (keep.start is None):
        yield from _check_roll_back(course, *((2, 0) if keep.start else (3, 1)))


def _trained(commands: Iterable[Command]) -> set[str]:
    """The models that the rounds train."""
    return {each.result for each in commands if each.script == TRAIN and each.place.part == 1}


def _check_roll_back(course: Course, t: int, parent: int) -> Iterator[str]:
    """Whether round `t` can start from round `parent`, and would do something else than the round after that did."""
    commands, problems = course.replan(course.loop, {t: parent})
    yield from (f"keep: roll_back: {problem}" for problem in problems if problem not in course.problems)
    if _work(commands, t) == _work(course.planned, parent + 1):
        yield (
            f"keep: roll_back: round {t}, started again from the same model, would repeat round {parent + 1}: give it "
            "other prompts, or another seed, such as ${seed+round}, where it samples"
        )


def _work(commands: Sequence[Command], t: int) -> list[tuple]:
    """What the commands of a round do, up to its last training, wherever their outputs are."""
    own = [each for each in commands if each.place[:2] == (1, t) and not each.evaluates]
    last = max((i for i, each in enumerate(own) if each.script == TRAIN), default=len(own))
    names = {each.result: f"${{{each.step}}}" for each in own} | {str(each.output): each.step for each in own}
    return [
        (each.script, each.words, {name: names.get(spell(text), text) for name, text in each.flags.items()})
        for each in own[: last + 1]
    ]


def find_place(word: str, course: Course, *, end: bool) -> Place:
    """The place that --from or, with `end`, --until names: a round, a step's id, or id@ROUND for a step in a round; a
    repeated step's id alone is that in round 1. Raises UserError where there is none."""
    step, _, number = (word, "", "") if word.isdecimal() else word.partition("@")
    t = word if word.isdecimal() else number
    if t.isdecimal() and not 1 <= int(t) <= course.loop.rounds:
        raise UserError(f"{word}: the loop has rounds 1 to {course.loop.rounds}")
    if word.isdecimal():
        return Place(1, int(t), len(course.loop.repeat) if end else 0)
    found = [each.place for each in course.planned if each.step == step and t in ("", str(each.place.round))]
    if not found:
        ids = [each.id for each in course.loop.steps()]
        raise UserError(f"{word}: neither a round nor a step{nearest(step, ids)}; the steps are {', '.join(ids)}")
    return found[0]


def lacking(course: Course) -> Iterator[str]:
    """The outputs that commands before --from should have made, and have not."""
    for command in course.planned:
        if command.place < course.first and not Path(command.result).exists():
            yield f"--from: {command.title} has not run: {command.result} is not there"


def refused(call: Callable, *args) -> list[str]:
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
                yield from refused(check_folder, path, None)
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
            self.read[key] = refused(_read, value, *key)
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
        wanted = " or ".join(map(nouns, kinds))
        raise UserError(f"--name {value}: {path} holds {nouns(held)}; the step reads {wanted}")
    deque(store.read(path, held, limit, skip=skip), maxlen=0)
