"""How good a judge is: what can be read of its verdicts, how they agree with each other, and with gold ranks or labels.

Of the measures against gold ranks, arXiv 2401.10020 (table 4) has all: pairwise accuracy, exact match, 5-best, Spearman
and Kendall. Means are over prompts, and so are the draws of their bootstrap intervals: responses to one prompt share
much, and pairs of them more.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from cream.errors import UserError
from cream.evaluation.bootstrap import ratio_interval
from cream.evaluation.grade import Rules
from cream.evaluation.tasks import grade_record
from cream.ranking import kendall, padded, spearman
from cream.records import Item, Record, Rewards

BINS = 10  # of a histogram of rewards that are not whole numbers
Number = float | None


@dataclass
class Judged:
    """What a file of rewards says, a row a prompt: `rewards` and `lengths` (characters) per response, `scores` the k
    judgements of a response, `first` the probabilities that i is better than j, presented in this order (N x N);
    `compared`: of each two different responses to a prompt, whether there is a choice between them in both orders."""

    uuids: list[str] = field(default_factory=list)
    rewards: list[list[Number]] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)
    scores: list[list[Number]] = field(default_factory=list)
    first: list[list[list[Number]]] = field(default_factory=list)
    compared: list[bool] = field(default_factory=list)
    responses: list[list[str]] = field(default_factory=list)


def collect(records: Iterable[Rewards], texts: bool = False) -> Judged:
    """The numbers in a file of rewards; `texts`: its responses, too."""
    found = Judged()
    for record in records:
        found.uuids.append(record.uuid)
        found.rewards.append(record.reward)
        own = record.responses()
        found.lengths.append(list(map(len, own)))
        found.scores += [scores for scores in record.parts.get("scores", ()) if isinstance(scores, list)]
        if record.preferences:
            table, different = record.preferences, sorted(map(own.index, {*own}))
            found.first.append(table)
            found.compared += [None not in (table[i][j], table[j][i]) for i, j in combinations(different, 2)]
        if texts:
            found.responses.append(own)
    return found


def gold_ranks(judged: Judged, records: Iterable[Record]) -> list[list[Number]]:
    """Per prompt the gold values of its responses, the higher the better; all None for a prompt without. Raises
    UserError where ranks are not numbers, or are of another number of responses, or no prompt has any."""
    ranks = {record.uuid: record.extra.get("ranks") for record in records}
    gold = []
    for uuid, rewards in zip(judged.uuids, judged.rewards, strict=True):
        row = ranks.get(uuid) or [None] * len(rewards)
        fine = isinstance(row, list) and all(each is None or type(each) in (int, float) for each in row)
        if not fine or len(row) != len(rewards):
            raise UserError(
                f"--ranks: record {uuid!r}: expected `ranks`, a list of {len(rewards)} numbers, got {row!r:.80}"
            )
        gold.append([None if each is None else -float(each) for each in row])
    if not any(uuid in ranks for uuid in judged.uuids):
        raise UserError("--ranks: none of its uuids is that of a prompt in the file of rewards")
    return gold


def gold_labels(judged: Judged, items: Mapping[str, Item]) -> list[list[Number]]:
    """1 for a correct response, 0 for a wrong one, None where no answer can be extracted, or the prompt has no label.
    Raises UserError where no prompt has one."""
    if not any(uuid in items for uuid in judged.uuids):
        raise UserError("--labels: none of its uuids is that of a prompt in the file of rewards")
    return [
        [_grade(items[uuid], text) if uuid in items else None for text in texts]
        for uuid, texts in zip(judged.uuids, judged.responses, strict=True)
    ]


def _grade(item: Item, text: str) -> Number:
    prediction, correct = grade_record(item, text, Rules())
    return None if prediction == "none" else float(correct)


# Measures -------------------------------------------------------------------------------------------------------------


def alpha(scores: Sequence[Sequence[Number]]) -> float | None:
    """Krippendorff's α, ordinal, of the k judgements of each response (Content Analysis, 2004, §11.3); None where fewer
    than two have a score, or all scores are equal: there is nothing to agree on."""
    import krippendorff

    table = padded(scores).T
    several = (~np.isnan(table)).sum(axis=0) > 1
    if len(np.unique(table[:, several][~np.isnan(table[:, several])])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=table, level_of_measurement="ordinal"))


def pair_counts(rewards: Sequence[Number], gold: Sequence[Number]) -> tuple[float, int, int]:
    """(right, judged, all) of the pairs of responses that gold orders: a tie of rewards is half right."""
    right, judged, pairs = 0.0, 0, 0
    for i, j in combinations(range(len(gold)), 2):
        if gold[i] is None or gold[j] is None or gold[i] == gold[j]:
            continue
        pairs += 1
        if rewards[i] is None or rewards[j] is None:
            continue
        judged += 1
        better = np.sign(rewards[i] - rewards[j]) * np.sign(gold[i] - gold[j])
        right += (1 + better) / 2
    return right, judged, pairs


def same_order(rewards: Sequence[Number], gold: Sequence[Number]) -> bool | None:
    """Whether the whole order is the same, ties included; None without two responses that gold orders. A response
    without a reward has no place in an order: else a judge of few verdicts would match the better."""
    both = [(r, g) for r, g in zip(rewards, gold, strict=True) if g is not None]
    if len(both) < 2:
        return None
    if any(r is None for r, _ in both):
        return False
    return all(np.sign(a[0] - b[0]) == np.sign(a[1] - b[1]) for a, b in combinations(both, 2))


def best_counts(rewards: Sequence[Number], gold: Sequence[Number], top: float) -> tuple[int, int]:
    """(how many of the responses with the highest reward, `top`, are their prompt's best by gold, all of them)."""
    best = max((g for g in gold if g is not None), default=None)
    found = [g == best for r, g in zip(rewards, gold, strict=True) if r == top and g is not None]
    return sum(found), len(found)


def against_gold(judged: Judged, gold: Sequence[Sequence[Number]], seed: int = 0) -> dict[str, tuple]:
    """name -> (value, low, high, number of pairs, prompts or responses that it is over)."""
    pairs = [pair_counts(*each) for each in zip(judged.rewards, gold, strict=True)]
    orders = [o for each in zip(judged.rewards, gold, strict=True) if (o := same_order(*each)) is not None]
    top = max((r for row in judged.rewards for r in row if r is not None), default=0.0)
    best = [best_counts(*each, top) for each in zip(judged.rewards, gold, strict=True)]
    found = {
        "pairwise accuracy": ([p[0] for p in pairs], [p[1] for p in pairs]),
        "exact match": (orders, [1] * len(orders)),
        f"best of those with the top reward, {top:g}": tuple(zip(*best, strict=True)),
    }
    for name, measure in (("Spearman", spearman), ("Kendall", kendall)):
        values = measure(padded(judged.rewards), padded(gold))
        values = values[~np.isnan(values)]
        found[name] = values, [1] * len(values)
    return {name: (*ratio_interval(*each, seed), int(sum(each[1]))) for name, each in found.items()}


def flips(first: Iterable[Sequence[Sequence[Number]]]) -> tuple[list[int], list[int], list[int], list[float]]:
    """Per prompt: pairs whose preferred response changes with the order, pairs with a preference in both orders, pairs
    asked in both; and the shares of choices for the response that came first."""
    changed, clear, asked, shares = [], [], [], []
    for table in first:
        counts = [0, 0, 0]
        for i, j in combinations(range(len(table)), 2):
            if table[i][j] is None or table[j][i] is None:
                continue
            shares += [table[i][j], table[j][i]]
            signs = np.sign(table[i][j] - 0.5), np.sign(0.5 - table[j][i])
            counts[2] += 1
            counts[1] += 0 not in signs
            counts[0] += signs[0] * signs[1] < 0
        for of, count in zip((changed, clear, asked), counts, strict=True):
            of.append(count)
    return changed, clear, asked, shares


def ties(rewards: Iterable[Sequence[Number]]) -> tuple[int, int, int, int]:
    """(pairs of responses with equal rewards, all pairs, prompts whose best reward is shared, prompts with two)."""
    equal = pairs = top = prompts = 0
    for row in rewards:
        counts = Counter(r for r in row if r is not None)
        n = counts.total()
        pairs += n * (n - 1) // 2
        equal += sum(c * (c - 1) // 2 for c in counts.values())
        if n > 1:
            prompts += 1
            top += counts[max(counts)] > 1
    return equal, pairs, top, prompts


# The report -----------------------------------------------------------------------------------------------------------


def describe(judged: Judged, gold: Sequence[Sequence[Number]] | None = None, seed: int = 0) -> list[str]:
    """Lines for the log."""
    rewards = [r for row in judged.rewards for r in row]
    known = [r for r in rewards if r is not None]
    lines = [f"{len(judged.rewards)} prompts; {len(known)} of {len(rewards)} responses have a reward"]
    if judged.scores:
        scores = [score for row in judged.scores for score in row]
        valid = [score for score in scores if score is not None]
        lines.append(f"parsed: {_share(len(valid), len(scores))} of the judgements have a valid score")
        lines.append(f"scores: {_histogram(valid)}")
        lines.append(_agreement(judged.scores))
    elif known:
        lines.append(f"rewards: {_histogram(known)}")
    if judged.compared:
        share = _share(sum(judged.compared), len(judged.compared))
        lines.append(f"parsed: {share} of the pairs of responses have a choice in both orders")
    equal, pairs, top, prompts = ties(judged.rewards)
    lines.append(
        f"ties: {_share(equal, pairs)} of the pairs of responses to one prompt; the best reward is shared in "
        f"{_share(top, prompts)} of the prompts"
    )
    values = spearman(padded(judged.rewards), padded(judged.lengths))
    values = values[~np.isnan(values)]
    length = ratio_interval(values, [1] * len(values), seed)
    lines.append(
        f"length: Spearman of reward and characters within a prompt {_interval(length)}, {len(values)} prompts"
    )
    if judged.first:
        changed, clear, asked, shares = flips(judged.first)
        rate = ratio_interval(changed, clear, seed)
        lines.append(
            f"order: the choice changes with the order in {_interval(rate)} of {sum(clear)} pairs (with a majority in "
            f"both orders, of {sum(asked)}); the first response is chosen in {np.mean(shares or [np.nan]):.3f}"
        )
    if gold is not None:
        right, seen, every = (sum(each) for each in zip(*map(pair_counts, judged.rewards, gold), strict=True))
        lines.append(f"against gold: {_share(seen, every)} of the pairs that it orders have two rewards")
        lines += [
            f"  {name}: {_interval(each[:3])} ({each[3]})" for name, each in against_gold(judged, gold, seed).items()
        ]
    return lines


def _agreement(scores: Sequence[Sequence[Number]]) -> str:
    try:
        value = alpha(scores)
    except ImportError:
        return "agreement: not computed, the package krippendorff is not installed (make setup installs it)"
    if value is None:
        return "agreement: none, there are no two judgements of a response, or all scores are equal"
    return (
        f"agreement: Krippendorff's alpha (ordinal) of the {max(map(len, scores))} judgements of a response {value:.3f}"
    )


def _histogram(values: Sequence[float]) -> str:
    """Counts of whole numbers, or of values in BINS intervals of equal width."""
    if not values:
        return "none"
    if all(value == int(value) for value in values) and len({*values}) <= 2 * BINS:
        return ", ".join(f"{value:g}: {count}" for value, count in sorted(Counter(values).items()))
    counts, edges = np.histogram(values, BINS)
    step = float(edges[1] - edges[0])
    digits = max(0, 1 - math.floor(math.log10(step))) if step > 0 else 3  # so that no two edges look alike
    return ", ".join(
        f"{a:.{digits}f} to {b:.{digits}f}: {n}" for a, b, n in zip(edges, edges[1:], counts, strict=False)
    )


def _share(part: float, whole: float) -> str:
    return f"{part:g} of {whole:g} ({100 * part / whole:.1f} %)" if whole else "0 of 0"


def _interval(value: tuple[float, float, float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*value)
