"""Rewarded answers, ranked by the current and the previous model, into preference pairs with their consistency."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cream.consistency import Description, consistency, describe, shuffled
from cream.errors import UserError
from cream.evaluation.tasks import grade
from cream.pairs import PAIRS, admissible
from cream.ranking import Array, constant, padded, shared
from cream.records import Item, Pair, Rewards


@dataclass
class PairSet:
    """Pairs in the order of the prompts, and what became of every answer and prompt.

    `answers` counts answers: in all, without a reward, cut at the length limit, repeating another. `dropped` counts
    prompts without a pair by reason; `without_c` those whose previous ranking is constant (c is null). `length_bias` is
    the correlation of reward and length within prompts, `longer_by` the tokens by which chosen answers are longer than
    rejected ones on average; None where lengths are not known.
    """

    pairs: list[Pair]
    consistency: Description
    answers: dict[str, int]
    dropped: Counter[str] = field(default_factory=Counter)
    without_c: int = 0
    length_bias: float | None = None
    longer_by: float | None = None


def build(
    current: Sequence[Rewards],
    previous: Sequence[Rewards] | None,
    *,
    rank: str = "kendall",
    labels: Mapping[str, Item] | None = None,
    shuffle_seed: int | None = None,
    keep_truncated: bool = False,
    summed: bool = True,
) -> PairSet:
    """Pairs drawn from `current`'s ranking, each with c from its agreement with `previous` (None: c = 1 everywhere).

    Answers without a reward in either, cut at the length limit, or repeating another, leave both rankings. `labels`
    (by uuid) chooses as the Oracle does; `shuffle_seed` deals the c's out to other prompts; `summed` says that `score`
    holds summed log-probabilities. Raises UserError (uuid) unless both hold the same answers.
    """
    texts = [record.answers() for record in current]
    rewards = padded([record.reward for record in current])
    cut = _truncated(current, rewards.shape)
    usable = admissible(rewards, texts, None if keep_truncated else cut)
    if previous is None:
        first, second = usable, usable
    else:
        first, second = shared(usable, padded(_matching(current, previous)))
    agreement, statistic = consistency(first, second, rank)
    if previous is None:
        agreement = np.where(np.isnan(agreement), agreement, 1.0)
    if shuffle_seed is not None:
        agreement = shuffled(agreement, shuffle_seed)
    choice = (
        PAIRS["extremes"](first) if labels is None else PAIRS["oracle"](first, _correct(current, labels, first.shape))
    )
    kept = [i for i, reason in enumerate(choice.reason) if reason is None]
    length_bias, longer_by = _lengths(current, first, choice, kept)
    return PairSet(
        pairs=[
            _pair(current[i], int(choice.chosen[i]), int(choice.rejected[i]), agreement[i], statistic[i], summed)
            for i in kept
        ],
        consistency=describe(agreement),
        answers=_count(current, rewards, usable, first, None if keep_truncated else cut),
        dropped=Counter(reason for reason in choice.reason if reason),
        length_bias=length_bias,
        longer_by=longer_by,
        without_c=0 if previous is None else int((constant(second) & ~constant(first)).sum()),
    )


def _matching(current: Sequence[Rewards], previous: Sequence[Rewards]) -> Iterator[list[float | None]]:
    """The previous model's rewards in the order of `current`; both must be of the same answers, matched by uuid."""
    by_uuid = {record.uuid: record for record in previous}
    for record in current:
        match = by_uuid.get(record.uuid)
        if match is None:
            raise UserError(f"record {record.uuid!r} is missing in --file2; both files must rank the same samples")
        if match.response != record.response:
            raise UserError(
                f"record {record.uuid!r} has other answers in --file2; both files must rank the same samples"
            )
        yield match.reward


def _truncated(records: Sequence[Rewards], shape: tuple[int, int]) -> Array:
    cut = np.zeros(shape, dtype=bool)
    for i, record in enumerate(records):
        for j, reason in enumerate(record.finish_reason or ()):
            cut[i, j] = reason == "length"
    return cut


def _correct(records: Sequence[Rewards], labels: Mapping[str, Item], shape: tuple[int, int]) -> Array:
    correct = np.zeros(shape, dtype=bool)
    for i, record in enumerate(records):
        if (item := labels.get(record.uuid)) is None:
            raise UserError(f"--labels: there is no item {record.uuid!r}; every prompt needs its label")
        for j, text in enumerate(record.answers()):
            correct[i, j] = grade(item.question, item.label, text)[1]
    return correct


def _count(
    records: Sequence[Rewards], rewards: Array, usable: Array, ranked: Array, cut: Array | None
) -> dict[str, int]:
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


def _lengths(records: Sequence[Rewards], ranked: Array, choice, kept: list[int]) -> tuple[float | None, float | None]:
    """Pearson's r of reward and scored tokens, both centred per prompt; mean length of chosen minus rejected."""
    if not kept or any(record.num_tokens is None for record in records):
        return None, None
    lengths = np.where(np.isnan(ranked), np.nan, padded([record.num_tokens for record in records]))
    rows = np.array(kept)
    longer_by = float((lengths[rows, choice.chosen[rows]] - lengths[rows, choice.rejected[rows]]).mean())
    x, y = (a[rows] - np.nanmean(a[rows], axis=1, keepdims=True) for a in (ranked, lengths))
    spread = np.sqrt(np.nansum(x * x) * np.nansum(y * y))
    return (float(np.nansum(x * y) / spread) if spread else None), longer_by


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
