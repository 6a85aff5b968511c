"""The alarms of a loop's stages, as their sidecars have them, and of each evaluation against the model before."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from cream.alarms import LIMITS, Fired, Limits, check, line
from cream.evaluation.evaluate import summary_path
from cream.files.provenance import meta_path
from cream.loops.plan import TRAIN, Command
from cream.loops.results import evaluations, model_name, read_output

Task = msgspec.defstruct("Task", [("task", str), ("accuracy", float), ("low", float | None, None)])
Summary = msgspec.defstruct("Summary", [("tasks", list[Task])])
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
            yield f"! {title}: {line(each)}"


def alarms(commands: Sequence[Command], limits: Limits = LIMITS) -> Alarms:
    """All alarms of a loop. A model is concerned by those of its evaluation and of the stages that made it from the
    model before. Raises UserError where a summary or sidecar is damaged."""
    makers = {command.result: command for command in commands}
    own = {command.result: _own(command) for command in commands}
    before: dict[object, Mapping[str, float]] = {}
    for command in evaluations(commands):
        tasks = read_output(summary_path(command.output), Summary).tasks
        key = tuple(command.flags.get(name) for name in ("name", "gen_n", "scoring", "few_shot"))
        for task in tasks:
            if (low := before.get(key, {}).get(task.task)) is not None:
                own[command.result] += check({"accuracy_drop": low - task.accuracy}, limits)
        before[key] = {task.task: task.low for task in tasks if task.low is not None}
    fired = [(command.title, each) for command in commands for each in own[command.result]]
    concerned = (c for c in evaluations(commands) if any(own[each] for each in _made_from(c, makers)))
    return Alarms(fired, {model_name(command) for command in concerned})


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
