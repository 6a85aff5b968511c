"""Files of the same prompts, matched record by record in memory that does not grow with their number."""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Generic, TypeVar

import msgspec
import xxhash

from cream.errors import UserError
from cream.files.index import Waiting
from cream.records import Record, Rewards

T = TypeVar("T")
MISSING, OTHER = "not in the previous ranking", "other responses in the previous ranking"  # why a record has no match


class Lookup(Generic[T]):
    """The records of a file by uuid, or what `keep` makes of each, of type `kind`.

    The file is read in step with the uuids that are asked for; a record that comes before its turn waits for it: none
    where both have one order and the same prompts.
    """

    def __init__(self, records: Iterable[Record], kind: type[T], keep: Callable[[Record], T] = lambda record: record):
        self._records, self._kind, self._keep, self._waiting = iter(records), kind, keep, Waiting()
        self._spare = 0  # records that wait

    def take(self, uuid: str) -> T | None:
        """What was kept of the record with this uuid, once; None if there is none."""
        if (kept := self._waiting.take(uuid)) is not None:
            self._spare -= 1
            return kept if isinstance(kept, self._kind) else msgspec.convert(kept, self._kind)
        for record in self._records:
            if record.uuid == uuid:
                return self._keep(record)
            self._waiting.add(record.uuid, self._keep(record))
            self._spare += 1
        return None

    def rest(self) -> int:
        """How many records nobody has asked for. Reads the rest of the file: malformed ones are mistakes even there."""
        self._spare += _count(self._records)
        return self._spare


def matched(
    current: Iterable[Rewards],
    previous: Iterable[Rewards] | None,
    allow: Container[str],
    check: Callable[[], object],
    unmatched: Counter[str],
    name: str,
) -> Iterator[tuple[Rewards, list[float | None]]]:
    """Each current record, and the previous model's rewards of the same responses (None: the current ones again).

    Those without a match for a reason in `allow` are skipped, and counted in `unmatched`. Raises UserError for
    another, by the `name` of `previous`; calls `check` where that may have a uuid twice, because not all of its
    records match.
    """
    if previous is None:
        yield from ((record, record.reward) for record in current)
        return
    current, lookup = iter(current), Lookup(previous, list, lambda other: [_digest(other), other.reward])
    for record in current:
        match = lookup.take(record.uuid)
        reason = MISSING if match is None else OTHER if match[0] != _digest(record) else None
        if reason is None:
            yield record, match[1]
        elif reason in allow:
            unmatched[reason] += 1
        else:
            _count(current)  # a duplicate uuid would be the true reason, and is named by the end
            check()
            said = "is missing" if reason == MISSING else "has other responses"
            raise UserError(f"record {record.uuid!r} {said} in {name}; both must rank the same samples")
    if lookup.rest():  # no mistake; but if there are none, the uuids are those of `current`: each once
        check()


def _digest(record: Rewards) -> str:
    """Stands for the responses that a record ranks."""
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(record.response))


def _count(records: Iterator[Record]) -> int:
    return sum(1 for _ in records)
