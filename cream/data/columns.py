"""Which columns of a table make which field of a record: a column map (field -> column).

A column may be a path (`question.stem`; `answers.rank` of a list of objects is a list, `ranked.0` its first element),
and several may be joined: `context+question` with a space, `instruction+input` with an empty line, `answerA+answerB` as
a list of choices. Fields that are not in the map are taken from the columns with their usual names (NAMES). The fields
of a row decide its layout: a pair (chosen, rejected, or responses and which is better), ranked responses (responses
and the ranks of all), rated responses, a response in steps (steps, labels), an item (question, answer), a conversation
or a prompt.
"""

from collections.abc import Iterable, Mapping

from cream.data import layouts
from cream.errors import UserError, nearest
from cream.records import Conversation, Item, Pair, Prompt, Ratings, Record, Samples, Steps

ARMO = (  # the columns of RLHFlow's multi-objective data, in the order of ArmoRM's attributes
    *("helpsteer-helpfulness", "helpsteer-correctness", "helpsteer-coherence", "helpsteer-complexity"),
    *("helpsteer-verbosity", "ultrafeedback-overall_score", "ultrafeedback-instruction_following"),
    *("ultrafeedback-truthfulness", "ultrafeedback-honesty", "ultrafeedback-helpfulness", "beavertails-is_safe"),
    *("prometheus-score", "argilla-overall_quality", "argilla-judge_lm", "code-complexity", "code-style"),
    *("code-explanation", "code-instruction-following", "code-readability"),
)
NAMES = {
    "uuid": ("uuid", "id"),
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "prompt": ("prompt", "instruction+input", "instruction"),
    "response": ("response", "completion", "output"),
    "chosen": ("chosen", "selected"),
    "rejected": ("rejected",),
    "question": ("question", "question_stem"),
    "choices": ("choices", "options"),
    "answer": ("answer", "answerKey", "label"),
    "steps": ("steps", "completions"),
    "labels": ("labels",),
    # Only by --columns:
    "responses": (),
    "best": (),
    "score": (),
    "rank": (),
    "ranks": (),
    "ratings": ("+".join(ARMO),),
    "chosen_score": (),
    "rejected_score": (),
    "thought": (),
    "keep": (),
    "copy": (),
}
SCORES = ("chosen_score", "rejected_score")  # of a pair
CHOICES = tuple(("responses", by) for by in ("best", "score", "rank"))  # two or more responses in a row
ROWS = tuple((*form, by) for by in ("score", "rank") for form in (("messages",), ("prompt", "response")))  # one in each
FORMS = {  # the fields that a layout needs; the first that fits is taken
    Pair: (("chosen", "rejected"), ("chosen", "rejected", *SCORES), *CHOICES, *ROWS),
    Samples: (("responses", "ranks"),),
    Ratings: (("messages", "ratings"), ("prompt", "response", "ratings"), ("prompt", "responses", "ratings")),
    Steps: (("prompt", "steps", "labels"),),
    Item: (("question", "answer"),),
    Conversation: (("messages",), ("prompt", "response")),
    Prompt: (("messages",), ("prompt",)),
}
OPTIONAL = {  # other fields that it uses
    Pair: ("messages", "system", "history", "prompt"),
    Samples: ("messages", "system", "history", "prompt"),
    Ratings: ("system", "history"),
    Steps: ("system", "history"),
    Item: ("choices",),
    ("messages",): ("system",),
    ("prompt", "response"): ("system", "history", "thought"),
    ("prompt",): ("system", "history"),
}
ALWAYS = ("uuid", "keep", "copy")
COPIED = ("best", "score", "rank", "keep", "copy")  # columns that are read, and kept as keys of the record as well
JOINTS = {"question": " ", "uuid": "-"}  # between joined columns; else an empty line


def parse_columns(text: str) -> dict[str, str]:
    """The map in a flag's text, "prompt=instruction+input,response=output". Raises UserError for other texts."""
    columns = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, column = (word.strip() for word in part.partition("="))
        name = {"completion": "response"}.get(name, name)
        if not equals or not column or name not in NAMES or name in columns:
            raise UserError(
                f"--columns {part!r}: expected field=column or field=one+another, each field once"
                f"{nearest(name, NAMES)} Fields: {', '.join(NAMES)}"
            )
        columns[name] = column
    return columns


def without_header(columns: Mapping[str, str]) -> bool:
    """Whether a map names columns by number, #1 the first, as those of a .csv file without a header."""
    return any(part.startswith("#") for part in parts_of(columns))


def plan(given: Mapping[str, str], present: Iterable[str], where: str) -> tuple[type[Record], dict[str, str]]:
    """(layout, map of the fields that it uses) of the rows of a table with the columns `present`: their names, or its
    first row, whose values a message can show.

    `messages` may turn out to be a prompt's. Raises UserError if a given column does not exist or is not used, or the
    columns make no record.
    """
    names = _resolved(given, present, where)
    fits = [(kind, form) for kind, forms in FORMS.items() for form in forms if names.keys() >= {*form}]
    if not fits:
        usual = *FORMS[Pair][:1], *FORMS[Item], *FORMS[Conversation], *FORMS[Ratings][:1], *FORMS[Steps]
        needed = "; ".join(" and ".join(form) for form in usual)
        raise UserError(
            f"{where}: its columns make no record. Needed: {needed}; prompt; for pairs also responses and one of best, "
            "score, rank, for ranked responses also responses and ranks. "
            f"Name them with --columns field=column. It has: {layouts.describe(present)}"
            f"{layouts.advice(present)}"
        )
    kind, form = next((fit for fit in fits if not given.keys() - _used(*fit, names)), fits[0])
    used = _used(kind, form, names)
    if unused := given.keys() - used:
        raise UserError(f"{where}: {', '.join(sorted(unused))} of --columns is not used with {' and '.join(form)}")
    return kind, {name: column for name, column in names.items() if name in used}


def _used(kind: type[Record], form: tuple[str, ...], names: Mapping[str, str]) -> set[str]:
    """The fields of `names` that a layout uses."""
    used = {*ALWAYS, *form, *OPTIONAL[kind if kind in OPTIONAL else form]}
    return used - {"prompt", "history"} if "messages" in names else used  # which are kept as extra keys


def _resolved(given: Mapping[str, str], present: Iterable[str], where: str) -> dict[str, str]:
    """The given map, and the columns with usual names; a given `prompt` excludes `messages` that are not given."""
    columns = {*present}
    for name, column in given.items():
        for part in column.split("+"):
            if part.partition(".")[0] not in columns:
                known = layouts.describe(present)
                raise UserError(f"{where}: no column {part!r}, for {name}{nearest(part, columns)} It has: {known}")
    free = columns - {*parts_of(given)}
    common = {name: next((c for c in known if free.issuperset(c.split("+"))), None) for name, known in NAMES.items()}
    if "prompt" in given:
        del common["messages"]
    return {name: column for name, column in common.items() if column} | dict(given)


def fields_of(row: Mapping, names: Mapping[str, str]) -> dict[str, object]:
    """field -> value of a row by a map, without nulls, and without an empty system or history."""
    values = {name: _value(row, name, column) for name, column in names.items() if name != "copy"}
    return {name: v for name, v in values.items() if v is not None and (v or name not in ("system", "history"))}


def _value(row: Mapping, name: str, column: str) -> object:
    parts = [_at(row, part) for part in column.split("+")]
    if name == "ratings":
        return dict(zip(map(_attribute, column.split("+")), parts, strict=True))
    if len(parts) == 1:
        return parts[0]
    if name in ("choices", "responses", "score", "rank", "ranks"):
        return parts
    texts = [str(part) for part in parts if part not in (None, "")]
    return " ".join(text.strip() for text in texts) if name == "question" else JOINTS.get(name, "\n\n").join(texts)


def _attribute(path: str) -> str:
    """The name of the rating at a path: its last key, of `annotations.honesty.Rating` the one before."""
    keys = path.split(".")
    return keys[-2] if len(keys) > 1 and keys[-1].lower() == "rating" else keys[-1]


def _at(row: Mapping, path: str) -> object:
    """The value at a path; of a list the element with a number, or a key of each of its elements."""
    value: object = row
    for key in path.split("."):
        if isinstance(value, list) and key.removeprefix("-").isdecimal():
            if not -len(value) <= int(key) < len(value):
                raise ValueError(f"{path}: there is no element {key} of {len(value)}")
            value = value[int(key)]
        elif isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
            value = [each.get(key) for each in value]
        elif isinstance(value, Mapping):
            value = value.get(key)
        else:
            raise ValueError(f"{path}: there is no {key!r}")
    return value


def copied(present: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """The columns that no field is made from, which are kept as extra keys."""
    used = parts_of({name: column for name, column in names.items() if name not in COPIED})
    return [name for name in present if name not in used]


def parts_of(names: Mapping[str, str]) -> tuple[str, ...]:
    """The columns of the table that a map uses."""
    return tuple(part.partition(".")[0] for column in names.values() for part in column.split("+"))
