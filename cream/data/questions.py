"""A question of any table -> an item: its options as lettered lines below it, and its label, a letter or a number."""

import re
from collections.abc import Mapping, Sequence

from cream.evaluation.tasks import grade

CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's annotations, 3*3=<<3*3=9>>9
FINAL = "####"
LETTERS = "ABCDEFGH"


def item(fields: Mapping, first: int | None) -> dict:
    """A question with its options as lines below it, "A. oxygen", and the label: a letter, or what stands after ####.

    A worked solution is kept as `solution`, without GSM8K's calculator annotations. Raises UserError for a label that
    could not be graded.
    """
    made = _item(fields, first)
    grade(made["question"], made["label"], "")
    return made


def _item(fields: Mapping, first: int | None) -> dict:
    question, answer = str(fields["question"]).strip(), fields["answer"]
    if "choices" in fields:
        texts, labels = options(fields["choices"])
        label = letter(answer, texts, labels, first)
        lines = [f"{mark}. {text}" for mark, text in zip(LETTERS, texts, strict=False)]
        return {"question": "\n".join([question, *lines]), "label": label}
    if isinstance(answer, str) and FINAL in answer:
        solution, _, final = answer.rpartition(FINAL)
        told = f"{CALCULATOR.sub('', solution)}{FINAL}{final}".strip()
        return {"question": question, "label": number(final), "solution": told}
    return {"question": question, "label": number(answer) if isinstance(answer, str) else answer}


def options(choices: object) -> tuple[list[str], list[str] | None]:
    """(texts, labels) of options given as a list of texts or whole numbers, of {"text", "label"}, or as {"text": […],
    "label": […]}, or {label: text}."""
    labels = None
    if isinstance(choices, Mapping) and "text" in choices:
        texts, labels = choices["text"], choices.get("label")
    elif isinstance(choices, Mapping):
        given = {label: text for label, text in choices.items() if text is not None}  # null: other rows have it
        texts, labels = list(given.values()), list(given)
    elif isinstance(choices, Sequence) and choices and all(isinstance(each, Mapping) for each in choices):
        texts, labels = ([each.get(key) for each in choices] for key in ("text", "label"))
    else:
        texts = choices
    if not texts or isinstance(texts, str) or not isinstance(texts, Sequence) or not all(map(_is_option, texts)):
        raise ValueError(f"an option is blank or no text: {texts!r:.80}")
    if not 2 <= len(texts) <= len(LETTERS) or labels is not None and len({*labels}) != len(texts):
        raise ValueError(f"{len(texts)} options with labels {labels}: expected 2 to {len(LETTERS)}, a label each")
    return [_line(str(text)) for text in texts], labels and [str(label) for label in labels]


def _is_option(value: object) -> bool:
    return type(value) is int or isinstance(value, str) and bool(value.strip())


def letter(answer: object, texts: Sequence[str], labels: Sequence[str] | None, first: int | None) -> str:
    """The letter A to H of the right option: `answer` is its label (without labels: a letter), its text, or its number
    counted from `first` (0 or 1). Raises ValueError where it is none of these, or may be several options."""
    told = _line(str(answer))
    known = labels or LETTERS[: len(texts)]
    if labels is not None and told in labels:
        found = {labels.index(told)}
    elif told.isdecimal() and first is not None:
        found = {int(told) - first}
    elif told.isdecimal() and int(told) <= len(texts):  # a text of an option as well, perhaps
        raise ValueError(f"the answer {told!r} is a number: --first_answer says whether they count from 0 or 1")
    else:
        found = {i for i, each in enumerate(zip(known, texts, strict=True)) if told in each}
        found |= {i for i, mark in enumerate(known) if told.upper() == mark.upper()}
    if len(found) > 1:
        named = " and of ".join(f"{known[i]} ({texts[i]})" for i in sorted(found))
        raise ValueError(f"the answer {told!r} may be that of {named}; say which by a number and --first_answer")
    index = next(iter(found), -1)
    if not 0 <= index < len(texts):
        raise ValueError(f"the answer {told!r} is none of the options {', '.join(labels or texts)}")
    return LETTERS[index]


def _line(text: str) -> str:
    """A text of an option, on one line."""
    return re.sub(r"\s*[\r\n]+\s*", " ", text.strip())


def number(text: str) -> str:
    """A final answer without the commas between thousands: " 1,234" is "1234"."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.strip())
