"""The summary of a reward: accuracy, calibration, length bias, best-of-N, each with its 95 % interval."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import xxhash

from cream.errors import UserError
from cream.evaluation.bootstrap import Draws, Measure, mean_of, ratio
from cream.evaluation.rewards import best_of_n as bon
from cream.evaluation.rewards import calibration, correlation
from cream.evaluation.rewards.accuracy import ALL, TITLES, V2, Results
from cream.evaluation.rewards.rows import Row
from cream.evaluation.statistics import mcnemar
from cream.ranking import Array, padded, spearman

FEWEST = 20  # pairs that a temperature is fitted on
RANKED = 4  # responses of a prompt that has a rank correlation of its own
ALIKE = 0.1  # lengths that differ by less, of the longer one, are about equal


@dataclass(frozen=True)
class How:
    """Flags of the measures: ties strict or half right, beta of differences of rewards, weights of votes, seed."""

    ties: str = "strict"
    beta: float = 1.0
    votes: str = "softmax"
    seed: int = 0


def summarise(rows: Sequence[Row], benchmark: str | None, how: How) -> dict:
    """All measures; a score of a benchmark is called so only where it is of all its rows."""
    results = Results.of(rows, benchmark, how.ties, how.seed)
    found = _scores(results)
    lacking = Counter(reason for row in rows for reason in row.reasons)
    summary = {
        "benchmark": TITLES.get(benchmark),
        "complete": results.complete(),
        "rows": len(rows),
        "responses": sum(len(row.gold) for row in rows),
        "most_responses": max(len(row.gold) for row in rows),
        "unrewarded": {"responses": sum(r is None for row in rows for r in row.rewards), "reasons": dict(lacking)},
        "ties": "1/c" if benchmark == V2 else how.ties,
    }
    if "score" in found:
        summary["score" if results.complete() else "score_of_this_subset"] = found.pop("score")
    pairs = _pairs(rows, how.beta)
    summary |= found | {"calibration": calibrate(pairs, how), "length": lengths(rows, pairs, results, how)}
    if benchmark is None and any(len(row.gold) > 2 for row in rows):
        summary["best_of_n"] = best_of(rows, how)
    return summary


def _scores(results: Results) -> dict:
    """kind -> name -> estimate; subsets with their ties, sections with their weights."""
    found = {}
    for kind, measures in results.measures().items():
        if measures:
            found[kind] = {name: _plain(results.estimate(kind, name, of)) for name, of in measures.items()}
    for name, own in found["subsets"].items():
        some = [row for row, subset in zip(results.rows, results.subsets, strict=True) if subset == name]
        own["ties"] = sum(row.log_odds(i, j, 1) == 0 for row in some for i, j in row.pairs())
    for name, own in found.get("sections", {}).items():
        own |= results.section(name)
    return found


def _plain(estimate: tuple) -> dict:
    return estimate._asdict()


# Pairs ----------------------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """(n,) of the pairs that gold orders and of which both have a reward: log-odds of the better one, the lengths of
    both, the prompt."""

    d: Array
    better: Array
    worse: Array
    prompts: list[str]


def _pairs(rows: Sequence[Row], beta: float) -> Pairs:
    found = [
        (d, row.lengths[i], row.lengths[j], row.uuid)
        for row in rows
        for i, j in row.pairs()
        if (d := row.log_odds(i, j, beta)) is not None
    ]
    *numbers, prompts = zip(*found, strict=True) if found else ([], [], [], [])
    return Pairs(*(np.array(each, float) for each in numbers), list(prompts))


def calibrate(pairs: Pairs, how: How) -> dict:
    """Measures of all pairs; and of one half of the prompts before and after division by the temperature that fits the
    other half, which are assigned by a hash of seed and uuid."""
    found = {
        "pairs": len(pairs.d),
        "beta": how.beta,
        "all": _estimates(calibration.measures, pairs.d, pairs.prompts, how),
    }
    fit = np.array([xxhash.xxh3_64_intdigest(uuid.encode(), how.seed) % 2 == 0 for uuid in pairs.prompts], bool)
    if fit.sum() < FEWEST or (~fit).sum() < FEWEST:
        return found | {"temperature": None}
    temperature, prompts = (
        calibration.fit_temperature(pairs.d[fit]),
        [p for p, own in zip(pairs.prompts, fit, strict=True) if not own],
    )
    d = pairs.d[~fit]
    return found | {
        "temperature": temperature,
        "fitted_on": int(fit.sum()),
        "held_out_before": _estimates(calibration.measures, d, prompts, how),
        "held_out_after": _estimates(calibration.measures, d / temperature, prompts, how),
    }


def _estimates(measures, values: Array, prompts: Sequence[str], how: How) -> dict:
    draws = Draws(prompts, seed=how.seed)
    return {name: _plain(draws.estimate(of)) for name, of in measures(values).items()} if len(values) else {}


# Length ---------------------------------------------------------------------------------------------------------------


def lengths(rows: Sequence[Row], pairs: Pairs, results: Results, how: How) -> dict:
    """Correlations of reward and length over all responses, within prompts, and given gold; of pairs, that of both
    differences, accuracy by which is longer, and that of "the longer one is better"."""
    seen = [
        (row.rewards[i], row.lengths[i], row.gold[i], number)
        for number, row in enumerate(rows)
        for i in range(len(row.gold))
        if row.rewards[i] is not None
    ]
    found = {}
    if seen:
        *numbers, prompt = zip(*seen, strict=True)
        reward, length, gold = (np.array(each, float) for each in numbers)
        prompt = np.unique(prompt, return_inverse=True)[1]
        own = [correlation.centred(each, prompt) for each in (reward, length, gold)]
        draws = Draws(prompt, seed=how.seed)
        found = {
            "pearson": correlation.of(correlation.pearson, reward, length),
            "spearman": correlation.of(correlation.spearman, reward, length),
            "pearson_within_prompt": correlation.of(correlation.pearson, *own[:2]),
            "pearson_within_prompt_given_gold": correlation.of(correlation.partial, *own),
        }
        found = {name: _plain(draws.estimate(of)) for name, of in found.items()}
    ranks = spearman(padded(row.rewards for row in rows), padded(row.lengths for row in rows))
    ranks = ranks[[len(row.gold) >= RANKED for row in rows]]
    if len(ranks):
        found["spearman_within_prompt"] = _plain(Draws(range(len(ranks)), seed=how.seed).estimate(mean_of(ranks)))
    return found | {"mean": float(np.mean([n for row in rows for n in row.lengths]))} | _of_pairs(pairs, how)


def _of_pairs(pairs: Pairs, how: How) -> dict:
    if not len(pairs.d):
        return {}
    right, more = calibration.correct(pairs.d), pairs.better - pairs.worse
    if how.ties == "strict":
        right = np.floor(right)
    alike = np.abs(more) <= ALIKE * np.maximum(pairs.better, pairs.worse)
    groups = {"longer": (more > 0) & ~alike, "shorter": (more < 0) & ~alike, "about_equal": alike}
    measures: dict[str, Measure] = {"spearman_of_differences": correlation.of(correlation.spearman, pairs.d, more)}
    accuracy = {name: _part(right, of) for name, of in groups.items()}
    measures |= {f"accuracy_chosen_{name}": of for name, of in accuracy.items()}
    measures["accuracy_longer_minus_shorter"] = lambda w: accuracy["longer"](w) - accuracy["shorter"](w)
    measures["accuracy_of_longer_is_better"] = mean_of((1 + np.sign(more)) / 2)
    draws = Draws(pairs.prompts, seed=how.seed)
    found = {name: _plain(draws.estimate(of)) for name, of in measures.items()}
    for name, of in groups.items():
        found[f"accuracy_chosen_{name}"]["n"] = int(of.sum())
    return found


def _part(values: Array, of: np.ndarray) -> Measure:
    return lambda w: ratio(w @ (values * of), w @ of)


# Best-of-N ------------------------------------------------------------------------------------------------------------


def best_of(rows: Sequence[Row], how: How) -> dict:
    """Per N = 1, 2, 4 … up to the smallest number of a prompt's rewarded responses: means over prompts. Prompts with
    fewer than two of them are skipped."""
    usable = [known for row in rows if len((known := _rewarded(row)).gold) > 1]
    if not usable:
        return {}
    if how.votes == "reward" and (odd := next((row for row in usable if min(row.rewards) < 0), None)):
        raise UserError(
            f"--votes reward: record {odd.uuid!r} has a reward of {min(odd.rewards):.4g}, and a vote cannot weigh less "
            "than nothing; take softmax or sigmoid"
        )
    m, draws = min(len(row.gold) for row in usable), Draws([row.uuid for row in usable], seed=how.seed)
    voting = all(row.finals is not None for row in usable)
    weights = bon.WEIGHTS[how.votes]
    table = []
    for n in bon.sizes(m):
        values = {
            "best": [bon.expected_best(row.rewards, row.gold, n) for row in usable],
            "oracle": [bon.oracle(row.gold, n) for row in usable],
            "mean": [float(np.mean(row.gold)) for row in usable],
        }
        if voting:
            values["majority"] = [bon.vote(row.finals, row.gold, n, seed=how.seed) for row in usable]
            values[f"weighted_majority_{how.votes}"] = [
                bon.vote(row.finals, row.gold, n, weights, row.rewards, how.seed) for row in usable
            ]
        arrays = {name: np.array(own) for name, own in values.items()}
        row_of = {"n": n, "kl": bon.kl(n)} | {
            name: _plain(draws.estimate(mean_of(own))) for name, own in arrays.items()
        }
        row_of["gap_closed"] = _plain(draws.estimate(_gap(arrays["best"], arrays["mean"], arrays["oracle"])))
        drift = np.array([bon.expected_best(row.rewards, row.lengths, n) for row in usable])
        mean = np.array([np.mean(row.lengths) for row in usable])
        row_of["length_of_best"] = _plain(draws.estimate(lambda w, a=drift, b=mean: ratio(w @ a, w @ b)))
        table.append(row_of)
    return {"prompts": len(usable), "responses": m, "skipped": len(rows) - len(usable), "by_n": table}


def _rewarded(row: Row) -> Row:
    """The row with those of its responses that have a reward."""
    keep = [i for i, reward in enumerate(row.rewards) if reward is not None]
    if len(keep) == len(row.rewards):
        return row
    rewards, gold, lengths = ([values[i] for i in keep] for values in (row.rewards, row.gold, row.lengths))
    finals = row.finals and [row.finals[i] for i in keep]
    return replace(row, rewards=rewards, gold=gold, lengths=lengths, finals=finals)


def _gap(best: Array, mean: Array, oracle: Array) -> Measure:
    return lambda w: ratio(w @ (best - mean), w @ (oracle - mean))


# Two rewards of the same rows -----------------------------------------------------------------------------------------


def compare(a: Sequence[Row], b: Sequence[Row], benchmark: str | None, how: How) -> dict:
    """kind -> name -> B minus A, with the interval of paired draws, the rows that are right by one of both alone, and
    McNemar's p of these. `a` and `b` are of the same prompts, in one order."""
    both = [Results.of(rows, benchmark, how.ties, how.seed) for rows in (a, b)]
    all_right = [results.parts == results.wholes for results in both]
    found: dict[str, dict] = {}
    first, second = (results.measures() for results in both)
    for kind, measures in first.items():
        for name, of in measures.items():
            difference = both[0].draws.estimate(lambda w, x=of, y=second[kind][name]: y(w) - x(w))
            row = _plain(difference) | {"a": both[0].value(of), "b": both[1].value(second[kind][name])}
            if kind in ("subsets", ALL):
                some = both[0].subsets == name if kind == "subsets" else np.ones(len(a), bool)
                only_a, only_b = (int((x & ~y & some).sum()) for x, y in (all_right, all_right[::-1]))
                row |= {"n": int(some.sum()), "only_a": only_a, "only_b": only_b, "p": mcnemar(only_a, only_b)}
            found.setdefault(kind, {})[name] = row
    return found


def as_row(row: Row, part: float, whole: float, beta: float) -> dict:
    """A line of the per-row file: its result, null where gold orders no pair, and for a single pair the probability
    that the better one is better."""
    pairs = row.pairs()
    d = row.log_odds(*pairs[0], beta) if len(pairs) == 1 else None
    fields: Mapping[str, object] = {
        "uuid": row.uuid,
        "subset": row.subset,
        "rewards": row.rewards,
        "gold": row.gold,
        "lengths": row.lengths,
        "result": float(part / whole) if whole else None,
        "p": None if d is None else float(calibration.probability(np.array([d]))[0]),
    }
    finals = row.finals and {"finals": [None if each is None else str(each) for each in row.finals]}
    return {**fields, **(finals or {}), **({"reasons": row.reasons} if row.reasons else {})}
