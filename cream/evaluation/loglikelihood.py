"""Multiple choice by log-likelihood: which option the model finds likeliest, so that no answer has to be extracted.

An option o of a question x has log π(o | x) = Σ_t log π(o_t | x, o_<t) in nats, over its tokens. The answer is the option
for which this, divided by a length, is largest; the first of equals. `NORMS` are the lengths:

    none    1: the likeliest text, which favours short ones       lm-evaluation-harness: acc
    chars   characters of the option                              acc_norm
    bytes   bytes of its UTF-8                                    acc_bytes
    tokens  tokens that are scored                                (another with every tokenizer)

Two formats say what x and o are. plain: the question as a text that the option goes on, in lm-evaluation-harness's own
words for the task; its options are not shown. chat: the question with its options as the user's turn, the option's text
as the assistant's, up to and including the end of turn: what the model is trained to see.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from cream.errors import UserError
from cream.evaluation.tasks import grade, options_of, split_question
from cream.records import Answer, Item, Message
from cream.rewards import Group
from cream.rewards.likelihood import Scored

# lm-evaluation-harness 0.4.13, doc_to_text of arc_easy (arc_challenge includes it), openbookqa and social_iqa
CONTEXTS = {"openbookqa": "{}", "siqa": "Q: {}\nA:"}
CONTEXT = "Question: {}\nAnswer:"
DELIMITER = " "
FORMATS = ("plain", "chat")

NORMS: dict[str, Callable[[str, int], int]] = {
    "none": lambda text, tokens: 1,
    "chars": lambda text, tokens: len(text),
    "bytes": lambda text, tokens: len(text.encode()),
    "tokens": lambda text, tokens: tokens,
}


def is_choice(item: Item) -> bool:
    """Whether an item is multiple choice: its label is one of its options. Raises UserError for a label that is neither
    an option nor a number."""
    if str(item.label).strip().upper() in options_of(item.question):
        return True
    grade(item.question, item.label, "")
    return False


def context_of(item: Item) -> str:
    """What the plain format's options continue."""
    return CONTEXTS.get(item.task, CONTEXT).format(split_question(item.question)[0])


def plain_group(item: Item, shots: Sequence[Item] = ()) -> Group:
    """The options as continuations of the question; `shots` are solved ones before it, an empty line between them."""
    solved = [context_of(s) + DELIMITER + options_of(s.question)[str(s.label).strip().upper()] for s in shots]
    text = "\n\n".join([*solved, context_of(item)])
    return _group(item, [Message("user", text)], DELIMITER)


def chat_group(item: Item, prompt: list[Message]) -> Group:
    """The options as an assistant's answers to the prompt that the question makes."""
    return _group(item, prompt, "")


def _group(item: Item, prompt: list[Message], delimiter: str) -> Group:
    options = options_of(item.question)
    return Group(item.uuid, prompt, [delimiter + text for text in options.values()], [True] * len(options))


def likeliest(options: dict[str, str], logprobs: dict[str, float], tokens: dict[str, int], norm: str) -> str:
    """The label of the option whose log π over its length is largest; the first of equals."""
    return max(options, key=lambda label: logprobs[label] / NORMS[norm](options[label], tokens[label]))


def picked(item: Item, scored: Scored, norm: str) -> Answer:
    """The item with the option that the model prefers. Where an option has no log-likelihood (`scored` says why), there
    is no answer, which is wrong."""
    options = options_of(item.question)
    record = Answer(
        uuid=item.uuid,
        question=item.question,
        label=item.label,
        task=item.task,
        responses="",
        final_prediction="none",
        correct=False,
        extra=dict(item.extra),
    )
    if why := next(filter(None, scored.reason), None):
        record.extra["reason"] = why
        return record
    record.option_logprob = dict(zip(options, scored.logprob, strict=True))
    record.option_tokens = dict(zip(options, scored.num_tokens, strict=True))
    return chosen(record, norm)


def chosen(record: Answer, norm: str) -> Answer:
    """The same record with the option that this norm prefers; one without log-likelihoods as it is."""
    if record.option_logprob is None:
        return record
    options = options_of(record.question)
    label = likeliest(options, record.option_logprob, record.option_tokens, norm)
    record.responses, record.final_prediction = options[label], label.lower()
    record.correct = label == str(record.label).strip().upper()
    return record


def check(items: Sequence[Item], source: Path) -> None:
    """Raises UserError unless there is an item to choose for."""
    if not items:
        raise UserError(
            f"{source}: --scoring loglikelihood compares options, and no question here has any; use --scoring generate"
        )
