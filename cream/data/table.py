"""Rows of any table -> records, through a column map (field -> column).

A column may be a path (`question.stem`; `answers.rank` of a list of objects is a list, `ranked.0` its first element),
and several may be joined: `context+question` with a space, `instruction+input` with an empty line, `answerA+answerB` as
a list of choices. Fields that are not in the map are taken from the columns with their usual names (NAMES). The fields
of a row decide its layout: a pair (chosen, rejected, or responses and which is better), an item (question, answer), a
conversation or a prompt.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from cream.data import layouts, preferences
from cream.data.messages import NONE, Keys, conversation, pair
from cream.data.questions import item
from cream.errors import UserError, nearest
from cream.evaluation.tasks import Question
from cream.files.store import SKIP, Bad
from cream.records import Conversation, Item, Pair, Prompt, Record, decode

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
    # Only by --columns:
    "responses": (),
    "best": (),
    "score": (),
    "rank": (),
    "thought": (),
    "keep": (),
    "copy": (),
}
CHOICES = tuple(("responses", by) for by in ("best", "score", "rank"))  # two or more responses in a row
ROWS = tuple((*form, by) for by in ("score", "rank") for form in (("messages",), ("prompt", "response")))  # one in each
FORMS = {  # the fields that a layout needs; the first that fits is taken
    Pair: (("chosen", "rejected"), *CHOICES, *ROWS),
    Item: (("question", "answer"),),
    Conversation: (("messages",), ("prompt", "response")),
    Prompt: (("messages",), ("prompt",)),
}
OPTIONAL = {  # other fields that it uses
    Pair: ("messages", "system", "history", "prompt"),
    Item: ("choices",),
    ("messages",): ("system",),
    ("prompt", "response"): ("system", "history", "thought"),
    ("prompt",): ("system", "history"),
}
ALWAYS = ("uuid", "keep", "copy")
COPIED = ("best", "score", "rank", "keep", "copy")  # columns that are read, and kept as keys of the record as well
JOINTS = {"question": " ", "uuid": "-"}  # between joined columns; else an empty line
WANTED = ("label", "labels", "kto_tag", "desirable", "accepted", "is_correct", "is_chosen")  # names of columns that say
# whether a response is wanted, if they hold yes or no
SCORED = ("score", "rating", "reward", "rank")  # and how good it is, if they hold a number
WORDS = {Pair: "dpo", Item: "test", Conversation: "sft", Prompt: "prompt"}  # in the names of files
SAME = "chosen and rejected are the same response"


class Skipped(NamedTuple):
    """A row without a record, which is not an error."""

    reason: str


@dataclass(frozen=True)
class Reading:
    """How rows are read: the number of the first option where answers are numbers, what becomes of keys of messages,
    the meaning of the values of `best` (1, 2, or 0 for a tie), and "math" where answers may be formulas."""

    first: int | None = None
    keys: Keys = NONE
    best: Mapping[str, int] = field(default_factory=dict)
    grader: str | None = None


USUAL = Reading()


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
        needed = "; ".join(" and ".join(form) for form in (*FORMS[Pair][:1], *FORMS[Item], *FORMS[Conversation]))
        raise UserError(
            f"{where}: its columns make no record. Needed: {needed}; prompt; or for pairs responses and one of best, "
            f"score, rank. Name them with --columns field=column. It has: {layouts.describe(present)}"
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
    if len(parts) == 1:
        return parts[0]
    if name in ("choices", "responses", "score", "rank"):
        return parts
    texts = [str(part) for part in parts if part not in (None, "")]
    return " ".join(text.strip() for text in texts) if name == "question" else JOINTS.get(name, "\n\n").join(texts)


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


def _extra_of(row: Mapping, names: Mapping[str, str], fields: Mapping) -> dict:
    """The columns that a row's record does not use, without nulls, which it keeps as extra keys: `system` is one of
    them if the `messages` have their own."""
    messages = fields.get("messages")
    first = messages[0] if isinstance(messages, Sequence) and messages else None
    own = isinstance(first, Mapping) and "system" in (first.get("role"), first.get("from"))
    left = (*COPIED, "system") if own else COPIED
    used = parts_of({name: column for name, column in names.items() if name not in left})
    return {key: value for key, value in row.items() if value is not None and key not in used}


def copied(present: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """The columns that no field is made from, which are kept as extra keys."""
    used = parts_of({name: column for name, column in names.items() if name not in COPIED})
    return [name for name in present if name not in used]


def uuid_of(fields: Mapping, otherwise: str) -> str:
    """The row's own uuid, or else this one."""
    return str(fields["uuid"]) if fields.get("uuid", "") != "" else otherwise


def parts_of(names: Mapping[str, str]) -> tuple[str, ...]:
    """The columns of the table that a map uses."""
    return tuple(part.partition(".")[0] for column in names.values() for part in column.split("+"))


class Draft(NamedTuple):
    """What a row (or the first of those with one prompt) makes: a record, why it is skipped, or an error."""

    index: int
    row: Mapping
    uuid: str | None
    result: Record | Skipped | Exception


def records(
    rows: Iterable[Mapping],
    kind: type[Record],
    names: Mapping[str, str],
    prefix: str,
    where: str,
    reading: Reading = USUAL,
) -> Iterator[Record | Skipped | Bad]:
    """The record of each row by `plan`, Skipped, or Bad; all have the layout of the first good one.

    A row without a uuid gets <prefix>-<its number>, from 000000 on. Rows with one scored response each make a pair per
    prompt, in the order of the prompts. Raises UserError where a column's meaning has to be given first.
    """
    seen: set[str] = set()
    if kind is Pair and "chosen" not in names and "responses" not in names:
        kind, drafts = Pair, _pair_up(_drafts(rows, Conversation, names, prefix, where, reading), names)
    else:
        drafts = _drafts(rows, kind, names, prefix, where, reading)
    for index, row, uuid, result in drafts:
        if isinstance(result, Skipped):
            yield result
            continue
        if isinstance(result, Record) and seen and type(result) is not kind:
            made = type(result).__name__
            result = ValueError(f"it is a {made} record, earlier ones are {kind.__name__} records")
        if isinstance(result, Record) and uuid in seen:
            result = ValueError(f"uuid {uuid!r} occurs twice")
        if isinstance(result, Exception):
            reason = str(result).removeprefix(f"row: record {uuid!r}: ")
            yield Bad(f"{where}, row {index}", uuid or f"row {index}", reason, msgspec.json.encode(row))
            continue
        kind = type(result)
        seen.add(uuid)
        yield result


def _drafts(
    rows: Iterable[Mapping], kind: type[Record], names: Mapping[str, str], prefix: str, where: str, reading: Reading
) -> Iterator[Draft]:
    for index, row in enumerate(rows):
        uuid = None
        try:
            fields = fields_of(row, names)
            uuid = uuid_of(fields, f"{prefix}-{index:06d}")
            result = _result(kind, uuid, fields, _extra_of(row, names, fields), names, reading)
        except (ValueError, UserError) as error:
            result = error
        if isinstance(result, Record) and result.extra:
            _check_meaning(result, row, names, f"{where}, row {index}")
        yield Draft(index, row, uuid, result)


def _result(
    kind: type[Record], uuid: str, fields: dict, extra: dict, names: Mapping[str, str], reading: Reading
) -> Record | Skipped:
    if "keep" in fields:
        if (kept := preferences.truth(fields["keep"])) is None:
            raise ValueError(f"keep is {fields['keep']!r:.40}, neither yes nor no")
        if not kept:
            return Skipped(f"{names['keep']} says no")
    if kind is Pair and "responses" in names:
        fields = preferences.choose(fields, reading.best)
        if fields is None:
            return Skipped(preferences.TIED)
    return record(kind, uuid, fields, extra, reading)


def _check_meaning(made: Record, row: Mapping, names: Mapping[str, str], where: str) -> None:
    """Raises UserError for a column that changes what a row means, and that the map does not mention."""
    unsaid = {name: row.get(name) for name in made.extra if name not in parts_of(names)}
    if unsaid.get("tools"):
        raise UserError(
            f"{where}: its column tools declares tools, which no prompt here can offer to the model; --columns "
            "copy=tools only keeps it as a key of the record"
        )
    numbers = () if "response" in names else (0, 1, "0", "1")  # besides whole conversations these may be classes
    plain = {name: value for name, value in unsaid.items() if isinstance(value, bool) or value not in numbers}
    said = [name for name in WANTED if name in plain and preferences.truth(plain[name]) is not None]
    if isinstance(made, Conversation) and said:
        name = said[0]
        raise UserError(
            f"{where}: {name} is {unsaid[name]!r}, which seems to say whether the response is wanted. Say what it is "
            f"with --columns: keep={name} trains on those with yes only, score={name} makes a pair of the responses to "
            f"one prompt, copy={name} only keeps it as a key"
        )
    if isinstance(made, Conversation) and (name := next((n for n in SCORED if _is_number(unsaid.get(n))), None)):
        raise UserError(
            f"{where}: {name} is {unsaid[name]!r}, which seems to say how good the response is. Say what it is with "
            f"--columns: {'rank' if name == 'rank' else 'score'}={name} makes a pair of the best and the worst "
            f"response to one prompt, copy={name} only keeps it as a key, and all responses are trained on"
        )


def _is_number(value: object) -> bool:
    with suppress(ValueError):
        return not isinstance(value, bool) and preferences.number("score", value) is not None
    return False


def _pair_up(drafts: Iterable[Draft], names: Mapping[str, str]) -> Iterator[Draft]:
    """A pair for each prompt, of the best and the worst of the conversations that begin with it."""
    groups: dict[bytes, list[tuple[float, Draft]]] = {}  # prompt -> the best one and the worst
    for draft in drafts:
        if not isinstance(draft.result, Record):
            yield draft
            continue
        try:
            if not isinstance(draft.result, Conversation):
                raise ValueError("it has no response")
            (score,) = preferences.scores(fields_of(draft.row, names))
        except ValueError as error:
            yield draft._replace(result=error)
            continue
        group = groups.setdefault(msgspec.json.encode(draft.result.messages[:-1]), [])
        if score is not None:
            best, worst = group or ((score, draft), (score, draft))
            group[:] = [max(best, (score, draft), key=_first), min(worst, (score, draft), key=_first)]
    for group in groups.values():
        (best, chosen), (worst, rejected) = group or ((0, None), (0, None))
        if best == worst:
            yield Draft(-1, {}, None, Skipped(preferences.TIED))
            continue
        made, other = chosen.result, rejected.result
        both = {"chosen": _plain(made.messages), "rejected": _plain(other.messages)}
        try:
            yield chosen._replace(result=record(Pair, chosen.uuid, both, _extra_of_both(made.extra, other.extra)))
        except (ValueError, UserError) as error:
            yield chosen._replace(result=error)


def _first(scored: tuple[float, Draft]) -> float:
    return scored[0]


def _plain(messages: object) -> list[dict]:
    return msgspec.to_builtins(messages)


def _extra_of_both(chosen: Mapping, rejected: Mapping) -> dict:
    """The extra keys of a pair: a value that both rows have, or the list of both."""
    names = dict.fromkeys([*chosen, *rejected])
    both = {name: [chosen.get(name), rejected.get(name)] for name in names}
    return {name: values[0] if values[0] == values[1] else values for name, values in both.items()}


def keep_good(
    results: Iterable[Record | Skipped | Bad], rejected: list[dict], dropped: Counter[str], skip: bool
) -> Iterator[Record]:
    """The records, without pairs of equal responses, which are counted in `dropped`, as skipped rows are. Bad rows are
    added to `rejected`, as journal.Output takes them; without `skip` the first one raises a UserError."""
    for each in results:
        if isinstance(each, Skipped):
            dropped[each.reason] += 1
        elif isinstance(each, Pair) and each.selected == each.rejected:
            dropped[SAME] += 1
        elif not isinstance(each, Bad):
            yield each
        elif skip:
            text = each.data.decode()
            rejected.append({"uuid": each.uuid, "where": each.where, "reason": each.reason, "record": text})
        else:
            raise UserError(f"{each.where}: {each.reason}. {SKIP}")


def record(kind: type[Record], uuid: str, fields: Mapping, extra: Mapping, reading: Reading = USUAL) -> Record:
    """One record of a layout; a conversation that ends with a user's turn is a prompt.

    Raises ValueError, or UserError that names the uuid, if the fields make no record.
    """
    forms = FORMS[kind][:1] if kind is Pair else FORMS[kind]
    if not any(fields.keys() >= {*form} for form in forms):
        raise ValueError(f"it lacks {' or '.join(' and '.join(form) for form in forms)}")
    if kind is Item:
        own = {"grader": None, **item(fields, reading.first, reading.grader)}
    elif kind is Pair:
        own = pair(fields, reading.keys)
        extra = {"consistency": None, **_numbers(extra, own)}
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
