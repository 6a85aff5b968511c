"""Consistency of the rankings: C of each set of pairs, what it goes with, and what training made of it."""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from types import MappingProxyType

import numpy as np

from cream.consistency import Tally, margin_cap
from cream.evaluation.statistics import wilson_interval
from cream.evaluation.tasks import grade_record
from cream.pairs.choice import NUMBERED
from cream.ranking import kendall, padded
from cream.records import Item, Pair, Rewards
from cream.reporting.figures import COLOURS, Figure, Series, bars, lines, matrix, section
from cream.reporting.numbers import by_bins, mean, rank_correlation
from cream.reporting.outputs import TRAINING, Output, Run, task_of
from cream.reporting.page import Section, table_of_runs

TITLE = "Consistency"
C = [i / 10 for i in range(11)]  # the middles of the bins of C
TASKS = 12  # tasks with a line of their own


def collect(run: Run, labels: Mapping[str, Item] = MappingProxyType({})) -> dict:
    """`pairs`: each set of pairs, its C and τ, by task, by margin, and against `labels`, questions by uuid;
    `agreement`: of each two rankings of the same samples the mean τ; `trained`: what training used of C, the margin cap
    and the margin reached."""
    return {
        "pairs": [of_pairs(output, run, labels) for output in run.of("pairs")],
        "agreement": _agreement(run),
        "trained": [_trained(output) for output in run.of(TRAINING) if "mean_c" in output.about.get("counts", {})],
    }


def of_pairs(output: Output, run: Run, labels: Mapping[str, Item]) -> dict:
    """C and τ of a set of pairs."""
    c, tau, margin, tasks, gold = [], [], [], {}, []
    for pair in output.read(Pair):
        values = [np.nan if each is None else each for each in (pair.consistency, pair.tau, pair.margin)]
        for into, value in zip((c, tau, margin), values, strict=True):
            into.append(value)
        tasks.setdefault(task_of(pair, labels), []).append(values[0])
        gold.append(_is_right(pair, labels))
    about = {key: output.about.get(key) for key in ("method", "rank", "mean_consistency")}
    counts = output.about.get("counts", {})
    return {
        "name": output.name,
        "file": str(output.path),
        "for": run.models.get((output.about.get("policy") or {}).get("fingerprint")),
        **about,
        "pairs": len(c),
        "dropped": counts.get("dropped", {}),
        "c": _tally(c),
        "tau": mean(tau),
        "tasks": {task: _tally(values) for task, values in tasks.items()} if len(tasks) <= TASKS else {},
        "margin": mean(margin),
        "c_by_margin": by_bins(margin, c),
        "c_with_margin": rank_correlation(margin, c),
        "labels": _against_labels(c, gold),
    }


def _tally(values: Sequence[float]) -> dict:
    """Statistics of C, as cal_consistency.py prints them."""
    tally = Tally(values)
    own = {"n": tally.n, "without": tally.nulls, "mean": tally.mean, "std": tally.std, "below_half": tally.below_half}
    return own | {"histogram": tally.histogram.tolist()}


def _is_right(pair: Pair, labels: Mapping[str, Item]) -> bool | None:
    """Whether the chosen response is correct and the rejected one wrong; None where both or neither is, or where
    nothing says."""
    item = labels.get(NUMBERED.sub("", pair.uuid))
    if item is None:
        return None
    chosen, rejected = (grade_record(item, each[-1].content)[1] for each in (pair.selected, pair.rejected))
    return None if chosen == rejected else chosen


def _against_labels(c: Sequence[float], gold: Sequence[bool | None]) -> dict | None:
    """Of the pairs of which one response is correct: the share whose chosen one is, in all and by C."""
    decided = [(value, right) for value, right in zip(c, gold, strict=True) if right is not None]
    if not decided:
        return None
    found = {"pairs": len(decided), **_share([right for _, right in decided]), "by_c": []}
    for middle in C:
        here = [right for value, right in decided if not np.isnan(value) and round(value, 1) == middle]
        if here:
            found["by_c"].append({"c": middle, "n": len(here), **_share(here)})
    return found


def _share(right: Sequence[bool]) -> dict:
    low, high = wilson_interval(sum(right), len(right))
    return {"right": fmean(right), "low": low, "high": high}


def _agreement(run: Run) -> list[dict]:
    """Of each two files of rewards of the same samples: Kendall's τ, mean over prompts."""
    groups: dict[str, list[Output]] = {}
    for output in run.of("rewards"):
        groups.setdefault(output.input("input_file") or "", []).append(output)
    found = []
    for group in groups.values():
        values = {output: {r.uuid: r.reward for r in output.read(Rewards)} for output in group}
        for a, b in combinations(group, 2):
            both = [uuid for uuid in values[a] if len(values[a][uuid]) == len(values[b].get(uuid, ()))]
            tau = kendall(*(padded(values[each][uuid] for uuid in both) for each in (a, b))) if both else []
            names = {name: ranking_name(each, run) for name, each in (("a", a), ("b", b))}
            samples = (a.source("input_file") or a.path).name
            found.append({**names, "samples": samples, "tau": mean(tau)})
    return found


def ranking_name(output: Output, run: Run) -> str:
    """Whose ranking it is: the model's; of another kind of reward with its name."""
    model = run.models.get(output.input("policy", "rm", "judge", "reward_model"))
    reward = output.about.get("reward")
    return f"{model}" if model and reward in ("dpo", "likelihood") else " ".join(filter(None, (model, reward))) or "?"


def _trained(output: Output) -> dict:
    """How training used C. Margins are in nats of log-ratio: those of the log divided by β."""
    settings, counts, last = output.settings, output.about["counts"], output.about.get("last", {})
    beta, c = settings.get("beta"), counts.get("mean_c_used")
    used = beta and c is not None and settings.get("method") != "original"
    cap = float(margin_cap(c, beta)) if used else None
    pairs = counts.get("pairs") or counts.get("trained_on")
    return {
        "name": output.name,
        "method": settings.get("method"),
        "beta": beta,
        "pairs": pairs,
        "mean_c": counts.get("mean_c"),
        "mean_c_used": c,
        "in_reverse": counts.get("trained_in_reverse"),
        "share_in_reverse": counts["trained_in_reverse"] / pairs if pairs and "trained_in_reverse" in counts else None,
        "cap": cap if cap is not None and np.isfinite(cap) else None,
        "margin": last["margin"] / beta if beta and "margin" in last else None,
    }


# The section ----------------------------------------------------------------------------------------------------------


def show(runs: Sequence[dict]) -> Section | None:
    """The section; None without pairs."""
    own = [(run["title"], run["consistency"]) for run in runs]
    if not any(found["pairs"] for _, found in own):
        return None
    known = [(title, [pairs for pairs in found["pairs"] if pairs["c"]["n"]]) for title, found in own]
    known = [(title, pairs) for title, pairs in known if pairs]
    figures: list[Figure] = []
    if known:
        figures.append(_means(known))
    if capped := _caps(own):
        figures.append(capped)
    for title, pairs in known:
        figures += _of_run(len(figures), f" ({title})" if len(runs) > 1 else "", pairs)
    for title, found in own:
        figures += _matrix(len(figures), f" ({title})" if len(runs) > 1 else "", found["agreement"])
    intro = (
        "<p>C says how far two models' rankings of the same responses agree: 1 fully, ½ as by chance, 0 in reverse. "
        "C = (τ + 1) / 2 for Kendall's τ. Training trusts a pair by its C; below ½ it prefers the rejected response. "
        "Pairs of other strategies have no C, or in its place a confidence that the chosen response is better.</p>"
    )
    return section("consistency", TITLE, intro, figures, _tables(own))


def _means(known: Sequence[tuple[str, list]]) -> Figure:
    series = []
    for title, pairs in known:
        errors = [1.96 * (each["c"]["std"] or 0) / each["c"]["n"] ** 0.5 for each in pairs]
        middle = [each["c"]["mean"] for each in pairs]
        bounds = [[m + sign * e for m, e in zip(middle, errors, strict=True)] for sign in (-1, 1)]
        series.append(Series(title, [each["name"] for each in pairs], middle, *bounds))
    about = "Mean C of each set of pairs, with 95 % intervals; the dotted line at ½ is chance."
    half = [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": 0.5,
            "y1": 0.5,
            "line": {"dash": "dot", "color": COLOURS[4]},
        }
    ]
    return lines("c-mean", "Mean C", about, series, "pairs", "mean C", shapes=half)


def _of_run(start: int, end: str, pairs: Sequence[dict]) -> list[Figure]:
    """The distribution of C, by task, by margin and against labels."""

    def shares(tally: dict) -> list[float]:
        return [round(100 * count / tally["n"], 2) for count in tally["histogram"]]

    series = [Series(each["name"], C, shares(each["c"])) for each in pairs]
    about = "Share of pairs with each C, to the nearest tenth. C below 0.5: the rankings contradict each other."
    found = [bars(f"c-{start}", f"Distribution of C{end}", about, series, "C", "pairs, %")]
    tasks = dict.fromkeys(task for each in pairs for task, own in each["tasks"].items() if own["n"])
    if len(tasks) > 1:
        series = [_by_task(each, [*tasks]) for each in pairs]
        about = "Mean C by task, with 95 % intervals."
        found.append(
            bars(f"c-task-{start}", f"C by task{end}", about, series, "task", "mean C", yaxis={"range": [0, 1]})
        )
    by_margin = [
        Series(each["name"], *([row[key] for row in each["c_by_margin"]] for key in ("x", "mean", "low", "high")))
        for each in pairs
        if len(each["c_by_margin"]) > 1
    ]
    if by_margin:
        about = "Mean C in bins of about equally many pairs, with 95 % intervals: do wide margins go with agreement?"
        title = f"C against reward margin{end}"
        found.append(lines(f"c-margin-{start}", title, about, by_margin, "margin, units of the reward", "mean C"))
    labelled = [each for each in pairs if each["labels"] and each["labels"]["by_c"]]
    if labelled:
        series = [_by_label(each) for each in labelled]
        about = (
            "Of the pairs of which one response is correct by the labels, the share whose chosen response is, by C, "
            "with 95 % Wilson intervals. If C can be trusted, it rises."
        )
        title = f"C against label accuracy{end}"
        found.append(lines(f"c-labels-{start}", title, about, series, "C", "chosen response correct, %"))
    return found


def _by_task(pairs: dict, tasks: Sequence[str]) -> Series:
    own = [pairs["tasks"].get(task) for task in tasks]
    middle = [each and each["mean"] for each in own]
    errors = [each and 1.96 * (each["std"] or 0) / max(1, each["n"]) ** 0.5 for each in own]
    bounds = [[None if m is None else m + sign * e for m, e in zip(middle, errors, strict=True)] for sign in (-1, 1)]
    return Series(pairs["name"], tasks, middle, *bounds)


def _by_label(pairs: dict) -> Series:
    rows = pairs["labels"]["by_c"]
    shares = ([round(100 * row[key], 2) for row in rows] for key in ("right", "low", "high"))
    return Series(pairs["name"], [row["c"] for row in rows], *shares)


def _matrix(start: int, end: str, agreement: Sequence[dict]) -> list[Figure]:
    known = [row for row in agreement if row["tau"]["mean"] is not None]
    names = sorted({name for row in known for name in (row["b"], row["a"])}, key=_by_number)
    if not known:
        return []
    values = [[1.0 if a == b else None for b in names] for a in names]
    for row in known:
        i, j = names.index(row["a"]), names.index(row["b"])
        values[i][j] = values[j][i] = row["tau"]["mean"]
    about = (
        "Mean Kendall's τ of two models' rankings of the same responses; empty where they have ranked none together."
    )
    return [matrix(f"agreement-{start}", f"Agreement of models{end}", about, names, values, "mean τ")]


def _by_number(name: str) -> list:
    """M2 before M10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _caps(own: Sequence[tuple[str, dict]]) -> Figure | None:
    rows = [(title, row) for title, found in own for row in found["trained"] if row["margin"] is not None]
    if not rows:
        return None
    names = [f"{title}: {row['name']}" if len(own) > 1 else row["name"] for title, row in rows]
    series = [
        Series("margin reached", names, [row["margin"] for _, row in rows]),
        Series("margin cap", names, [row["cap"] for _, row in rows]),
    ]
    about = (
        "Log-ratio margin at the end of training, and the cap logit(C) / β at the mean C used, where the loss has its "
        "optimum; without a cap training trusts pairs fully."
    )
    return bars("margin-cap", "Margins and their cap", about, series, "training", "log-ratio margin, nats")


def _tables(own: Sequence[tuple[str, dict]]) -> str:
    columns = ("run", "pairs", "mean C", "label accuracy, %", "below ½, %", "number", "method", "for", "mean τ")
    columns += ("standard deviation of C", "Spearman of C and margin")
    rows = [
        (title, each["name"], each["c"]["mean"], each["labels"] and _percent(each["labels"]["right"]),
         _percent(each["c"]["below_half"]), each["pairs"], each["method"], each["for"], each["tau"]["mean"],
         each["c"]["std"], each["c_with_margin"])
        for title, found in own
        for each in found["pairs"]
    ]  # fmt: skip
    html = [table_of_runs(len(own) > 1, columns, rows, "sets of pairs")]
    columns = ("run", "trained", "margin", "cap", "in reverse, %", "mean C used", "mean C", "method", "β", "pairs")
    rows = [
        (title, row["name"], row["margin"], row["cap"], _percent(row["share_in_reverse"]), row["mean_c_used"],
         row["mean_c"], row["method"], row["beta"], row["pairs"])
        for title, found in own
        for row in found["trained"]
    ]  # fmt: skip
    caption = "training on pairs; margin and cap in nats of log-ratio"
    html += [table_of_runs(len(own) > 1, columns, rows, caption)] if rows else []
    return "\n".join(html)


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)
