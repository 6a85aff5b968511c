"""Evaluation by generation: the policy responds to every question, once greedily or several times for a vote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from msgspec import structs

from cream.cli import preflight
from cream.engines import Completion
from cream.evaluation import statistics
from cream.evaluation.few_shot import build_prompt
from cream.evaluation.grade import Rules, majority
from cream.evaluation.statistics import format_percent, format_table, table_rows
from cream.evaluation.tasks import grade_record
from cream.files.journal import Output
from cream.records import Answer, Item, Prompt, encode
from cream.scoring.completions import generate_responses
from cream.scoring.driver import Model

if TYPE_CHECKING:
    from cream.evaluation.evaluate import Plan
    from cream.evaluation.options import EvaluationFlags
    from cream.evaluation.questions import Questions

NEEDS_OPTIONS = False


def requests(questions: Questions, flags: EvaluationFlags, sysprompt: str) -> dict[str, Prompt]:
    """Each item as it is put to the policy, by uuid."""
    return {
        uuid: Prompt(uuid=uuid, messages=build_prompt(item, sysprompt, questions.examples.get(item.task, ())))
        for uuid, item in questions.items.items()
    }


def suffix(plan: Plan) -> str:
    return "" if plan.sampling.greedy else f"-n{plan.sampling.n}"


def unused_flags(plan: Plan) -> list[str]:
    unused = ["scoring", "prompt_format", "length_norm", *plan.sampling.idle_flags]
    if plan.sampling.greedy:
        unused += ["gen_n", "gen_temperature", "top_p", "do_sample", *([] if plan.flags.few_shot else ["seed"])]
    return unused


def size(plan: Plan) -> float:
    return preflight.size_of_samples(len(plan.requests), 0, plan.sampling.n, plan.sampling.max_tokens)


def evaluate(plan: Plan, output: Output, model: Model, **how) -> Iterator[Answer]:
    """The graded record of each question that the journal does not hold yet. `how`: of `generate_responses`."""
    prompts, how = list(plan.requests.values()), how | {"engine": plan.engine}
    for prompt, _, completions in generate_responses(
        output, model, partial(list, prompts), len(prompts), plan.sampling, **how
    ):
        about = {"opened": model.chat.opened, "count": model.chat.thought_tokens}
        yield grade_responses(plan.questions.items[prompt.uuid], prompt, completions, plan.rules, **about)


def complete(plan: Plan, rows: Iterator[dict], output: Output) -> Iterator[dict]:
    """The records of all questions, in their order; one whose prompt does not fit is wrong."""
    return fill_missing(rows, plan.requests, plan.questions.items, plan.rules)


def summarise(plan: Plan, records: Sequence[Answer]) -> tuple[dict, str]:
    rows, strict, n = table_rows(records), strict_accuracies(records, plan.rules.grader), plan.sampling.n
    text = format_table(rows)
    if n > 1:
        text += f"\naccuracy: of the majority vote of {n} responses; pass@j: one of j is right, ± standard error"
    text += f"\naccuracy % by the released code's extraction rules: {format_percent(strict)}"
    facts = {"tasks": rows, "strict": strict, "greedy": n == 1, "gen_n": n, "extraction": plan.flags.extraction}
    return facts, text


# Graded records ------------------------------------------------------------------------------------------------------


def grade_responses(
    item: Item,
    prompt: Prompt,
    completions: Sequence[Completion],
    rules: Rules,
    *,
    opened: bool = False,
    count: Callable[[Sequence[int], str], int | None] | None = None,
) -> Answer:
    """The item with its responses; one that has none (its prompt did not fit) is wrong. `opened`: its prompt ends with
    the tag that opens a thought; `count`: tokens of the thought in a response's ids and text (Chat.thought_tokens)."""
    texts = [completion.text for completion in completions] or [""]
    reasons = [completion.finish_reason for completion in completions] or [None]
    lengths = [len(completion.token_ids) for completion in completions] or [None]
    thoughts = [count(completion.token_ids, completion.text) for completion in completions] if count else []
    thoughts = thoughts if any(tokens is not None for tokens in thoughts) else None
    several = {"all_responses": texts, "all_finish_reasons": reasons, "all_num_tokens": lengths}
    several |= {"all_thought_tokens": thoughts}
    record = Answer(
        uuid=item.uuid,
        question=prompt.messages[-1].content,
        label=item.label,
        task=item.task,
        grader=item.grader,
        responses=texts[0],
        final_prediction="none",
        correct=False,
        finish_reason=reasons[0],
        num_tokens=lengths[0],
        thought_tokens=thoughts and thoughts[0],
        thought_opened=opened,
        extra=item.extra if completions else {**item.extra, "reason": "the prompt does not fit"},
    )
    verdict = _verdict(record, texts, rules)
    return structs.replace(record, **verdict, **(several if len(texts) > 1 else {}))


def _verdict(record: Answer, texts: Sequence[str], rules: Rules) -> dict:
    """The keys of a record that say how its responses are graded: the vote, and where there are several, each."""
    grades = [grade_record(record, text, rules, record.thought_opened) for text in texts]
    predictions, correct = map(list, zip(*grades, strict=True))
    vote = majority(predictions)
    verdict = {"final_prediction": predictions[vote], "correct": correct[vote]}
    return verdict | ({"all_predictions": predictions, "all_correct": correct} if len(texts) > 1 else {})


def fill_missing(
    rows: Iterator[dict], prompts: Mapping[str, Prompt], items: Mapping[str, Item], rules: Rules
) -> Iterator[dict]:
    """The graded records, in the order of the prompts; a prompt without a response gets a record that is wrong."""
    row = next(rows, None)
    for uuid, prompt in prompts.items():
        if row is not None and row["uuid"] == uuid:
            yield row
            row = next(rows, None)
        else:
            yield encode(grade_responses(items[uuid], prompt, [], rules))


def regrade(record: Answer, rules: Rules) -> Answer:
    """The same record, each of its responses graded again."""
    return structs.replace(record, **_verdict_of(record, rules))


def _verdict_of(record: Answer, rules: Rules) -> dict:
    return _verdict(record, record.all_responses or [record.responses], rules)


def changes(before: Sequence[Answer], after: Sequence[Answer]) -> list[str]:
    """A line for each record whose grade has changed."""
    return [
        f"{old.uuid}: {old.final_prediction} -> {new.final_prediction} (label {old.label})"
        for old, new in zip(before, after, strict=True)
        if (old.final_prediction, old.correct) != (new.final_prediction, new.correct)
    ]


def strict_accuracies(records: Iterable[Answer], grader: str | None = None) -> dict[str, float]:
    """Accuracy per task by the released code's extraction rules; `grader` as in Rules."""
    rules = Rules(strict=True, grader=grader)
    graded = ({"task": record.task, **_verdict_of(record, rules)} for record in records)
    return {row["task"]: row["accuracy"] for row in statistics.summarise(graded)}
