"""The alarms of a loop's stages, as their sidecars have them, and of each evaluation against the model before."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist, fmean
from typing import Annotated

import msgspec

from cream.alarms import LIMITS, Fired, Limits, check, line
from cream.evaluation.evaluate import summary_path
from cream.files.provenance import meta_path
from cream.loops.plan import TRAIN, Command
from cream.loops.results import evaluations, model_name, read_output

Task = msgspec.defstruct("Task", [("task", str), ("accuracy", float), ("n", int, 0)])
Summary = msgspec.defstruct("Summary", [("tasks", Annotated[list[Task], msgspec.Meta(min_length=1)])])
About = msgspec.defstruct("About", [("alarms", list[Fired], [])])


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
    own = {command.result: _own(command) for command in commands}
    before: dict[object, float] = {}  # data -> lower bound of the accuracy
    for command in evaluations(commands):
        accuracy, low = _accuracy(read_output(summary_path(command.output), Summary).tasks)
        data = tuple(command.flags.get(name) for name in ("name", "gen_n", "scoring", "few_shot"))
        own[command.result] += check({"accuracy_drop": before[data] - accuracy} if data in before else {}, limits)
        before[data] = low
    fired = [(command.title, each) for command in commands for each in own[command.result]]
    concerned = (c for c in evaluations(commands) if any(own[each] for each in _made_from(c, makers)))
    return Alarms(fired, {model_name(command) for command in concerned})


def _accuracy(tasks: Sequence[Task]) -> tuple[float, float]:
    """The unweighted mean over tasks, and the lower bound of its 95 % interval (normal)."""
    tasks = [task for task in tasks if task.task != "macro"]
    mean = fmean(task.accuracy for task in tasks)
    variance = sum(task.accuracy * (1 - task.accuracy) / max(1, task.n) for task in tasks) / len(tasks) ** 2
    return mean, mean - NormalDist().inv_cdf(0.975) * sqrt(variance)


def _own(command: Command) -> list[Fired]:
    path = meta_path(command.output)
    return read_output(path, About).alarms if path.exists() else []


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
