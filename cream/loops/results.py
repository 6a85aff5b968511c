"""What a loop has measured: accuracy of each evaluated model, consistency of the pairs it was trained on."""

from collections.abc import Collection, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from cream.errors import UserError
from cream.evaluation.evaluate import summary_path
from cream.files import store
from cream.files.provenance import meta_path
from cream.loops.plan import PAIRS, TRAIN, Command

T = TypeVar("T")


# The fields that are read of an evaluation's summary, and of the sidecar of pairs.
Task = msgspec.defstruct("Task", [("task", str), ("accuracy", float)])
Summary = msgspec.defstruct("Summary", [("tasks", Annotated[list[Task], msgspec.Meta(min_length=1)])])
Counts = msgspec.defstruct("Counts", [("out", int)])
Pairs = msgspec.defstruct("Pairs", [("counts", Counts), ("mean_consistency", float | None)])


def results(commands: Sequence[Command], best: str | None = None, link: str | None = None) -> list[dict]:
    """One row for each evaluation: its name, the accuracy per task and overall (the macro average where there is one),
    and, where the model was trained on pairs that the loop made, their number and mean consistency; last those of the
    loop's result `best`, by that name. `link`: how commands name it that run after the rounds.

    Raises UserError where a summary or sidecar is damaged.
    """
    makers, rows, of_best = {command.result: command for command in commands}, [], []
    for command in evaluations(commands):
        summary = read_output(summary_path(command.output), Summary)
        tasks = {row.task: row.accuracy for row in summary.tasks}
        name = model_name(command)
        rows.append({"model": name, "accuracy": tasks.get("macro", next(iter(tasks.values()))), "tasks": tasks})
        checkpoint = command.flags.get("checkpoint")
        training = makers.get(best if checkpoint == link else checkpoint)
        data = makers.get(training.flags.get("name")) if training and training.script == TRAIN else None
        if data and data.script in PAIRS:
            pairs = read_output(meta_path(data.output), Pairs)
            rows[-1] |= {"pairs": pairs.counts.out, "consistency": pairs.mean_consistency}
        if best is not None and checkpoint == best:
            of_best.append(rows[-1] | {"model": _as_best(name, best)})
    return rows + of_best


def _as_best(name: str, best: str) -> str:
    """The name of a row of the best model: `best` in place of the model's name."""
    own = Path(best).parent.name
    return f"best{name.removeprefix(own)}" if name.startswith(own) else f"best ({name})"


def evaluations(commands: Sequence[Command]) -> list[Command]:
    """The evaluations among them."""
    return [c for c in commands if c.script == "infer.py" and c.flags.get("mode") == "evaluation"]


def model_name(evaluation: Command) -> str:
    """What the table calls the evaluated model."""
    return evaluation.output.name.partition(".json")[0].removesuffix(".evaluation")


def read_output(path: Path, kind: type[T]) -> T:
    """A file that a stage wrote beside its output. Raises UserError where it is damaged."""
    try:
        return msgspec.convert(store.read_json(path), kind)
    except msgspec.ValidationError as error:
        raise UserError(
            f"{path}: damaged, or another kind of file: {error}; run its stage again with --overwrite"
        ) from None


def table(columns: Sequence[tuple[str, list[dict]]], marked: Sequence[Collection[str]] = ()) -> str:
    """Accuracy (macro average, %) and mean consistency per model: one line for each model, one block of columns for
    each loop, (title, its results); a ! before the accuracies of its `marked` models."""
    width = max(24, *(len(title) + 2 for title, _ in columns))
    blocks = [{row["model"]: row for row in rows} for _, rows in columns]
    models = list(dict.fromkeys(model for block in blocks for model in block))
    if not models:
        return "no evaluation, hence no table"
    first = max(5, *(len(model) + 1 for model in models))
    lines = [f"{'model':<{first}}" + "".join(f"{title:>{width}}" for title, _ in columns)]
    lines.append(" " * first + "".join(f"{'accuracy %':>{width - 10}}{'mean C':>10}" for _ in columns))
    for model in models:
        cells = []
        for row, marks in zip_longest((block.get(model) for block in blocks), marked, fillvalue=()):
            accuracy = f"{'!' * (model in marks)}{100 * row['accuracy']:.1f}" if row else ""
            c = row.get("consistency") if row else None
            cells.append(f"{accuracy:>{width - 10}}{'' if c is None else f'{c:.2f}':>10}")
        lines.append(f"{model:<{first}}" + "".join(cells))
    return "\n".join(lines)
