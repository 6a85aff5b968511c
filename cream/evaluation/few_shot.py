"""Solved examples in front of a question: where they come from, which are drawn, how they are written."""

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import xxhash

from cream.errors import UserError
from cream.evaluation.tasks import Question
from cream.files import store
from cream.records import Item

log = logging.getLogger("cream")


def places(tasks: Iterable[str], given: str | None, path: Path, task_files: Mapping[str, Path]) -> dict[str, Path]:
    """Task -> the file of its examples: the one `given`, else train.json beside its own file, else beside `path`."""
    return {task: Path(given) if given else task_files.get(task, path).with_name("train.json") for task in tasks}


def draw(
    files: Mapping[str, Path], asked: Collection[Item], k: int, seed: int, *, skip: bool = False
) -> dict[str, list[Item]]:
    """`k` examples for each task, from its file: those of the task, or of none, that are no question of `asked`.

    Questions are compared word by word, whatever the case. The draw depends on the seed and the examples' uuids alone,
    and with a larger `k` goes on from the same ones. `skip`: malformed examples are passed over.
    Raises UserError where a file is missing or has fewer examples; all that is wrong is told at once.
    """
    problems, drawn = [], {}
    held = {path: list(store.read(path, Question, skip=skip)) for path in {*files.values()} if path.exists()}
    known = {_words(item.question) for item in asked}
    for task, path in files.items():
        if path not in held:
            problems.append(f"{path} does not exist, of which {task} would take its examples")
            continue
        of_task = [item for item in held[path] if item.task in (None, task)]
        fresh = list({_words(item.question): item for item in reversed(of_task)}.items())
        fresh = [item for words, item in fresh if words not in known]
        drawn[task] = sorted(fresh, key=lambda item: xxhash.xxh3_64_intdigest(f"{seed} {item.uuid}".encode()))[:k]
        if len(drawn[task]) < k:
            left_out = len(of_task) - len(fresh)
            problems.append(
                f"{path} has {len(fresh)} examples for {task} (besides {left_out} that are asked, or stand there twice)"
            )
    if problems:
        raise UserError(f"--few_shot {k}: {'; '.join(problems)}. Give another --few_shot_file FILE, or fewer")
    for task, examples in drawn.items():
        log.info("%s: %d examples of %s: %s", task, k, files[task], ", ".join(example.uuid for example in examples))
    return drawn


def worked(example: Item) -> str:
    """The assistant's turn of an example: its `solution`, if it has one (GSM8K's without its last line, "#### 12"),
    and the answer as the question's suffix asks for it."""
    solution = example.extra.get("solution")
    solution = solution.partition("####")[0].strip() if isinstance(solution, str) else ""
    return f"{solution}\nAnswer: {str(example.label).strip()}".lstrip()


def _words(question: str) -> str:
    return " ".join(question.casefold().split())
