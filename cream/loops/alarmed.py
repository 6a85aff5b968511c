"""The alarms of a loop's stages, as their sidecars have them, and of each evaluation against the model before."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist, fmean
from typing import Annotated

import msgspec

from cream.alarms import LIMITS, Limits, check, line
from cream.evaluation.evaluate import summary_path
from cream.files.provenance import Fired, read_meta
from cream.loops.plan import INFER, TRAIN, Command
from cream.loops.results import evaluations, model_name, read_output

TRAINED_BY = ("file1", "rewards", "name")  # flags that name the rewards that pairs are made by, or training reads
Task = msgspec.defstruct("Task", [("task", str), ("accuracy", float), ("n", int, 0)])
Summary = msgspec.defstruct("Summary", [("tasks", Annotated[list[Task], msgspec.Meta(min_length=1)])])


@dataclass
class Alarms:
    """Of a loop: (title of the stage, alarm) in the order of the stages, and the models that they concern, as the table
    of results names them."""

    fired: list[tuple[str, Fired]]
    models: set[str]

    def lines(self) -> Iterator[str]:
        """In words, for below the table."""
        for title, each in self.fired:
            yield f"{title}: {line(each)}"


def describe_alarms(titles: Sequence[str], found: Sequence[Alarms]) -> list[str]:
    """The lines beneath a table of several loops, each with the titles of the loops that it is true of."""
    lines: dict[str, list[str]] = {}
    for title, each in zip(titles, found, strict=True):
        for text in each.lines():
            lines.setdefault(text, []).append(title)
    return [f"! {', '.join(own) + ', ' if len(titles) > 1 else ''}{text}" for text, own in lines.items()]


def alarms(commands: Sequence[Command], limits: Limits = LIMITS) -> Alarms:
    """All alarms of a loop. A model is concerned by those of its evaluation and of the stages that made it from the
    model before. Raises UserError where a summary or sidecar is damaged."""
    makers = {command.result: command for command in commands}
    own = {command.result: [*_about(command).get("alarms", ())] for command in commands}
    before: dict[object, tuple[float, object]] = {}  # data -> lower bound of the accuracy, model
    for command in evaluations(commands):
        accuracy, low = _accuracy(read_output(summary_path(command.output), Summary).tasks)
        data = tuple(command.flags.get(name) for name in ("name", "gen_n", "scoring", "few_shot"))
        model = command.flags.get("checkpoint")
        if data in before:
            exploited = _rose(before[data][1], model, commands)
            own[command.result] += _drop(before[data][0] - accuracy, exploited, limits)
        before[data] = low, model
    fired = [(command.title, each) for command in commands for each in own[command.result]]
    concerned = (c for c in evaluations(commands) if any(own[each] for each in _made_from(c, makers)))
    return Alarms(fired, {model_name(command) for command in concerned})


def _accuracy(tasks: Sequence[Task]) -> tuple[float, float]:
    """The unweighted mean over tasks, and the lower bound of its 95 % interval (normal)."""
    tasks = [task for task in tasks if task.task != "macro"]
    mean = fmean(task.accuracy for task in tasks)
    variance = sum(task.accuracy * (1 - task.accuracy) / max(1, task.n) for task in tasks) / len(tasks) ** 2
    return mean, mean - NormalDist().inv_cdf(0.975) * sqrt(variance)


def _drop(below: float, exploited: bool, limits: Limits) -> list[Fired]:
    """The alarm of an accuracy so far below the interval of the model before: one that says more, or the plain one."""
    return check({"over_optimised_round": below} if exploited else {}, limits) or check(
        {"accuracy_drop": below}, limits
    )


def _rose(before: object, now: object, commands: Sequence[Command]) -> bool:
    """Whether a model's own responses have a higher mean reward than those of the model before, by the same kind of
    reward and the same models; False where one of them is not known. A policy that rewards itself is another model in
    each round, whose rewards say nothing about those of the round before."""
    old, new = _rewards(before, commands), _rewards(now, commands)
    return any(new[by] > old[by] for by in old.keys() & new.keys())


def _rewards(model: object, commands: Sequence[Command]) -> dict[tuple, float]:
    """Kind of reward and hashes of what scores -> the mean reward of a model's own responses, of the rewards that pairs
    are made by, or that training reads."""
    sampled = {each.result for each in commands if _samples(each) and each.flags.get("checkpoint") == model}
    named = (str(each.flags.get(flag, "")) for each in commands for flag in TRAINED_BY)
    trained_by = {part for names in named for part in names.split(",")}
    found: dict[tuple, list[float]] = {}
    for command in (each for each in commands if each.flags.get("input_file") in sampled):
        about = _about(command)
        scorers = {name: digest for name, digest in about.get("inputs", {}).items() if name != "input_file"}
        mean = about.get("rewarded", {}).get("mean")
        if command.result in trained_by and scorers and mean is not None:
            found.setdefault((about.get("reward"), *sorted(scorers.items())), []).append(mean)
    return {by: fmean(means) for by, means in found.items()}


def _samples(command: Command) -> bool:
    return command.script == INFER and command.flags.get("mode", "sampling") == "sampling"


def _about(command: Command) -> dict:
    return read_meta(command.output) or {}


def _made_from(evaluation: Command, makers: Mapping[str, Command]) -> set[str]:
    """The results of the stages that made an evaluation: its own, the training's, and what that was given, without
    other trainings."""
    found, new = {evaluation.result}, [evaluation]
    while new:
        command = new.pop()
        for value in map(str, command.flags.values()):
            maker = makers.get(value)
            if maker and value not in found and (maker.script != TRAIN or command is evaluation):
                found.add(value)
                new.append(maker)
    return found
