"""Evaluation data: which items an evaluation covers, the task of each, how it is asked."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from cream.errors import UserError
from cream.evaluation.few_shot import worked
from cream.evaluation.tasks import Question
from cream.files import store
from cream.records import Item, Message
from cream.text.prompts import apply


class Items(NamedTuple):
    """The items of one data set, each with its task; why a task has none."""

    items: list[Item]
    missing: dict[str, str]


def item_files(path: Path, task_files: Mapping[str, Path]) -> list[Path]:
    """The files that a data set's items are read from."""
    return [file for file in (path, *task_files.values()) if file.exists()]


def read_items(name: str, path: Path, task_files: Mapping[str, Path], *, skip: bool = False) -> Items:
    """The items of a data set. `task_files`, one a task, are given of the set of all tasks only.

    An item's task is its own `task` key, else that of the per-task file that holds its uuid, else the data set's name
    without `_test`. A set of all tasks without a file of its own is all per-task files that are there. `skip`:
    malformed items are passed over. Raises UserError when there is no item at all, or a uuid stands in two tasks.
    """
    if not task_files:
        items = list(store.read(path, Question, skip=skip))
        for item in items:
            item.task = item.task or name.removesuffix("_test")
        missing = {}
    else:
        items = _of_all_tasks(path, task_files, skip)
        found = {item.task for item in items}
        missing = {
            task: f"{path} has none of its questions" if file.exists() else f"{file} does not exist"
            for task, file in task_files.items()
            if task not in found
        }
    return Items(items, missing)


def _of_all_tasks(path: Path, task_files: Mapping[str, Path], skip: bool) -> list[Item]:
    present = {task: file for task, file in task_files.items() if file.exists()}
    by_uuid: dict[str, Item] = {}
    for task, file in present.items():
        for item in store.read(file, Question, skip=skip):
            if item.uuid in by_uuid:
                other = by_uuid[item.uuid].task
                raise UserError(
                    f"{file}: uuid {item.uuid!r} stands in {other} too; uuids must be unique over all tasks"
                )
            item.task = item.task or task
            by_uuid[item.uuid] = item
    if path.exists():
        items = list(store.read(path, Question, skip=skip))
        for item in items:
            known = by_uuid.get(item.uuid)
            item.task = item.task or (known.task if known else "all_test")
        return items
    if not by_uuid:
        files = ", ".join(str(file) for file in (path, *task_files.values()))
        raise UserError(f"--name all_test: none of its files is there ({files})")
    return list(by_uuid.values())


def prompt_of(item: Item, sysprompt: str, examples: Iterable[Item] = ()) -> list[Message]:
    """The item as a user's turn, after earlier turns with solved `examples`, which are asked in the same way. `auto` is
    the method's suffix, or none for the tiny world, which never saw it."""
    if sysprompt == "auto":
        sysprompt = "none" if item.task and item.task.startswith("tiny") else "task"
    turns = []
    for example in examples:
        turns += [Message("user", apply(sysprompt, example.question)), Message("assistant", worked(example))]
    return [*turns, Message("user", apply(sysprompt, item.question))]
