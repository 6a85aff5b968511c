"""A question of any table -> an item: the options as lettered lines below it, and a letter or number as its label."""

import re
from collections.abc import Mapping, Sequence

from cream.evaluation.grade import LETTERS, OWN_LABEL, is_option, strip_labels
from cream.evaluation.tasks import grade

CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's annotations, 3*3=<<3*3=9>>9
FINAL = "####"
LABEL = re.compile(r"[(\[]?([A-Za-z]|\d\d?)[)\].:]")


def item(fields: Mapping, first: int | None, grader: str | None = None) -> dict:
    """A question with its options as lines below it, "A. oxygen", and the label: a letter, or the text after ####.

    A worked solution is kept as `solution`, without GSM8K's calculator annotations; `grader` "math" is kept unless the
    label is an option. Raises UserError for a label that cannot be graded.
    """
    question, answer, solution = str(fields["question"]).strip(), fields["answer"], {}
    if "choices" in fields:
        texts, labels = options(fields["choices"])
        answer = letter(answer, texts, labels, first)
        question = "\n".join([question, *(f"{mark}. {text}" for mark, text in zip(LETTERS, texts, strict=False))])
    elif isinstance(answer, str):
        working, sign, answer = answer.rpartition(FINAL)
        if sign:
            solution = {"solution": f"{CALCULATOR.sub('', working)}{FINAL}{answer}".strip()}
        answer = answer.strip() if grader else number(answer)
    grade(question, answer, "", grader=grader)
    by = {"grader": grader} if grader and not is_option(question, answer) else {}
    return {"question": question, "label": answer, **by, **solution}


def options(choices: object) -> tuple[list[str], list[str] | None]:
    """(texts, labels) of options: a list of texts, whole numbers or {"text", "label"}, {"text": […], "label": […]}, or
    {label: text}. Labels that the texts begin with, "(A)4", are theirs."""
    labels = None
    if isinstance(choices, Mapping) and "text" in choices:
        texts, labels = choices["text"], choices.get("label")
    elif isinstance(choices, Mapping):
        text_of = {label: text for label, text in choices.items() if text is not None}  # null: other rows have it
        texts, labels = list(text_of.values()), list(text_of)
    elif isinstance(choices, Sequence) and choices and all(isinstance(each, Mapping) for each in choices):
        texts, labels = ([each.get(key) for each in choices] for key in ("text", "label"))
    else:
        texts = choices
    listed = isinstance(texts, Sequence) and not isinstance(texts, str) and texts
    if not listed or not all(type(text) is int or isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"an option is blank or not a text: {texts!r:.80}")
    named = labels is None or isinstance(labels, Sequence) and all(isinstance(label, str | int) for label in labels)
    if not named:
        raise ValueError(f"a label of an option is not a text or a number: {labels!r:.80}")
    if not 2 <= len(texts) <= len(LETTERS) or labels is not None and len({*labels}) != len(texts):
        raise ValueError(f"{len(texts)} options with labels {labels}: expected 2 to {len(LETTERS)}, a label each")
    texts, own = strip_labels([_line(str(text)) for text in texts])
    return texts, [str(label) for label in labels] if labels else own


def letter(answer: object, texts: Sequence[str], labels: Sequence[str] | None, first: int | None) -> str:
    """The letter of the right option: `answer` is its label (without labels: a letter), in brackets perhaps, its text,
    both, or its number counted from `first` (0 or 1). Raises ValueError if it fits no option, or several."""
    text = _line(str(answer))
    marks = labels or LETTERS[: len(texts)]
    if (both := OWN_LABEL.match(text)) and text not in texts and text[both.end() :] in texts:  # "C)80"
        text = both[1] or both[2]
    elif (bare := LABEL.fullmatch(text)) and text not in texts:  # "(C)", "C."
        text = bare[1]
    if labels is not None and text in labels:
        fits = {labels.index(text)}
    elif text.isdecimal() and first is not None:
        fits = {int(text) - first}
    elif text.isdecimal() and int(text) <= len(texts):  # a text of an option as well, perhaps
        raise ValueError(f"the answer {text!r} is a number: --first_answer says whether they count from 0 or 1")
    else:
        fits = {i for i, each in enumerate(zip(marks, texts, strict=True)) if text in each}
        fits |= {i for i, mark in enumerate(marks) if text.upper() == mark.upper()}
    if len(fits) > 1:
        named = " and ".join(f"{marks[i]} ({texts[i]})" for i in sorted(fits))
        raise ValueError(f"the answer {text!r} fits {named}; give its number and --first_answer")
    index = next(iter(fits), -1)
    if not 0 <= index < len(texts):
        raise ValueError(f"the answer {text!r} is none of the options {', '.join(labels or texts)}")
    return LETTERS[index]


def _line(text: str) -> str:
    """A text of an option, on one line."""
    return re.sub(r"\s*[\r\n]+\s*", " ", text.strip())


def number(text: str) -> str:
    """A final answer without the commas between thousands: " 1,234" is "1234"."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.strip())
