"""Two rankings of the same responses, matched record by record in memory that does not grow with their number."""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator

import msgspec
import xxhash

from cream.errors import UserError
from cream.files.index import Waiting
from cream.records import Rewards

MISSING, OTHER = "not in the previous ranking", "other responses in the previous ranking"  # why a record has no match


def matched(
    current: Iterable[Rewards],
    previous: Iterable[Rewards] | None,
    allow: Container[str],
    check: Callable[[], object],
    unmatched: Counter[str],
    name: str,
) -> Iterator[tuple[Rewards, list[float | None]]]:
    """Each current record, and the previous model's rewards of the same responses (None: the current ones again).

    Both are read in step. A record of `previous` that comes before its turn waits for it: none where both have one
    order. Those without a match for a reason in `allow` are skipped, and counted in `unmatched`. Raises UserError for
    another, by the `name` of `previous`; calls `check` where that may have a uuid twice, because not all of its
    records match.
    """
    if previous is None:
        yield from ((record, record.reward) for record in current)
        return
    current, previous, waiting = iter(current), iter(previous), Waiting()
    spare = 0  # records of `previous` without a match. If there are none, its uuids are those of `current`: each once
    for record in current:
        match = waiting.take(record.uuid)
        spare -= match is not None
        while match is None and (other := next(previous, None)):
            if other.uuid == record.uuid:
                match = _digest(other), other.reward
            else:
                waiting.add(other.uuid, [_digest(other), other.reward])
                spare += 1
        reason = MISSING if match is None else OTHER if match[0] != _digest(record) else None
        if reason is None:
            yield record, match[1]
        elif reason in allow:
            unmatched[reason] += 1
        else:
            _count_rest(current)  # a duplicate uuid would be the true reason, and is named by the end
            check()
            said = "is missing" if reason == MISSING else "has other responses"
            raise UserError(f"record {record.uuid!r} {said} in {name}; both must rank the same samples")
    spare += _count_rest(previous)  # further records are no mistake, malformed ones are
    if spare:
        check()


def _digest(record: Rewards) -> str:
    """Stands for the responses that a record ranks."""
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(record.response))


def _count_rest(records: Iterator[Rewards]) -> int:
    return sum(1 for _ in records)
