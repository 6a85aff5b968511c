"""Answers into graded records, records into a summary, and an evaluation's file graded again."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import structs

from cream.engines import Completion
from cream.evaluation.statistics import summarise
from cream.evaluation.tasks import grade
from cream.records import Answer, Item, Prompt, encode


def graded(item: Item, prompt: Prompt, completion: Completion | None, strict: bool) -> Answer:
    """The item with its answer; None is no answer (the prompt did not fit), which is wrong."""
    text = completion.text if completion else ""
    prediction, correct = grade(item.question, item.label, text, strict=strict)
    return Answer(
        uuid=item.uuid,
        question=prompt.messages[-1].content,
        label=item.label,
        task=item.task,
        responses=text,
        final_prediction=prediction,
        correct=correct,
        finish_reason=completion.finish_reason if completion else None,
        num_tokens=len(completion.token_ids) if completion else None,
        extra=item.extra if completion else {**item.extra, "reason": "the prompt does not fit"},
    )


def whole(
    rows: Iterator[dict], prompts: Mapping[str, Prompt], items: Mapping[str, Item], strict: bool
) -> Iterator[dict]:
    """The graded answers, in the order of the prompts; one without an answer gets none, which is wrong."""
    row = next(rows, None)
    for uuid, prompt in prompts.items():
        if row is not None and row["uuid"] == uuid:
            yield row
            row = next(rows, None)
        else:
            yield encode(graded(items[uuid], prompt, None, strict))


def regraded(answer: Answer, strict: bool) -> Answer:
    """The same answer, read and graded again."""
    prediction, correct = grade(answer.question, answer.label, answer.responses, strict=strict)
    return structs.replace(answer, final_prediction=prediction, correct=correct)


def changes(before: Sequence[Answer], after: Sequence[Answer]) -> list[str]:
    """A line for each answer that is graded otherwise than before."""
    return [
        f"{old.uuid}: {old.final_prediction} -> {new.final_prediction} (label {old.label})"
        for old, new in zip(before, after, strict=True)
        if (old.final_prediction, old.correct) != (new.final_prediction, new.correct)
    ]


def table_rows(answers: Iterable[Answer], task: str | None = None) -> list[dict]:
    """The summary's rows, one per task; `task` stands for that of answers which have none (the method's files)."""
    return summarise({"task": task, **encode(answer)} for answer in answers)


def strict_accuracies(answers: Iterable[Answer]) -> dict[str, float]:
    """Accuracy per task by the method's released extraction rules."""
    return {row["task"]: row["accuracy"] for row in table_rows(regraded(answer, strict=True) for answer in answers)}
