"""One record from the fields of a row (cream/data/columns.py)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from cream.data import preferences, ratings
from cream.data.columns import FORMS
from cream.data.messages import NONE, Dropped, Keys, conversation, pair
from cream.data.questions import item
from cream.data.steps import labelled
from cream.evaluation.tasks import Question
from cream.pairs.validity import EMPTY
from cream.records import Conversation, Item, Pair, Prompt, Ratings, Record, Samples, Steps, decode

NO_LABEL = "no step has a label"
NO_RATING = "it has no rating"


@dataclass(frozen=True)
class Reading:
    """How rows are read: the number of the first option where answers are numbers, what becomes of keys of messages,
    the meaning of the values of `best` (1, 2, or 0 for a tie), "math" where answers may be formulas, which pairs a
    prompt's responses make, the scale of ratings, what separates the steps of a text, and, if a row makes several,
    what takes it apart."""

    first: int | None = None
    keys: Keys = NONE
    best: Mapping[str, int] = field(default_factory=dict)
    grader: str | None = None
    selection: preferences.Selection = preferences.USUAL
    scale: ratings.Scale = ratings.Scale()
    separator: str = "\n"
    take_apart: Callable[[Mapping], Iterable[Mapping]] | None = None


USUAL = Reading()


def record(kind: type[Record], uuid: str, fields: Mapping, extra: Mapping, reading: Reading = USUAL) -> Record:
    """One record of a layout; a conversation that ends with a user's turn is a prompt.

    Raises ValueError, or UserError that names the uuid, if the fields make no record, and Dropped where a filter drops
    it.
    """
    forms = FORMS[kind][:1] if kind is Pair else FORMS[kind]
    if not any(fields.keys() >= {*form} for form in forms):
        raise ValueError(f"it lacks {' or '.join(' and '.join(form) for form in forms)}")
    if kind is Item:
        own = {"grader": None, **item(fields, reading.first, reading.grader)}
    elif kind is Pair:
        own = pair(fields, reading.keys)
        extra = {"consistency": None, **_numbers(extra, own)}
    elif kind is Ratings:
        numbers = ratings.scaled(fields["ratings"], reading.scale)
        own = {"messages": conversation(fields, reading.keys), "ratings": numbers}
        if all(number is None for number in numbers.values()):
            raise Dropped(NO_RATING)
        if any(not turn["content"].strip() for turn in own["messages"]):
            raise Dropped(EMPTY)
    elif kind is Steps:
        steps, labels = labelled(fields["steps"], fields["labels"], reading.separator)
        own = {"prompt": conversation(fields, reading.keys), "steps": steps, "labels": labels}
        if all(label is None for label in labels):
            raise Dropped(NO_LABEL)
    elif kind is Samples:
        own = {"prompt": conversation(fields, reading.keys), **preferences.ranked(fields)}
    else:
        own = {"messages": conversation(fields, reading.keys)}
        kind = Conversation if own["messages"] and own["messages"][-1]["role"] == "assistant" else Prompt
    whole = {f"input_{key}" if key in own else key: value for key, value in extra.items()} | own
    if kind is Item:  # one that cannot be graded is refused here, as stages refuse it
        decode(Question, uuid, whole, "row")
    return decode(kind, uuid, whole, "row")


def _numbers(extra: Mapping, own: Mapping) -> dict:
    """A pair's extra keys, with the layout's own numbers, which are texts in a .csv file, as numbers, and without empty
    ones. Raises ValueError for a text that is not a number of that field."""
    types = {field.name: field.type for field in msgspec.structs.fields(Pair) if field.name not in (*own, "extra")}
    numbers = {}
    for name, value in extra.items():
        if name in types and isinstance(value, str):
            if not value:
                continue
            try:
                value = msgspec.convert(value, types[name], strict=False)
            except msgspec.ValidationError as error:
                raise ValueError(f"{name}: {error}, found {value!r:.60}; rename the column if it is another") from None
        numbers[name] = value
    return numbers
