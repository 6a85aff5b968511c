"""What a loop has measured: accuracy of each evaluated model, and how sure or right the pairs it was trained on are."""

from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from cream.errors import UserError
from cream.evaluation.evaluate import summary_path
from cream.files import store
from cream.files.provenance import meta_path
from cream.loops.plan import INFER, MEASURE, PAIRS, PREPARE, TRAIN, Command

T = TypeVar("T")


# The fields that are read of the summaries of an evaluation and of a reward's measures, and of the sidecar of pairs.
Task = msgspec.defstruct("Task", [("task", str), ("accuracy", float)])
Summary = msgspec.defstruct("Summary", [("tasks", Annotated[list[Task], msgspec.Meta(min_length=1)])])
Value = msgspec.defstruct("Value", [("value", float)])
Measured = msgspec.defstruct("Measured", [("all", dict[Literal["all"], Value])])
Counts = msgspec.defstruct("Counts", [("out", int)])
Pairs = msgspec.defstruct(
    "Pairs", [("counts", Counts), ("mean_consistency", float | None), ("table", dict[str, float | str], {})]
)


def results(
    commands: Sequence[Command], best: str | None = None, link: str | None = None, validation: object = None
) -> list[dict]:
    """One row for each evaluation, of a policy or of a reward: its name, the accuracy per task and overall (the macro
    average where there is one); and, where the model was trained on pairs that the loop made, their number and mean
    consistency, and what their sidecar has for the table (`shown`); last those of the loop's result `best`, by that
    name. `link`: how commands name it that run after the rounds; `validation`: the data set that chose it, whose rows
    say so.

    Raises UserError where a summary or sidecar is damaged.
    """
    makers, rows, of_best = {command.result: command for command in commands}, [], []
    for command in commands:
        if command.script == MEASURE:
            model, tasks = command.flags.get("reward_model"), {"pairs": _measured(command.output)}
        elif is_evaluation(command):
            summary = read_output(summary_path(command.output), Summary)
            model, tasks = command.flags.get("checkpoint"), {row.task: row.accuracy for row in summary.tasks}
        else:
            continue
        name = model_name(command)
        rows.append({"model": name, "accuracy": tasks.get("macro", next(iter(tasks.values()))), "tasks": tasks})
        if validation is not None and command.flags.get("name") == validation:
            rows[-1]["validation"] = True
        training = makers.get(best if model == link else model)
        data = _pairs_of(training.flags.get("name"), makers) if training and training.script == TRAIN else None
        if data:
            pairs = read_output(meta_path(data.output), Pairs)
            rows[-1] |= {"pairs": pairs.counts.out, "consistency": pairs.mean_consistency}
            rows[-1] |= {"shown": pairs.table} if pairs.table else {}
        if best is not None and model == best:
            of_best.append(rows[-1] | {"model": _as_best(name, best)})
    return rows + of_best


def _measured(folder: Path) -> float:
    """The accuracy of all pairs in an output of evaluate_reward.py."""
    summaries = sorted(folder.glob("*.summary.json"))
    if len(summaries) != 1:
        raise UserError(f"{folder}: expected one summary, found {len(summaries)}; run its stage again")
    return read_output(summaries[0], Measured).all["all"].value


def _pairs_of(name: object, makers: Mapping[str, Command]) -> Command | None:
    """The step that made the pairs in a training set: of all those that prepare_data.py made it of, the one that runs
    last. A part of a file (split) is no longer the pairs that its sidecar describes."""
    maker, order = makers.get(name), list(makers)
    if maker is None or maker.script in PAIRS:
        return maker
    if maker.script != PREPARE or maker.words[0] == "split":
        return None
    found = [pairs for word in maker.words if (pairs := _pairs_of(word, makers))]
    return max(found, key=lambda pairs: order.index(pairs.result), default=None)


def _as_best(name: str, best: str) -> str:
    """The name of a row of the best model: `best` in place of the model's name."""
    own = Path(best).parent.name
    return f"best{name.removeprefix(own)}" if name.startswith(own) else f"best ({name})"


def is_evaluation(command: Command) -> bool:
    """Whether it evaluates a policy."""
    return command.script == INFER and command.flags.get("mode") == "evaluation"


def evaluations(commands: Sequence[Command]) -> list[Command]:
    """The evaluations of policies among them."""
    return [*filter(is_evaluation, commands)]


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
    """Accuracy (macro average, %) and mean consistency per model, and what the rows have besides: one line for each
    model, and one for it on a validation set; one block of columns for each loop, (title, its results); a ! before the
    accuracies of its `marked` models."""
    heads = [["accuracy %", "mean C", *_names(rows)] for _, rows in columns]
    widths = [_widths(head, title) for head, (title, _) in zip(heads, columns, strict=True)]
    blocks = [{(row["model"], bool(row.get("validation"))): row for row in rows} for _, rows in columns]
    models = {key: key[0] + " (validation)" * key[1] for block in blocks for key in block}
    if not models:
        return "no evaluation, hence no table"
    first = max(5, *(len(label) + 1 for label in models.values()))
    titles = "".join(f"{title:>{sum(own)}}" for (title, _), own in zip(columns, widths, strict=True))
    lines = [f"{'model':<{first}}{titles}"]
    lines.append(" " * first + "".join(_line(head, own) for head, own in zip(heads, widths, strict=True)))
    for key, label in models.items():
        cells = [
            _cells(block.get(key), head, "!" * (key[0] in marks))
            for block, head, marks in zip_longest(blocks, heads, marked, fillvalue=())
        ]
        lines.append(f"{label:<{first}}" + "".join(map(_line, cells, widths)))
    return "\n".join(lines)


def _names(rows: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.get("shown", ())))


def _widths(head: Sequence[str], title: str) -> list[int]:
    """The widths of a block's columns, of which the first makes room for the title."""
    own = [10, *(max(10, len(name) + 2) for name in head[2:])]
    return [max(24, len(title) + 2) - sum(own) if len(own) == 1 else max(14, len(title) + 2 - sum(own)), *own]


def _cells(row: dict | None, head: Sequence[str], mark: str) -> list[str]:
    if row is None:
        return [""] * len(head)
    c, shown = row.get("consistency"), row.get("shown", {})
    more = [shown.get(name, "") for name in head[2:]]
    more = [value if isinstance(value, str) else f"{value:.1f}" for value in more]
    return [f"{mark}{100 * row['accuracy']:.1f}", "" if c is None else f"{c:.2f}", *more]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
