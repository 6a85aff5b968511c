"""Rewarded answers, ranked by the current and the previous model, into preference pairs with their consistency.

Prompts go through in blocks. What stays of them is a few sums.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

from cream.consistency import Description, Tally, consistency
from cream.errors import UserError
from cream.evaluation.tasks import grade
from cream.files.index import Waiting
from cream.pairs import PAIRS, admissible
from cream.pairs.extremes import Choice
from cream.ranking import Array, constant, padded, shared
from cream.records import Item, Pair, Rewards

BLOCK = 1024  # prompts at a time: enough to compute with as arrays, few enough to hold
MISSING, OTHER = "not in --file2", "other answers in --file2"  # why a record of --file1 has no match


class Block(NamedTuple):
    """P prompts, and both rankings of their answers: rewards (P, N), NaN for an answer that is in neither."""

    records: list[Rewards]
    first: Array  # by the current model
    second: Array  # by the previous model
    c: Array  # (P,), and the statistic behind it
    statistic: Array
    answers: dict[str, int]  # in all, and left out of the rankings by reason


@dataclass
class Lengths:
    """What rewards have to do with lengths in scored tokens, over the ranked answers to prompts that have a pair."""

    known: bool = True  # no record without them so far
    pairs: int = 0
    longer: float = 0.0  # tokens, chosen minus rejected, summed over pairs
    products: Array = field(default_factory=lambda: np.zeros(3))  # sums of xx, xy, yy: reward x and length y, centred

    def add(self, block: Block, choice: Choice) -> None:
        """Count in a block; rewards and lengths are centred per prompt."""
        self.known &= all(record.num_tokens is not None for record in block.records)
        rows = np.flatnonzero(choice.chosen >= 0)
        if not self.known or not len(rows):
            return
        rewards, lengths = shared(block.first, padded([record.num_tokens for record in block.records]))
        self.pairs += len(rows)
        self.longer += float((lengths[rows, choice.chosen[rows]] - lengths[rows, choice.rejected[rows]]).sum())
        x, y = (a[rows] - np.nanmean(a[rows], axis=1, keepdims=True) for a in (rewards, lengths))
        self.products += [np.nansum(x * x), np.nansum(x * y), np.nansum(y * y)]

    @property
    def longer_by(self) -> float | None:
        """Tokens by which chosen answers are longer than rejected ones on average; None where lengths are unknown."""
        return self.longer / self.pairs if self.known and self.pairs else None

    @property
    def bias(self) -> float | None:
        """Pearson's r of reward and length within prompts; None where lengths are unknown or do not vary."""
        xx, xy, yy = self.products
        return float(xy / np.sqrt(xx * yy)) if self.known and xx * yy > 0 else None


@dataclass
class PairSet:
    """Pairs in the order of the prompts, and what became of every answer and prompt.

    `pairs` makes them as it is gone through, once. All else tells of the prompts that it has been through, so of the
    whole when it has ended: `prompts`, how many; `c`, sums of theirs; `answers`, in all and left out of the rankings by
    reason; `dropped`, prompts without a pair by reason; `unmatched`, records of only one file, which are no prompts
    here; `without_c`, prompts whose previous ranking is constant.
    """

    pairs: Iterator[Pair] = iter(())
    prompts: int = 0
    c: Tally = field(default_factory=Tally)
    unmatched: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    without_c: int = 0
    lengths: Lengths = field(default_factory=Lengths)

    @property
    def consistency(self) -> Description:
        """Statistics of `c`."""
        return self.c.description

    @property
    def count(self) -> int:
        """Prompts with a pair."""
        return self.prompts - self.dropped.total()


def build(
    current: Iterable[Rewards],
    previous: Iterable[Rewards] | None,
    *,
    rank: str = "kendall",
    labels: Mapping[str, Item] | None = None,
    dealt: Array | None = None,
    keep_truncated: bool = False,
    summed: bool = True,
    allow: Container[str] = (),
    check: Callable[[], object] = lambda: None,
    size: int = BLOCK,
) -> PairSet:
    """Pairs drawn from `current`'s ranking, each with c from its agreement with `previous` (None: c = 1 everywhere).

    Answers without a reward in either, cut at the length limit, or repeating another, leave both rankings. `labels`
    (by uuid) chooses as the Oracle does; `dealt` (P,) stands in place of the prompts' own c's; `summed` says that
    `score` holds summed log-probabilities. Going through the pairs raises UserError (uuid) unless both hold the same
    answers, but for the reasons in `allow` (MISSING, OTHER), for which records are left out. Uuids of `current` are
    unique; where one of `previous` may stand there twice, because not all of its records match, `check` is called: it
    raises if so.
    """
    made = PairSet()
    blocks = _ranked(_matched(current, previous, allow, check, made.unmatched), rank, keep_truncated, size)
    made.pairs = _draw(made, blocks, labels, dealt, summed)
    return made


def consistencies(
    current: Iterable[Rewards],
    previous: Iterable[Rewards] | None,
    *,
    rank: str = "kendall",
    keep_truncated: bool = False,
    allow: Container[str] = (),
    check: Callable[[], object] = lambda: None,
    size: int = BLOCK,
) -> Array:
    """The prompts' own c's (P,), NaN where there is none, as `build` has them: a pass without pairs."""
    values = array("d")
    for block in _ranked(_matched(current, previous, allow, check, Counter()), rank, keep_truncated, size):
        values.extend(block.c)
    return np.asarray(values)


def _ranked(
    matched: Iterator[tuple[Rewards, list[float | None]]], rank: str, keep_truncated: bool, size: int
) -> Iterator[Block]:
    while both := list(islice(matched, size)):
        records, others = map(list, zip(*both, strict=True))
        rewards = padded([record.reward for record in records])
        cut = None if keep_truncated else _truncated(records, rewards.shape)
        usable = admissible(rewards, [record.answers() for record in records], cut)
        first, second = shared(usable, padded(others))
        answers = _count(records, rewards, usable, first, cut)
        yield Block(records, first, second, *consistency(first, second, rank), answers)


def _matched(
    current: Iterable[Rewards],
    previous: Iterable[Rewards] | None,
    allow: Container[str],
    check: Callable[[], object],
    unmatched: Counter[str],
) -> Iterator[tuple[Rewards, list[float | None]]]:
    """Each current record, and the previous model's rewards of the same answers (None: the current ones again).

    Both are gone through in step. A record of `previous` that comes before its turn waits for it: none where both have
    one order. Those that have no match for a reason in `allow` are left out, and counted in `unmatched`.
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
                match = _answers(other), other.reward
            else:
                waiting.add(other.uuid, [_answers(other), other.reward])
                spare += 1
        reason = MISSING if match is None else OTHER if match[0] != _answers(record) else None
        if reason is None:
            yield record, match[1]
        elif reason in allow:
            unmatched[reason] += 1
        else:
            _count_rest(current)  # a uuid that stands there twice would be the true reason, and is told by the end
            check()
            said = "is missing" if reason == MISSING else "has other answers"
            raise UserError(f"record {record.uuid!r} {said} in --file2; both files must rank the same samples")
    spare += _count_rest(previous)  # further records are no mistake, malformed ones are
    if spare:
        check()


def _answers(record: Rewards) -> str:
    """Stands for the answers that a record ranks."""
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(record.response))


def _count_rest(records: Iterator[Rewards]) -> int:
    return sum(1 for _ in records)


def _draw(
    made: PairSet, blocks: Iterable[Block], labels: Mapping[str, Item] | None, dealt: Array | None, summed: bool
) -> Iterator[Pair]:
    for block in blocks:
        c = block.c if dealt is None else dealt[made.prompts :][: len(block.c)]
        if labels is None:
            choice = PAIRS["extremes"](block.first)
        else:
            choice = PAIRS["oracle"](block.first, _correct(block.records, labels, block.first.shape))
        made.prompts += len(c)
        made.c.add(c)
        made.answers.update(block.answers)
        made.dropped.update(reason for reason in choice.reason if reason)
        made.without_c += int((constant(block.second) & ~constant(block.first)).sum())
        made.lengths.add(block, choice)
        for i in np.flatnonzero(choice.chosen >= 0):
            chosen, rejected = int(choice.chosen[i]), int(choice.rejected[i])
            yield _pair(block.records[i], chosen, rejected, c[i], block.statistic[i], summed)


def _truncated(records: list[Rewards], shape: tuple[int, int]) -> Array:
    cut = np.zeros(shape, dtype=bool)
    for i, record in enumerate(records):
        if record.finish_reason and "length" in record.finish_reason:
            cut[i, : len(record.finish_reason)] = [reason == "length" for reason in record.finish_reason]
    return cut


def _correct(records: list[Rewards], labels: Mapping[str, Item], shape: tuple[int, int]) -> Array:
    correct = np.zeros(shape, dtype=bool)
    for i, record in enumerate(records):
        if (item := labels.get(record.uuid)) is None:
            raise UserError(f"--labels: there is no item {record.uuid!r}; every prompt needs its label")
        for j, text in enumerate(record.answers()):
            correct[i, j] = grade(item.question, item.label, text)[1]
    return correct


def _count(records: list[Rewards], rewards: Array, usable: Array, ranked: Array, cut: Array | None) -> dict[str, int]:
    answers = sum(len(record.response) for record in records)
    rewarded = ~np.isnan(rewards)
    cut_count = 0 if cut is None else int((cut & rewarded).sum())
    left = int((~np.isnan(usable)).sum())
    repeated = int(rewarded.sum()) - cut_count - left
    return {
        "answers": answers,
        "without a reward": answers - int(rewarded.sum()),
        "cut at the length limit": cut_count,
        "repeat another": repeated,
        "without a reward by the previous model": left - int((~np.isnan(ranked)).sum()),
    }


def _pair(record: Rewards, chosen: int, rejected: int, c: float, statistic: float, summed: bool) -> Pair:
    cut = record.finish_reason or ["stop"] * len(record.response)
    return Pair(
        uuid=record.uuid,
        prompt=record.prompt,
        selected=record.response[chosen],
        rejected=record.response[rejected],
        consistency=None if np.isnan(c) else float(c),
        tau=None if np.isnan(statistic) else float(statistic),
        selected_index=chosen,
        rejected_index=rejected,
        margin=record.reward[chosen] - record.reward[rejected],
        selected_logp=record.score[chosen] if summed else None,
        rejected_logp=record.score[rejected] if summed else None,
        selected_truncated=cut[chosen] == "length",
        rejected_truncated=cut[rejected] == "length",
        extra=record.extra,
    )
