"""Questions with labels: rows of a task's split -> items. What the tasks differ in is their column map."""

from collections.abc import Iterable, Mapping
from functools import partial

from cream.data import Found, Source
from cream.data.table import fields_of, parts_of, record, uuid_of
from cream.errors import UserError
from cream.records import Item


def task(name: str, columns: Mapping[str, str], first: int | None = None, **about) -> Source:
    """A source of labelled questions, by its column map (table.py). `first`: the number of the first option."""
    read = partial(items, columns=columns, first=first)
    return Source(name=name, read=read, columns=parts_of(columns), **about)


def items(rows: Iterable[dict], prefix: str, *, columns: Mapping[str, str], first: int | None) -> Found:
    """The items of a split. A row without an id gets <prefix>-<its number>, from 0000 on."""
    found = Found()
    for index, row in enumerate(rows):
        found.rows += 1
        fields = fields_of(row, columns)
        uuid = uuid_of(fields, f"{prefix}-{index:04d}")
        try:
            found.items.append(record(Item, uuid, fields, {}, first))
        except (ValueError, UserError) as error:
            found.reject(index, uuid, str(error), row)
    return found
