"""Answers into graded records, records into a summary, and an evaluation's file graded again."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import structs

from cream.engines import Completion
from cream.errors import UserError
from cream.evaluation.statistics import summarise
from cream.evaluation.tasks import grade, majority
from cream.files import store
from cream.records import Answer, Item, Prompt, encode


def graded(item: Item, prompt: Prompt, completions: Sequence[Completion], strict: bool) -> Answer:
    """The item with its answers; one that has none (its prompt did not fit) is wrong."""
    texts = [completion.text for completion in completions] or [""]
    reasons = [completion.finish_reason for completion in completions] or [None]
    lengths = [len(completion.token_ids) for completion in completions] or [None]
    question = prompt.messages[-1].content
    several = {"all_responses": texts, "all_finish_reasons": reasons, "all_num_tokens": lengths}
    return Answer(
        uuid=item.uuid,
        question=question,
        label=item.label,
        task=item.task,
        responses=texts[0],
        finish_reason=reasons[0],
        num_tokens=lengths[0],
        **_verdict(question, item.label, texts, strict),
        **(several if len(texts) > 1 else {}),
        extra=item.extra if completions else {**item.extra, "reason": "the prompt does not fit"},
    )


def _verdict(question: str, label: str | int | float, texts: Sequence[str], strict: bool) -> dict:
    """The keys of a record that say how its answers are graded: the vote, and where there are several, each."""
    grades = [grade(question, label, text, strict=strict) for text in texts]
    predictions, correct = map(list, zip(*grades, strict=True))
    vote = majority(predictions)
    verdict = {"final_prediction": predictions[vote], "correct": correct[vote]}
    return verdict | ({"all_predictions": predictions, "all_correct": correct} if len(texts) > 1 else {})


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
            yield encode(graded(items[uuid], prompt, [], strict))


def regraded(answer: Answer, strict: bool) -> Answer:
    """The same record, each of its answers read and graded again."""
    texts = answer.all_responses or [answer.responses]
    return structs.replace(answer, **_verdict(answer.question, answer.label, texts, strict))


def again(
    answers: Iterable[Answer], grade: Callable[[Answer], Answer], path: Path, *, skip: bool
) -> tuple[list[Answer], list[Answer], list[dict]]:
    """The answers of a file, the same as `grade` has them now, and those that it cannot grade, as `store.rejected` has
    malformed records. Raises UserError, with the record, for the first of these unless they are to be passed over
    (`skip`), and where no other is left."""
    before, now, bad = [], [], []
    for answer in answers:
        try:
            now.append(grade(answer))
            before.append(answer)
        except UserError as error:
            text = msgspec.json.encode(encode(answer)).decode()
            bad.append({"uuid": answer.uuid, "where": str(path), "reason": str(error), "record": text})
            if not skip:
                raise UserError(f"{path}: record {answer.uuid!r}: {error}. {store.SKIP}") from None
    if bad and not now:
        raise UserError(f"{path}: no answer can be graded; {bad[0]['uuid']!r}: {bad[0]['reason']}")
    return before, now, bad


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
