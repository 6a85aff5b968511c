"""Rows of any table -> records, through a column map (cream/data/columns.py)."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from cream.data import preferences
from cream.data.columns import COPIED, FORMS, fields_of, parts_of
from cream.data.messages import NONE, Keys, conversation, pair
from cream.data.questions import item
from cream.errors import UserError
from cream.evaluation.tasks import Question
from cream.files.store import SKIP, Bad
from cream.records import Conversation, Item, Pair, Prompt, Record, Samples, decode

WANTED = ("label", "labels", "kto_tag", "desirable", "accepted", "is_correct", "is_chosen")  # names of columns that say
# whether a response is wanted, if they hold yes or no
SCORED = ("score", "rating", "reward", "rank")  # and how good it is, if they hold a number
WORDS = {Pair: "dpo", Samples: "ranked", Item: "test", Conversation: "sft", Prompt: "prompt"}  # in the names of files
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


def _extra_of(row: Mapping, names: Mapping[str, str], fields: Mapping) -> dict:
    """The columns that a row's record does not use, without nulls, which it keeps as extra keys: `system` is one of
    them if the `messages` have their own."""
    messages = fields.get("messages")
    first = messages[0] if isinstance(messages, Sequence) and messages else None
    own = isinstance(first, Mapping) and "system" in (first.get("role"), first.get("from"))
    left = (*COPIED, "system") if own else COPIED
    used = parts_of({name: column for name, column in names.items() if name not in left})
    return {key: value for key, value in row.items() if value is not None and key not in used}


def uuid_of(fields: Mapping, otherwise: str) -> str:
    """The row's own uuid, or else this one."""
    return str(fields["uuid"]) if fields.get("uuid", "") != "" else otherwise


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
