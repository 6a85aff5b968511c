"""What is measured: a prompt's responses with their rewards, their gold values and their lengths."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from itertools import permutations
from math import isfinite
from pathlib import Path
from typing import NoReturn

import numpy as np

from cream.errors import UserError
from cream.evaluation.grade import Rules, ballot
from cream.evaluation.tasks import grade_record, questions_in
from cream.files import store
from cream.preferences import comparisons
from cream.records import Item, Record, Rewards, Samples
from cream.scoring.logprobs import NOT_FINITE

Number = float | None
Finals = list[str | Decimal | None]  # equal answers are equal
Gold = tuple[list[float], Finals | None]
PAIRED = 16  # the first responses of a prompt, of which pairs are made
MOST_CERTAIN = 1e-9  # what a probability may be from 0 or 1: of an order that a model gives for certain, log-odds exist


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt's N responses. gold: the higher the better; lengths: in characters or tokens; finals: their answers, if
    they can be put to a vote; better: (N, N) probabilities that i is better than j, of a source that compares."""

    uuid: str
    subset: str
    id: str
    rewards: list[Number]
    gold: list[float]
    lengths: list[int]
    finals: Finals | None = None
    better: np.ndarray | None = None
    reasons: tuple[str, ...] = ()

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) responses, for all pairs of the first PAIRED that gold orders."""
        some = range(min(len(self.gold), PAIRED))
        return [(i, j) for i, j in permutations(some, 2) if self.gold[i] > self.gold[j]]

    def log_odds(self, i: int, j: int, beta: float) -> float | None:
        """log p / (1 - p) of i being better than j: beta times the difference of rewards, or by the model's own
        comparisons; None where one has no reward."""
        if self.rewards[i] is None or self.rewards[j] is None:
            return None
        if self.better is None or np.isnan(self.better[i, j]):
            return beta * (self.rewards[i] - self.rewards[j])
        p = np.clip(self.better[i, j], MOST_CERTAIN, 1 - MOST_CERTAIN)
        return float(np.log(p) - np.log1p(-p))


def unrewarded(sample: Samples) -> Row:
    """A prompt's responses before they have rewards. Raises UserError where they have no gold values."""
    values, finals = own_gold(sample) or _lacks_gold(sample)
    if len(values) != len(sample.responses):
        raise _other_count(sample, values, sample.responses)
    return _made(sample, [None] * len(values), values, [0] * len(values), finals)


def collect(
    records: Iterable[Rewards], data: Iterable[Samples] | None, gold: Callable[[Record], Gold | None], in_tokens: bool
) -> list[Row]:
    """The rows of a file of rewards. `data`: the responses that were to be rewarded, which have the gold values then;
    `gold`: a record's. Raises UserError where rewards are missing, of other responses, or not finite, or gold is
    missing."""
    due = None if data is None else {sample.uuid: sample for sample in data}
    rows = [
        _row(record, _match(record, due), gold, in_tokens) for record in records if due is None or record.uuid in due
    ]
    if due is not None and len(rows) < len(due):
        first = next(iter(due.keys() - {row.uuid for row in rows}))
        raise UserError(f"{len(due) - len(rows)} of {len(due)} prompts have no rewards, {first!r} is one; reward all")
    if not rows:
        raise UserError("the file of rewards holds no records")
    return rows


def _match(record: Rewards, due: Mapping[str, Samples] | None) -> Record:
    """The record with the gold values."""
    if due is None:
        return record
    sample = due[record.uuid]
    if sample.responses != record.responses() or sample.prompt != record.prompt:
        raise UserError(
            f"record {record.uuid!r}: the rewards are not of the {len(sample.responses)} responses in --data, in their "
            "order: a response is missing or was changed"
        )
    return sample


def _row(record: Rewards, source: Record, gold: Callable[[Record], Gold | None], in_tokens: bool) -> Row:
    texts = record.responses()
    values, finals = gold(source) or _lacks_gold(record)
    if len(values) != len(texts) or (finals and len(finals) != len(texts)):
        raise _other_count(record, values, texts)
    reasons = [reason for reason in record.reason or [] if reason]
    if NOT_FINITE in reasons:
        raise UserError(
            f"record {record.uuid!r}: a reward is {NOT_FINITE} (NaN or infinite): the reward model is broken, or its "
            "precision too low; no score is computed from such rewards"
        )
    lengths = record.num_tokens if in_tokens else [len(text) for text in texts]
    if lengths is None:
        raise UserError(f"--length tokens: record {record.uuid!r} has no num_tokens; take characters")
    better = None if record.preferences is None else comparisons(record.preferences)
    return _made(source, record.reward, values, lengths, finals, better, tuple(reasons))


def _made(source: Record, rewards: list, values: list, lengths: list, *more) -> Row:
    subset, number = source.extra.get("subset") or "all", source.extra.get("id", source.uuid)
    return Row(source.uuid, str(subset), str(number), rewards, values, lengths, *more)


def _lacks_gold(record: Record) -> NoReturn:
    raise UserError(
        f"record {record.uuid!r} has no gold values: none of the keys `gold` and `ranks` (docs/formats.md); give "
        "--gold FILE, or --data with the benchmark"
    )


def _other_count(record: Record, values: list, texts: list) -> UserError:
    return UserError(f"record {record.uuid!r}: {len(values)} gold values for {len(texts)} responses")


def own_gold(record: Record) -> Gold | None:
    """Gold values that a record has itself: `gold`, numbers, the highest is best, with `finals`; or `ranks`, the lowest
    is best. Raises UserError for anything but finite numbers in them."""
    for key, sign in (("gold", 1), ("ranks", -1)):
        values = record.extra.get(key)
        if values is None:
            continue
        if not isinstance(values, list) or not all(type(v) in (int, float, bool) and isfinite(v) for v in values):
            raise UserError(f"record {record.uuid!r}: expected `{key}`, a number for each response, got {values!r:.80}")
        finals = record.extra.get("finals")
        return [sign * float(value) for value in values], finals and [_ballot(each) for each in finals]
    return None


def _ballot(answer: object) -> str | Decimal | None:
    return None if answer in (None, "", "none") else ballot(str(answer))


def gold_file(path: Path, skip: bool) -> Callable[[Record], Gold | None]:
    """Gold values by uuid from a file of labelled questions (1 right, 0 wrong, with the answers that vote), or of
    records with `gold` or `ranks`."""
    if store.kind_in(path) is Item:
        items = {item.uuid: item for item in store.read(path, questions_in(path), skip=skip)}
        return partial(_by_label, items)
    others = {record.uuid: record for record in store.read(path, Record, skip=skip)}
    return lambda record: own_gold(others[record.uuid]) if record.uuid in others else None


def _by_label(items: Mapping[str, Item], record: Record) -> Gold | None:
    if record.uuid not in items:
        return None
    texts = record.responses if isinstance(record, Samples) else record.responses()
    graded = [grade_record(items[record.uuid], text, Rules()) for text in texts]
    return [float(correct) for _, correct in graded], [_ballot(prediction) for prediction, _ in graded]
