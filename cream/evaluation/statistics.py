"""How sure an accuracy, a mean over seeds, or a difference between two methods is; and the table that says so."""

from collections.abc import Iterable, Mapping, Sequence
from math import nan, sqrt
from statistics import NormalDist, fmean, stdev

COLUMNS = ("task", "n", "correct", "accuracy", "low", "high", "unanswered", "truncated")


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of a proportion, both in [0, 1]: the score interval without continuity correction.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927). It stays
    inside [0, 1] and has width at 0 or n successes, where the normal interval has none. Raises ValueError unless
    0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} is no proportion")
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
    from scipy.stats import binomtest  # half a second to import, and only comparisons need it

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


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


def summarise(records: Iterable[Mapping]) -> list[dict]:
    """One row per task, in order of appearance; a record has `task`, `correct`, `final_prediction`, `finish_reason`.

    Keys: COLUMNS. `accuracy`, `low`, `high` (95 % Wilson interval) are in [0, 1]; `unanswered` counts predictions
    "none", `truncated` responses that ended by length (an absent or null `finish_reason` means stop). Several tasks get
    a last row "macro": counts summed, accuracy the unweighted mean over tasks, no interval (low and high None).
    """
    tasks: dict[str, list[Mapping]] = {}
    for record in records:
        tasks.setdefault(record["task"], []).append(record)
    rows = []
    for task, group in tasks.items():
        n, correct = len(group), sum(record["correct"] for record in group)
        low, high = wilson_interval(correct, n)
        unanswered = sum(record["final_prediction"] == "none" for record in group)
        truncated = sum(record.get("finish_reason") == "length" for record in group)
        rows.append(dict(zip(COLUMNS, (task, n, correct, correct / n, low, high, unanswered, truncated), strict=True)))
    if len(rows) > 1:
        total = {key: sum(row[key] for row in rows) for key in ("n", "correct", "unanswered", "truncated")}
        macro = {"task": "macro", "accuracy": fmean(row["accuracy"] for row in rows), "low": None, "high": None} | total
        rows.append({key: macro[key] for key in COLUMNS})
    return rows


def format_table(rows: Sequence[Mapping]) -> str:
    """The rows of `summarise` as a plain fixed-width table; accuracy and its interval in percent."""
    lines = [["task", "n", "correct", "accuracy %", "95 % interval", "unanswered", "truncated"]]
    for row in rows:
        interval = "" if row["low"] is None else f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        accuracy = f"{100 * row['accuracy']:.1f}"
        cells = (row["task"], row["n"], row["correct"], accuracy, interval, row["unanswered"], row["truncated"])
        lines.append([str(cell) for cell in cells])
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells as a fixed-width table: the first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{'>' if column else '<'}{widths[column]}}" for column, cell in enumerate(line))
        for line in lines
    )
