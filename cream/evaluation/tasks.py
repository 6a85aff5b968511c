"""What an evaluation item asks, whether a response answers it (by label, or a number), and what several agree on.

An item carries its options inside its question (spec of the CREAM data), so whether it is multiple choice, and how many
options it has, follows from the item and not from the task: ARC has items with labels 1 to 4 and with a fifth option E.
"""

import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from cream.errors import UserError
from cream.evaluation.answers import (
    extract_choice,
    extract_choice_strict,
    extract_number,
    extract_number_strict,
    numbers_equal,
)
from cream.records import Item

TASKS = ("arc_easy", "arc_challenge", "openbookqa", "siqa", "gsm8k")

OPTION_LINE = re.compile(r"^[ \t]*(?:\(([A-H1-9])\)|([A-H1-9])[.):])[ \t]+(\S(?:.*[^ \t\n])?)[ \t]*$", re.MULTILINE)
OPTION_INLINE = re.compile(
    r"(?<!\S)\(?([A-H1-9])\)[ \t]+(\S.*?)(?<![ \t])(?=[ \t]+\(?[A-H1-9]\)[ \t]|[ \t]*$)", re.MULTILINE
)


def options_of(question: str) -> dict[str, str]:
    """Label -> text of the options inside a question, in order; {} when it has none.

    Options are lines ("A. oxygen", "B) neon", "(C) helium", "4: argon"), or follow each other on one line ("A) Tom B)
    Mary C) same"). They run from A or 1 without a gap, at least two of them; of several such runs the last is taken.
    """
    return split_question(question)[1]


def split_question(question: str) -> tuple[str, dict[str, str]]:
    """(what is asked, without the line break or blank before its options; the options, as `options_of` gives them)."""
    for pattern in (OPTION_LINE, OPTION_INLINE):
        start, options = _last_run(list(pattern.finditer(question)))
        if options:
            before = question[:start]
            return (before[:-1] if before[-1:] in ("\n", " ") else before), options
    return question, {}


def _last_run(found: list[re.Match]) -> tuple[int, dict[str, str]]:
    """Where the last run of two options or more starts, and its options; (0, {}) without one."""
    runs: list[tuple[int, dict[str, str]]] = []
    for match in found:
        *labels, text = match.groups()
        label = next(filter(None, labels))
        if label in ("A", "1"):
            runs.append((match.start(), {label: text}))
        elif runs and label == chr(ord(next(reversed(runs[-1][1]))) + 1):
            runs[-1][1][label] = text
    return next((run for run in reversed(runs) if len(run[1]) > 1), (0, {}))


def grade(question: str, label: str | int | float, response: str, strict: bool = False) -> tuple[str, bool]:
    """(final prediction in lower case, or "none"; whether it is correct) of one response.

    Multiple choice where the label is one of the question's options, else numbers, compared as decimals. `strict`
    grades as the released code does: its extraction rules, and equality of strings. Raises UserError for a label that
    is neither an option nor a number.
    """
    label = str(label).strip()
    options = options_of(question)
    if label.upper() in options:
        answer = extract_choice_strict(response) if strict else extract_choice(response, options)
        return (answer or "none").lower(), answer == label.upper()
    gold = extract_number(label)
    if gold is None:
        known = f"none of its options {', '.join(options)}" if options else "no number, and it has no option lines"
        raise UserError(f"question {question[:80]!r}: label {label[:80]!r} is {known}; mend the label or the question")
    if strict:
        answer = extract_number_strict(response)
        return (answer or "none").lower(), answer == label
    answer = extract_number(response)
    return (answer or "none").lower(), answer is not None and numbers_equal(answer, gold)


class Question(Item, kw_only=True):
    """Evaluation data: a question with the lettered options inside it, and the label (a letter or a number).

    An Item whose label can be graded: what stages read of evaluation data. Raises ValueError as `grade` raises
    UserError.
    """

    def __post_init__(self):
        try:
            grade(self.question, self.label, "")
        except UserError as error:
            raise ValueError(str(error)) from None


def majority(predictions: Sequence[str]) -> int:
    """Index of the first prediction of those that most answers give; `predictions` as `grade` writes them.

    Numbers are compared as decimals: "18" and "18.00" are one vote. "none" never wins over an answer; a tie goes to the
    prediction that came first. X. Wang et al., "Self-consistency", arXiv 2203.11171. Raises ValueError for none at all.
    """
    if not predictions:
        raise ValueError("a vote needs a prediction")
    keys = [_ballot(prediction) for prediction in predictions]
    votes = Counter(key for key in keys if key != "none")  # in the order in which they came, as max takes them
    return keys.index(max(votes, key=votes.get)) if votes else 0


def _ballot(prediction: str) -> str | Decimal:
    """What equal predictions have in common."""
    try:
        value = Decimal(prediction.replace(",", ""))
    except InvalidOperation:
        return prediction
    return value if value.is_finite() else prediction
