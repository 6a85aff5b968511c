"""The numbers of a report in Markdown: a section of a model card, and the parts of a whole one (model_card.py)."""

from collections.abc import Iterable, Iterator, Sequence

from cream.reporting.sections import steering

MARK = "<!-- made by report.py html --markdown -->"
HASH = 12  # hexadecimal digits of a file's hash that are shown


def card(numbers: dict) -> str:
    """Evaluation, alarms, decisions, training on preferences, lineage and software of each run. Texts of users are
    escaped."""
    lines = [MARK]
    for run in numbers["runs"]:
        lines += [f"## {plain(run['title'])}", *_under("### Evaluation", accuracy(run))]
        lines += _under("### Alarms", alarms(run))
        lines += _under("### Decisions while it ran", decisions(run))
        lines += _under("### Preference pairs, by the model's own rankings", pairs(run))
        lines += [*_under("### Training", training(run)), *_under("### Lineage", origin(run)), *software(run)]
    return "\n\n".join(lines) + "\n"


def _under(heading: str, parts: Iterable[str]) -> list[str]:
    """The parts below a heading; nothing without a part."""
    found = [*parts]
    return [heading, *found] if found else []


def accuracy(run: dict) -> Iterator[str]:
    """Accuracies, and paired differences."""
    part, marked = run["accuracy"], run.get("alarms", {}).get("models", ())
    rows = [
        (
            "! " * (each["name"] in marked) + each["name"],
            row["task"],
            row["n"],
            _percent(row["accuracy"]),
            interval(row, 100),
        )
        for each in part["evaluations"]
        for row in each["tasks"]
    ]
    if rows:
        yield table(("model", "task", "questions", "accuracy, %", "95 % interval"), rows)
    rows = [
        (each["a"], each["b"], row["task"], f"{100 * row['difference']:+.1f}", interval(row, 100, "+"), _p(row["p"]))
        for each in part["differences"]
        for row in each.get("tasks", ())
    ]
    if rows:
        yield "Paired differences (95 % bootstrap interval, McNemar's exact test):"
        yield table(("A", "B", "task", "B - A, points", "95 % interval", "p"), rows)


def alarms(run: dict) -> Iterator[str]:
    """What is probably wrong, and where that is explained; models that it concerns have a `!` above."""
    if fired := run["alarms"]["fired"]:
        yield "\n".join(f"- {plain(each['stage'])}: {plain(each['text'])}. See {plain(each['page'])}" for each in fired)


def decisions(run: dict) -> Iterator[str]:
    """What a steered loop decided, and why: which round it kept, and where it ended."""
    for decided in run["steering"]:
        if rule := "; ".join(steering.rules(decided)):
            yield f"By its settings {plain(rule)}."
        if decided["said"]:
            yield "\n".join(f"- {plain(each['text'])}" for each in decided["said"])


def pairs(run: dict) -> Iterator[str]:
    """C of each set of pairs."""
    rows = [
        (each["name"], each["method"], each["pairs"], _number(each["c"]["mean"]), _percent(each["c"]["below_half"]),
         _percent(each["labels"] and each["labels"]["right"]))
        for each in run["consistency"]["pairs"]
    ]  # fmt: skip
    if rows:
        yield table(("pairs", "method", "number", "mean C", "C below ½, %", "label accuracy, %"), rows)


def training(run: dict) -> Iterator[str]:
    """The main settings of each training run."""
    settings = {each["path"]: each["settings"] for each in run["lineage"]["outputs"]}
    rows = []
    for each in run["training"]["curves"]:
        own = settings.get(each["folder"], {})
        keys = ("epoch", "lr", "global_batch", "beta", "method", "seed")
        rows.append((each["name"], each["stage"], each["counts"].get("trained_on"), *(own.get(key) for key in keys)))
    if rows:
        columns = ("model", "stage", "examples", "epochs", "learning rate", "batch", "β", "method", "seed")
        yield table(columns, rows)


def origin(run: dict) -> Iterator[str]:
    """Each file, by the beginning of its hash, and what it was made from."""
    found = run["lineage"]
    made_of = {to: [found["nodes"][a]["name"] for a, b in found["edges"] if b == to] for _, to in found["edges"]}
    rows = [
        (node["name"], node["script"], ", ".join(made_of.get(i, [])), (node["hash"] or "")[:HASH])
        for i, node in enumerate(found["nodes"])
    ]
    if rows:
        yield table(("file", "made by", "made from", "xxh3"), rows)


def software(run: dict) -> Iterator[str]:
    """Versions of Python, libraries and this project."""
    versions = dict.fromkeys(
        f"{name} {version}" for each in run["lineage"]["outputs"] for name, version in each["versions"].items()
    )
    if versions:
        yield f"Software: {plain(', '.join(versions))}."


def table(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A table; its cells are plain text."""
    lines = [columns, ["---"] * len(columns), *([plain(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def one_line(value: object) -> str:
    """A value as text on one line, without characters that control how text is shown; nothing for None."""
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def plain(value: object) -> str:
    """The same with nothing in it that is markup."""
    text = one_line(value)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{char}" if char in "\\`*_[]|#!~$" else char for char in text)


def interval(row: dict, scale: float, sign: str = "") -> str:
    """The bounds of a row; nothing where it has none."""
    low, high = (row[key] for key in ("low", "high"))
    return "" if low is None or high is None else f"{scale * low:{sign}.1f} to {scale * high:{sign}.1f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _p(value: float | None) -> str | None:
    return None if value is None else f"{value:.2g}"
