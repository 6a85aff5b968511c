"""Public data sources. One file per kind, which declares its sources, and one line for each of them here.

A source says where the hub has it, how a local copy of a split is known by its name, how many rows its makers publish,
and under which licence; its `read` makes records of the rows of one split.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import NamedTuple

import msgspec

from cream.errors import UserError, nearest
from cream.records import Conversation, Item, Prompt

SOURCES = {
    "oasst1": "cream.data.oasst",
    "arc_easy": "cream.data.choices",
    "arc_challenge": "cream.data.choices",
    "openbookqa": "cream.data.choices",
    "siqa": "cream.data.choices",
    "gsm8k": "cream.data.gsm8k",
}


class Split(NamedTuple):
    """A split: its name on the hub, the number of rows that are published, and the words one of which a local file's
    name has (those that come first are looked for first; none: the hub's name)."""

    hub: str
    rows: int
    words: tuple[str, ...] = ()


@dataclass
class Found:
    """What the rows of one split gave: records, counts of what was skipped and why, and malformed rows."""

    rows: int = 0
    items: list[Item] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)  # why there is no prompt
    unanswered: Counter[str] = field(default_factory=Counter)  # why a prompt has no conversation
    rejected: list[dict] = field(default_factory=list)  # as journal.Output takes them

    def reject(self, index: int, uuid: str, reason: str, row: object) -> None:
        """Keep a row that makes no record, and why."""
        text = msgspec.json.encode(row).decode()
        self.rejected.append({"uuid": uuid, "where": f"row {index}", "reason": reason, "record": text})


@dataclass(frozen=True, kw_only=True)
class Source:
    """A public data set. `read(rows, prefix, …)` makes records of a split's rows, `prefix` begins the uuid of those
    that have none; it looks at `columns` only, and takes those flags of the build command that are named in `flags`."""

    name: str
    gives: str
    hub: str
    subset: str | None = None  # of the hub's data set: its configuration
    splits: dict[str, Split]  # by our name, train or test
    names: tuple[str, ...]  # how a local file may call it
    licence: str
    read: Callable[..., Found]
    columns: tuple[str, ...]
    flags: tuple[str, ...] = ()


def source(name: str) -> Source:
    """A source by its name. Raises UserError for an unknown one."""
    if name not in SOURCES:
        raise UserError(f"{name}: no such source{nearest(name, SOURCES)} Known: {', '.join(SOURCES)}")
    return next(each for each in import_module(SOURCES[name]).DECLARED if each.name == name)


def sources(names: Iterable[str]) -> list[Source]:
    """Those of some names, `all` being every one, in the order listed here, whatever the order asked for."""
    asked = {name.lower() for name in names}
    if "all" in asked:
        asked = asked - {"all"} | {*SOURCES}
    for name in asked - {*SOURCES}:
        source(name)  # raises
    return [source(name) for name in SOURCES if name in asked]
