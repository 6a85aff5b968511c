"""Responses in steps, with a label for each step, in the forms of public data sets -> prompt, steps, labels.

A label is the probability that its step is right: 1, 0, a share between them, None where nobody labelled it.

- PRM800K (Lightman et al., "Let's Verify Step by Step", arXiv 2305.20050): per step several completions, rated -1, 0
  or 1, and the one that the solution continues with
- Math-Shepherd (Wang et al., arXiv 2312.08935): one text, in which each step ends with ки, and the same text with + or
  - in its place
- trl's: columns prompt, completions, labels
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

SIGNS = {"+": 1.0, "-": 0.0, "1": 1.0, "0": 0.0, "true": 1.0, "false": 0.0}
NEUTRAL = {"right": 1.0, "wrong": 0.0, "half": 0.5, "unlabelled": None}  # what PRM800K's rating 0 means
TAG = "ки"  # Math-Shepherd's, in Cyrillic letters
FIRST = "Step 1:"
COLUMNS = {"prompt": "prompt", "steps": "steps", "labels": "labels"}  # of the rows that the readers make

Row = Mapping[str, object]


def label(value: object) -> float | None:
    """The label in a cell: true, a number in [0, 1], +, - or null. Raises ValueError for other values."""
    if value is None or value == "":
        return None
    if isinstance(value, str) and value.strip().lower() in SIGNS:
        return SIGNS[value.strip().lower()]
    if isinstance(value, bool | int | float) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f"label {value!r:.40} is not true, false, +, -, or a number from 0 to 1")


def labelled(steps: object, labels: object, separator: str = "\n") -> tuple[list[str], list[float | None]]:
    """(steps, labels) of a row, without empty steps. A text is split at `separator`, and a single label is that of its
    last step. Raises ValueError unless there are as many labels as steps."""
    parts = steps.split(separator) if isinstance(steps, str) else steps
    if not isinstance(parts, Sequence) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"steps: expected a text or a list of texts, found {steps!r:.60}")
    if not isinstance(labels, list):
        texts = [part.strip() for part in parts if part.strip()]
        return texts, [None] * (len(texts) - 1) + [label(labels)]
    if len(labels) != len(parts):
        raise ValueError(f"{len(parts)} steps, but {len(labels)} labels")
    both = [(part.strip(), label(value)) for part, value in zip(parts, labels, strict=True) if part.strip()]
    return [part for part, _ in both], [value for _, value in both]


def prm800k(row: Row, neutral: float | None = 1.0) -> Iterator[dict]:
    """The labelled solutions of a row: the one that the labeller continued, and for each other completion of a step
    those steps up to it, with a label for the last alone (the others are labelled already).

    A person's own completion has no rating, and so no label. `neutral`: the label of the rating 0; the paper counts it
    as right. Raises ValueError for a rating that is none.
    """
    ratings = {-1: 0.0, 0: neutral, 1: 1.0, None: None}
    rest = {key: value for key, value in row.items() if key not in ("question", "label")}
    question, marked = row["question"], row["label"]
    rest |= {name: question[name] for name in ("ground_truth_answer",) if name in question}
    rest |= {name: marked[name] for name in ("finish_reason",) if name in marked}
    path: list[tuple[str, float | None]] = []
    others: list[list[tuple[str, float | None]]] = []
    for step in marked["steps"]:
        completions, chosen = step.get("completions") or [], step.get("chosen_completion")
        human = step.get("human_completion")
        if odd := [each["rating"] for each in completions if each.get("rating") not in ratings]:
            raise ValueError(f"rating {odd[0]!r:.40} is not -1, 0, 1 or null")
        rated = [(each["text"], ratings[each.get("rating")]) for each in completions]
        going_on = (human["text"], None) if human else rated[chosen] if chosen is not None else None
        if going_on is None and len(rated) == 1:  # the solution ends here, at a wrong step
            going_on = rated[0]
        before = [(text, None) for text, _ in path]
        others += [[*before, each] for i, each in enumerate(rated) if each is not going_on and each[1] is not None]
        if going_on is None:
            break
        path.append(going_on)
    for solution in (path, *others):
        if any(value is not None for _, value in solution):
            texts, labels = zip(*solution, strict=True)
            yield rest | {"prompt": question["problem"], "steps": [*texts], "labels": [*labels]}


def math_shepherd(row: Row) -> Iterator[dict]:
    """The solution of a row. Raises ValueError if its two texts do not agree."""
    texts, marked = row["input"].split(TAG), row["label"]
    if len(texts) < 2:
        raise ValueError(f"its input has no step that ends with {TAG!r}")
    if texts[-1].strip():
        raise ValueError(f"its input continues after the last {TAG!r}")
    steps, labels, at = [], [], 0
    for text in texts[:-1]:
        sign = marked[at + len(text) : at + len(text) + 1]
        if marked[at : at + len(text)] != text or sign not in ("+", "-"):
            raise ValueError(f"its label has no + or - where its input has {TAG!r}, after {text[-30:]!r}")
        steps.append(text)
        labels.append(SIGNS[sign])
        at += len(text) + 1
    question, first, rest = steps[0].rpartition(FIRST)
    if not question.strip():
        raise ValueError(f"its input has no question before {FIRST!r}")
    steps[0] = first + rest
    more = {key: value for key, value in row.items() if key not in ("input", "label")}
    yield more | {"prompt": question.strip(), "steps": [step.strip() for step in steps], "labels": labels}


FORMS: dict[str, tuple[tuple[str, ...], Callable[[Row], Iterable[Row]]]] = {  # data set -> its columns, its reader
    "PRM800K": (("question.problem", "label.steps"), prm800k),
    "Math-Shepherd": (("input", "label"), math_shepherd),
}


def form_of(row: Row) -> str | None:
    """The data set of FORMS that a first row is of; None for others."""
    for name, (columns, _) in FORMS.items():
        if all(_has(row, column) for column in columns):
            return name if name != "Math-Shepherd" or TAG in str(row["input"]) else None
    return None


def _has(row: Row, path: str) -> bool:
    value: object = row
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return True
