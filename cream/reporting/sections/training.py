"""Training curves; time, tokens, reuse and memory of each stage."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from html import escape

import msgspec

from cream.loops.plan import TRAIN
from cream.records import Samples
from cream.reporting.figures import Figure, Series, bars, lines, section
from cream.reporting.outputs import TRAINING, Output, Run
from cream.reporting.page import Section, table_of_runs

TITLE = "Training and time"
CURVES = {  # of log.jsonl: title, axis, what it is
    "loss": ("Loss", "loss, nats", "Mean since the last line of the log."),
    "margin": ("Margin", "margin, β × nats", "β times the difference of chosen and rejected log-ratios."),
    "accuracy": ("Pair accuracy", "share of pairs", "Share of pairs whose chosen response has gained more."),
    "ratio_abs": ("Distance from the reference", "distance, nats", "Mean |log π - log π_ref| of the responses."),
    "grad_norm": ("Gradient norm", "norm", "Before clipping."),
    "lr": ("Learning rate", "learning rate", "By the schedule."),
    "tokens_per_second": ("Speed", "tokens/s", "Tokens that the layers compute, of all processes together."),
    "peak_memory_gb": ("Peak memory", "memory, GB", "Of one process: resident on a CPU, allocated on a GPU."),
}
FOLDED = ("ratio_abs", "grad_norm", "lr", "tokens_per_second", "peak_memory_gb")  # shown when asked for
PLACES = {  # where scores are from -> how the page calls it
    "computed": "computed",
    "cached": "from the score cache",
    "data": "from the data",
    "sampler": "from the sampler",
}
SHARED = "shared by several"
HELD_OUT = "eval_"  # how the metrics of held-out records begin


def collect(run: Run, others: Sequence[Run] = ()) -> dict:
    """`curves`: each training run, its log and counts; `stages`: each output, its records, seconds and tokens, and what
    was reused for it; `left`: titles of a loop's stages that have no output yet. `others`: the runs that are shown
    beside it, which may share outputs."""
    return {
        "curves": [_curves(output) for output in run.of(TRAINING)],
        "stages": [_stage(each, [run.title for run in others if each in run.outputs]) for each in run.outputs],
        "left": run.left,
    }


def _curves(output: Output) -> dict:
    return {
        "name": output.name,
        "folder": str(output.path),
        "stage": output.stage,
        "finished": output.finished,
        "counts": output.about.get("counts", {}),
        "last": output.about.get("last", {}),
        "log": list(_log(output)),
    }


def _log(output: Output) -> Iterator[dict]:
    """The lines of log.jsonl; of a run that still trains the last one may be torn."""
    path = output.path / "log.jsonl"
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            yield row


def _stage(output: Output, shared_with: Sequence[str]) -> dict:
    """What is recorded of a stage; None where it is not. `reuse`: of each model that scored for it, how many scores
    were computed, and how many were there already and where; `resumed`: requests that an interrupted run had
    finished."""
    about, counts = output.about, output.about.get("counts", {})
    return {
        "name": output.name,
        "path": str(output.path),
        "script": output.script,
        "finished": output.finished,
        "records": counts.get("out", counts.get("trained_on")),
        "dropped": sum(value for value in counts.get("dropped", {}).values()),
        "seconds": about.get("wall_seconds"),
        "tokens": _tokens(output),
        "memory_gb": about.get("last", {}).get("peak_memory_gb"),
        "reuse": about.get("reuse"),
        "resumed": about.get("resumed"),
        "shared_with": [*shared_with],
    }


def _tokens(output: Output) -> int | None:
    """Tokens of the responses that a stage sampled; None for other stages, and where they are not counted."""
    if output.kind == "samples":
        numbers = [record.num_tokens for record in output.read(Samples)]
        return sum(map(sum, numbers)) if all(numbers) else None
    if output.kind == "evaluation":
        rows = [row for row in (output.summary() or {}).get("tasks", ()) if row["task"] != "macro"]
        known = rows and all(row.get("mean_tokens") is not None for row in rows)
        each = [row["mean_tokens"] * row["n"] * row.get("answers", 1) for row in rows] if known else []
        return round(sum(each)) if known else None
    return None


# The section ----------------------------------------------------------------------------------------------------------


def show(runs: Sequence[dict]) -> Section | None:
    """The section; None where nothing is recorded."""
    own = [(run["title"], run["training"]) for run in runs]
    figures, folded = _figures(own, CURVES.keys() - FOLDED), _figures(own, FOLDED)
    timed = [(title, row) for title, found in own for row in found["stages"] if row["seconds"] is not None]
    if timed:
        figures.append(_time(own))
    if not figures and not any(found["left"] for _, found in own):
        return None
    tables = "\n".join([*_shared(own), *_reuse(own), _table(own)])
    return section("training", TITLE, _status(own), figures, tables, folded)


def _figures(own: Sequence[tuple[str, dict]], metrics: Collection[str]) -> list[Figure]:
    """A figure for each of the metrics that some run logs, for each stage: the losses of stages have other scales."""
    runs: dict[str, list[str]] = {}  # a training that several runs share is shown once
    for title, part in own:
        for each in part["curves"]:
            runs.setdefault(each["folder"], []).append(title)
    trained = {each["folder"]: each for _, part in own for each in part["curves"] if each["log"]}
    names = {
        folder: each["name"] if len(own) == 1 or len(runs[folder]) > 1 else f"{runs[folder][0]}: {each['name']}"
        for folder, each in trained.items()
    }
    found = []
    for stage in dict.fromkeys(each["stage"] for each in trained.values()):
        for key, (title, axis, about) in ((key, CURVES[key]) for key in CURVES if key in metrics):
            series = [
                Series(f"{names[folder]}{words}", *curve)
                for folder, each in trained.items()
                if each["stage"] == stage
                for words, name in (("", key), (", held out", HELD_OUT + key))
                if (curve := _curve(each["log"], name))[0]
            ]
            if series:
                title = f"{title}, {stage}" if stage else title
                found.append(lines(f"curve-{key.replace('_', '-')}-{len(found)}", title, about, series, "step", axis))
    return found


def _curve(log: Sequence[dict], name: str) -> tuple[list, list]:
    rows = [(row["step"], row[name]) for row in log if isinstance(row.get(name), int | float)]
    return [step for step, _ in rows], [value for _, value in rows]


def _time(own: Sequence[tuple[str, dict]]) -> Figure:
    """Seconds of each stage, summed over outputs of one script; those of outputs that several runs share once."""
    sums: dict[str, dict[str, float]] = {SHARED: {}}
    stages = {row["path"]: (title, row) for title, found in own for row in found["stages"]}
    for title, row in stages.values():
        if row["seconds"] is not None:
            name, seconds = row["script"] or "unknown", sums.setdefault(SHARED if row["shared_with"] else title, {})
            seconds[name] = round(seconds.get(name, 0) + row["seconds"], 3)
    series = [Series(title, list(seconds), list(seconds.values())) for title, seconds in sums.items() if seconds]
    about = "Wall time of the stages whose outputs are here, without starts, summed by script."
    return bars("time", "Time by script", about, series, "script", "seconds")


def _shared(own: Sequence[tuple[str, dict]]) -> Iterator[str]:
    """Which outputs several runs share: they are made once."""
    shared: dict[tuple[str, ...], dict[str, float | None]] = {}  # titles of runs -> path -> seconds
    for title, row in ((title, row) for title, found in own for row in found["stages"] if row["shared_with"]):
        runs = tuple(name for name, _ in own if name in (title, *row["shared_with"]))
        shared.setdefault(runs, {})[row["path"]] = row["seconds"]
    for runs, made in shared.items():
        text = f"{' and '.join(runs)} share {len(made)} output{'s' * (len(made) > 1)}"
        known = [seconds for seconds in made.values() if seconds is not None]
        yield f"<p>{escape(text)}, made once{f', in {sum(known):.1f} s' if known else ''}.</p>"


def _reuse(own: Sequence[tuple[str, dict]]) -> Iterator[str]:
    """A table of how many scores were computed, and how many were there already; those for outputs that several runs
    share once."""
    parts: dict[str, list[dict]] = {SHARED: []}
    for title, row in {row["path"]: (title, row) for title, found in own for row in found["stages"]}.values():
        parts.setdefault(SHARED if row["shared_with"] else title, []).append(row)
    counted = [
        (title, what, counts)
        for title, rows in parts.items()
        for what, trains in (("responses, for rewards", False), ("examples, for training", True))
        if (counts := _sources(row for row in rows if (row["script"] == TRAIN) == trains))
    ]
    places = {place: words for place, words in PLACES.items() if any(counts[place] for *_, counts in counted)}
    columns = ("run", "scores of", "in all", *places.values())
    rows = [(title, what, counts.total(), *(counts[place] for place in places)) for title, what, counts in counted]
    caption = "what was computed, and what was there already"
    yield table_of_runs(len(own) > 1, columns, rows, caption) if rows else ""


def _sources(stages: Iterable[dict]) -> Counter[str]:
    """How many scores of stages are from where."""
    return sum((Counter(counts) for row in stages for counts in (row["reuse"] or {}).values()), Counter())


def _status(own: Sequence[tuple[str, dict]]) -> str:
    rows = [
        (title, ", ".join(row["name"] for row in found["stages"] if not row["finished"]), ", ".join(found["left"]))
        for title, found in own
        if found["left"] or not all(row["finished"] for row in found["stages"])
    ]
    columns = ("run", "interrupted, or still running", "not finished yet")
    return table_of_runs(len(own) > 1, columns, rows, "unfinished") if rows else ""


def _table(own: Sequence[tuple[str, dict]]) -> str:
    columns = ("run", "output", "script", "seconds", "records", "skipped", "tokens sampled", "peak memory, GB")
    columns += ("scores", "not computed again", "requests done by an interrupted run", "shared with")
    keys = ("name", "script", "seconds", "records", "dropped", "tokens", "memory_gb")
    rows = []
    for title, found in own:
        for row in found["stages"]:
            scores = _sources([row])
            known = (scores.total(), scores.total() - scores["computed"]) if scores else (None, None)
            rows.append((title, *(row[key] for key in keys), *known, row["resumed"], ", ".join(row["shared_with"])))
    return f"<details><summary>all stages</summary>{table_of_runs(len(own) > 1, columns, rows)}</details>"
