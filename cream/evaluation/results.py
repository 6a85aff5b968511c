"""Responses -> graded records -> accuracies."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import structs

from cream.engines import Completion
from cream.evaluation.statistics import summarise
from cream.evaluation.tasks import grade, majority
from cream.records import Answer, Item, Prompt, encode


def grade_responses(item: Item, prompt: Prompt, completions: Sequence[Completion], strict: bool) -> Answer:
    """The item with its responses; one that has none (its prompt did not fit) is wrong."""
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
        **_verdict(question, item, texts, strict),
        **(several if len(texts) > 1 else {}),
        extra=item.extra if completions else {**item.extra, "reason": "the prompt does not fit"},
    )


def _verdict(question: str, item: Item, texts: Sequence[str], strict: bool) -> dict:
    """The keys of a record that say how its responses are graded: the vote, and where there are several, each."""
    grades = [grade(question, item.label, text, strict, item.task) for text in texts]
    predictions, correct = map(list, zip(*grades, strict=True))
    vote = majority(predictions)
    verdict = {"final_prediction": predictions[vote], "correct": correct[vote]}
    return verdict | ({"all_predictions": predictions, "all_correct": correct} if len(texts) > 1 else {})


def fill_missing(
    rows: Iterator[dict], prompts: Mapping[str, Prompt], items: Mapping[str, Item], strict: bool
) -> Iterator[dict]:
    """The graded records, in the order of the prompts; a prompt without a response gets a record that is wrong."""
    row = next(rows, None)
    for uuid, prompt in prompts.items():
        if row is not None and row["uuid"] == uuid:
            yield row
            row = next(rows, None)
        else:
            yield encode(grade_responses(items[uuid], prompt, [], strict))


def regrade(answer: Answer, strict: bool) -> Answer:
    """The same record, each of its responses graded again."""
    texts = answer.all_responses or [answer.responses]
    return structs.replace(answer, **_verdict(answer.question, answer, texts, strict))


def changes(before: Sequence[Answer], after: Sequence[Answer]) -> list[str]:
    """A line for each record whose grade has changed."""
    return [
        f"{old.uuid}: {old.final_prediction} -> {new.final_prediction} (label {old.label})"
        for old, new in zip(before, after, strict=True)
        if (old.final_prediction, old.correct) != (new.final_prediction, new.correct)
    ]


def table_rows(answers: Iterable[Answer], task: str | None = None) -> list[dict]:
    """The summary's rows, one per task; `task` is that of records which have none (files of the released code)."""
    return summarise({"task": task, **encode(answer)} for answer in answers)


def strict_accuracies(answers: Iterable[Answer]) -> dict[str, float]:
    """Accuracy per task by the released code's extraction rules."""
    return {row["task"]: row["accuracy"] for row in table_rows(regrade(answer, strict=True) for answer in answers)}
