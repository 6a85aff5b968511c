"""Accuracy per task of each evaluated model, and paired differences between models and between runs."""

from collections.abc import Iterator, Sequence

from cream.errors import UserError
from cream.evaluation.compare import compare, join
from cream.evaluation.statistics import interval_of_mean, table_rows
from cream.records import Answer
from cream.reporting.figures import Series, label, lines, section
from cream.reporting.outputs import Output, Run
from cream.reporting.page import Section, table, table_of_runs

TITLE = "Accuracy"
MACRO = "macro"


def collect(run: Run, seed: int = 0) -> dict:
    """`evaluations`: name, file, model, data and its name, and the rows of the summary, of which the mean over tasks
    has its interval; `differences` between each model and the next one, and between the first and the last, that were
    asked the same: as `report.py compare` has them. `seed`: of the bootstrap intervals."""
    tested = run.of("evaluation")
    rows = [
        {
            "name": output.name,
            "file": str(output.path),
            "model": run.models.get(output.input("policy")),
            "data": output.input("data"),
            "questions": (path := output.source("data")) and path.name.partition(".json")[0],
            "tasks": _tasks(output, seed),
        }
        for output in tested
    ]
    found = []
    for group in _alike(tested):
        pairs = [*zip(group, group[1:], strict=False), *([(group[0], group[-1])] if len(group) > 2 else [])]
        found += [_difference(a, b, seed) for a, b in pairs]
    return {"evaluations": rows, "differences": found}


def between(runs: Sequence[Run], seed: int = 0) -> list[dict]:
    """Differences between the first run and each other one, of evaluations that have the same name and were asked the
    same; those that both runs share are skipped."""
    found = []
    for other in runs[1:]:
        for a in runs[0].of("evaluation"):
            for b in other.of("evaluation"):
                if a.name == b.name and question(a) == question(b) and a.path.resolve() != b.path.resolve():
                    found.append({"runs": [runs[0].title, other.title], **_difference(a, b, seed)})
    return found


def show(runs: Sequence[dict], between: Sequence[dict]) -> Section | None:
    """The section, of what `collect` and `between` found; None without an evaluation."""
    tested = [(run["title"], run["accuracy"]["evaluations"]) for run in runs]
    tasks = dict.fromkeys(row["task"] for _, rows in tested for each in rows for row in each["tasks"])
    if not tasks:
        return None
    figures, models = [], _in_order([[each["name"] for each in rows] for _, rows in tested])
    for task in sorted(tasks, key=lambda task: task != MACRO):  # the macro average first, else as they come
        series = [_series(title, rows, task) for title, rows in _by_questions(tested) if _has(rows, task)]
        about = "By model, with 95 % Wilson intervals."
        if task == MACRO:
            about = "Mean of the tasks' accuracies, by model, with 95 % bootstrap intervals."
        number = len(figures) + 1
        title = "Accuracy, mean of all tasks" if task == MACRO else f"Accuracy, {task}"
        axis = {"categoryorder": "array", "categoryarray": models}
        figures.append(lines(f"accuracy-{number}", title, about, series, "model", "accuracy, %", xaxis=axis))
    intro = "<p>The share of questions that a model answers correctly, by the grading rule of their task.</p>"
    return section("accuracy", TITLE, intro, figures, "\n".join(_tables(tested, runs, between)))


def _by_questions(tested: Sequence[tuple[str, list]]) -> list[tuple[str, list]]:
    """The evaluations that one line joins: those of a run that asked the same questions, such as a validation set."""
    groups: dict[tuple, list] = {}
    for title, rows in tested:
        for each in rows:
            groups.setdefault((title, each["data"]), []).append(each)
    several = len({data for _, data in groups}) > 1
    return [
        (f"{title}, {rows[0]['questions'] or 'other questions'}" if several else title, rows)
        for (title, _), rows in groups.items()
    ]


def _in_order(names: Sequence[Sequence[str]]) -> list[str]:
    """The names of all models as an axis has them: in the order of the run that has most, then the others'."""
    longest_first = sorted(names, key=lambda own: -len(own))
    return [label(name) for name in dict.fromkeys(name for own in longest_first for name in own)]


def _series(title: str, evaluations: Sequence[dict], task: str) -> Series:
    rows = [(each["name"], row) for each in evaluations for row in each["tasks"] if row["task"] == task]
    values = ([_percent(row[key]) for _, row in rows] for key in ("accuracy", "low", "high"))
    return Series(title, [name for name, _ in rows], *values)


def _has(evaluations: Sequence[dict], task: str) -> bool:
    return any(row["task"] == task for each in evaluations for row in each["tasks"])


def _tables(tested: Sequence[tuple[str, list]], runs: Sequence[dict], between: Sequence[dict]) -> Iterator[str]:
    yield from _accuracies(runs)
    within: dict[tuple, dict] = {}  # those of evaluations that all runs share once, and without a run's name
    for run in runs:
        for each in run["accuracy"]["differences"]:
            shared = all(each in other["accuracy"]["differences"] for other in runs)
            named = each if shared else {**each, "a": f"{run['title']}: {each['a']}"}
            within.setdefault(tuple(each["files"]), named)
    across = [
        {**each, **{key: f"{title}: {each[key]}" for key, title in zip("ab", each["runs"], strict=True)}}
        for each in between
    ]
    for title, found in (("Between models", [*within.values()]), ("Between runs", across)):
        yield from _differences(title, found)


def _accuracies(runs: Sequence[dict]) -> Iterator[str]:
    """A table of the mean over tasks, and of all tasks below; models that an alarm concerns have a `!`."""
    columns = ("run", "model", "accuracy, %", "from", "to", "task", "questions", "correct", "unanswered, %")
    columns += ("truncated, %", "tokens")
    chief, every = [], []
    for run in runs:
        marked = run["alarms"]["models"]
        for each in run["accuracy"]["evaluations"]:
            name, tasks = "! " * (each["name"] in marked) + each["name"], each["tasks"]
            for row in tasks:
                shares = _percents(row, ("accuracy", "low", "high"))
                others = _percents(row, ("unanswered_rate", "truncated_rate"))
                every.append((run["title"], name, *shares, row["task"], row["n"], row["correct"], *others,
                              row["mean_tokens"]))  # fmt: skip
                if row["task"] == MACRO or not _has([each], MACRO):
                    chief.append(every[-1])
    caption = "95 % intervals: Wilson, of a mean over tasks bootstrap"
    if any(run["alarms"]["models"] for run in runs):
        caption += "; ! an alarm, see the summary"
    several = len(runs) > 1
    yield table_of_runs(several, columns, chief, caption)
    if len(every) > len(chief):
        yield f"<details><summary>by task</summary>{table_of_runs(several, columns, every, caption)}</details>"


def _differences(title: str, found: Sequence[dict]) -> Iterator[str]:
    """A table of the mean over tasks, and of all tasks below."""
    columns = (
        "A",
        "B",
        "B - A, points",
        "from",
        "to",
        "task",
        "questions",
        "only A right",
        "only B right",
        "McNemar p",
    )

    def rows(tasks) -> list[tuple]:
        shares, others = ("difference", "low", "high"), ("task", "n", "only_a", "only_b", "p")
        return [
            (each["a"], each["b"], *_percents(row, shares), *(row[key] for key in others))
            for each in found
            for row in tasks(each.get("tasks", ()))
        ]  # fmt: skip

    def chief(tasks: Sequence[dict]) -> Sequence[dict]:
        return [row for row in tasks if row["task"] == MACRO] or tasks

    if some := rows(chief):
        tested = any(row[-1] is not None for row in some)  # a mean over tasks is not
        caption = "paired over the questions: 95 % bootstrap interval" + ", McNemar's exact test" * tested
        shown = table(columns, some, caption) if tested else table(columns[:-1], [row[:-1] for row in some], caption)
        yield f"<h3>{title}</h3>{shown}"
        if len(every := rows(list)) > len(some):
            yield f"<details><summary>by task</summary>{table(columns, every)}</details>"
    if notes := dict.fromkeys(each["note"] for each in found if "note" in each):
        yield table(("not compared",), [(note,) for note in notes])


def _percents(row: dict, keys: Sequence[str]) -> list[float | None]:
    return [_percent(row[key]) for key in keys]


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)


def _tasks(output: Output, seed: int) -> list[dict]:
    """The rows of its summary, or without one those of its records; the mean over tasks with its interval."""
    rows = (output.summary() or {}).get("tasks") or table_rows(output.read(Answer))
    bounds = dict(zip(("low", "high"), interval_of_mean(rows, seed), strict=True))
    return [row | bounds if row["task"] == MACRO else row for row in rows]


def question(output: Output) -> tuple:
    """What an evaluation asked, and how: only those that are alike are compared."""
    return output.input("data"), output.input("few_shot"), tuple(sorted(map(str, output.settings.items())))


def _alike(outputs: Sequence[Output]) -> list[list[Output]]:
    groups: dict[tuple, list[Output]] = {}
    for output in outputs:
        groups.setdefault(question(output), []).append(output)
    return [group for group in groups.values() if len(group) > 1]


def _difference(a: Output, b: Output, seed: int) -> dict:
    """The rows of `compare`; a `note` where the two cannot be compared."""
    names = {"a": a.name, "b": b.name, "files": [str(a.path), str(b.path)]}
    try:
        return names | {"tasks": compare(join(a.answers, b.answers), seed)}
    except UserError as error:
        return names | {"note": f"{a.path} and {b.path}: {error}"}
