"""Evaluation data: which items an evaluation covers, the task of each, how it is asked."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from cream import store
from cream.errors import UserError
from cream.evaluation.few_shot import worked
from cream.prompts import apply
from cream.records import Item, Message


def item_files(name: str, path: Path, task_files: Mapping[str, Path]) -> list[Path]:
    """The files that a data set's items are read from."""
    return [file for file in ([path, *task_files.values()] if name == "all_test" else [path]) if file.exists()]


def read_items(
    name: str, path: Path, task_files: Mapping[str, Path], *, skip: bool = False
) -> tuple[list[Item], list[str]]:
    """(the items of one data set, each with its task; the names of tasks that are missing).

    An item's task is its own `task` key, else that of the per-task file that holds its uuid, else the data set's name
    without `_test`. `all_test` without a file of its own is all per-task files that are there. `skip`: malformed items
    are passed over.
    Raises UserError when there is no item at all, or a uuid stands in two tasks.
    """
    if name != "all_test":
        items = list(store.read(path, Item, skip=skip))
        for item in items:
            item.task = item.task or name.removesuffix("_test")
        return items, []
    present = {task: file for task, file in task_files.items() if file.exists()}
    missing = [task for task in task_files if task not in present]
    by_uuid: dict[str, Item] = {}
    for task, file in present.items():
        for item in store.read(file, Item, skip=skip):
            if item.uuid in by_uuid:
                other = by_uuid[item.uuid].task
                raise UserError(
                    f"{file}: uuid {item.uuid!r} stands in {other} too; uuids must be unique over all tasks"
                )
            item.task = item.task or task
            by_uuid[item.uuid] = item
    if path.exists():
        items = list(store.read(path, Item, skip=skip))
        for item in items:
            known = by_uuid.get(item.uuid)
            item.task = item.task or (known.task if known else "all_test")
        return items, [task for task in missing if all(item.task != task for item in items)]
    if not by_uuid:
        files = ", ".join(str(file) for file in (path, *task_files.values()))
        raise UserError(f"--name all_test: none of its files is there ({files})")
    return list(by_uuid.values()), missing


def prompt_of(item: Item, sysprompt: str, examples: Iterable[Item] = ()) -> list[Message]:
    """The item as a user's turn, after earlier turns with solved `examples`, which are asked in the same way. `auto` is
    the method's suffix, or none for the tiny world, which never saw it."""
    if sysprompt == "auto":
        sysprompt = "none" if item.task and item.task.startswith("tiny") else "task"
    turns = []
    for example in examples:
        turns += [Message("user", apply(sysprompt, example.question)), Message("assistant", worked(example))]
    return [*turns, Message("user", apply(sysprompt, item.question))]
