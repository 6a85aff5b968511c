"""Multiple choice by log-likelihood: which option the model finds likeliest, so that no answer has to be extracted.

An option o of a question x has log π(o | x) = Σ_t log π(o_t | x, o_<t) in nats, over its tokens. The answer is the
option for which this, divided by a length, is largest; the first of equals. `NORMS` are the lengths:

    none    1: the likeliest text, which favours short ones       lm-evaluation-harness: acc
    chars   characters of the option                              acc_norm
    bytes   bytes of its UTF-8                                    acc_bytes
    tokens  tokens that are scored                                (another with every tokenizer)

Two formats say what x and o are. plain: the question as a text that the option continues, in lm-evaluation-harness's
own words for the task; its options are not shown. chat: the question with its options as the user's turn, the option's
text as the assistant's, up to and including the end of turn: what the model is trained to see.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from cream.cli import preflight
from cream.engines import OFF
from cream.errors import UserError
from cream.evaluation.few_shot import build_prompt
from cream.evaluation.grade import DEFAULT, Rules, gold_option, is_option, options_of, split_question
from cream.evaluation.statistics import format_percent, format_table, table_rows
from cream.evaluation.tasks import find_task, grade_record
from cream.files.journal import Output
from cream.records import Answer, Item, Message
from cream.scoring import driver, logprobs
from cream.scoring.driver import Model
from cream.scoring.logprobs import Group, Scored

if TYPE_CHECKING:
    from cream.evaluation.evaluate import Plan
    from cream.evaluation.options import EvaluationFlags
    from cream.evaluation.questions import Questions

log = logging.getLogger("cream")

NEEDS_OPTIONS = True
DELIMITER = " "
RECORD = 256  # tokens of text that a record of compared options takes, besides its question, at most
FORMATS = ("plain", "chat")
CHUNK = 32  # questions that a CPU computes together, lost if the process is killed; a GPU takes a pool's batch at once
WITHOUT = "no options to compare"

NORMS: dict[str, Callable[[str, int], int]] = {
    "none": lambda text, tokens: 1,
    "chars": lambda text, tokens: len(text),
    "bytes": lambda text, tokens: len(text.encode()),
    "tokens": lambda text, tokens: tokens,
}


def with_options(items: Mapping[str, Item], source: Path, rules: Rules = DEFAULT) -> tuple[dict[str, Item], int]:
    """(The items that are multiple choice, how many are not), which the log says.

    Raises UserError where none is, and for a label that is neither an option nor a number.
    """
    kept = {uuid: item for uuid, item in items.items() if is_choice(item, rules)}
    if not kept:
        raise UserError(
            f"--scoring loglikelihood compares options, and no question of {source} has any; use --scoring generate"
        )
    if skipped := len(items) - len(kept):
        log.info("%d of %d questions are skipped: %s", skipped, len(items), WITHOUT)
    return kept, skipped


def is_choice(item: Item, rules: Rules = DEFAULT) -> bool:
    """Whether an item is multiple choice: its label is one of its options. Raises UserError for a label that cannot
    be graded."""
    if is_option(item.question, item.label):
        return True
    grade_record(item, "", rules)
    return False


def context_of(item: Item, task: str | None = None) -> str:
    """What the plain format's options continue, in the words of a task, its own unless another is given."""
    return find_task(task or item.task).CONTEXT.format(split_question(item.question)[0])


def group(item: Item, prompt_format: str, sysprompt: str = "none", shots: Sequence[Item] = ()) -> Group:
    """An item's options as responses to its question. `shots` are solved examples before it, in the same form: as plain
    text in the words of the item's task, an empty line after each, or as earlier turns.

    Raises UserError for an example that is not multiple choice.
    """
    if bad := [shot.uuid for shot in shots if not is_option(shot.question, shot.label)]:
        raise UserError(f"examples {', '.join(bad)} have no options to compare; give others with --few_shot_file FILE")

    def solve(example: Item) -> str:
        return options_of(example.question)[gold_option(example.label)]

    options = list(options_of(item.question).values())
    if prompt_format == "chat":
        return Group(item.uuid, build_prompt(item, sysprompt, shots, solve), options, [True] * len(options))
    solved = [context_of(shot, item.task) + DELIMITER + solve(shot) for shot in shots]
    text = "\n\n".join([*solved, context_of(item)])
    prompt = [Message("user", text)] if text.strip() else []
    return Group(item.uuid, prompt, [DELIMITER + text for text in options], [True] * len(options))


def likeliest(options: Mapping[str, str], logprob: Mapping[str, float], tokens: Mapping[str, int], norm: str) -> str:
    """The label of the option whose log π over its length is largest; the first of equals."""
    return max(options, key=lambda label: logprob[label] / NORMS[norm](options[label], tokens[label]))


def record_choice(item: Item, scored: Scored, norm: str) -> Answer:
    """The item with the option that the model prefers. Where an option has no log-likelihood (`scored` says why), there
    is no prediction, which is wrong."""
    why = next(filter(None, scored.reason), None)
    labels = options_of(item.question)
    record = Answer(
        uuid=item.uuid,
        question=item.question,
        label=item.label,
        task=item.task,
        grader=item.grader,
        responses="",
        final_prediction="none",
        correct=False,
        option_logprob=None if why else dict(zip(labels, scored.logprob, strict=True)),
        option_tokens=None if why else dict(zip(labels, scored.num_tokens, strict=True)),
        extra={**item.extra, "reason": why} if why else item.extra,
    )
    return choose_option(record, norm)


def choose_option(record: Answer, norm: str) -> Answer:
    """The record with the option that this norm prefers; as it is where it has no log-likelihoods.

    Raises UserError where these are not of its question's options, or its label is none of them.
    """
    if not record.option_logprob or record.option_tokens is None:
        return record
    options = options_of(record.question)
    if options.keys() != record.option_logprob.keys():
        has, asks = (", ".join(labels) or "no option" for labels in (record.option_logprob, options))
        raise UserError(f"`option_logprob` has {has}, its question {asks}")
    if (gold := gold_option(record.label)) not in options:
        raise UserError(f"label {gold[:80]!r} is none of its options {', '.join(options)}")
    label = likeliest(options, record.option_logprob, record.option_tokens, norm)
    return structs.replace(record, responses=options[label], final_prediction=label.lower(), correct=label == gold)


def accuracies(records: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Norm -> task -> accuracy, in [0, 1]."""
    by_norm = {norm: table_rows(choose_option(record, norm) for record in records) for norm in NORMS}
    return {norm: {row["task"]: row["accuracy"] for row in rows} for norm, rows in by_norm.items()}


def score_options(
    output: Output, model: Model, groups: Sequence[Group], *, max_length: int, show: bool
) -> Iterator[tuple[str, Scored]]:
    """(uuid, the scores of its options) of each group that the journal does not hold yet, as they are finished.

    Question and option have `max_length` tokens together at most. `show`: print the first group's first option with its
    scored tokens marked.
    """
    options, pool = logprobs.Options(max_length), model.pool
    chunk = pool.batch(len(groups))
    if pool.alone and pool.kind == "cpu":
        chunk = min(chunk, CHUNK)

    def setup():
        if show:
            logprobs.show_first(model, groups[:1], options)
        return logprobs.setup(model, options, chunk)

    how = {"count": len(groups), "chunk": chunk, "doing": "comparing options", "unit": "questions"}
    yield from driver.run(model, partial(list, groups), output.resume(), setup, **how)


# As one of evaluate.SCORINGS ------------------------------------------------------------------------------------------


def requests(questions: Questions, flags: EvaluationFlags, sysprompt: str) -> dict[str, Group]:
    """The options of each item, to be compared, by uuid. Raises UserError for an example that has none."""
    sysprompt = "none" if sysprompt == "auto" else sysprompt
    return {
        uuid: group(item, flags.prompt_format, sysprompt, questions.examples.get(item.task, ()))
        for uuid, item in questions.items.items()
    }


def suffix(plan: Plan) -> str:
    return f"-loglikelihood-{plan.flags.prompt_format}"


def unused_flags(plan: Plan) -> list[str]:
    unused = ["gen_n", "gen_temperature", "top_p", "do_sample", "gen_max_tokens", "extraction", "grader", "engine"]
    unused += ["keep_special_tokens", "thinking_tags", *OFF]
    unused += [] if plan.flags.few_shot else ["seed"]
    return unused + (["sysprompt"] if plan.flags.prompt_format == "plain" else [])


def size(plan: Plan) -> float:
    questions = sum(len(item.question) for item in plan.questions.items.values())
    return preflight.size_of_samples(len(plan.requests), questions, 1, RECORD)


def evaluate(plan: Plan, output: Output, model: Model, **how) -> Iterator[Answer]:
    """The record of each question that the journal does not hold yet. `how`: as `score_options` takes it."""
    for uuid, scored in score_options(output, model, list(plan.requests.values()), **how):
        yield record_choice(plan.questions.items[uuid], scored, plan.flags.length_norm)


def complete(plan: Plan, rows: Iterator[dict], output: Output) -> Iterator[dict]:
    """The records of all questions; those without log-likelihoods are counted as dropped."""
    for row in rows:
        if "option_logprob" not in row:
            output.drop(row["reason"])
        yield row


def summarise(plan: Plan, records: Sequence[Answer]) -> tuple[dict, str]:
    rows, by_norm, flags = table_rows(records), accuracies(records), plan.flags
    lines = [format_table(rows), "accuracy % by what the log-likelihood is divided by:"]
    lines += [f"  {norm:<6}  {format_percent(each)}" for norm, each in by_norm.items()]
    facts = {"tasks": rows, "by_length_norm": by_norm, "scoring": flags.scoring}
    return facts | {"prompt_format": flags.prompt_format, "length_norm": flags.length_norm}, "\n".join(lines)
