"""Rewards: chosen against rejected, ties, length, judges' verdicts; how good a reward is, where that was measured."""

from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from cream.evaluation import judges
from cream.evaluation.rewards import correlation
from cream.evaluation.rewards.report import format_summary
from cream.evaluation.statistics import wilson_interval
from cream.files import store
from cream.pairs.choice import NUMBERED
from cream.records import Pair, Rewards
from cream.reporting.figures import Figure, Series, bars, lines, section
from cream.reporting.numbers import by_bins, estimate, histogram, mean
from cream.reporting.outputs import MEASURED, Output, Run
from cream.reporting.page import Section, escape, scrolling, table_of_runs

TITLE = "Rewards"
FEW = 20  # different whole numbers that have a bar each


def collect(run: Run, seed: int = 0) -> dict:
    """`rewards`: each file of rewards, its values, ties, length and verdicts; `pairs`: chosen and rejected rewards of
    each set of pairs; `measured`: the summaries of evaluate_reward.py, with the pairs by confidence."""
    values: dict[str, dict] = {}
    rewards = [_rewards(output, run, values, seed) for output in run.of("rewards")]
    return {
        "rewards": rewards,
        "pairs": [_pairs(output, values) for output in run.of("pairs")],
        "measured": [measured for output in run.of(MEASURED) if (measured := _measured(output))],
    }


def _rewards(output: Output, run: Run, values: dict[str, dict], seed: int) -> dict:
    """The numbers of one file of rewards; its rewards, by prompt, are put into `values` under the file's hash."""
    records = [*output.read(Rewards)]
    judged, reasons = judges.collect(records), Counter()
    for record in records:
        reasons.update(reason or "no reason given" for reason, value in _reasons(record) if value is None)
    values[output.about.get("output", "")] = {record.uuid: record.reward for record in records}
    known = np.array([value for row in judged.rewards for value in row if value is not None])
    equal, pairs, top, prompts = judges.ties(judged.rewards)
    return {
        "name": output.name,
        "file": str(output.path),
        "reward": output.about.get("reward"),
        "by": run.models.get(output.input("policy", "rm", "judge", "reward_model")),
        "prompts": len(records),
        "responses": sum(map(len, judged.rewards)),
        "without": dict(reasons),
        "value": mean(known),
        "histogram": _histogram(known),
        "ties": {"equal": equal, "pairs": pairs, "top_shared": top, "prompts": prompts},
        "length": _length(records, seed),
        "judge": _verdicts(judged),
    }


def _reasons(record: Rewards) -> Iterator[tuple[str | None, float | None]]:
    yield from zip(record.reason or [None] * len(record.reward), record.reward, strict=True)


def _histogram(values) -> dict:
    """Counts of whole numbers, as judges give them, or of values in bins."""
    whole = {*values.tolist()}
    if len(whole) <= FEW and all(value == int(value) for value in whole):
        counts = sorted(Counter(values.tolist()).items())
        return {"middles": [value for value, _ in counts], "counts": [count for _, count in counts]}
    return histogram(values)


def _length(records: Sequence[Rewards], seed: int) -> dict | None:
    """How rewards go with length within prompts, in tokens where all records count them: Pearson's r, and the mean
    reward above its prompt's by length."""
    in_tokens = all(record.num_tokens for record in records)
    rows = [
        (reward, length, number)
        for number, record in enumerate(records)
        for reward, length in zip(
            record.reward, record.num_tokens if in_tokens else map(len, record.responses()), strict=True
        )
        if reward is not None
    ]
    if not rows:
        return None
    reward, length, prompt = (np.array(each, float) for each in zip(*rows, strict=True))
    prompt = np.unique(prompt, return_inverse=True)[1]
    above = correlation.centred(reward, prompt)
    r = estimate([above, correlation.centred(length, prompt)], prompt, seed)
    return {"unit": "tokens" if in_tokens else "characters", "r": r, "by_length": by_bins(length, above)}


def _verdicts(judged: judges.Judged) -> dict | None:
    """Of a judge: the share of its verdicts that could be parsed, their histogram and agreement; of comparisons, how
    often the choice changes with the order. None for any other reward."""
    asked = [score for scores in judged.scores for score in scores]
    if not asked and not judged.first:
        return None
    found = {}
    if asked:
        known = np.array([score for score in asked if score is not None])
        low, high = wilson_interval(len(known), len(asked))
        parsed = {"asked": len(asked), "parsed": len(known), "rate": len(known) / len(asked), "low": low, "high": high}
        found = {"scores": parsed | {"histogram": _histogram(known), "alpha": _alpha(judged)}}
    if judged.first:
        changed, clear, pairs, first = judges.flips(judged.first)
        found["comparisons"] = {
            "pairs": len(judged.compared),
            "parsed": sum(judged.compared),
            "in_both_orders": sum(pairs),
            "clear": sum(clear),
            "changed": sum(changed),
            "first_chosen": float(np.mean(first)) if first else None,
        }
    return found


def _alpha(judged: judges.Judged) -> float | None:
    try:
        return judges.alpha(judged.scores)
    except ImportError:
        return None


def _pairs(output: Output, values: dict[str, dict]) -> dict:
    """Mean rewards of chosen and rejected responses, and the margins. The rewards are looked up in the file that the
    pairs were made of; without it, or where their rewards are no longer there, only margins are known."""
    source, both, margins = values.get(output.input("file1", "rewards") or "", {}), [], []
    for pair in output.read(Pair):
        margins.append(np.nan if pair.margin is None else pair.margin)
        row = source.get(NUMBERED.sub("", pair.uuid))
        if row and None not in (pair.selected_index, pair.rejected_index):
            both.append((row[pair.selected_index], row[pair.rejected_index]))
    chosen, rejected = zip(*both, strict=True) if both else ((), ())
    return {
        "name": output.name,
        "chosen": mean(chosen),
        "rejected": mean(rejected),
        "margin": mean(margins),
        "margins": histogram(margins),
    }


def _measured(output: Output) -> dict | None:
    """The summary of evaluate_reward.py, and accuracy by confidence, of its rows that are one pair each."""
    summary = output.summary()
    if summary is None:
        return None
    p = np.array([row["p"] for row in map(msgspec.json.decode, _lines(output)) if row.get("p") is not None], float)
    confidence, right = np.maximum(p, 1 - p), (1 + np.sign(p - 0.5)) / 2
    return {
        "name": output.name.removesuffix(".rows"),
        "file": str(output.path),
        "summary": summary,
        "by_confidence": by_bins(confidence, right),
    }


def _lines(output: Output) -> Iterator[bytes]:
    with store.open_file(output.path) as file:
        yield from (line for line in file if line.strip())


# The section ----------------------------------------------------------------------------------------------------------


def show(runs: Sequence[dict]) -> Section | None:
    """The section; None without rewards."""
    own = [(run["title"], run["rewards"]) for run in runs]
    if not any(found["rewards"] or found["measured"] for _, found in own):
        return None
    several, figures = len(runs) > 1, []
    for number, (title, found) in enumerate(own):
        end = f" ({title})" if several else ""
        figures += _of_pairs(number, end, [each for each in found["pairs"] if each["margin"]["n"]])
        figures += _of_rewards(number, end, found["rewards"])
        figures += _of_measured(number, end, found["measured"])
    intro = (
        "<p>What responses are ranked by. A reward that goes with length may train length; one that ties often ranks "
        "little.</p>"
    )
    return section("rewards", TITLE, intro, figures, "\n".join(_tables(own)))


def _of_pairs(number: int, end: str, pairs: Sequence[dict]) -> list[Figure]:
    if not pairs:
        return []
    found = []
    if with_both := [each for each in pairs if each["chosen"]["n"]]:
        names = [each["name"] for each in with_both]
        series = [
            Series(part, names, *([each[part][key] for each in with_both] for key in ("mean", "low", "high")))
            for part in ("chosen", "rejected")
        ]
        about = "Mean rewards of the responses in the pairs, with 95 % intervals."
        title = f"Chosen and rejected{end}"
        found.append(bars(f"chosen-{number}", title, about, series, "pairs", "reward"))
    series = [Series(each["name"], each["margins"]["middles"], _shares(each["margins"]["counts"])) for each in pairs]
    about = "Reward of the chosen response minus that of the rejected one, in ten bins."
    title = f"Reward margins{end}"
    return [*found, lines(f"margins-{number}", title, about, series, "margin, units of the reward", "pairs, %")]


def _of_rewards(number: int, end: str, rewards: Sequence[dict]) -> list[Figure]:
    found = []
    series = [
        Series(
            each["name"], *([row[key] for row in each["length"]["by_length"]] for key in ("x", "mean", "low", "high"))
        )
        for each in rewards
        if each["length"] and each["length"]["by_length"]
    ]
    if series:
        units = {each["length"]["unit"] for each in rewards if each["length"]}
        about = (
            "Mean reward above the mean of its prompt, in bins of about equally many responses, with 95 % intervals."
        )
        x = f"length, {' or '.join(sorted(units))}"
        found.append(lines(f"length-{number}", f"Reward against length{end}", about, series, x, "reward, centred"))
    scored = [each for each in rewards if each["judge"] and "scores" in each["judge"]]
    if scored:
        series = [
            Series(each["name"], of["middles"], _shares(of["counts"]))
            for each in scored
            for of in [each["judge"]["scores"]["histogram"]]
        ]
        about = "How often a judge gives each score, of its verdicts that could be parsed."
        found.append(bars(f"scores-{number}", f"Scores of judges{end}", about, series, "score", "verdicts, %"))
    return found


def _of_measured(number: int, end: str, measured: Sequence[dict]) -> list[Figure]:
    found = []
    series = [
        Series(each["name"], *([100 * row[key] for row in rows] for key in ("x", "mean")))
        for each in measured
        if (rows := each["by_confidence"])
    ]
    if series:
        series.append(Series("calibrated", [50, 100], [50, 100]))
        about = "Share of pairs that a reward orders as gold does, by its confidence σ(β × difference)."
        x, y = "confidence, %", "right, %"
        found.append(lines(f"calibration-{number}", f"Calibration{end}", about, series, x, y))
    for place, each in enumerate(measured):
        if by_n := (each["summary"].get("best_of_n") or {}).get("by_n"):
            kinds = [name for name in ("best", "oracle", "mean", "majority") if name in by_n[0]]
            series = [
                Series(
                    f"by {name}" if name != "best" else "by this reward",
                    [row["n"] for row in by_n],
                    *([row[name][key] for row in by_n] for key in ("value", "low", "high")),
                )
                for name in kinds
            ]
            about = "Gold value of the response that is chosen of N, with 95 % intervals."
            title = f"Best of N, {each['name']}{end}"
            found.append(lines(f"best-{number}-{place}", title, about, series, "N", "gold value"))
    return found


def _shares(counts: Sequence[int]) -> list[float]:
    return [round(100 * count / max(1, sum(counts)), 2) for count in counts]


def _tables(own: Sequence[tuple[str, dict]]) -> Iterator[str]:
    columns = ("run", "rewards", "by", "mean", "without", "tied pairs, %", "best shared, %", "r with length", "from")
    columns += ("to", "kind", "prompts", "responses")
    several, rows = len(own) > 1, []
    for title, found in own:
        for each in found["rewards"]:
            ties, length = each["ties"], each["length"]
            r = [length["r"][key] for key in ("value", "low", "high")] if length else [None] * 3
            rows.append(
                (title, each["name"], each["by"], each["value"]["mean"], sum(each["without"].values()),
                 _percent(ties["equal"], ties["pairs"]), _percent(ties["top_shared"], ties["prompts"]), *r,
                 each["reward"], each["prompts"], each["responses"])
            )  # fmt: skip
    yield table_of_runs(several, columns, rows, "files of rewards; r is within prompts") if rows else ""
    rows = [
        (title, each["name"], reason, count)
        for title, found in own
        for each in found["rewards"]
        for reason, count in each["without"].items()
    ]
    columns = ("run", "rewards", "why a response has no reward", "responses")
    yield table_of_runs(several, columns, rows) if rows else ""
    columns = ("run", "judge", "parsed, %", "asked", "parsed", "agreement α", "order changes the choice, %")
    rows = []
    for title, found in own:
        for each in (each for each in found["rewards"] if each["judge"]):
            scores, compared = (each["judge"].get(kind, {}) for kind in ("scores", "comparisons"))
            asked, parsed = (scores or compared).get("asked", compared.get("pairs")), (scores or compared)["parsed"]
            changed = _percent(compared["changed"], compared["clear"]) if compared else None
            rows.append((title, each["name"], _percent(parsed, asked), asked, parsed, scores.get("alpha"), changed))
    yield table_of_runs(several, columns, rows, "verdicts of judges") if rows else ""
    for title, found in own:
        for each in found["measured"]:
            name = f"{title}: {each['name']}" if several else each["name"]
            numbers = scrolling(f"<pre>{escape(format_summary(each['summary']))}</pre>", f"{name}, measured")
            yield f"<details><summary>{escape(name)}, measured</summary>{numbers}</details>"


def _percent(part: int, whole: int) -> float | None:
    return round(100 * part / whole, 2) if whole else None
