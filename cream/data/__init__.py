"""Public data sources: one line each here, and a file per kind that declares them."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import NamedTuple

import msgspec

from cream.errors import UserError, nearest
from cream.records import Conversation, Item, Prompt, Samples

SOURCES = {
    "oasst1": "cream.data.oasst",
    "arc_easy": "cream.data.tasks",
    "arc_challenge": "cream.data.tasks",
    "openbookqa": "cream.data.tasks",
    "siqa": "cream.data.tasks",
    "gsm8k": "cream.data.tasks",
}


class Split(NamedTuple):
    """A split: its name on the hub, its number of published rows, and the words by which a local file is recognised, in
    the order in which they are tried (none: the name on the hub)."""

    hub: str
    rows: int
    words: tuple[str, ...] = ()


@dataclass
class Parsed:
    """The records of one split, counts of what was skipped and why, and malformed rows."""

    rows: int = 0
    items: list[Item] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    ranked: list[Samples] = field(default_factory=list)  # responses that people ranked: `ranks` in their extra
    dropped: Counter[str] = field(default_factory=Counter)  # why there is no prompt
    unanswered: Counter[str] = field(default_factory=Counter)  # why a prompt has no conversation
    rejected: list[dict] = field(default_factory=list)  # as journal.Output takes them

    def reject(self, index: int, uuid: str, reason: str, row: object) -> None:
        """Add a malformed row."""
        text = msgspec.json.encode(row).decode()
        self.rejected.append({"uuid": uuid, "where": f"row {index}", "reason": reason, "record": text})


@dataclass(frozen=True, kw_only=True)
class Source:
    """A public data set. `read(rows, prefix, …)` makes records of a split's rows, of which it needs only `columns`;
    `prefix` starts the uuid of rows without one, and `flags` names the flags of the build command that it takes.
    `labels`: further columns, which --selection quality needs."""

    name: str
    gives: str
    hub: str
    subset: str | None = None  # the configuration on the hub
    splits: dict[str, Split]  # train, test
    names: tuple[str, ...]  # by which a local file is recognised
    licence: str
    read: Callable[..., Parsed]
    columns: tuple[str, ...]
    flags: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


def source(name: str) -> Source:
    """A source by its name. Raises UserError for an unknown one."""
    if name not in SOURCES:
        raise UserError(f"{name}: no such source{nearest(name, SOURCES)} Known: {', '.join(SOURCES)}")
    return next(each for each in import_module(SOURCES[name]).DECLARED if each.name == name)


def sources(names: Iterable[str]) -> list[Source]:
    """The sources of these names, or `all`, in the order of SOURCES. Raises UserError for an unknown one."""
    asked = {name.lower() for name in names}
    if "all" in asked:
        asked = asked - {"all"} | {*SOURCES}
    return [source(name) for name in sorted(asked, key=[*SOURCES, *asked].index)]
