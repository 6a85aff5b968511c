"""A loop -> the stage commands it stands for, in order, and everything that is wrong with it.

Planning reads and writes no file; iterate.py's --help describes the keys of a loop.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated

import msgspec

from cream.cli.flags import as_dict, as_words, is_plain, spell
from cream.cli.names import NAME
from cream.errors import nearest
from cream.files import store
from cream.files.provenance import LAST

TRAIN = "train.py"
PREPARE = "prepare_data.py"  # its command and files are words, not flags
MEASURE = "evaluate_reward.py"
FOLDERS = (TRAIN, MEASURE)  # their outputs are folders
PAIRS = ("cal_consistency.py", "make_pairs.py")
SEEDED = (TRAIN, "infer.py")  # every run of theirs has a seed; elsewhere a seed belongs to one choice, a step's own
Value = str | int | float | bool | None
Flags = dict[str, Value]
REFERENCE = re.compile(r"\$\{([^}]*)\}?")
TARGET = re.compile(r"([\w.-]+?)(?:@-([1-9]\d?))?")
ROUND = re.compile(r"round([+-]\d{1,3})?")
OWN_SEED = re.compile(r"seed\+(round|\d{1,3})")  # draws apart from those of the same prompts in other rounds and steps


class Rounds(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A value for round 1 and one for all later rounds."""

    first: Value
    then: Value


RoundFlags = dict[str, Value | list[Value] | Rounds]  # a list has one value for each round


class Step(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """One stage: `script` with `flags`.

    `words`: words before the flags, the command of prepare_data.py and its files. `output`: name of the output,
    by default the id, after `round<t>.` in a repeated step. `shared`: whether the output lies in the loop's base_dir,
    where other loops find it. `title`: what the log calls the step.
    """

    id: str
    script: str
    flags: RoundFlags = {}
    words: list[str] = []
    output: str | None = None
    shared: bool | Rounds = False
    title: str | None = None


class Loop(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Steps that run once `before` the rounds, in every round (`repeat`), and once `after` them.

    `start`: id of a repeated step -> its output before round 1. `flags`: id of a step -> flags put over its own; a null
    takes a flag away. `fresh`: ids of steps whose data must be another set in every round.
    """

    title: str
    model: str
    output_dir: str
    base_dir: str | None = None
    seed: int = 0
    rounds: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    before: list[Step] = []
    repeat: list[Step] = []
    after: list[Step] = []
    start: dict[str, str | None] = {}
    flags: dict[str, RoundFlags] = {}
    fresh: list[str] = []

    def __post_init__(self):
        check_texts(self.title, self.model, self.output_dir, *([] if self.base_dir is None else [self.base_dir]))

    def steps(self) -> list[Step]:
        """All steps, each once."""
        return [*self.before, *self.repeat, *self.after]

    def flags_of(self, step: Step) -> RoundFlags:
        """A step's flags with those of the loop put over them."""
        return {**step.flags, **self.flags.get(step.id, {})}


def check_texts(*texts: str) -> None:
    """Raises ValueError for a text that cannot be part of a path and of a JSON file."""
    if odd := [text for text in texts if not is_plain(text)]:
        raise ValueError(f"{odd[0]!r} is not a text: it is empty, or has a NUL or half of a character")


@dataclass(frozen=True)
class Command:
    """One stage of the loop: `script` with `flags`, and what it makes; `fresh`: from data that no other round uses."""

    title: str
    script: str
    flags: Flags
    output: Path
    fresh: bool = False
    words: tuple[str, ...] = ()

    @property
    def result(self) -> str:
        """What a reference to the step stands for: its output; of a training run the last checkpoint."""
        return str(self.output / LAST if self.script == TRAIN else self.output)

    def argv(self) -> list[str]:
        """The words of its command line."""
        return [*self.words, *(word for name, value in self.flags.items() for word in as_words(name, value))]


def plan(
    loop: Loop, configs: Mapping[str, type], device: str, record_device: str | None = None, bf16: bool | None = None
) -> tuple[list[Command], list[str]]:
    """The commands of a loop, and what is wrong with it, one message each.

    `configs`: script -> dataclass of its flags. --model, --device and --seed are the loop's model, `device` (outside
    training `record_device`, if given) and the loop's seed unless the step has its own; `bf16`, where it is not None,
    goes to every stage that runs a model, in place of what the loop says.
    """
    known = {script: as_dict(config()).keys() for script, config in configs.items()}
    problems = dict.fromkeys(_structure(loop, known))
    commands, results = [], {}
    for step, t in _schedule(loop):
        has = known.get(step.script, ())

        def value(what: str, given, step=step, t=t):
            try:
                return _in_round(given, t, loop, results)
            except ValueError as error:
                problems[f"{step.id}: {what}: {error}"] = None
                return next(reversed(_all_values(given)), None)  # for what else can be checked

        name = value("output", step.output) or (f"round{t}.{step.id}" if t else step.id)
        if step.script not in FOLDERS and not store.is_record_file(Path(name)):
            name += ".json"
        if not NAME.fullmatch(name):
            problems[f"{step.id}: output: {name!r} is not a file name of letters, digits, '.', '_' and '-'"] = None
        output = Path((value("shared", step.shared) and loop.base_dir) or loop.output_dir, name)
        own = {"model": loop.model, "device": device if step.script == TRAIN else record_device or device}
        own |= {"seed": loop.seed} if step.script in SEEDED else {}
        flags = {each: own_value for each, own_value in own.items() if each in has and step.script != PREPARE}
        flags |= {each: value(f"--{each}", given) for each, given in loop.flags_of(step).items()}
        flags[_output_flag(has)] = str(output)
        if bf16 is not None and "bf16" in has:
            flags["bf16"] = bf16
        title = value("title", step.title) or (f"round {t}: {step.id}" if t else step.id)
        given = {each: text for each, text in flags.items() if text is not None}
        words = tuple(spell(value("words", word)) for word in step.words)
        commands.append(Command(title, step.script, given, output, step.id in loop.fresh, words))
        results[step.id, t] = commands[-1].result
    _hand_on_beta(commands)
    names = [command.output.name for command in commands]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    return commands, [*problems, *(f"two outputs have the name {name}; `output` gives another" for name in twice)]


def _hand_on_beta(commands: list[Command]) -> None:
    """Pairs are made with the beta that they are trained with, for the margin cap that they print."""
    makers = {command.result: command for command in commands if command.script in PAIRS}
    for command in commands:
        maker = makers.get(command.flags.get("name")) if command.script == TRAIN else None
        beta = command.flags.get("beta")
        if maker and isinstance(beta, int | float) and beta > 0:  # any other is refused in training
            maker.flags.setdefault("beta", beta)


def _output_flag(flags: Collection[str]) -> str:
    """Which of a script's flags says where its output goes."""
    return "output" if "output" in flags else "output_dir"


def _schedule(loop: Loop) -> Iterator[tuple[Step, int | None]]:
    """(step, its round or None) in the order in which they run."""
    yield from ((step, None) for step in loop.before)
    yield from ((step, t) for t in range(1, loop.rounds + 1) for step in loop.repeat)
    yield from ((step, None) for step in loop.after)


def _structure(loop: Loop, known: Mapping[str, Collection[str]]) -> Iterator[str]:
    """What is wrong in every round: ids, scripts, flags of the output, cycles."""
    steps, repeated = loop.steps(), [step.id for step in loop.repeat]
    ids = [step.id for step in steps]
    if not ids:
        yield "no steps; `before`, `repeat` and `after` list them"
    yield from (f"two steps have the id {name}" for name in dict.fromkeys(ids) if ids.count(name) > 1)
    yield from (f"flags: no step has the id {name}{nearest(name, ids)}" for name in loop.flags if name not in ids)
    yield from (f"fresh: no step has the id {name}{nearest(name, ids)}" for name in loop.fresh if name not in ids)
    for name in (name for name in loop.start if name not in repeated):
        yield f"start: no step of `repeat` has the id {name}{nearest(name, repeated)}"
    needs = {}
    for step in steps:
        flags = loop.flags_of(step)
        if not NAME.fullmatch(step.id) or step.id == "round":
            yield f"{step.id!r} is not an id: letters, digits, '.', '_' and '-' only, and not `round`"
        if step.script not in known:
            yield f"{step.id}: unknown script {step.script} (known: {', '.join(known)}){nearest(step.script, known)}"
        elif (name := _output_flag(known[step.script])) in flags:
            yield f"{step.id}: --{name} follows from the id; `output` gives another name"
        if step.shared and loop.base_dir is None:
            yield f"{step.id}: shared outputs lie in base_dir, which the loop does not give"
        if not all(isinstance(each, bool) for each in _all_values(step.shared)):
            yield f"{step.id}: shared: yes or no is expected"
        if step.words and step.script != PREPARE:
            yield f"{step.id}: {step.script} has flags only; `words` are for {PREPARE}"
        texts = [value for given in flags.values() for value in _all_values(given) if isinstance(value, str)]
        texts += step.words
        needs[step.id] = [name for text in texts for name in REFERENCE.findall(text) if name in ids]
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        cycle = error.args[1][1:]
        at = cycle.index(min(cycle, key=ids.index))
        yield f"these steps wait for each other: {' -> '.join([*cycle[at:], *cycle[: at + 1]])}"


def _all_values(value) -> list[Value]:
    if isinstance(value, Rounds):
        return [value.first, value.then]
    return value if isinstance(value, list) else [value]


def _in_round(value, t: int | None, loop: Loop, results: Mapping[tuple[str, int | None], str]) -> Value:
    """A value in round `t` (None: outside the rounds), its references replaced. Raises ValueError where it has none."""
    if isinstance(value, list | Rounds):
        if t is None:
            raise ValueError("has values per round, but the step is not in `repeat`")
        if isinstance(value, list) and len(value) < loop.rounds:
            raise ValueError(f"{len(value)} values for {loop.rounds} rounds")
        value = value[t - 1] if isinstance(value, list) else value.first if t == 1 else value.then
    if not isinstance(value, str):
        return value
    return REFERENCE.sub(lambda match: _target(match, t, loop, results), value)


def _target(match: re.Match, t: int | None, loop: Loop, results: Mapping[tuple[str, int | None], str]) -> str:
    """The text that a reference stands for in round `t`. Raises ValueError where there is none."""
    if t is not None and (number := ROUND.fullmatch(match[1])):
        return str(t + int(number[1] or 0))
    if (own := OWN_SEED.fullmatch(match[1])) and (t is not None or own[1] != "round"):
        return str(loop.seed + (t if own[1] == "round" else int(own[1])))
    target, ids, repeated = TARGET.fullmatch(match[1]), {s.id for s in loop.steps()}, {s.id for s in loop.repeat}
    if target is None or not match[0].endswith("}"):
        raise ValueError(f"{match[0]} is not a reference; write ${{id}}, ${{id@-1}} (a round before) or ${{round}}")
    name, back = target[1], int(target[2] or 0)
    if name not in ids:
        raise ValueError(f"{match[0]}: no step has the id {name}{nearest(name, ids)}")
    if back and (t is None or name not in repeated):
        raise ValueError(f"{match[0]}: an earlier round exists only between steps of `repeat`")
    round_ = None if name not in repeated else loop.rounds if t is None else t - back
    if round_ == 0 and name in loop.start:
        return spell(_in_round(loop.start[name], None, loop, results))
    if round_ is not None and round_ < 1:
        advice = f"`start` gives one for {name}" if round_ == 0 else "give round 1 a value of its own"
        raise ValueError(f"{match[0]}: round {t} has no output {back} rounds before it; {advice}")
    if (name, round_) not in results:
        raise ValueError(f"{match[0]}: that step runs later; steps run in the order of the file")
    return results[name, round_]
