"""Evaluation by generation: the policy responds to every question, once greedily or several times for a vote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from cream.cli import preflight
from cream.evaluation import results
from cream.evaluation.statistics import format_percent, format_table
from cream.files.journal import Output
from cream.records import Answer
from cream.scoring.completions import answered
from cream.text.chat import Chat

if TYPE_CHECKING:
    from cream.evaluation.evaluate import Plan

NEEDS_OPTIONS = False


def suffix(plan: Plan) -> str:
    """What the name of an output says of the scoring."""
    return "" if plan.sampling.greedy else f"-n{plan.sampling.n}"


def unused_flags(plan: Plan) -> list[str]:
    """Flags that decide nothing of this output."""
    unused = ["scoring", "prompt_format", "length_norm"]
    if plan.sampling.greedy:
        unused += ["gen_n", "gen_temperature", "top_p", "do_sample", *([] if plan.flags.few_shot else ["seed"])]
    return unused


def size(plan: Plan) -> float:
    """Bytes that the output and its journal take, about."""
    return preflight.size_of_samples(len(plan.asked), 0, plan.sampling.n, plan.sampling.max_tokens)


def evaluate(plan: Plan, output: Output, chat: Chat, **where) -> Iterator[Answer]:
    """The graded record of each question that the journal does not hold yet. `where`: as `answered` takes it."""
    every, where = (
        partial(list, list(plan.asked.values())),
        where | {"engine": plan.engine | {"tensor_parallel_size": where["pool"].group}},
    )
    for prompt, _, completions in answered(output, chat, every, len(plan.asked), plan.sampling, **where):
        yield results.grade_responses(plan.questions.items[prompt.uuid], prompt, completions, plan.strict)


def complete(plan: Plan, rows: Iterator[dict], output: Output) -> Iterator[dict]:
    """The records of all questions, in their order; one whose prompt does not fit is wrong."""
    return results.fill_missing(rows, plan.asked, plan.questions.items, plan.strict)


def summarise(plan: Plan, answers: Sequence[Answer]) -> tuple[dict, str]:
    """(What the summary says, the same as text)."""
    rows, strict, n = results.table_rows(answers), results.strict_accuracies(answers), plan.sampling.n
    text = format_table(rows)
    if n > 1:
        text += f"\naccuracy: of the majority vote of {n} responses; pass@j: one of j is right, ± standard error"
    text += f"\naccuracy % by the released code's extraction rules: {format_percent(strict)}"
    facts = {"tasks": rows, "strict": strict, "greedy": n == 1, "gen_n": n, "extraction": plan.flags.extraction}
    return facts, text
