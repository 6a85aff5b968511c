"""Rewarded responses, matched with the previous model's ranking of them, into preference pairs with their consistency.

Prompts go through in blocks; only sums are kept of them.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isnan, nan
from types import ModuleType
from typing import NamedTuple

import numpy as np

from cream.consistency import consistency
from cream.errors import UserError
from cream.pairs import extremes
from cream.pairs.choice import Choice, PairUuids, pair_uuid
from cream.pairs.match import matched
from cream.pairs.report import PairSet
from cream.ranking import Array, constant, padded
from cream.records import Item, Pair, Rewards, ended_turn

BLOCK = 1024  # prompts at a time: enough to compute with as arrays, few enough to hold
FEWER_THAN_TWO = "fewer than two usable responses"
NO_MARGIN = "no reward difference of --margin"
NONE_CHOSEN = "the strategy chose none"


@dataclass(frozen=True)
class Rules:
    """How pairs are chosen: by a strategy (a module of cream.pairs) with its options; the rank statistic behind c; what
    may be a pair (`margin`: reward difference of at least this) and how many of a prompt (`most`)."""

    strategy: ModuleType = extremes
    options: object = None
    rank: str = "kendall"
    keep_truncated: bool = False
    margin: float | None = None
    most: int | None = None

    @property
    def ranked(self) -> bool:
        """Whether a pair has its prompt's c, not a confidence that the strategy states."""
        return "previous" in self.strategy.INPUTS

    @property
    def rewarded(self) -> bool:
        """Whether the strategy chooses by rewards; else it has `candidates`."""
        return hasattr(self.strategy, "choose")


CREAM = Rules()


class Ranked(NamedTuple):
    """P prompts with their usable responses (indices; in both rankings), and how far the rankings of these agree."""

    records: list[Rewards]
    usable: list[list[int]]
    c: Array  # (P,), and the statistic behind it
    statistic: Array
    without_c: int  # prompts whose previous ranking alone is constant


def build(
    current: Iterable[Rewards],
    previous: Iterable[Rewards] | None,
    rules: Rules = CREAM,
    *,
    labels: Mapping[str, Item] | None = None,
    reassigned: Array | None = None,
    summed: bool = True,
    allow: Container[str] = (),
    check: Callable[[], object] = lambda: None,
    name: str = "the previous ranking",
    size: int = BLOCK,
) -> PairSet:
    """Pairs of `current`'s responses; of a prompt those with the highest confidence first, then of the largest margin.

    `consistency` is the prompt's c, from the agreement with `previous` (None: c = 1 everywhere), or what the strategy
    states (`Rules.ranked`). A prompt's second pair has the uuid `<uuid>#2`, and so on. Responses without a reward in
    either ranking, truncated, or repeating another, are in neither. `labels` (by uuid) for a strategy that reads them;
    `reassigned` (P,) in place of the prompts' own c's; `summed`: `score` holds summed log-probabilities.

    Going through the pairs raises UserError (uuid) where a label is missing, a prompt has the uuid of another's further
    pair, or both do not hold the same responses; for the reasons in `allow` (MISSING, OTHER) such records are skipped.
    Uuids of `current` are unique; `check` is called where `previous` may have one twice: it raises if so. `name` is
    that of `previous` in messages.
    """
    pair_set = PairSet(own=not rules.ranked)
    if hasattr(rules.strategy, "facts"):
        pair_set.facts = lambda: rules.strategy.facts(rules.options, pair_set.count, pair_set.gold)
    blocks = _blocks(
        matched(current, previous, allow, check, pair_set.unmatched, name), rules, pair_set.responses, size
    )
    pair_set.pairs = _draw(pair_set, blocks, rules, labels, reassigned, summed)
    return pair_set


def consistencies(
    current: Iterable[Rewards],
    previous: Iterable[Rewards] | None,
    rules: Rules = CREAM,
    *,
    allow: Container[str] = (),
    check: Callable[[], object] = lambda: None,
    name: str = "the previous ranking",
    size: int = BLOCK,
) -> Array:
    """The prompts' own c's (P,), NaN where there is none, as `build` has them: a pass without pairs."""
    values = array("d")
    for block in _blocks(matched(current, previous, allow, check, Counter(), name), rules, Counter(), size):
        values.extend(block.c)
    return np.asarray(values)


def survey(
    current: Iterable[Rewards],
    previous: Iterable[Rewards] | None,
    rules: Rules = CREAM,
    *,
    allow: Container[str] = (),
    check: Callable[[], object] = lambda: None,
    name: str = "the previous ranking",
) -> None:
    """The strategy's look at all prompts with two or more usable responses, if it has one: a pass without pairs, before
    `build`."""
    if not hasattr(rules.strategy, "survey"):
        return
    both, counts = matched(current, previous, allow, check, Counter(), name), Counter()
    pool = ((record, usable(record, other, rules.keep_truncated, counts)) for record, other in both)
    rules.strategy.survey(((record, kept) for record, kept in pool if len(kept) > 1), rules.options)


def usable(record: Rewards, previous: Sequence[float | None], keep_truncated: bool, counts: Counter[str]) -> list[int]:
    """Indices of a record's responses that may enter a pair: rewarded by both models (`previous`: the other's rewards),
    complete, each text once, where it is first rewarded. `counts` gets all (""), and the others by reason."""
    ended = record.finish_reason or ["stop"] * len(record.response)
    kept, texts = [], set()
    for i, text in enumerate(record.responses()):
        if record.reward[i] is None:
            reason = "without a reward"
        elif ended[i] == "length" and not keep_truncated:
            reason = "truncated"
        elif text in texts:
            reason = "equal to an earlier one"
        else:
            texts.add(text)
            if previous[i] is not None:
                kept.append(i)
                continue
            reason = "without a reward by the previous model"
        counts[reason] += 1
    counts[""] += len(record.response)
    return kept


def _blocks(
    both: Iterator[tuple[Rewards, list[float | None]]], rules: Rules, counts: Counter[str], size: int
) -> Iterator[Ranked]:
    while some := list(islice(both, size)):
        records = [record for record, _ in some]
        kept = [usable(record, other, rules.keep_truncated, counts) for record, other in some]
        if not rules.ranked:
            yield Ranked(records, kept, *np.full((2, len(some)), nan), 0)
            continue
        first, second = (
            padded([rewards[i] for i in indices] for rewards, indices in zip(side, kept, strict=True))
            for side in ([record.reward for record in records], [other for _, other in some])
        )
        without = int((constant(second) & ~constant(first)).sum())
        yield Ranked(records, kept, *consistency(first, second, rules.rank), without)


def _draw(
    pair_set: PairSet,
    blocks: Iterable[Ranked],
    rules: Rules,
    labels: Mapping[str, Item] | None,
    reassigned: Array | None,
    summed: bool,
) -> Iterator[Pair]:
    uuids = PairUuids()
    for block in blocks:
        c = block.c if reassigned is None else reassigned[pair_set.prompts :][: len(block.c)]
        pair_set.prompts += len(c)
        pair_set.without_c += block.without_c
        chosen = []
        for record, pairs in zip(block.records, _choose(block, rules, labels), strict=True):
            if isinstance(pairs, str):
                pair_set.dropped[pairs] += 1
                pairs = []
            chosen.append(pairs)
            uuids.check(record.uuid, len(pairs))
        pair_set.lengths.add(block.records, block.usable, chosen)
        stated = [nan if pair.confidence is None else pair.confidence for pairs in chosen for pair in pairs]
        pair_set.c.add(c if rules.ranked else stated)
        for i, pairs in enumerate(chosen):
            for number, pair in enumerate(pairs, 1):
                pair_set.count += 1
                pair_set.gold.add(block.records[i], pair.chosen, pair.rejected)
                confidence = float(c[i]) if rules.ranked else pair.confidence
                yield _pair(block.records[i], number, pair, confidence, float(block.statistic[i]), summed)


def _choose(block: Ranked, rules: Rules, labels: Mapping[str, Item] | None) -> Iterator[list[Choice] | str]:
    """Per prompt its pairs, in the order in which they are written, or why it has none."""
    for record, usable in zip(block.records, block.usable, strict=True):
        if labels is not None and record.uuid not in labels:
            raise UserError(f"--labels: there is no item {record.uuid!r}; every prompt needs its label")
        if len(usable) < 2:
            yield FEWER_THAN_TWO
            continue
        pairs = rules.strategy.choose(record, usable, labels and labels[record.uuid], rules.options)
        yield pairs if isinstance(pairs, str) else _best(record.reward, pairs, rules)


def _best(reward: list[float], pairs: list[Choice], rules: Rules) -> list[Choice] | str:
    def margin(pair: Choice) -> float:
        return reward[pair.chosen] - reward[pair.rejected]

    if rules.ranked and any(pair.confidence is not None for pair in pairs):
        raise ValueError(f"{rules.strategy.__name__} reads `previous`, whose c is the confidence, and states its own")
    kept = [pair for pair in pairs if rules.margin is None or margin(pair) >= rules.margin]
    kept.sort(  # the rewards themselves tell equal differences, which may be rounded, apart
        key=lambda p: (-(p.confidence or 0), -margin(p), -reward[p.chosen], reward[p.rejected])
    )
    return kept[: rules.most] or (NO_MARGIN if pairs else NONE_CHOSEN)


def _pair(record: Rewards, number: int, pair: Choice, c: float | None, statistic: float, summed: bool) -> Pair:
    chosen, rejected, _ = pair
    ended = record.finish_reason or ["stop"] * len(record.response)
    logps = record.score if summed else None
    return Pair(
        uuid=pair_uuid(record.uuid, number),
        prompt=record.prompt,
        selected=record.response[chosen],
        rejected=record.response[rejected],
        consistency=None if c is None or isnan(c) else c,
        tau=None if isnan(statistic) else statistic,
        selected_index=chosen,
        rejected_index=rejected,
        margin=record.reward[chosen] - record.reward[rejected],
        selected_logp=logps and logps[chosen],
        rejected_logp=logps and logps[rejected],
        selected_truncated=not ended_turn(ended[chosen]),
        rejected_truncated=not ended_turn(ended[rejected]),
        source_prompt=record.source_prompt,
        extra=record.extra,
    )
