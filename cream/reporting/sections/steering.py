"""What steered loops decided while they ran, and why: the best round of each, and where and why it ended."""

from collections.abc import Iterator, Sequence
from html import escape

import msgspec

from cream.loops.course import RESULT
from cream.loops.decisions import DecisionFile
from cream.reporting.figures import Figure, Series, lines, section
from cream.reporting.outputs import Run
from cream.reporting.page import Section, table_of_runs

TITLE = "Decisions"
VALUES = ("value", "low", "high")
WHOLE = {"dtick": 1, "zeroline": False}  # an axis of whole numbers


def collect(run: Run) -> list[dict]:
    """What each decisions.json of the run holds (cream/loops/decisions.py), and the path of the `file`. Raises
    UserError for a damaged one."""
    held = ((path, DecisionFile(path.parent).held) for path in run.decisions)
    return [{"file": str(path), **msgspec.to_builtins(decided)} for path, decided in held]


def rules(decided: dict) -> Iterator[str]:
    """In words, by which keys of its file a loop was steered."""
    keep = decided["loop"].get("keep")
    if keep:
        best = "lowest" if keep.get("mode") == "min" else "highest"
        yield f"it keeps the round with the {best} {keep['metric']}"
        if patience := keep.get("patience"):
            rounds = f"{patience} evaluated round{'s' * (patience > 1)}"
            yield f"patience {patience}: it ends after {rounds} without a new best"
        if keep.get("roll_back"):
            yield "roll-back: a round after one without a new best starts from the best again"
    for fact, bound in (decided["loop"].get("stop_if") or {}).items():
        given = {how: limit for how, limit in bound.items() if limit is not None}
        drift = given.pop("drift", None)
        limits = [f"is {how} {limit:g}" for how, limit in given.items()]
        limits += [] if drift is None else [f"drifts from round 1 by more than {100 * drift:g} %"]
        yield f"it ends where {fact} {' or '.join(limits)}"


def ends(decided: dict) -> Iterator[str]:
    """Why no further round ran, and which round is the result, or the best so far."""
    if stopped := decided["stopped"]:
        yield f"Ended in round {stopped['round']}: {stopped['why']}."
    if best := decided["best"]:
        yield f"{_best(decided).capitalize()}: {_called(best['round'])}, {best['model']}."


def _best(decided: dict) -> str:
    """What the best round is: a loop that has ended has said its result."""
    return "kept" if any(each["text"].startswith(RESULT) for each in decided["said"]) else "best so far"


def _called(number: int) -> str:
    return f"round {number}" if number else "the model before round 1"


def show(runs: Sequence[dict]) -> Section | None:
    """The section; None without a steered loop."""
    own = [(run["title"], decided) for run in runs for decided in run["steering"]]
    if not own:
        return None
    html = []
    for title, decided in own:
        html.append(f"<h3>{escape(title)}</h3>")
        if end := " ".join(ends(decided)):
            html.append(f"<p><strong>{escape(end)}</strong></p>")
        if rule := "; ".join(rules(decided)):
            html.append(f"<p>By its settings {escape(rule)}.</p>")
        said = [f"<li>{escape(each['text'])}</li>" for each in decided["said"]]
        html.append(f"<ol>{''.join(said)}</ol>" if said else "<p>Nothing was decided yet.</p>")
    return section("steering", TITLE, "\n".join(html), _figures(own), "\n".join(_tables(own)))


def _figures(own: Sequence[tuple[str, dict]]) -> list[Figure]:
    """The metric of the measured rounds of each loop, a figure for each metric, with the best rounds."""
    found: dict[str, list[Series]] = {}
    for title, decided in own:
        name, rows = _metric(decided), decided["rounds"]
        if not rows:
            continue
        values = [[_value(row, key) for row in rows] for key in VALUES]
        bounds = values[1:] if None not in values[1] + values[2] else (None, None)
        found.setdefault(name, []).append(Series(title, [row["round"] for row in rows], values[0], *bounds))
        best = [i for i, row in enumerate(rows) if decided["best"] and row["round"] == decided["best"]["round"]]
        points = [rows[i]["round"] for i in best], [values[0][i] for i in best]
        found[name].append(Series(f"{title}: {_best(decided)}", *points))
    about = "Of the model of each round, 0 before the first one, with 95 % intervals where the metric has them."
    return [
        lines(f"steering-{i}", f"Metric of each round: {name}", about, series, "round", name, xaxis=WHOLE)
        for i, (name, series) in enumerate(found.items(), 1)
    ]


def _metric(decided: dict) -> str:
    """Its name with the unit."""
    share = any(row["metric"]["share"] for row in decided["rounds"])
    return f"{(decided['loop'].get('keep') or {}).get('metric', 'metric')}{', %' * share}"


def _value(row: dict, key: str) -> float | None:
    value = row["metric"][key]
    return round(100 * value, 2) if value is not None and row["metric"]["share"] else value


def _tables(own: Sequence[tuple[str, dict]]) -> Iterator[str]:
    rows = [
        (title, row["round"], *(_value(row, key) for key in VALUES),
         _best(decided) if decided["best"] and row["round"] == decided["best"]["round"] else "",
         _metric(decided), row["starts_from"], row["model"])
        for title, decided in own
        for row in decided["rounds"]
    ]  # fmt: skip
    columns = ("run", "round", "value", "from", "to", "result", "metric", "starts from round", "model")
    several = len({title for title, _ in own}) > 1
    yield table_of_runs(several, columns, rows, "measured models") if rows else ""
    gone = [(title, name, each["bytes"]) for title, decided in own for name, each in decided["deleted"].items()]
    columns, caption = ("run", "training run", "bytes"), "checkpoints that --keep has deleted"
    yield table_of_runs(several, columns, gone, caption) if gone else ""
