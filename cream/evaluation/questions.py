"""What an evaluation asks: its items, each with its task, the solved examples in front of them, and their files."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cream.cli.names import in_root
from cream.errors import UserError
from cream.evaluation import choices, few_shot
from cream.evaluation.grade import Rules
from cream.evaluation.tasks import TASKS, Question, is_all_test, questions_of
from cream.files import store
from cream.records import Item

log = logging.getLogger("cream")

if TYPE_CHECKING:
    from cream.evaluation.options import EvaluationFlags


class Questions(NamedTuple):
    """`items` by uuid, in the order they are asked, and `examples` by task."""

    items: dict[str, Item]
    examples: dict[str, list[Item]]
    inputs: dict[str, Path]  # the files of both: data, data.1 …, examples, examples.1 …
    skipped: int  # items without options, where options are compared
    rejected: list[dict]  # malformed items and examples, as `store.rejected` has them


def read_questions(
    name: str,
    path: Path,
    flags: EvaluationFlags,
    *,
    limit: int | None = None,
    limit_per_task: int | None = None,
    seed: int = 0,
    skip: bool = False,
) -> Questions:
    """The first `limit` items of a data set, at most `limit_per_task` of each task, with --few_shot examples for each
    of their tasks, drawn by `seed`.

    `path` may be the file of all_test, whose tasks' own files count as well. Where options are compared only multiple
    choice is kept. `skip`: malformed items and examples are skipped, and `rejected`. Logs which tasks are missing, and
    what is skipped. Raises UserError where no item is left, a uuid is in two tasks, and as `with_options` and
    `few_shot.draw` do.
    """
    task_files = {t: in_root(task.TEST) for t, task in TASKS.items() if task.IN_ALL_TEST} if is_all_test(path) else {}
    files = _files(name, path, task_files, flags.all_by)
    every = _all_tasks(path, task_files, files, skip) if task_files else list(store.read(path, files[path], skip=skip))
    present = {item.task for item in every}
    for task, file in ((task, file) for task, file in task_files.items() if task not in present):
        why = f"{path} has none of its questions" if file.exists() else f"{file} does not exist"
        log.info("task %s is not evaluated: %s", task, why)
    items = {item.uuid: item for item in _first_of_each_task(every, limit_per_task)[:limit]}
    if not items:
        raise UserError(f"{path}: no question is left to ask")
    items, skipped = (
        choices.with_options(items, path, Rules(grader=flags.all_by))
        if flags.scoring == "loglikelihood"
        else (items, 0)
    )
    tasks = dict.fromkeys(item.task for item in items.values()) if flags.few_shot else {}
    places = few_shot.places(tasks, flags.few_shot_file, path, task_files)
    examples = few_shot.draw(places, every, flags.few_shot, seed, skip=skip, grader=flags.all_by)
    example_files = few_shot.files(places, flags.all_by)
    kinds = files | example_files
    rejected = [row for file, kind in kinds.items() for row in store.rejected(file, kind)] if skip else []
    named = (("data", files), ("examples", example_files))
    inputs = {f"{name}.{i}" if i else name: file for name, each in named for i, file in enumerate(each)}
    return Questions(items, examples, inputs, skipped, rejected)


def _first_of_each_task(items: list[Item], limit: int | None) -> list[Item]:
    if limit is None:
        return items
    numbers = defaultdict(count)
    return [item for item in items if next(numbers[item.task]) < limit]


def _files(name: str, path: Path, task_files: Mapping[str, Path], grader: str | None) -> dict[Path, type[Question]]:
    """The files that a data set's items are read from, each with the type of its records."""
    if not task_files:
        return {path: questions_of(name.removesuffix("_test"), grader)}
    files = {path: questions_of(None, grader)}
    files |= {file: questions_of(task, grader) for task, file in task_files.items()}
    if not any(file.exists() for file in files):
        raise UserError(f"--name all_test: none of its files exists ({', '.join(map(str, files))})")
    return {file: kind for file, kind in files.items() if file.exists()}


def _all_tasks(
    path: Path, task_files: Mapping[str, Path], files: Mapping[Path, type[Question]], skip: bool
) -> list[Item]:
    """The items of all tasks: those of `path`, or where it does not exist those of all per-task files. One of `path`
    that names no task is of the task whose file has its uuid."""
    by_uuid: dict[str, Item] = {}
    for file in filter(files.__contains__, task_files.values()):
        for item in store.read(file, files[file], skip=skip):
            if item.uuid in by_uuid:
                other = by_uuid[item.uuid].task
                raise UserError(f"{file}: uuid {item.uuid!r} is in {other} too; uuids must be unique over all tasks")
            by_uuid[item.uuid] = item
    if path not in files:
        return list(by_uuid.values())
    items = list(store.read(path, files[path], skip=skip))
    for item in items:
        item.task = item.task or (by_uuid[item.uuid].task if item.uuid in by_uuid else "all_test")
    return items
