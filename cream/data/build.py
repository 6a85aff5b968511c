"""Tables of public data -> the files of localdata/, as the method has them: an SFT set, unlabelled prompts and their
subsets for the rounds, test sets; and the labelled train splits, from which few-shot examples are taken."""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from msgspec import structs

from cream.data import SOURCES, Found, Source, sources
from cream.data.overlap import CONTAMINATED, grams, sift
from cream.data.reading import Place, digest, find, rows
from cream.data.split import shuffled, subsets
from cream.errors import UserError
from cream.files.provenance import read_meta
from cream.files.store import SKIP
from cream.records import Conversation, Item, Message, Prompt, Record

log = logging.getLogger("cream")

LIMITED = "more than --task_limit of its task"


class Table(NamedTuple):
    """What one split of a source gave, and where that was read."""

    source: Source
    split: str
    place: Place
    found: Found
    digest: str  # of its rows


def gathered(names: Collection[str], folder: Path | None, *, skip: bool, **flags) -> dict[str, Table]:
    """The splits of some sources ("gsm8k.train" -> table), of the hub or of a folder, where those that it lacks are
    skipped; a line of the log for each. `flags`: each source takes its own.

    Raises UserError where there is none, one cannot be read, or, without `skip`, a row of it makes no record.
    """
    tables = {}
    for source in sources(names):
        for split, about in source.splits.items():
            place = Place(source.hub, source.subset, about.hub) if folder is None else find(folder, source, split)
            if place is None:
                log.info("%s, %s: not in %s, skipped", source.name, split, folder)
                continue
            table = read(source, split, place, **{name: flags[name] for name in source.flags})
            if (bad := table.found.rejected) and not skip:
                more = f"; {len(bad) - 1} more bad rows" if len(bad) > 1 else ""
                raise UserError(f"{place}, {bad[0]['where']} ({bad[0]['uuid']}): {bad[0]['reason']}{more}. {SKIP}")
            log.info(
                "%s, %s: %d rows of %s (%d are published)", source.name, split, table.found.rows, place, about.rows
            )
            tables[_name(table)] = table
    if not tables:
        raise UserError(f"--from {folder}: none of {', '.join(names)} is there; docs/data.md says how it is known")
    return tables


def read(source: Source, split: str, place: Place, **flags) -> Table:
    """One split of a source; `flags`: those of `source.flags`. Raises UserError where it cannot be read."""
    found = rows(place, source.columns)
    prefix = f"{source.name}-{source.splits[split].hub}"
    return Table(source, split, place, source.read(found, prefix, **flags), digest(found))


@dataclass
class File:
    """One file of localdata/: its name there, its records, which tables they were made of ("gsm8k.train"), and the
    settings that decided them. `tasks`: per task, what was read, kept and skipped."""

    name: str
    records: list[Record]
    inputs: tuple[str, ...]
    settings: dict = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    rejected: list[dict] = field(default_factory=list)
    tasks: dict[str, dict[str, int]] = field(default_factory=dict)


def localdata(
    tables: Mapping[str, Table], *, count: int, seed: int, multi_turn: bool, task_limit: int | None
) -> list[File]:
    """The files, in a fixed order, of the tables that are there ("gsm8k.train" -> table).

    Prompts and conversations that share words with a test question of these tables, or are (nearly) equal to an earlier
    one, are skipped; labelled train items only where they share words with a test question. `count` subsets; of each
    task at most `task_limit` prompts. Raises UserError where a uuid is in two tables.
    """
    made = [table for table in tables.values() if table.found.items or table.found.prompts]
    tests = [table for table in made if table.split == "test"]
    trains = [table for table in made if table.split != "test"]
    _check_unique(tests, "test")
    _check_unique(trains, "train")
    known = set().union(*(grams(item.question) for table in tests for item in table.found.items))
    tested = tuple(map(_name, tests))
    reasons = _reasons(trains, known)
    files = [_conversations(table, known, tested, multi_turn) for table in trains if table.found.conversations]
    files += _prompts(trains, reasons, tested, {"seed": seed, "task_limit": task_limit}, count)
    files += [_items(table, reasons, tested) for table in trains if table.found.items]
    files += [_items(table, {}, ()) for table in tests]
    if tests:
        names = [table.source.name for table in tests]
        items = [structs.replace(i, task=table.source.name, extra={}) for table in tests for i in table.found.items]
        files.append(File("all_test.json", items, tested, {"tasks": ", ".join(names)}))
    return files


def check_subsets(folder: Path, files: Iterable[File], count: int) -> None:
    """Raises UserError where a folder has a subset beyond the `count` that are to be written there."""
    stale = folder / f"prompt.{count + 1}.json"
    if stale.exists() and any(file.name == "prompt.json" for file in files):
        raise UserError(
            f"{stale}: is of another split, and would overlap with {count} subsets; remove it, or give another "
            "--output_dir"
        )


def lost(path: Path, inputs: Iterable[str]) -> list[str]:
    """The sources of the file at a path, written by an earlier command, that none of the `inputs` is of."""
    with suppress(UserError):  # a damaged sidecar: nobody can tell
        meta = read_meta(path) or {"inputs": {}}
        held, own = ({name.partition(".")[0] for name in names} for names in (meta["inputs"], inputs))
        return [name for name in SOURCES if name in held - own]
    return []


def _name(table: Table) -> str:
    return f"{table.source.name}.{table.split}"


def _check_unique(tables: Iterable[Table], what: str) -> None:
    seen: dict[str, Table] = {}
    for table in tables:
        for record in table.found.items or table.found.prompts:
            if record.uuid in seen:
                other = seen[record.uuid].place
                raise UserError(
                    f"{table.place}: uuid {record.uuid!r} is repeated there, or in {other}; in all {what} data "
                    "together uuids must be unique"
                )
            seen[record.uuid] = table


def _text(messages: Iterable[Message]) -> str:
    """What users say in a conversation: the part that could be a test question's."""
    return "\n".join(message.content for message in messages if message.role == "user")


def _asked(table: Table) -> list[Prompt]:
    """The unlabelled prompts of a table: its questions, as they are asked in a test."""
    items = table.found.items
    return table.found.prompts or [Prompt(uuid=i.uuid, messages=[Message("user", i.question)]) for i in items]


def _reasons(trains: Iterable[Table], known: set[int]) -> dict[str, str]:
    """uuid -> why that prompt is skipped, over all tables in their order."""
    prompts = [prompt for table in trains for prompt in _asked(table)]
    told = sift((_text(prompt.messages) for prompt in prompts), known)
    return {prompt.uuid: reason for prompt, reason in zip(prompts, told, strict=True) if reason}


def _kept(records: Iterable[Record], reason: Callable[[str], str | None]) -> tuple[list, Counter[str]]:
    """Records without a reason to leave them out, and counts of the others by reason."""
    kept, dropped = [], Counter()
    for record in records:
        if why := reason(record.uuid):
            dropped[why] += 1
        else:
            kept.append(record)
    return kept, dropped


def _conversations(table: Table, known: set[int], tested: tuple[str, ...], multi_turn: bool) -> File:
    found: list[Conversation] = table.found.conversations
    told = sift((_text(each.messages) for each in found), known)
    reasons = {each.uuid: reason for each, reason in zip(found, told, strict=True)}
    records, dropped = _kept(found, reasons.get)
    dropped += table.found.dropped + table.found.unanswered
    name = f"{table.source.name}.sft.json"
    return File(name, records, (_name(table), *tested), {"multi_turn": multi_turn}, dropped, table.found.rejected)


def _items(table: Table, reasons: Mapping[str, str], tested: tuple[str, ...]) -> File:
    """A task's test or train file; a train item goes only where it shares words with a test question. Of tests no
    solution is kept."""
    items: list[Item] = table.found.items
    if table.split == "test":
        items = [structs.replace(item, extra={}) for item in items]
    records, dropped = _kept(items, lambda uuid: CONTAMINATED if reasons.get(uuid) == CONTAMINATED else None)
    folder = table.source.name.replace("_", "-")
    settings = {"source": table.source.name, "split": table.split}
    return File(
        f"{folder}/{table.split}.json", records, (_name(table), *tested), settings, dropped, table.found.rejected
    )


def _prompts(
    trains: list[Table], reasons: Mapping[str, str], tested: tuple[str, ...], settings: dict, count: int
) -> list[File]:
    """prompt.json, and prompt.1.json to prompt.<count>.json."""
    inputs = (*map(_name, trains), *tested)
    whole = File("prompt.json", [], inputs, settings)
    tasks: dict[str, list[str]] = defaultdict(list)
    for table in trains:
        kept, dropped = _kept(_asked(table), reasons.get)
        dropped += table.found.dropped
        if settings["task_limit"] is not None and len(kept) > settings["task_limit"]:
            chosen = {*shuffled((prompt.uuid for prompt in kept), settings["seed"])[: settings["task_limit"]]}
            dropped[LIMITED] += len(kept) - len(chosen)
            kept = [prompt for prompt in kept if prompt.uuid in chosen]
        whole.records += kept
        whole.dropped += dropped
        tasks[table.source.name] += [prompt.uuid for prompt in kept]
        whole.tasks[table.source.name] = {"kept": len(kept), **dropped}
    if not whole.records:
        return []
    by_uuid = {prompt.uuid: prompt for prompt in whole.records}
    files = [whole]
    for number, uuids in enumerate(subsets(tasks, count, settings["seed"]), 1):
        held = {task: {"kept": len({*uuids} & {*those})} for task, those in tasks.items()}
        part = {**settings, "subset": f"{number} of {count}"}
        files.append(File(f"prompt.{number}.json", [by_uuid[u] for u in uuids], inputs, part, tasks=held))
    return files
