"""Rows of any table -> records, through a column map (cream/data/columns.py)."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec
import xxhash

from cream.data import preferences, ratings
from cream.data.columns import COPIED, SCORES, fields_of, parts_of
from cream.data.making import NO_LABEL, USUAL, Reading, record
from cream.data.messages import Dropped
from cream.errors import UserError
from cream.files.store import SKIP, Bad
from cream.pairs.validity import SAME
from cream.records import Conversation, Item, Pair, Prompt, Ratings, Record, Samples, Steps, nouns

WANTED = ("label", "labels", "kto_tag", "desirable", "accepted", "is_correct", "is_chosen")  # names of columns that say
# whether a response is wanted, if they hold yes or no
SCORED = ("score", "rating", "reward", "rank")  # and how good it is, if they hold a number
WORDS = {  # in the names of files
    Pair: "dpo",
    Samples: "ranked",
    Ratings: "ratings",
    Steps: "steps",
    Item: "test",
    Conversation: "sft",
    Prompt: "prompt",
}
BEYOND = "beyond --max_pairs of its prompt"


class Skipped(NamedTuple):
    """A row without a record, which is not an error."""

    reason: str


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
        kind, drafts = Pair, _pair_up(_drafts(rows, Conversation, names, prefix, where, reading), names, reading)
    else:
        drafts = _drafts(rows, kind, names, prefix, where, reading)
    for index, row, uuid, result in drafts:
        if isinstance(result, Skipped):
            yield result
            continue
        if isinstance(result, Record) and seen and type(result) is not kind:
            result = ValueError(
                f"its layout is another ({nouns(type(result))}) than that of earlier ones ({nouns(kind)})"
            )
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
        at = f"{where}, row {index}"
        try:
            parts = [row] if reading.take_apart is None else [*reading.take_apart(row)]
            if not parts:
                yield Draft(index, row, None, Skipped(NO_LABEL))
        except (LookupError, TypeError, AttributeError) as error:
            yield Draft(index, row, None, ValueError(f"it has another form than the first row: {error!r:.60}"))
            continue
        except ValueError as error:
            yield Draft(index, row, None, error)
            continue
        for number, part in enumerate(parts):
            uuid = f"{prefix}-{index:06d}" + (f"-{number}" if len(parts) > 1 else "")
            try:
                fields = fields_of(part, names)
                uuid = uuid_of(fields, uuid)
                made = _results(kind, uuid, fields, _extra_of(part, names, fields), names, reading)
            except (ValueError, UserError) as error:
                made = [(uuid, error)]
            for own, result in made:
                if isinstance(result, Record) and result.extra:
                    _check_meaning(result, part, names, at)
                yield Draft(index, part, own, result)


def _results(
    kind: type[Record], uuid: str, fields: dict, extra: dict, names: Mapping[str, str], reading: Reading
) -> list[tuple[str, Record | Skipped | Exception]]:
    """What a row makes: the uuid and the record of each, or why it makes none."""
    if "keep" in fields:
        if (kept := preferences.truth(fields["keep"])) is None:
            raise ValueError(f"keep is {fields['keep']!r:.40}, neither yes nor no")
        if not kept:
            return [(uuid, Skipped(f"{names['keep']} says no"))]
    if "chosen_score" in names:
        extra = {name: preferences.number(name, fields[name]) for name in SCORES if name in fields} | extra
    if "responses" not in names or kind not in (Pair, Ratings):
        return [(uuid, _made(kind, uuid, fields, extra, reading))]
    parts = _rated(fields) if kind is Ratings else preferences.choose(fields, reading.best, reading.selection, uuid)
    if isinstance(parts, str):
        return [(uuid, Skipped(parts))]
    made = []
    for suffix, part in parts.items():
        more = {name: part[name] for name in SCORES if name in part}
        made.append((uuid + suffix, _made(kind, uuid + suffix, part, more | extra, reading)))
    return made


def _made(
    kind: type[Record], uuid: str, fields: Mapping, extra: Mapping, reading: Reading
) -> Record | Skipped | Exception:
    try:
        return record(kind, uuid, fields, extra, reading)
    except Dropped as why:
        return Skipped(str(why))
    except (ValueError, UserError) as error:
        return error


def _rated(fields: dict) -> dict[str, dict]:
    """suffix of its uuid -> fields of each of a row's `responses`, with its own ratings."""
    responses = fields.get("responses")
    if not isinstance(responses, list):
        raise ValueError(f"responses: expected a list, found {responses!r:.60}")
    rest = {name: value for name, value in fields.items() if name != "responses"}
    each = ratings.of_each(fields["ratings"], len(responses))
    return {f"-{i}": rest | {"response": responses[i], "ratings": own} for i, own in enumerate(each)}


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


def _pair_up(drafts: Iterable[Draft], names: Mapping[str, str], reading: Reading) -> Iterator[Draft]:
    """The pairs of each prompt, of the conversations that begin with it."""
    groups: dict[bytes, list[tuple[float, Draft]]] = {}
    for draft in drafts:
        if not isinstance(draft.result, Record):
            yield draft
            continue
        try:
            if not isinstance(draft.result, Conversation):
                raise ValueError("it has no response")
            (score,) = preferences.scores(fields_of(draft.row, names), 1)
        except ValueError as error:
            yield draft._replace(result=error)
            continue
        groups.setdefault(msgspec.json.encode(draft.result.messages[:-1]), []).append((score, draft))
    for group in groups.values():
        scores, members = zip(*group, strict=True)
        texts = [draft.result.messages[-1].content for draft in members]
        pairs = preferences.select(scores, texts, reading.selection, members[0].uuid)
        if isinstance(pairs, str):
            yield Draft(-1, {}, None, Skipped(pairs))
            continue
        for i, j in pairs:
            numbers = {"chosen_score": scores[i], "rejected_score": scores[j]} if "score" in names else {}
            own = members[i].uuid + (f"-{members[j].uuid}" if reading.selection.how == "all" else "")
            yield members[i]._replace(uuid=own, result=_joined(own, members[i], members[j], numbers, reading))


def _joined(uuid: str, chosen: Draft, rejected: Draft, extra: dict, reading: Reading) -> Record | Skipped | Exception:
    """The pair of two rows' conversations."""
    made, other = chosen.result, rejected.result
    both = {"chosen": _plain(made.messages), "rejected": _plain(other.messages)}
    return _made(Pair, uuid, both, extra | _extra_of_both(made.extra, other.extra), reading)


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


def capped(pairs: Iterable[Pair], selection: preferences.Selection, dropped: Counter[str]) -> list[Pair]:
    """The pairs without those of a prompt beyond `selection.max_pairs`, which are drawn by its seed; in their order."""
    whole = [*pairs]
    groups: dict[bytes, list[Pair]] = {}
    for each in whole:
        groups.setdefault(msgspec.json.encode(each.prompt), []).append(each)
    kept = set()
    for group in groups.values():
        drawn = sorted(group, key=lambda each: xxhash.xxh3_64_intdigest(each.uuid.encode(), selection.seed))
        kept |= {each.uuid for each in drawn[: selection.max_pairs]}
    if len(kept) < len(whole):
        dropped[BEYOND] += len(whole) - len(kept)
    return [each for each in whole if each.uuid in kept]
