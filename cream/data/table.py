"""Rows of any table -> records, through a column map (field -> column).

A column may be a path (`question.stem`), and several may be joined: `context+question` with a space,
`instruction+input` with an empty line, `answerA+answerB` as a list of choices. Fields that are not in the map are taken
from the columns with their usual names (NAMES). The fields of a row decide its layout: a pair (chosen, rejected), an
item (question, answer), a conversation or a prompt.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

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
}
FORMS = {  # the fields that a layout needs; the first that fits is taken
    Pair: (("chosen", "rejected"),),
    Item: (("question", "answer"),),
    Conversation: (("messages",), ("prompt", "response")),
    Prompt: (("messages",), ("prompt",)),
}
OPTIONAL = {  # other fields that it uses
    Pair: ("messages", "system", "history", "prompt"),
    Item: ("choices",),
    ("messages",): ("system",),
    ("prompt", "response"): ("system", "history"),
    ("prompt",): ("system", "history"),
}
WORDS = {Pair: "dpo", Item: "test", Conversation: "sft", Prompt: "prompt"}  # in the names of files
SAME = "chosen and rejected are the same response"
ROLES = {"human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant"}
ROLES |= {"assistant": "assistant", "model": "assistant", "bot": "assistant", "system": "system"}
# Messages in a cell of a .csv file.
WRITTEN = re.compile(r"""\s*\[\s*\{\s*["'](?:role|from|content|value)["']\s*:.*\}\s*\]\s*$""", re.DOTALL)


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


def plan(given: Mapping[str, str], present: Iterable[str], where: str) -> tuple[type[Record], dict[str, str]]:
    """(layout, map of the fields that it uses) of the rows of a table with the columns `present`.

    `messages` may turn out to be a prompt's. Raises UserError if a given column does not exist or is not used, or the
    columns make no record.
    """
    names = _resolved(given, {*present}, where)
    fits = [(kind, form) for kind, forms in FORMS.items() for form in forms if names.keys() >= {*form}]
    if not fits:
        needed = "; ".join(dict.fromkeys(" and ".join(form) for forms in FORMS.values() for form in forms))
        raise UserError(
            f"{where}: its columns make no record. Needed: {needed}. Name them with --columns field=column. An object "
            "of records by uuid is a file of this project already; validate says what it holds"
        )
    kind, form = fits[0]
    used = {"uuid", *form, *OPTIONAL[kind if kind in OPTIONAL else form]}
    if "messages" in names:
        used -= {"prompt", "history"}  # which are kept as extra keys
    if unused := given.keys() - used:
        raise UserError(f"{where}: {', '.join(sorted(unused))} of --columns is not used with {' and '.join(form)}")
    return kind, {name: column for name, column in names.items() if name in used}


def _resolved(given: Mapping[str, str], present: set[str], where: str) -> dict[str, str]:
    """The given map, and the columns with usual names; a given `prompt` excludes `messages` that are not given."""
    for name, column in given.items():
        for part in column.split("+"):
            if part.partition(".")[0] not in present:
                known = ", ".join(sorted(present)[:20])
                raise UserError(f"{where}: no column {part!r}, for {name}{nearest(part, present)} It has: {known}")
    free = present - {*parts_of(given)}
    common = {name: next((c for c in known if free.issuperset(c.split("+"))), None) for name, known in NAMES.items()}
    if "prompt" in given:
        del common["messages"]
    return {name: column for name, column in common.items() if column} | dict(given)


def fields_of(row: Mapping, names: Mapping[str, str]) -> dict[str, object]:
    """field -> value of a row by a map, without nulls, and without an empty system or history."""
    values = {name: _value(row, name, column) for name, column in names.items()}
    return {name: v for name, v in values.items() if v is not None and (v or name not in ("system", "history"))}


def _value(row: Mapping, name: str, column: str) -> object:
    parts = [_at(row, part) for part in column.split("+")]
    if len(parts) == 1:
        return parts[0]
    if name == "choices":
        return parts
    texts = [str(part) for part in parts if part not in (None, "")]
    return " ".join(text.strip() for text in texts) if name == "question" else "\n\n".join(texts)


def _at(row: Mapping, path: str) -> object:
    value: object = row
    for key in path.split("."):
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}: there is no {key!r}")
        value = value.get(key)
    return value


def _extra_of(row: Mapping, names: Mapping[str, str], fields: Mapping) -> dict:
    """The columns that a row's record does not use, without nulls, which it keeps as extra keys: `system` is one of
    them if the `messages` have their own."""
    messages = fields.get("messages")
    first = messages[0] if isinstance(messages, Sequence) and messages else None
    own = isinstance(first, Mapping) and "system" in (first.get("role"), first.get("from"))
    used = parts_of({name: column for name, column in names.items() if name != "system" or not own})
    return {key: value for key, value in row.items() if value is not None and key not in used}


def uuid_of(fields: Mapping, otherwise: str) -> str:
    """The row's own uuid, or else this one."""
    return str(fields["uuid"]) if fields.get("uuid", "") != "" else otherwise


def parts_of(names: Mapping[str, str]) -> tuple[str, ...]:
    """The columns of the table that a map uses."""
    return tuple(part.partition(".")[0] for column in names.values() for part in column.split("+"))


def records(
    rows: Iterable[Mapping],
    kind: type[Record],
    names: Mapping[str, str],
    prefix: str,
    first: int | None,
    where: str,
    grader: str | None = None,
) -> Iterator[Record | Bad]:
    """The record of each row by `plan`, or a Bad; all have the layout of the first good one.

    A row without a uuid gets <prefix>-<its number>, from 000000 on.
    """
    seen: set[str] = set()
    for index, row in enumerate(rows):
        uuid = None
        try:
            fields = fields_of(row, names)
            uuid = uuid_of(fields, f"{prefix}-{index:06d}")
            result = record(kind, uuid, fields, _extra_of(row, names, fields), first, grader)
            if seen and type(result) is not kind:
                raise ValueError(f"it is a {type(result).__name__} record, earlier ones are {kind.__name__} records")
            if uuid in seen:
                raise ValueError(f"uuid {uuid!r} occurs twice")
        except (ValueError, UserError) as error:
            yield Bad(f"{where}, row {index}", uuid or f"row {index}", str(error), msgspec.json.encode(row))
            continue
        kind = type(result)
        seen.add(uuid)
        yield result


def keep_good(
    results: Iterable[Record | Bad], rejected: list[dict], dropped: Counter[str], skip: bool
) -> Iterator[Record]:
    """The records, without pairs of equal responses, which are counted in `dropped`. Bad rows are added to `rejected`,
    as journal.Output takes them; without `skip` the first one raises a UserError."""
    for each in results:
        if isinstance(each, Pair) and each.selected == each.rejected:
            dropped[SAME] += 1
        elif not isinstance(each, Bad):
            yield each
        elif skip:
            text = each.data.decode()
            rejected.append({"uuid": each.uuid, "where": each.where, "reason": each.reason, "record": text})
        else:
            raise UserError(f"{each.where}: {each.reason}. {SKIP}")


# Conversations --------------------------------------------------------------------------------------------------------


def record(
    kind: type[Record], uuid: str, fields: Mapping, extra: Mapping, first: int | None = None, grader: str | None = None
) -> Record:
    """One record of a layout; a conversation that ends with a user's turn is a prompt. `first`: see `letter`; `grader`:
    see `item`.

    Raises ValueError, or UserError that names the uuid, if the fields make no record.
    """
    if not any(fields.keys() >= {*form} for form in FORMS[kind]):
        raise ValueError(f"it lacks {' or '.join(' and '.join(form) for form in FORMS[kind])}")
    if kind is Item:
        own = {"grader": None, **item(fields, first, grader)}
    elif kind is Pair:
        own = pair(fields)
        extra = {"consistency": None, **_numbers(extra, own)}
    else:
        own = {"messages": turns(fields)}
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


def turns(fields: Mapping) -> list[dict]:
    """The messages of a row: its `messages`, or its `system`, `history`, `prompt` and `response`."""
    system = [_message("system", fields["system"])] if "system" in fields else []
    if "messages" in fields:
        messages = _messages(fields["messages"], "user")
        return messages if messages[:1] and messages[0]["role"] == "system" else system + messages
    past = [_message(role, text) for turn in fields.get("history", []) for role, text in _both(turn)]
    prompt = _messages(fields.get("prompt", []), "user")
    return [*system, *past, *prompt, *_messages(fields.get("response", []), "assistant")]


def pair(fields: Mapping) -> dict:
    """`prompt`, `selected` and `rejected` of a row whose `chosen` and `rejected` are texts, messages or whole
    conversations."""
    prompt = turns({key: value for key, value in fields.items() if key != "response"})
    both = [_messages(fields[name], "assistant") for name in ("chosen", "rejected")]
    if prompt and prompt[-1]["role"] == "assistant":  # the whole chosen conversation, as UltraFeedback's messages
        if both[0][-1:] != prompt[-1:]:
            raise ValueError("its messages end with an assistant's turn that is not the chosen one")
        prompt = prompt[:-1]
    if not prompt:
        prompt = both[0][:-1]
    both = [each[len(prompt) :] if each[:-1] == prompt else each for each in both]
    if any(len(each) != 1 or each[0]["role"] != "assistant" for each in both):
        raise ValueError("chosen and rejected are not one assistant's turn each, after the same prompt")
    return {"prompt": prompt, "selected": [*prompt, *both[0]], "rejected": [*prompt, *both[1]]}


def _messages(value: object, role: str) -> list[dict]:
    """Messages in any form; a bare text is a turn of `role`. Raises ValueError for messages written as a text."""
    if isinstance(value, str):
        if WRITTEN.match(value):
            raise ValueError(
                f"messages are written as a text, {value!r:.60}; give them as a list, in .jsonl or .parquet"
            )
        return [_message(role, value)]
    values = [value] if isinstance(value, Mapping) else value
    if not isinstance(values, Sequence):
        raise ValueError(f"expected a text or messages, found {value!r:.60}")
    return [_turn(each) for each in values]


def _turn(value: object) -> dict:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a message with role and content, found {value!r:.60}")
    role = value.get("role") or value.get("from")
    text = value["content"] if value.get("content") is not None else value.get("value")
    if role not in ROLES:
        raise ValueError(f"role {role!r} is none of {', '.join(ROLES)}")
    return _message(ROLES[role], text)


def _message(role: str, text: object) -> dict:
    if not isinstance(text, str):
        raise ValueError(f"the {role}'s turn is not text: {text!r:.60}")
    return {"role": role, "content": text}


def _both(turn: object) -> zip:
    if not isinstance(turn, Sequence) or len(turn) != 2:
        raise ValueError(f"history: expected pairs of texts, found {turn!r:.60}")
    return zip(("user", "assistant"), turn, strict=True)
