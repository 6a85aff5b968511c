"""The numbers of a report as a section of a model card, in Markdown."""

from collections.abc import Iterable, Iterator, Sequence

MARK = "<!-- made by report.py html --markdown -->"


def card(numbers: dict) -> str:
    """Evaluation, training on preferences, lineage and software of each run. Texts of users are escaped."""
    lines = [MARK]
    for run in numbers["runs"]:
        lines += [f"## {_text(run['title'])}", *_accuracy(run), *_pairs(run), *_training(run), *_origin(run)]
    return "\n\n".join(lines) + "\n"


def _accuracy(run: dict) -> Iterator[str]:
    part = run["accuracy"]
    rows = [
        (each["name"], row["task"], row["n"], _percent(row["accuracy"]), _interval(row, 100))
        for each in part["evaluations"]
        for row in each["tasks"]
    ]
    if rows:
        yield "### Evaluation"
        yield _table(("model", "task", "questions", "accuracy, %", "95 % interval"), rows)
    rows = [
        (each["a"], each["b"], row["task"], f"{100 * row['difference']:+.1f}", _interval(row, 100, "+"), _p(row["p"]))
        for each in part["differences"]
        for row in each.get("tasks", ())
    ]
    if rows:
        yield "Paired differences (95 % bootstrap interval, McNemar's exact test):"
        yield _table(("A", "B", "task", "B - A, points", "95 % interval", "p"), rows)


def _pairs(run: dict) -> Iterator[str]:
    rows = [
        (each["name"], each["method"], each["pairs"], _number(each["c"]["mean"]), _percent(each["c"]["below_half"]),
         _percent(each["labels"] and each["labels"]["right"]))
        for each in run["consistency"]["pairs"]
    ]  # fmt: skip
    if rows:
        yield "### Preference pairs, by the model's own rankings"
        yield _table(("pairs", "method", "number", "mean C", "C below ½, %", "label accuracy, %"), rows)


def _training(run: dict) -> Iterator[str]:
    settings = {each["path"]: each["settings"] for each in run["lineage"]["outputs"]}
    rows = []
    for each in run["training"]["curves"]:
        own = settings.get(each["folder"], {})
        keys = ("epoch", "lr", "global_batch", "beta", "method", "seed")
        rows.append((each["name"], each["stage"], each["counts"].get("trained_on"), *(own.get(key) for key in keys)))
    if rows:
        yield "### Training"
        columns = ("model", "stage", "examples", "epochs", "learning rate", "batch", "β", "method", "seed")
        yield _table(columns, rows)


def _origin(run: dict) -> Iterator[str]:
    found = run["lineage"]
    made_of = {to: [found["nodes"][a]["name"] for a, b in found["edges"] if b == to] for _, to in found["edges"]}
    rows = [(node["name"], node["script"], ", ".join(made_of.get(i, []))) for i, node in enumerate(found["nodes"])]
    if rows:
        yield "### Lineage"
        yield _table(("file", "made by", "made from"), rows)
    versions = dict.fromkeys(
        f"{name} {version}" for each in found["outputs"] for name, version in each["versions"].items()
    )
    if versions:
        yield f"Software: {_text(', '.join(versions))}."


def _table(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    lines = [columns, ["---"] * len(columns), *([_text(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: object) -> str:
    """A value as plain text on one line: nothing in it is markup."""
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{char}" if char in "\\`*_[]|#!~$" else char for char in text)


def _interval(row: dict, scale: float, sign: str = "") -> str:
    low, high = (row[key] for key in ("low", "high"))
    return "" if low is None or high is None else f"{scale * low:{sign}.1f} to {scale * high:{sign}.1f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _p(value: float | None) -> str | None:
    return None if value is None else f"{value:.2g}"
