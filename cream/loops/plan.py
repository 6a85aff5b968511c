"""A loop -> the stage commands it stands for, in order, and everything that is wrong with it.

Planning reads and writes no file; iterate.py's --help describes the keys of a loop.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from cream.cli.flags import as_dict, as_words, spell
from cream.cli.names import NAME
from cream.errors import nearest
from cream.files import store
from cream.files.provenance import LAST
from cream.loops.loop import BEST, Flags, Loop, Step
from cream.loops.references import REFERENCE, Made, all_values, in_round

TRAIN = "train.py"
PREPARE = "prepare_data.py"  # its command and files are words, not flags
INFER = "infer.py"
MEASURE = "evaluate_reward.py"
FOLDERS = (TRAIN, MEASURE)  # their output is a folder
PAIRS = ("cal_consistency.py", "make_pairs.py")
SEEDED = (TRAIN, INFER)  # every run of theirs has a seed; elsewhere a seed belongs to one choice, a step's own


class Place(NamedTuple):
    """Where a command is in the loop, in the order in which commands run: in `part` 0, before the rounds, in 1, a
    `round`, or in 2, after them (`round` is 0 there); the index of its step in that part."""

    part: int
    round: int
    index: int


@dataclass(frozen=True)
class Command:
    """One stage of the loop: `script` with `flags`, and what it makes; `fresh`: from data that no other round uses;
    `step`: its step's id; `config`: the dataclass of the script's flags."""

    title: str
    script: str
    flags: Flags
    output: Path
    fresh: bool = False
    words: tuple[str, ...] = ()
    step: str = ""
    place: Place = Place(0, 0, 0)
    config: type | None = field(default=None, compare=False, repr=False)

    @property
    def result(self) -> str:
        """What a reference to the step stands for: its output; of a training run the last checkpoint."""
        return str(self.output / LAST if self.script == TRAIN else self.output)

    @property
    def evaluates(self) -> bool:
        """Whether it measures a model, and no other step needs that."""
        return evaluates(self.script, self.flags)

    def argv(self) -> list[str]:
        """The words of its command line."""
        return [*self.words, *(word for name, value in self.flags.items() for word in as_words(name, value))]


def evaluates(script: str, flags: Mapping) -> bool:
    """Whether a step measures a model: the accuracy of a policy, or how good a reward is."""
    return script == MEASURE or (script == INFER and flags.get("mode") == "evaluation")


def plan(
    loop: Loop,
    configs: Mapping[str, type],
    device: str,
    record_device: str | None = None,
    bf16: bool | None = None,
    parents: Mapping[int, int] = {},
) -> tuple[list[Command], list[str]]:
    """The commands of a loop, and what is wrong with it, one message each.

    `configs`: script -> dataclass of its flags. --model, --device and --seed are the loop's model, `device` (outside
    training `record_device`, if given) and the loop's seed unless the step has its own; `bf16`, where it is not None,
    goes to every stage that runs a model, in place of what the loop says. `parents`: round -> the round whose outputs
    are its `${id@-1}`, where that is not the one before.
    """
    known = {script: as_dict(config()).keys() for script, config in configs.items()}
    problems = dict.fromkeys(_structure(loop, known))
    commands, made, plain = [], Made(parents), Made({})
    for step, place in _schedule(loop):
        has, t = known.get(step.script, ()), place.round or None
        if place.part == 2 and loop.keep:
            made[BEST, None] = str(loop.best)

        def value(what: str, given, made=made, step=step, t=t):
            try:
                return in_round(given, t, loop, made)
            except ValueError as error:
                problems[f"{step.id}: {what}: {error}"] = None
                return next(reversed(all_values(given)), None)  # for what else can be checked

        name = value("output", step.output) or (f"round{t}.{step.id}" if t else step.id)
        if step.script not in FOLDERS and not store.is_record_file(Path(name)):
            name += ".json"
        if not NAME.fullmatch(name):
            problems[f"{step.id}: output: {name!r} is not a file name of letters, digits, '.', '_' and '-'"] = None
        shared = value("shared", step.shared, plain)  # by the number of the round, wherever it starts from
        output = Path((shared and loop.base_dir) or loop.output_dir, name)
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
        fresh = step.id in loop.fresh
        config = configs.get(step.script)
        commands.append(Command(title, step.script, given, output, fresh, words, step.id, place, config))
        made[step.id, t] = commands[-1].result
    _hand_on_beta(commands)
    names = [command.output.name for command in commands] + [BEST] * bool(loop.keep)
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


def _schedule(loop: Loop) -> Iterator[tuple[Step, Place]]:
    """The steps with their places, in the order in which they run."""
    yield from ((step, Place(0, 0, i)) for i, step in enumerate(loop.before))
    for t in range(1, loop.rounds + 1):
        due = t % loop.eval_every == 0 or t == loop.rounds
        for i, step in enumerate(loop.repeat):
            if due or not evaluates(step.script, loop.flags_of(step)):
                yield step, Place(1, t, i)
    yield from ((step, Place(2, 0, i)) for i, step in enumerate(loop.after))


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
        if loop.keep and step.id == BEST:
            yield f"{BEST} is not an id where there is `keep`: ${{{BEST}}} is its result"
        if not NAME.fullmatch(step.id) or step.id == "round":
            yield f"{step.id!r} is not an id: letters, digits, '.', '_' and '-' only, and not `round`"
        if step.script not in known:
            yield f"{step.id}: unknown script {step.script} (known: {', '.join(known)}){nearest(step.script, known)}"
        elif (name := _output_flag(known[step.script])) in flags:
            yield f"{step.id}: --{name} follows from the id; `output` gives another name"
        if step.shared and loop.base_dir is None:
            yield f"{step.id}: shared outputs lie in base_dir, which the loop does not give"
        if not all(isinstance(each, bool) for each in all_values(step.shared)):
            yield f"{step.id}: shared: yes or no is expected"
        if step.words and step.script != PREPARE:
            yield f"{step.id}: {step.script} has flags only; `words` are for {PREPARE}"
        texts = [value for given in flags.values() for value in all_values(given) if isinstance(value, str)]
        texts += step.words
        needs[step.id] = [name for text in texts for name in REFERENCE.findall(text) if name in ids]
    seldom = {s.id for s in loop.repeat if loop.eval_every > 1 and evaluates(s.script, loop.flags_of(s))}
    for step in loop.repeat:
        for name in seldom.intersection(needs[step.id]):
            yield f"{step.id}: reads ${{{name}}}, which most rounds do not have, by eval_every {loop.eval_every}"
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        cycle = error.args[1][1:]
        at = cycle.index(min(cycle, key=ids.index))
        yield f"these steps wait for each other: {' -> '.join([*cycle[at:], *cycle[: at + 1]])}"
