"""Tables of public data -> the files of localdata/: an SFT set, unlabelled prompts and their subsets for the rounds,
test sets, and the labelled train splits, from which few-shot examples are taken."""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import xxhash
from msgspec import structs

from cream.data import SOURCES, Parsed, Source, sources
from cream.data.reading import Place, digest, find, rows
from cream.errors import UserError
from cream.files.provenance import read_meta
from cream.files.store import SKIP
from cream.records import Conversation, Item, Message, Prompt, Record, Samples
from cream.text.overlap import CONTAMINATED, grams, prompt_text, sift

log = logging.getLogger("cream")

LIMITED = "more than --task_limit of its task"
BEYOND = "more than --sft_limit"


class Table(NamedTuple):
    """One split of a source as read: its records, and the place and the hash of its rows."""

    source: Source
    split: str
    place: Place
    parsed: Parsed
    digest: str

    @property
    def name(self) -> str:
        """Such as gsm8k.train."""
        return f"{self.source.name}.{self.split}"

    def prompts(self) -> list[Prompt]:
        """Its unlabelled prompts; of a task, its questions as they are asked in a test."""
        items = self.parsed.items
        return self.parsed.prompts or [Prompt(uuid=i.uuid, messages=[Message("user", i.question)]) for i in items]


def read_tables(names: Collection[str], folder: Path | None, *, skip: bool, **flags) -> dict[str, Table]:
    """{"gsm8k.train": table, …} of some sources, from the hub, or from a folder, where missing splits are skipped.

    Each source takes its own of the `flags`. Raises UserError if there is none, one cannot be read, or, without
    `skip`, has a malformed row.
    """
    tables = {}
    for source in sources(names):
        for split, about in source.splits.items():
            place = Place(source.hub, source.subset, about.hub) if folder is None else find(folder, source, split)
            if place is None:
                log.info("%s, %s: not in %s, skipped", source.name, split, folder)
                continue
            table = read(source, split, place, **{name: flags[name] for name in source.flags})
            if (bad := table.parsed.rejected) and not skip:
                more = f"; {len(bad) - 1} more bad rows" if len(bad) > 1 else ""
                raise UserError(f"{place}, {bad[0]['where']} ({bad[0]['uuid']}): {bad[0]['reason']}{more}. {SKIP}")
            count = table.parsed.rows
            log.info("%s, %s: %d rows of %s (%d are published)", source.name, split, count, place, about.rows)
            tables[table.name] = table
    if not tables:
        raise UserError(
            f"--from {folder}: found none of {', '.join(names)}; docs/data.md says how files are recognised"
        )
    return tables


def read(source: Source, split: str, place: Place, **flags) -> Table:
    """One split of a source; `flags`: those of `source.flags`. Raises UserError if it cannot be read."""
    raw = rows(place, source.columns + (source.labels if flags.get("selection") == "quality" else ()))
    prefix = f"{source.name}-{source.splits[split].hub}"
    return Table(source, split, place, source.read(raw, prefix, **flags), digest(raw))


@dataclass
class File:
    """One file of localdata/: its name there, its records, the tables they come from ("gsm8k.train"), and the settings
    that decided them. `tasks`: counts per task."""

    name: str
    records: list[Record]
    inputs: tuple[str, ...]
    settings: dict = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    rejected: list[dict] = field(default_factory=list)
    tasks: dict[str, dict[str, int]] = field(default_factory=dict)


def build_files(
    tables: Mapping[str, Table],
    *,
    count: int,
    seed: int,
    task_limit: int | None,
    multi_turn: bool,
    selection: str = "rank",
    sft_limit: int | None = None,
) -> list[File]:
    """The files of the given tables ("gsm8k.train" -> table), in a fixed order.

    Prompts and conversations that share words with a test question of these tables, or are (nearly) equal to an earlier
    one, are skipped; labelled train items only if they share words with a test question. `count` subsets; at most
    `task_limit` prompts per task, and `sft_limit` conversations: drawn by the seed, with `selection` quality the best.
    Raises UserError where a uuid is in two tables.
    """
    full = [table for table in tables.values() if table.parsed.items or table.parsed.prompts]
    tests = [table for table in full if table.split == "test"]
    trains = [table for table in full if table.split != "test"]
    _check_unique(tests, "test")
    _check_unique(trains, "train")
    test_grams = set().union(*(grams(item.question) for table in tests for item in table.parsed.items))
    tested = tuple(table.name for table in tests)
    reasons = _sift([prompt for table in trains for prompt in table.prompts()], test_grams)
    how = {"multi_turn": multi_turn, "selection": selection, "sft_limit": sft_limit, "seed": seed}
    files = [_conversations(table, test_grams, tested, **how) for table in trains if table.parsed.conversations]
    files += [_ranked(table, test_grams, tested) for table in trains if table.parsed.ranked]
    files += _prompts(trains, reasons, tested, {"seed": seed, "task_limit": task_limit}, count)
    files += [_items(table, reasons, tested) for table in trains if table.parsed.items]
    files += [_items(table, {}, ()) for table in tests]
    if tests:
        names = [table.source.name for table in tests]
        items = [structs.replace(i, task=table.source.name, extra={}) for table in tests for i in table.parsed.items]
        files.append(File("all_test.json", items, tested, {"tasks": ", ".join(names)}))
    return files


def check_subsets(folder: Path, files: Iterable[File], count: int) -> None:
    """Raises UserError where a folder has a subset beyond the `count` that are to be written there."""
    stale = folder / f"prompt.{count + 1}.json"
    if stale.exists() and any(file.name == "prompt.json" for file in files):
        raise UserError(
            f"{stale}: is from a split into more subsets, and would overlap with the new {count}; remove it, or give "
            "another --output_dir"
        )


def lost_sources(path: Path, inputs: Iterable[str]) -> list[str]:
    """The sources of the file at a path, written by an earlier command, that are not among those of `inputs`."""
    with suppress(UserError):  # a damaged sidecar does not say
        meta = read_meta(path) or {"inputs": {}}
        held, own = ({name.partition(".")[0] for name in names} for names in (meta["inputs"], inputs))
        return [name for name in SOURCES if name in held - own]
    return []


def _check_unique(tables: Iterable[Table], what: str) -> None:
    seen: dict[str, Table] = {}
    for table in tables:
        for record in table.parsed.items or table.parsed.prompts:
            if record.uuid in seen:
                other = seen[record.uuid].place
                raise UserError(
                    f"{table.place}: uuid {record.uuid!r} occurs twice, here or in {other}; in all {what} data "
                    "together uuids must be unique"
                )
            seen[record.uuid] = table


def _sift(records: Collection[Prompt | Conversation | Samples], test_grams: set[int]) -> dict[str, str]:
    """uuid -> reason of the records that are to be skipped, judged by their user turns."""
    texts = map(prompt_text, records)
    reasons = zip(records, sift(texts, test_grams), strict=True)
    return {record.uuid: reason for record, reason in reasons if reason}


def _keep(records: Iterable[Record], reason: Callable[[str], str | None]) -> tuple[list, Counter[str]]:
    """Records without a reason to be skipped, and counts of the others by reason."""
    kept, dropped = [], Counter()
    for record in records:
        if why := reason(record.uuid):
            dropped[why] += 1
        else:
            kept.append(record)
    return kept, dropped


def _conversations(
    table: Table,
    test_grams: set[int],
    tested: tuple[str, ...],
    *,
    multi_turn: bool,
    selection: str,
    sft_limit: int | None,
    seed: int,
) -> File:
    parsed = table.parsed
    records, dropped = _keep(parsed.conversations, _sift(parsed.conversations, test_grams).get)
    dropped += parsed.dropped + parsed.unanswered
    name, settings = f"{table.source.name}.sft.json", {"multi_turn": multi_turn}
    settings |= {"selection": selection} if selection != "rank" else {}  # as of files that earlier versions wrote
    if sft_limit is not None:
        settings |= {"sft_limit": sft_limit} | ({"seed": seed} if selection == "rank" else {})
        uuids = [record.uuid for record in records]
        chosen = {*(shuffled(uuids, seed) if selection == "rank" else uuids)[:sft_limit]}
        dropped[BEYOND] += len(uuids) - len(chosen)
        records = [record for record in records if record.uuid in chosen]
    return File(name, records, (table.name, *tested), settings, +dropped, parsed.rejected)


def _ranked(table: Table, test_grams: set[int], tested: tuple[str, ...]) -> File:
    """Responses that people ranked, for `eft`: prompts may share words with each other, not with a test question."""
    reasons = _sift(table.parsed.ranked, test_grams)
    records, dropped = _keep(
        table.parsed.ranked, lambda uuid: CONTAMINATED if reasons.get(uuid) == CONTAMINATED else None
    )
    return File(f"{table.source.name}.ranked.json", records, (table.name, *tested), {"ranked": True}, dropped)


def _items(table: Table, reasons: Mapping[str, str], tested: tuple[str, ...]) -> File:
    """A task's test file, without solutions, or its train file, of which only contaminated items are skipped."""
    items: list[Item] = table.parsed.items
    if table.split == "test":
        items = [structs.replace(item, extra={}) for item in items]
    records, dropped = _keep(items, lambda uuid: CONTAMINATED if reasons.get(uuid) == CONTAMINATED else None)
    name = f"{table.source.name.replace('_', '-')}/{table.split}.json"
    settings = {"source": table.source.name, "split": table.split}
    return File(name, records, (table.name, *tested), settings, dropped, table.parsed.rejected)


def _prompts(
    trains: list[Table], reasons: Mapping[str, str], tested: tuple[str, ...], settings: dict, count: int
) -> list[File]:
    """prompt.json, and prompt.1.json to prompt.<count>.json."""
    inputs = (*(table.name for table in trains), *tested)
    whole = File("prompt.json", [], inputs, settings)
    tasks: dict[str, list[str]] = defaultdict(list)
    for table in trains:
        kept, dropped = _keep(table.prompts(), reasons.get)
        dropped += table.parsed.dropped
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


def shuffled(uuids: Iterable[str], seed: int) -> list[str]:
    """In the order of xxh3-64(uuid; seed): the same for any order that they come in, and in every process."""
    return sorted(uuids, key=lambda uuid: (xxhash.xxh3_64_intdigest(uuid.encode(), seed), uuid))


def subsets(tasks: Mapping[str, Iterable[str]], count: int, seed: int) -> list[list[str]]:
    """`count` disjoint lists that hold every uuid once, of uuids by task (unique over all tasks).

    A task's shuffled uuids are assigned to the subsets in turn, and the next task's from where that stopped: per task,
    and in all, sizes differ by at most one. Within a subset tasks are mixed, so that its beginning is a fair sample.
    """
    ordered = [uuid for task in sorted(tasks) for uuid in shuffled(tasks[task], seed)]
    return [shuffled(ordered[part::count], seed) for part in range(count)]
