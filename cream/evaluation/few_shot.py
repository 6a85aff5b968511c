"""Solved examples in front of a question: where they come from, which are drawn, how they are written."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import xxhash

from cream.cli.names import in_root
from cream.errors import UserError
from cream.evaluation.tasks import TASKS, Question, find_task, questions_of
from cream.files import store
from cream.records import Item, Message
from cream.text.prompts import apply

log = logging.getLogger("cream")


def places(tasks: Iterable[str], given: str | None, path: Path, task_files: Mapping[str, Path]) -> dict[str, Path]:
    """Task -> the file of its examples: the one `given`, else its own training file where its own test file is asked,
    else train.json beside that of its questions, one of `task_files` or `path`."""
    return {task: Path(given) if given else _place(task, task_files.get(task, path)) for task in tasks}


def _place(task: str, questions: Path) -> Path:
    own = TASKS.get(task)
    if own and own.TRAIN and questions.resolve() == in_root(own.TEST).resolve():
        return in_root(own.TRAIN)
    return questions.with_name("train.json")


def files(places: Mapping[str, Path], grader: str | None = None) -> dict[Path, type[Question]]:
    """The files of examples, each with the type of its records: one that serves a single task is of that task."""
    tasks: dict[Path, list[str]] = {}
    for task, path in places.items():
        tasks.setdefault(path, []).append(task)
    return {path: questions_of(of[0] if len(of) == 1 else None, grader) for path, of in tasks.items()}


def draw(
    places: Mapping[str, Path],
    questions: Collection[Item],
    k: int,
    seed: int,
    *,
    skip: bool = False,
    grader: str | None = None,
) -> dict[str, list[Item]]:
    """`k` examples for each task, from its file: those of the task, or of none, that are not one of `questions`.

    Questions are compared word by word, whatever the case. The draw depends on the seed and the examples' uuids alone,
    and a larger `k` begins with the same ones. `skip`: malformed examples are skipped.
    Raises UserError where a file is missing or has fewer examples; all problems are listed at once.
    """
    problems, drawn = [], {}
    held = {
        path: list(store.read(path, kind, skip=skip)) for path, kind in files(places, grader).items() if path.exists()
    }
    taken = {_words(item.question) for item in questions}
    for task, path in places.items():
        if path not in held:
            problems.append(f"{path} does not exist, from which the examples of {task} would be drawn")
            continue
        of_task = [item for item in held[path] if item.task in (None, task)]
        fresh = list({_words(item.question): item for item in reversed(of_task)}.items())
        fresh = [item for words, item in fresh if words not in taken]
        drawn[task] = sorted(fresh, key=lambda item: xxhash.xxh3_64_intdigest(f"{seed} {item.uuid}".encode()))[:k]
        if len(drawn[task]) < k:
            others = len(of_task) - len(fresh)
            problems.append(
                f"{path} has {len(fresh)} examples for {task} (besides {others} that are asked or repeated)"
            )
    if problems:
        raise UserError(f"--few_shot {k}: {'; '.join(problems)}. Give another --few_shot_file FILE, or fewer")
    for task, examples in drawn.items():
        log.info("%s: %d examples from %s: %s", task, k, places[task], ", ".join(example.uuid for example in examples))
    return drawn


def write_solution(example: Item) -> str:
    """The assistant's turn of an example: its `solution`, if it has one (GSM8K's without its last line, "#### 12"),
    and the answer as the question's suffix asks for it."""
    solution = example.extra.get("solution")
    solution = solution.partition("####")[0].strip() if isinstance(solution, str) else ""
    return f"{solution}\nAnswer: {str(example.label).strip()}".lstrip()


def build_prompt(
    item: Item, sysprompt: str, examples: Iterable[Item] = (), solve: Callable[[Item], str] = write_solution
) -> list[Message]:
    """The item as a user's turn, after earlier turns with solved `examples`, which are asked in the same way. `auto` is
    the task's own suffix."""
    suffix = find_task(item.task).SYSPROMPT if sysprompt == "auto" else sysprompt
    turns = []
    for example in examples:
        turns.append(Message("user", apply(suffix, example.question)))
        turns.append(Message("assistant", solve(example)))
    return [*turns, Message("user", apply(suffix, item.question))]


def _words(question: str) -> str:
    return " ".join(question.casefold().split())
