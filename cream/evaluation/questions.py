"""What an evaluation asks: its items, the solved examples in front of them, and the files that all come from."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cream.errors import UserError
from cream.evaluation import choices, few_shot
from cream.evaluation.items import item_files, prompt_of, read_items
from cream.evaluation.tasks import Question
from cream.files import store
from cream.records import Item, Prompt
from cream.scoring.logprobs import Group

log = logging.getLogger("cream")


class Questions(NamedTuple):
    """`items` by uuid, in the order they are asked, and `examples` by task."""

    items: dict[str, Item]
    examples: dict[str, list[Item]]
    files: list[Path]
    example_files: list[Path]
    passed_over: int  # items without options, where options are compared
    rejected: list[dict]  # malformed items and examples, as `store.rejected` has them
    shots: int  # examples in front of a question

    def prompts(self, sysprompt: str) -> dict[str, Prompt]:
        """Each item as it is put to the policy, by uuid."""
        examples = self.examples
        asked = {uuid: prompt_of(item, sysprompt, examples.get(item.task, ())) for uuid, item in self.items.items()}
        return {uuid: Prompt(uuid=uuid, messages=messages) for uuid, messages in asked.items()}

    def groups(self, prompt_format: str, sysprompt: str) -> list[Group]:
        """The options of each item, to be compared. Raises UserError for an example that has none."""
        examples = self.examples
        return [
            choices.group(item, prompt_format, sysprompt, examples.get(item.task, ())) for item in self.items.values()
        ]

    def facts(self) -> dict:
        """What a sidecar says of the examples: the uuids of each task's."""
        drawn = {task: [example.uuid for example in examples] for task, examples in self.examples.items()}
        return {"few_shot": drawn} if drawn else {}


def read_questions(
    name: str,
    path: Path,
    task_files: Mapping[str, Path],
    *,
    options: bool = False,
    limit: int | None = None,
    shots: int = 0,
    shots_file: str | None = None,
    seed: int = 0,
    skip: bool = False,
) -> Questions:
    """The first `limit` items of a data set, with `shots` examples for each of their tasks, drawn by `seed`.

    `name`, `path`, `task_files`: as `read_items` takes them. `options`: only multiple choice is kept. `skip`: malformed
    items and examples are passed over, and `rejected`. Logs which tasks are missing, and what is passed over.
    Raises UserError where no item is left, and what `read_items`, `with_options` and `few_shot.draw` raise.
    """
    found, missing = read_items(name, path, task_files, skip=skip)
    for task, why in missing.items():
        log.info("task %s is not evaluated: %s", task, why)
    items = {item.uuid: item for item in found[:limit]}
    if not items:
        raise UserError(f"{path}: no question is left to ask")
    items, passed_over = choices.with_options(items, path) if options else (items, 0)
    tasks = dict.fromkeys(item.task for item in items.values()) if shots else ()
    places = few_shot.places(tasks, shots_file, path, task_files)
    examples = few_shot.draw(places, found, shots, seed, skip=skip)
    files, example_files = item_files(path, task_files), list(dict.fromkeys(places.values()))
    rejected = _malformed([*files, *example_files]) if skip else []
    return Questions(items, examples, files, example_files, passed_over, rejected, shots)


def _malformed(files: Sequence[Path]) -> list[dict]:
    return [row for file in dict.fromkeys(files) for row in store.rejected(file, Question)]
