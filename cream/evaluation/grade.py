"""Grading rules: whether a response gives the right label, or the right number; and what several responses agree on.

An item of CREAM's data carries its options, if it is multiple choice, in the text of its question.

A rule maps (question, label, response, strict) to (prediction in lower case, or "none"; whether it is correct).
`strict` grades as the released CREAM code does: its extraction rules, and equality of strings. A rule raises UserError
for a label that it cannot grade.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache

from cream.errors import UserError
from cream.evaluation.answers import (
    extract_choice,
    extract_choice_strict,
    extract_number,
    extract_number_strict,
)
from cream.evaluation.formulas import grade_formula, is_formula
from cream.evaluation.numbers import label_number, numbers_equal
from cream.text.thoughts import USUAL, Tags

Label = str | int | float


@dataclass(frozen=True)
class Rules:
    """How responses are graded, by flags: as the released code does; the tags around a thought; `grader` "math" for all
    items, else each by its own."""

    strict: bool = False
    tags: Tags = USUAL
    grader: str | None = None


DEFAULT = Rules()


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_OPTIONS = len(LETTERS)
MARK = "[A-Z]|1\\d|2[0-6]|[1-9]"  # a letter, or a number up to 26
OPTION_LINE = re.compile(
    rf"^[ \t]*(?:\(({MARK})\)[ \t]*|({MARK})(?:\)[ \t]*|[.:][ \t]+))(\S(?:.*[^ \t\n])?)[ \t]*$", re.MULTILINE
)
OPTION_INLINE = re.compile(
    rf"(?<!\S)\(?({MARK})\)[ \t]+(\S.*?)(?<![ \t])(?=[ \t]+\(?(?:{MARK})\)[ \t]|[ \t]*$)", re.MULTILINE
)
# The label that an option's own text begins with: "(A)4", "A)60", "A. Tom", "1) red"; not the 1 of "1.5" and "1:2".
OWN_LABEL = re.compile(rf"(?:\(({MARK}|[a-z])\)|({MARK}|[a-z])(?:\)|[.:](?=\s)|(?<=[A-Za-z])[.:](?!\d)))\s*(?=\S)")


def options_of(question: str) -> dict[str, str]:
    """Label -> text of the options inside a question, in order; {} when it has none. It is not to be changed: the next
    call for the question gives the same object.

    Options are lines ("A. oxygen", "B) neon", "(C) helium", "4: argon"), or follow each other on one line ("A) Tom B)
    Mary C) same"). They run from A or 1 without a gap, at least two of them; of several such runs the last is taken.
    """
    return split_question(question)[1]


@lru_cache(2048)
def split_question(question: str) -> tuple[str, dict[str, str]]:
    """(what is asked, without the line break or blank before its options; the options, as `options_of` gives them)."""
    for pattern in (OPTION_LINE, OPTION_INLINE):
        start, options = _last_run(list(pattern.finditer(question)))
        if options:
            before = question[:start]
            texts = strip_labels([*options.values()])[0]
            return (before[:-1] if before[-1:] in ("\n", " ") else before), dict(zip(options, texts, strict=True))
    return question, {}


def strip_labels(texts: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """(the texts of options without the labels that they begin with, these labels); the texts as they are, and None,
    unless all of them begin with labels that run from A, a or 1."""
    found = [OWN_LABEL.match(text) for text in texts]
    labels = [match[1] or match[2] for match in found if match]
    runs = (list(LETTERS), list(LETTERS.lower()), [str(i + 1) for i in range(MOST_OPTIONS)])
    if labels not in [run[: len(texts)] for run in runs]:
        return [*texts], None
    return [text[match.end() :] for text, match in zip(texts, found, strict=True)], labels


def _last_run(matches: list[re.Match]) -> tuple[int, dict[str, str]]:
    """Where the last run of two options or more starts, and its options; (0, {}) without one."""
    runs: list[tuple[int, dict[str, str]]] = []
    for match in matches:
        *labels, text = match.groups()
        label = next(filter(None, labels))
        if label in ("A", "1"):
            runs.append((match.start(), {label: text}))
        elif runs and label == _next_label(next(reversed(runs[-1][1]))):
            runs[-1][1][label] = text
    return next((run for run in reversed(runs) if len(run[1]) > 1), (0, {}))


def _next_label(label: str) -> str:
    return str(int(label) + 1) if label.isdecimal() else chr(ord(label) + 1)


def gold_option(label: Label) -> str:
    """A label of a multiple choice question, as `options_of` spells it."""
    return str(label).strip().upper()


def is_option(question: str, label: Label) -> bool:
    """Whether a label is one of the question's options, in any case."""
    return gold_option(label) in options_of(question)


def grade_choice(question: str, label: Label, response: str, strict: bool = False) -> tuple[str, bool]:
    """Multiple choice: the option that the response answers with, against the label."""
    gold, options = gold_option(label), options_of(question)
    if gold not in options:
        raise _not_an_option(question, label, "given, but the question has no options")
    answer = extract_choice_strict(response) if strict else extract_choice(response, options)
    return (answer or "none").lower(), answer == gold


def grade_number(question: str, label: Label, response: str, strict: bool = False) -> tuple[str, bool]:
    """A number, compared as a decimal: "18.00" equals "18". An item whose label is the letter of an option is multiple
    choice, whatever its task."""
    gold = label_number(str(label))
    if gold is None:
        if is_option(question, label):
            return grade_choice(question, label, response, strict)
        raise _ungradable(question, label, "not a number")
    answer = extract_number_strict(response) if strict else extract_number(response)
    if answer is None:
        return "none", False
    return answer.lower(), answer == str(label).strip() if strict else numbers_equal(answer, gold)


def grade_item(question: str, label: Label, response: str, strict: bool = False) -> tuple[str, bool]:
    """As the item itself says: multiple choice where the label is one of the question's options, else a number."""
    if is_option(question, label):
        return grade_choice(question, label, response, strict)
    if label_number(str(label)) is None:
        raise _not_an_option(question, label, "not a number, and it has no option lines")
    return grade_number(question, label, response, strict)


def grade_math(question: str, label: Label, response: str, strict: bool = False) -> tuple[str, bool]:
    """As the item itself says: multiple choice, else a formula, which a number is as well
    (cream/evaluation/formulas.py), read as without math-verify where a response has no formula ("18 apples"). By the
    released rules, where nothing but numbers can be extracted, equality of strings."""
    if is_option(question, label):
        return grade_choice(question, label, response, strict)
    gold = str(label).strip()
    if not is_formula(gold):
        raise _ungradable(question, label, "not a formula that math-verify reads")
    if strict:
        answer = extract_number_strict(response)
        return answer or "none", answer == gold
    answer, correct = grade_formula(gold, response)
    if answer == "none" and label_number(gold) is not None:
        return grade_number(question, label, response)
    return answer, correct


def _not_an_option(question: str, label: Label, without: str) -> UserError:
    options = options_of(question)
    return _ungradable(question, label, f"none of its options {', '.join(options)}" if options else without)


def _ungradable(question: str, label: Label, why: str) -> UserError:
    text = str(label).strip()
    formulas = "; formulas (and whatever else is not a number as a whole) need --grader math" if "number" in why else ""
    return UserError(
        f"question {question[:80]!r}: label {text[:80]!r} is {why}; fix the label or the question{formulas}"
    )


def majority(predictions: Sequence[str]) -> int:
    """Index of the first prediction of those that most responses give; `predictions` as `grade` writes them.

    Numbers are compared as decimals: "18" and "18.00" are one vote. "none" never wins over an answer; a tie goes to the
    prediction that came first. X. Wang et al., "Self-consistency", arXiv 2203.11171. Raises ValueError for none at all.
    """
    if not predictions:
        raise ValueError("a vote needs a prediction")
    keys = [ballot(prediction) for prediction in predictions]
    votes = Counter(key for key in keys if key != "none")  # in the order in which they came, as max takes them
    return keys.index(max(votes, key=votes.get)) if votes else 0


def ballot(prediction: str) -> str | Decimal:
    """What equal predictions have in common."""
    try:
        value = Decimal(prediction.replace(",", ""))
    except InvalidOperation:
        return prediction
    return value if value.is_finite() else prediction
