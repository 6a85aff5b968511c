"""Evaluation tasks. One file per task, a module of data, and one line for it in TASKS. A task's file says

    TEST, TRAIN   its files, relative to the repository root (TRAIN, which few-shot examples are drawn from: or None)
    IN_ALL_TEST   whether the data set all_test covers it
    SYSPROMPT     the name in cream/text/prompts.py of the text that its questions end with, unless --sysprompt says so
    CONTEXT       its question as plain text, which options continue with --scoring loglikelihood: the words of
                  lm-evaluation-harness
    grade         its grading rule, of cream/evaluation/grade.py or its own

`--name <task>_test` and `--name <task>_train` are its files. A task's item without a `task` key is of its file's task.
"""

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from cream.cli.names import in_root, short
from cream.errors import UserError
from cream.evaluation.grade import DEFAULT, Label, Rules, grade_math
from cream.evaluation.tasks import arc_challenge, arc_easy, gsm8k, openbookqa, other, siqa, tiny
from cream.records import Item
from cream.text.recent import Recent
from cream.text.thoughts import USUAL, Tags, split_thought

TASKS: dict[str, ModuleType] = {
    "arc_easy": arc_easy,
    "arc_challenge": arc_challenge,
    "openbookqa": openbookqa,
    "siqa": siqa,
    "gsm8k": gsm8k,
    "tiny": tiny,
}
ALL_TEST = "localdata/all_test.json"
GRADES = Recent()  # models say the same thing often, and evaluations and reports grade it again


def find_task(name: str | None) -> ModuleType:
    """The task of an item's `task` or of a data set's name: the one of this name, or that it is a part or variant of
    (tiny_add of tiny; a folder is spelled arc-easy); tasks/other.py for any other."""
    spelled = (name or "").replace("-", "_")
    parts = (known for known in TASKS if spelled.startswith(f"{known}_"))
    return TASKS.get(spelled) or TASKS.get(max(parts, key=len, default=""), other)


def data_files() -> dict[str, str]:
    """Data set name -> file, from the repository root: all_test, and <task>_test and <task>_train of each task."""
    files = {"all_test": ALL_TEST}
    for split in ("test", "train"):
        files |= {f"{name}_{split}": getattr(task, split.upper()) for name, task in TASKS.items()}
    return {name: file for name, file in files.items() if file is not None}


def is_all_test(path: Path) -> bool:
    """Whether this is the file of all_test, in whose place its tasks' files may be, and not another of that name."""
    return path.resolve() == in_root(ALL_TEST).resolve()


def grade(
    question: str,
    label: Label,
    response: str,
    strict: bool = False,
    task: str | None = None,
    *,
    grader: str | None = None,
    tags: Tags = USUAL,
    opened: bool = False,
) -> tuple[str, bool]:
    """(prediction, "none" without one; whether it is correct) of one response, by the rule of its task or by `grader`.

    Only the response's final text is read, not its thought between `tags`; `opened`: see `split_thought`. Without a
    known task: multiple choice where the label is one of the question's options, else a number. `strict` grades the
    whole response as the released code does. Raises UserError for a label that cannot be graded.
    """
    key = question, type(label), label, response, strict, task, grader, tuple(tags), opened
    if (found := GRADES.get(key)) is None:
        text = response if strict else split_thought(response, tags, opened).final
        rule = grade_math if grader == "math" else find_task(task).grade
        found = rule(question, label, text, strict)
        GRADES.add(key, found, len(question) + len(response))
    return found


def grade_record(item: Item, response: str, rules: Rules = DEFAULT, opened: bool = False) -> tuple[str, bool]:
    """`grade` of a response to an item, by its own grader if it has one."""
    grader = item.grader or rules.grader
    how = {"grader": grader, "tags": rules.tags, "opened": opened}
    return grade(item.question, item.label, response, rules.strict, item.task, **how)


class Question(Item, kw_only=True):
    """Evaluation data: a question with the lettered options inside it, and the label (a letter or a number).

    An Item whose label can be graded: what stages read of evaluation data. Raises ValueError as `grade` raises
    UserError.
    """

    file_task: ClassVar[str | None] = None  # of the items of a file that do not name theirs
    file_grader: ClassVar[str | None] = None  # what grades those without their own, by a flag

    def __post_init__(self):
        self.task = self.task or self.file_task
        try:
            grade_record(self, "", Rules(grader=self.file_grader))
        except UserError as error:
            raise ValueError(str(error)) from None


@cache
def questions_of(name: str | None, grader: str | None = None) -> type[Question]:
    """Question for the file of one task: an item that names no task is of this one, and graded by its rule, or by this
    grader."""

    class TaskQuestion(Question, kw_only=True):
        __doc__ = Question.__doc__
        file_task = name
        file_grader = grader

    return TaskQuestion


def questions_in(path: Path) -> type[Question]:
    """`questions_of` the task that a file is named for: its stem, or the folder of a test.json."""
    return questions_of(short(str(path)).removesuffix("_test"))
