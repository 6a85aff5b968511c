"""Two evaluations of the same items: how far their accuracies differ, how sure that is, and which items flipped."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from cream.cli.flags import flag
from cream.errors import UserError
from cream.evaluation.statistics import aligned, bootstrap_difference, mcnemar
from cream.files.identity import list_differences
from cream.records import Answer

COLUMNS = ("task", "n", "accuracy_a", "accuracy_b", "difference", "low", "high", "only_a", "only_b", "p")
FEW = 5  # flipped items; with fewer the bootstrap interval is too narrow
SHORT = 200  # characters of a question or a response beside another
ONE_DATA = "only evaluations of the same data can be compared"


@dataclass
class CompareFlags:
    """compare"""

    show: int = flag(5, "print this many flipped items per direction", low=0)


@dataclass(frozen=True)
class Joined:
    """The items that both evaluations hold, in A's order, each with its task and both records; the uuids that only one
    of them holds; how many questions were put differently."""

    items: list[tuple[str, Answer, Answer]]
    only_a: list[str]
    only_b: list[str]
    reworded: int

    def flipped(self) -> list[tuple[str, Answer, Answer]]:
        """Those that one has right and the other wrong."""
        return [item for item in self.items if item[1].correct != item[2].correct]


def join(a: Iterable[Answer], b: Iterable[Answer]) -> Joined:
    """Two evaluations by uuid. An item's task is the one its records name; "all" where neither does (files of the
    released code).

    Raises UserError where an item's labels differ, or its questions by more than text around them (--sysprompt), and
    where no item is in both.
    """
    others = {answer.uuid: answer for answer in b}
    items, only_a, reworded = [], [], 0
    for answer in a:
        if (other := others.pop(answer.uuid, None)) is None:
            only_a.append(answer.uuid)
            continue
        labels = str(answer.label).strip(), str(other.label).strip()
        if labels[0] != labels[1]:
            raise UserError(f"item {answer.uuid!r} has the label {labels[0]!r} in A and {labels[1]!r} in B; {ONE_DATA}")
        if answer.question not in other.question and other.question not in answer.question:
            asked = f"{_short(answer.question)!r} in A and {_short(other.question)!r} in B"
            raise UserError(f"item {answer.uuid!r} asks {asked}; {ONE_DATA}")
        reworded += answer.question != other.question
        items.append((answer.task or other.task or "all", answer, other))
    if not items:
        raise UserError(f"no uuid is in both files (A has {len(only_a)} items, B {len(others)}); {ONE_DATA}")
    return Joined(items, only_a, list(others), reworded)


def describe_settings(joined: Joined, settings_a: dict | None, settings_b: dict | None) -> list[str]:
    """In what two evaluations differ beside the model: a reader should know before the numbers. Settings are those of
    their sidecars, None without one."""
    notes = [
        f"{len(only)} items are only in {name} and skipped: {', '.join(only[:3])}{' …' if len(only) > 3 else ''}"
        for name, only in (("A", joined.only_a), ("B", joined.only_b))
        if only
    ]
    if joined.reworded:
        notes.append(f"{joined.reworded} questions were put with another text around them (--sysprompt)")
    a, b = settings_a or {}, settings_b or {}
    both = a.keys() & b.keys()  # a file that was graded again has none of its generation's
    if differing := list_differences(*({key: made[key] for key in both} for made in (a, b))):
        notes.append(f"made by other settings, A -> B: {differing}")
    return notes


def compare(joined: Joined, seed: int = 0) -> list[dict]:
    """One row per task, in order of appearance. Keys: COLUMNS.

    Accuracies are in [0, 1]; `difference` is B's minus A's, `low` and `high` its 95 % bootstrap interval; `only_a` and
    `only_b` count the items that only one has right, `p` is McNemar's exact test of them. Several tasks get two more
    rows: "macro", the unweighted mean over tasks, without p, and "all items", every item counting the same.
    """
    tasks: dict[str, list[tuple[bool, bool]]] = {}
    for task, a, b in joined.items:
        tasks.setdefault(task, []).append((a.correct, b.correct))
    counts = {task: _counts(outcomes) for task, outcomes in tasks.items()}
    rows = [_row(task, tasks[task], [counts[task]], seed) for task in tasks]
    if len(rows) > 1:
        everything = [outcome for outcomes in tasks.values() for outcome in outcomes]
        macro = _row("macro", everything, list(counts.values()), seed)
        macro |= {key: fmean(row[key] for row in rows) for key in ("accuracy_a", "accuracy_b", "difference")}
        rows += [macro | {"p": None}, _row("all items", everything, [_counts(everything)], seed)]
    return rows


def _counts(outcomes: Sequence[tuple[bool, bool]]) -> tuple[int, int, int]:
    """(only A right, only B right, all)."""
    return outcomes.count((True, False)), outcomes.count((False, True)), len(outcomes)


def _row(task: str, outcomes: Sequence[tuple[bool, bool]], counts: Sequence[tuple[int, int, int]], seed: int) -> dict:
    """The row of some items; its interval is that of the mean over `counts`, one per task."""
    only_a, only_b, n = _counts(outcomes)
    right_a, right_b = (sum(each) for each in zip(*outcomes, strict=True))
    low, high = bootstrap_difference(counts, seed=seed)
    values = (task, n, right_a / n, right_b / n, (only_b - only_a) / n, low, high, only_a, only_b)
    return dict(zip(COLUMNS, (*values, mcnemar(only_a, only_b)), strict=True))


def format_comparison(rows: Sequence[Mapping]) -> str:
    """The rows of `compare` as a plain fixed-width table; accuracies in percent, differences in points."""
    lines = [["task", "n", "A %", "B %", "B - A", "95 % interval", "only A right", "only B right", "McNemar p"]]
    for row in rows:
        accuracies = [f"{100 * row[key]:.1f}" for key in ("accuracy_a", "accuracy_b")]
        difference, low, high = (f"{100 * row[key]:+.1f}" for key in ("difference", "low", "high"))
        flips = [str(row["only_a"]), str(row["only_b"])]
        p = "" if row["p"] is None else f"{row['p']:.2g}"
        lines.append([row["task"], str(row["n"]), *accuracies, difference, f"{low} to {high}", *flips, p])
    few = ", ".join(row["task"] for row in rows if row["only_a"] + row["only_b"] < FEW)
    note = f"\nfewer than {FEW} items flipped in {few}: its interval is too narrow, go by McNemar's p" if few else ""
    return aligned(lines) + note


def format_flips(flipped: Sequence[tuple[str, Answer, Answer]], show: int) -> str:
    """The first `show` items that only A has right, then those that only B has, both responses below each question."""
    lines = []
    for name, right in (("A", lambda a, b: a.correct), ("B", lambda a, b: b.correct)):
        some = [(task, a, b) for task, a, b in flipped if right(a, b)]
        shown = some[:show]
        lines.append(f"only {name} right: {len(some)} items{f', the first {len(shown)}' * (len(shown) < len(some))}")
        for task, a, b in shown:
            lines += [f"  {a.uuid} ({task}): {_short(a.question)}", f"    label {a.label}"]
            for each, answer in (("A", a), ("B", b)):
                lines.append(f"    by {each}: {answer.final_prediction}; response: {_short(_voting(answer), end=True)}")
    return "\n".join(lines)


def flip_row(task: str, a: Answer, b: Answer) -> dict:
    """A flipped item as a line of a file: the item, itself evaluation data, and both outcomes.

    `responses` of each is the text that gave its `final_prediction`.
    """
    outcomes = {
        name: {"correct": answer.correct, "final_prediction": answer.final_prediction, "responses": _voting(answer)}
        for name, answer in (("a", a), ("b", b))
    }
    grader = {"grader": a.grader} if a.grader else {}
    return {"uuid": a.uuid, "question": a.question, "label": a.label, "task": task, **grader, **outcomes}


def _voting(answer: Answer) -> str:
    """Its text; of several the first whose prediction is the vote."""
    if answer.final_prediction not in (answer.all_predictions or ()):
        return answer.responses
    return answer.all_responses[answer.all_predictions.index(answer.final_prediction)]


def _short(text: str, end: bool = False) -> str:
    """A text on one line; of a long one its beginning, or its `end`, where its answer is."""
    words = " ".join(text.split())
    if len(words) <= SHORT:
        return words
    return f"… {words[-SHORT:]}" if end else f"{words[:SHORT]} …"
