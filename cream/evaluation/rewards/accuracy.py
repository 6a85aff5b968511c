"""How often the better response has the higher reward: of subsets, of all, and a benchmark's scores.

A row's result is the share of its pairs that are right; in RewardBench 2 the rule of its domain. A response without a
reward makes its pairs wrong: a model that cannot read a response does not prefer it.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cream.errors import UserError, nearest
from cream.evaluation.bootstrap import Draws, Estimate, Measure, ratio
from cream.evaluation.rewards import rewardbench as v1
from cream.evaluation.rewards import rewardbench2 as v2
from cream.evaluation.rewards.rows import Row
from cream.evaluation.statistics import wilson_interval
from cream.ranking import Array

V1, V2 = "rewardbench", "rewardbench2"
TITLES = {V1: "RewardBench", V2: "RewardBench 2"}
BENCHMARKS = ("auto", V1, V2, "none")
ALL = "all"


def choose_benchmark(asked: str, rows: Sequence[Row]) -> str | None:
    """The benchmark that rows are of; auto: by the names of their subsets. Raises UserError where it has no such
    subset, or its rows are not as that benchmark's."""
    subsets = {row.subset: row for row in rows}
    if asked == "auto":
        if all(map(v2.domain_of, subsets)) and any(len(row.gold) > 2 for row in rows):
            asked = V2
        else:
            asked = V1 if subsets.keys() & {*v1.WEIGHTS, "anthropic_helpful", "anthropic_hhh"} else "none"
    if asked == "none":
        return None
    known = [*v2.DOMAINS] if asked == V2 else [*v1.WEIGHTS, *v1.PRIOR_SETS]
    if odd := [name for name in subsets if not (v2.domain_of(name) if asked == V2 else name in known)]:
        like = nearest(odd[0], known) or ";"
        raise UserError(
            f"record {subsets[odd[0]].uuid!r}: its subset {odd[0]!r} is not one of {TITLES[asked]}'s "
            f"({len(odd)} of {len(subsets)} subsets are not){like} --benchmark none measures a file with subsets of "
            "its own"
        )
    _check_rows(asked, rows)
    return asked


def _check_rows(benchmark: str, rows: Sequence[Row]) -> None:
    for row in rows:
        count = sum(value > 0 for value in row.gold)
        first = row.gold == sorted(row.gold, reverse=True)
        tied = benchmark == V2 and v2.domain_of(row.subset) == v2.TIES
        one = first and count == 1 and (len(row.gold) == 2 if benchmark == V1 else len(row.gold) > 1)
        if not (first and 0 < count < len(row.gold) if tied else one):
            what = "one chosen and one rejected" if benchmark == V1 else "the correct responses first, then wrong ones"
            raise UserError(f"record {row.uuid!r}: {TITLES[benchmark]} has {what} in a row, found gold {row.gold}")
        kind, _, number = row.id.partition(":")
        if tied and (kind not in ("ref", "tied") or not number):
            raise UserError(f"record {row.uuid!r}: ids of {v2.TIES} are ref:N and tied:N, found {row.id!r}")


def right(log_odds: float | None, ties: str) -> float:
    """1, 0, or for a tie what `ties` says: strict 0, half 1/2."""
    if log_odds is None:
        return 0.0
    return 0.5 if log_odds == 0 and ties == "half" else float(log_odds > 0)


@dataclass
class Results:
    """Per row the number of right pairs and of all pairs, of RewardBench 2 the result of the row and 1; and the draws
    of rows: a prompt of Ties is drawn with both its rows."""

    rows: Sequence[Row]
    benchmark: str | None
    parts: Array
    wholes: Array
    subsets: np.ndarray
    draws: Draws

    @classmethod
    def of(cls, rows: Sequence[Row], benchmark: str | None, ties: str = "strict", seed: int = 0) -> "Results":
        pairs = [row.pairs() for row in rows]
        if benchmark == V2:
            parts, wholes = [_result2(row) for row in rows], np.ones(len(rows))
        else:
            parts = [
                sum(right(row.log_odds(i, j, 1), ties) for i, j in own) for row, own in zip(rows, pairs, strict=True)
            ]
            wholes = np.array([len(own) for own in pairs], float)
        subsets = np.array([v2.domain_of(row.subset) if benchmark == V2 else row.subset for row in rows])
        prompts = [_tie_number(row) if name == v2.TIES and benchmark == V2 else row.uuid
                   for row, name in zip(rows, subsets, strict=True)]  # fmt: skip
        return cls(rows, benchmark, np.array(parts, float), wholes, subsets, Draws(prompts, subsets, seed))

    def names(self) -> list[str]:
        """The subsets, in the order of their first rows."""
        return list(dict.fromkeys(self.subsets.tolist()))

    def accuracy(self, of: np.ndarray) -> Measure:
        """The accuracy of the rows in a (n,) bool."""
        rows = np.flatnonzero(of)
        parts, wholes = self.parts[rows], self.wholes[rows]
        return lambda w: ratio((own := w[:, rows]) @ parts, own @ wholes)

    def measures(self) -> dict[str, dict[str, Measure]]:
        """kind -> name -> measure: subsets and, of a benchmark, its sections, prior sets, and score."""
        own = {name: self.accuracy(self.subsets == name) for name in self.names()}
        if self.benchmark == V2:
            return _measures2(own, self)
        found = {"subsets": own, ALL: {ALL: self.accuracy(np.ones(len(self.rows), bool))}}
        return found if self.benchmark is None else _measures1(own, self.counts())

    def counts(self) -> Counter[str]:
        """Rows per subset."""
        return Counter(self.subsets.tolist())

    def complete(self) -> bool:
        """Whether these are all rows of the benchmark, and so its score. The prior sets are a benchmark of their own,
        of which the sizes are not known here."""
        due = v2.DOMAINS if self.benchmark == V2 else v1.ROWS
        counts = self.counts()
        return self.benchmark is not None and {name: counts[name] for name in due} == due

    def value(self, measure: Measure) -> float | None:
        """A measure of all rows; None where it is not defined."""
        found = float(measure(np.ones((1, len(self.rows))))[0])
        return found if np.isfinite(found) else None

    def section(self, name: str) -> dict:
        """Rows of a section of RewardBench, and whether its weights are the official ones: subsets that it lacks."""
        counts, due = self.counts(), v1.SECTIONS[name]
        missing = [subset for subset in due if not counts[subset]]
        return {
            "n": sum(counts[subset] for subset in due),
            "of": sum(v1.ROWS[subset] for subset in due),
            "weights": "rows" if missing else "official",
            "missing": missing,
        }

    def estimate(self, kind: str, name: str, measure: Measure) -> Estimate:
        """Of a subset of single pairs, all right or wrong, Wilson's interval; else the bootstrap's."""
        of = self.subsets == name if kind == "subsets" else np.ones(len(self.rows), bool)
        parts, n = self.parts[of], int(self.wholes[of].sum())
        single = np.all(self.wholes[of] == 1) and np.all((parts == 0) | (parts == 1))
        if kind in ("subsets", ALL) and single and n and not (self.benchmark == V2 and name == v2.TIES):
            return Estimate(float(parts.sum() / n), *wilson_interval(int(parts.sum()), n), n)
        found = self.draws.estimate(measure)
        if kind == "length_groups" and name in v1.LENGTHS:
            n = sum(self.counts()[subset] for subset in v1.LENGTHS[name])
        return found._replace(n=n)


def _result2(row: Row) -> float:
    """A row of RewardBench 2: 1 / c, or of Ties whether all correct ones are above all wrong ones."""
    if v2.domain_of(row.subset) != v2.TIES:
        return v2.share_of_best(row.rewards)
    if None in row.rewards:
        return 0.0
    count = sum(value > 0 for value in row.gold)
    return float(min(row.rewards[:count]) > max(row.rewards[count:]))


def _tie_number(row: Row) -> str:
    return "ties:" + row.id.rpartition(":")[2]


def _measures1(own: Mapping[str, Measure], counts: Mapping[str, int]) -> dict[str, dict[str, Measure]]:
    sections = {}
    for section in v1.SECTIONS:
        if weights := v1.section_weights(section, counts):
            sections[section] = _combined(own, lambda found, weights=weights: v1.weighted(found, weights))
    groups = {
        group: _combined(own, lambda found, weights=weights: v1.weighted(found, weights))
        for group, names in v1.LENGTHS.items()
        if (weights := {name: counts[name] for name in names if counts[name]})
    }
    if {"chosen longer", "chosen shorter"} <= groups.keys():
        longer, shorter = groups["chosen longer"], groups["chosen shorter"]
        groups["longer - shorter"] = lambda w: longer(w) - shorter(w)
    prior = {"prior": _combined(own, v1.prior_mean)} if own.keys() >= {*v1.PRIOR} else {}
    found = {"subsets": dict(own), "sections": sections, "length_groups": groups, "prior": prior}
    if len(sections) == len(v1.SECTIONS):
        found["score"] = {"score": _combined(sections, v1.leaderboard)}
        if prior:
            found["score"]["score with prior sets"] = lambda w: v1.leaderboard(
                {name: measure(w) for name, measure in sections.items()}, prior["prior"](w)
            )
    return found


def _combined(measures: Mapping[str, Measure], combine: Callable[[dict[str, Array]], Array]) -> Measure:
    """The measure that combines those of several names, in each draw."""
    return lambda w: combine({name: measure(w) for name, measure in measures.items()})


def _measures2(own: dict[str, Measure], results: Results) -> dict[str, dict[str, Measure]]:
    ties = {row.id: i for i, row in enumerate(results.rows) if results.subsets[i] == v2.TIES}
    if ties:
        rows = [results.rows[i] for i in ties.values()]
        parts = v2.tie_parts({n: (r.rewards, sum(g > 0 for g in r.gold)) for n, r in zip(ties, rows, strict=True)})
        first = {}  # the row of each prompt that stands for it: both are drawn together
        for name, index in ties.items():
            first.setdefault(name.partition(":")[2], index)
        own = own | {v2.TIES: lambda w: v2.ties_score(parts, w[:, [*first.values()]])}
    found = {"subsets": own}
    if own.keys() == v2.DOMAINS.keys():
        found["score"] = {"score": _combined(own, lambda scores: sum(scores.values()) / len(scores))}
    return found
