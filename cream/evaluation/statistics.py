"""How sure an accuracy, a mean over seeds, or a difference between two methods is; and the table that says so."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from math import comb, nan, sqrt
from statistics import NormalDist, fmean, stdev

from cream.records import Answer, encode

COUNTS = ("n", "correct", "unanswered", "truncated")
RATES = ("accuracy", "unanswered_rate", "truncated_rate", "mean_tokens")
THOUGHTS = ("mean_thought_tokens", "mean_final_tokens", "in_thought_rate")  # where a response has a thought


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of a proportion, both in [0, 1]: the score interval without continuity correction.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927). It stays
    inside [0, 1] and has width at 0 or n successes, where the normal interval has none. Raises ValueError unless
    0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} is not a proportion")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value of "A and B are right equally often", from the items that only one of them has right.

    Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12 (1947), without its normal approximation: under the null, `only_b` of the only_a + only_b
    discordant items is binomial with 1/2. Items that both have right, or both wrong, say nothing. 1 without any
    discordant item. The test is conservative: of true nulls it rejects at most the stated share.
    """
    from scipy.special import bdtr  # slow to import, and only comparisons need it

    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def bootstrap_difference(
    counts: Sequence[tuple[int, int, int]], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """(low, high) of the difference in accuracy, B - A, in [-1, 1], between two evaluations of the same items.

    counts: per task (items that only A has right, items that only B has right, all items). The difference is the
    unweighted mean over tasks of (only B - only A) / all; with one task, that task's. The percentile interval of B.
    Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979): items are drawn with
    replacement within their task, each with both its outcomes. How many of the drawn are only A's, only B's, or
    neither's is multinomial, so that is what is drawn: (resamples, 3) counts a task, whatever the number of items.
    With a handful of discordant items it is too narrow, and without any it has no width. Raises ValueError for no
    task, a task without items, or counts that cannot be.
    """
    import numpy as np

    if not counts or any(min(only_a, only_b) < 0 or not 0 < n >= only_a + only_b for only_a, only_b, n in counts):
        raise ValueError(f"(only A, only B, all) of at least one item are needed, got {list(counts)}")
    rng, means = np.random.default_rng(seed), np.zeros(resamples)
    for only_a, only_b, n in counts:
        drawn = rng.multinomial(n, np.array([only_a, only_b, n - only_a - only_b]) / n, size=resamples)
        means += (drawn[:, 1] - drawn[:, 0]) / n / len(counts)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def interval_of_mean(tasks: Sequence[Mapping], seed: int = 0) -> tuple[float, float] | tuple[None, None]:
    """(low, high) of the mean over tasks, by the rows of `summarise`: a bootstrap in which items are drawn within their
    task; (None, None) without a task, or with one that has no item."""
    counts = [(0, row["correct"], row["n"]) for row in tasks if row["task"] != "macro"]
    return bootstrap_difference(counts, seed=seed) if counts and all(n for *_, n in counts) else (None, None)


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1 below the sum; nan for one value). Raises ValueError for none."""
    if not values:
        raise ValueError("the mean of no values is not defined")
    return fmean(values), stdev(values) if len(values) > 1 else nan


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean of a - b, low, high) over paired runs, a[i] and b[i] from the same seed: Student's paired t interval.

    Student, "The probable error of a mean", Biometrika 6 (1908). Raises ValueError for fewer than two pairs, or lengths
    that differ.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"two paired lists of at least two runs are needed, got {len(a)} and {len(b)}")
    from scipy.stats import t  # half a second to import, and only studies over seeds need it

    mean, std = mean_std([x - y for x, y in zip(a, b, strict=True)])
    half = float(t.ppf((1 + confidence) / 2, len(a) - 1)) * std / sqrt(len(a))
    return mean, mean - half, mean + half


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that of `k` responses, drawn without replacement from `n` of which some are correct, one is correct.

    1 - C(n - correct, k) / C(n, k): M. Chen et al., arXiv 2107.03374, eq. 1; over n samples an unbiased estimate of the
    chance that one of k samples is right. Raises ValueError unless 0 <= correct <= n and 1 <= k <= n.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"{k} responses cannot be drawn from {n} of which {correct} are correct")
    return 1 - comb(n - correct, k) / comb(n, k)


def summarise(records: Iterable[Mapping]) -> list[dict]:
    """One row per task, in order of appearance, of graded records as docs/formats.md has them.

    `accuracy`, in [0, 1], with `low` and `high`, its 95 % Wilson interval: of the one response, or the vote of several.
    `unanswered`: items whose prediction is "none". `truncated`: responses that ended by length (an absent or null
    `finish_reason` means stop); its rate is the mean over items of that share of theirs. `mean_tokens`: of responses of
    known length, None without one. Only where items have k > 1 responses: `answers` (k); `pass_at`, the mean over items
    of `pass_at_k` for 1, 2, 4 … and k; `pass_at_error`, its standard errors (None for a single item).
    Only where a response has a thought: `mean_thought_tokens` and `mean_final_tokens`, which add up to `mean_tokens`,
    and `in_thought_rate`, the share of responses that were truncated within their thought.
    Several tasks get a last row "macro": counts summed, rates the unweighted mean over tasks, no interval.
    """
    tasks: dict[str, list[Mapping]] = {}
    for record in records:
        tasks.setdefault(record["task"], []).append(record)
    graded = [
        record for group in tasks.values() for record in group
    ]  # wrong and one alone: its prompt may not have fit
    counts = [len(r.get("all_correct") or [True]) for r in graded if r.get("all_correct") or r["correct"]]
    rows = [_row(task, group, min(counts, default=1)) for task, group in tasks.items()]
    if any(record.get("thought_tokens") is not None for record in graded):
        rows = [row | _thoughts(group) for row, group in zip(rows, tasks.values(), strict=True)]
    return [*rows, _macro(rows)] if len(rows) > 1 else rows


def table_rows(records: Iterable[Answer], task: str | None = None) -> list[dict]:
    """The summary's rows, one per task; `task` is that of records which have none (files of the released code)."""
    return summarise({"task": task, **encode(record)} for record in records)


def _row(task: str, group: Sequence[Mapping], responses: int) -> dict:
    n, right = len(group), sum(record["correct"] for record in group)
    low, high = wilson_interval(right, n)
    unanswered = sum(record["final_prediction"] == "none" for record in group)
    cut = [[end == "length" for end in _each(record, "finish_reason", "all_finish_reasons")] for record in group]
    tokens = [t for record in group for t in _each(record, "num_tokens", "all_num_tokens") if t is not None]
    row = {"task": task, "n": n, "correct": right, "accuracy": right / n, "low": low, "high": high}
    row |= {"unanswered": unanswered, "unanswered_rate": unanswered / n}
    row |= {"truncated": sum(map(sum, cut)), "truncated_rate": fmean(map(fmean, cut))}
    row["mean_tokens"] = fmean(tokens) if tokens else None
    return row | _passes([_each(record, "correct", "all_correct") for record in group], responses)


def _thoughts(group: Sequence[Mapping]) -> dict:
    """The THOUGHTS of a task; a response without a thought has one of no tokens."""
    lengths = [
        (total, thought or 0)
        for record in group
        for total, thought in zip_longest(  # of several responses none may have a thought
            _each(record, "num_tokens", "all_num_tokens"),
            _each(record, "thought_tokens", "all_thought_tokens"),
        )
        if total is not None
    ]
    if not lengths:
        return dict.fromkeys(THOUGHTS)
    thoughts, finals = fmean(thought for _, thought in lengths), fmean(total - thought for total, thought in lengths)
    return dict(
        zip(THOUGHTS, (thoughts, finals, fmean(total == thought > 0 for total, thought in lengths)), strict=True)
    )


def _each(record: Mapping, one: str, several: str) -> Sequence:
    """A value for each of a record's responses; a record that has none counts as one without text."""
    return record.get(several) or [record.get(one)]


def _passes(correct: Sequence[Sequence[bool]], k: int) -> dict:
    """pass@j over items with `k` responses, {} for k = 1; an item whose prompt did not fit has one that is wrong."""
    passed, errors = {}, {}
    for j in sorted({k} | {2**i for i in range(k.bit_length())}) if k > 1 else ():
        mean, std = mean_std([pass_at_k(len(each), sum(each), min(j, len(each))) for each in correct])
        passed[str(j)] = mean
        errors[str(j)] = std / sqrt(len(correct)) if len(correct) > 1 else None
    return {"answers": k, "pass_at": passed, "pass_at_error": errors} if passed else {}


def _macro(rows: Sequence[Mapping]) -> dict:
    def mean(values: Sequence[float | None]) -> float | None:
        return None if None in values else fmean(values)

    macro = {"task": "macro", **{key: sum(row[key] for row in rows) for key in COUNTS}, "low": None, "high": None}
    macro |= {key: mean([row[key] for row in rows]) for key in (*RATES, *THOUGHTS) if key in rows[0]}
    if "pass_at" in rows[0]:
        macro |= {"answers": rows[0]["answers"], "pass_at": {}, "pass_at_error": {}}
        for j in rows[0]["pass_at"]:
            macro["pass_at"][j] = mean([row["pass_at"][j] for row in rows])
            macro["pass_at_error"][j] = _error_of_mean([row["pass_at_error"][j] for row in rows])
    return {key: macro[key] for key in rows[0]}


def _error_of_mean(errors: Sequence[float | None]) -> float | None:
    """Standard error of the mean of independent values with these."""
    return None if None in errors else sqrt(sum(error * error for error in errors)) / len(errors)


def format_table(rows: Sequence[Mapping]) -> str:
    """The rows of `summarise` as a plain fixed-width table; shares in percent, pass@j with its standard error."""
    passes = list(dict.fromkeys(j for row in rows for j in row.get("pass_at", ())))
    lines = [["task", "n", "correct", "accuracy of vote %" if passes else "accuracy %", "95 % interval"]]
    lines[0] += [*(f"pass@{j} %" for j in passes), "unanswered %", "truncated %", "tokens"]
    thinks = any("mean_thought_tokens" in row for row in rows)
    lines[0] += ["of thought", "of final text", "truncated in thought %"] if thinks else []
    for row in rows:
        interval = "" if row["low"] is None else f"{_percent(row['low'])} to {_percent(row['high'])}"
        cells = [row["task"], str(row["n"]), str(row["correct"]), _percent(row["accuracy"]), interval]
        for j in passes:
            values = [row.get(key, {}).get(j) for key in ("pass_at", "pass_at_error")]
            cells.append(" ± ".join(_percent(value) for value in values if value is not None))
        cells += [_percent(row["unanswered_rate"]), _percent(row["truncated_rate"])]
        lengths = ["mean_tokens", *(THOUGHTS[:2] if thinks else [])]
        cells += ["" if row.get(key) is None else f"{row[key]:.1f}" for key in lengths]
        if thinks:
            cells.append("" if row.get(THOUGHTS[2]) is None else _percent(row[THOUGHTS[2]]))
        lines.append(cells)
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells as a fixed-width table: the first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{'>' if column else '<'}{widths[column]}}" for column, cell in enumerate(line))
        for line in lines
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def format_percent(accuracies: Mapping[str, float]) -> str:
    """Task -> accuracy in [0, 1] as one line, in percent."""
    return ", ".join(f"{task} {_percent(accuracy)}" for task, accuracy in accuracies.items())
