"""Gold labels as rewards, without a model: 1 where a response's final answer is the label, 0 where it is another.

The answer is extracted from the response's final text, not its thought, and graded as in evaluation: multiple choice by
letter, numbers as decimals, formulas of items with `grader` "math" by math-verify. A response from which none can be
extracted has no reward. Labels belong to prompts by uuid; the options of a multiple choice question
are those in the label's question.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cream.cli.flags import flag
from cream.errors import UserError
from cream.evaluation.grade import Rules
from cream.evaluation.tasks import Question, grade_record, questions_in
from cream.files import store
from cream.records import Samples
from cream.rewards.base import GroupReward
from cream.scoring.driver import Pass
from cream.text.thoughts import ThoughtFlags

NOTHING = "no answer could be extracted"


@dataclass
class Options(ThoughtFlags):
    """Rewards by gold labels (labels)"""

    labels: str | None = flag(None, "labelled questions, matched with the prompts by uuid", decides=False)
    extraction: str = flag(
        "default",
        "how an answer is extracted: default, or strict (the released code's rules)",
        choices=("default", "strict"),
    )
    items: dict[str, Question] = field(init=False, default_factory=dict)  # by uuid, read by `prepare`


def passes(options: Options) -> list[Pass]:
    return []


def files(options: Options) -> dict[str, tuple[Path, type]]:
    path = Path(options.labels)
    return {"labels": (path, questions_in(path))}


def prepare(options: Options, samples: Callable[[], Iterable[Samples]], skip: bool) -> None:
    """Raises UserError unless each prompt has a label."""
    if options.labels is None:
        raise UserError("--reward labels needs --labels FILE: questions with labels, of the same uuids as the prompts")
    options.items = {item.uuid: item for item in store.read(*files(options)["labels"], skip=skip)}
    uuids = [sample.uuid for sample in samples()]
    missing = [uuid for uuid in uuids if uuid not in options.items]
    if missing and len(missing) == len(uuids):
        first = next(iter(options.items), None)
        raise UserError(
            f"--labels {options.labels}: none of its {len(options.items)} questions belongs to a prompt; they are "
            f"matched by uuid, and the first is {first!r} there, {uuids[0]!r} in --input_file"
        )
    if missing:
        raise UserError(
            f"--labels {options.labels}: {len(missing)} of {len(uuids)} prompts have no label, the first is "
            f"{missing[0]!r}; add theirs, or reward a file of the labelled prompts alone"
        )


def combine(sample: Samples, results: dict[str, list], options: Options) -> GroupReward:
    """The extracted answers are in `texts`."""
    item, rules = options.items.get(sample.uuid), Rules(options.extraction == "strict", options.tags)
    if item is None:
        raise UserError(f"record {sample.uuid!r} has no label: the samples were changed while this ran; run it again")
    graded = [grade_record(item, text, rules, opened=sample.thought_opened) for text in sample.responses]
    extracted = [None if prediction == "none" else prediction for prediction, _ in graded]
    reward = [None if text is None else float(correct) for text, (_, correct) in zip(extracted, graded, strict=True)]
    reason = [NOTHING if text is None else None for text in extracted]
    return GroupReward(reward, reason, texts={"extracted": extracted})
