"""Facts of a step: the numbers that its output's summary or sidecar holds, by which a loop is steered.

A fact is named by the step's id, and optionally which of its numbers is meant:

evaluation (infer.py)     ID: accuracy, the macro average of several tasks; ID.TASK; ID.FIELD and ID.TASK.FIELD, a field
                          of the summary: accuracy, unanswered_rate, truncated_rate, mean_tokens …
evaluate_reward.py        ID: the benchmark's score, else the accuracy over all pairs; ID.PATH, a place in the summary
training                  ID.METRIC: of the last step (loss, margin, kl, eval_accuracy …), or a count (mean_c …)
sampling                  ID.mean_tokens, and shares of responses: ID.truncated, ID.distinct
pairs                     ID: their number; ID.below_half, the share with C < 1/2; ID.mean_consistency …
any other                 ID.PATH, a place in the sidecar
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cream.errors import UserError, nearest
from cream.evaluation.compare import compare, join
from cream.evaluation.evaluate import summary_path
from cream.evaluation.statistics import COUNTS, RATES, THOUGHTS, interval_of_mean
from cream.evaluation.tasks import TASKS, is_all_test, questions_in
from cream.files import store
from cream.files.provenance import meta_path
from cream.loops.plan import INFER, MEASURE, PAIRS, TRAIN, Command
from cream.records import Answer, Pair, Samples

FIELDS = (*COUNTS, *RATES, *THOUGHTS)  # of a row of an evaluation's summary
SHARES = ("accuracy", "_rate", "truncated", "distinct", "below_half")  # endings of what is shown in percent
SAMPLED = ("mean_tokens", "truncated", "distinct")
INSIDE = ("", "last", "counts", "table")  # parts of a sidecar whose numbers need no longer name
MEASURED = ("score", "score_of_this_subset", "all", "sections", "prior", "subsets", "length_groups", "calibration")
MEASURED += ("length", "best_of_n", "unrewarded", "rows", "responses")  # parts of a summary of evaluate_reward.py

DAMAGED = "damaged, or another kind of file; run its stage again with --overwrite"


class Fact(NamedTuple):
    """A number, with its 95 % interval where it has one; `share`: whether it is shown in percent."""

    value: float
    low: float | None = None
    high: float | None = None
    share: bool = False

    def __str__(self) -> str:
        text = self.spell(self.value) + " %" * self.share
        return text if self.low is None else f"{text} [{self.spell(self.low)}, {self.spell(self.high)}]"

    def spell(self, value: float, sign: str = "") -> str:
        """A value of this kind as text."""
        return f"{100 * value:{sign}.1f}" if self.share else f"{value:{sign}.4g}"


# Names ----------------------------------------------------------------------------------------------------------------


def split(name: str, ids: Collection[str]) -> tuple[str, str]:
    """(step's id, which of its facts) of a name. Raises ValueError where no step has such an id."""
    found = [each for each in ids if name == each or name.startswith(f"{each}.")]
    if not found:
        raise ValueError(f"no step has the id {name}{nearest(name, ids)}")
    step = max(found, key=len)
    return step, name[len(step) + 1 :]


def refusal(command: Command, path: str, data: Callable[[str], Path]) -> str | None:
    """Why a step has no such fact, as far as this is known before it runs. `data`: the file of a data set's name."""
    kind, known = _kind(command), None
    if kind == "evaluation":
        task = path.rpartition(".")[0] if path.rpartition(".")[2] in FIELDS else path
        if task not in ("", "macro") and (tasks := _tasks(command, data)) and task not in tasks:
            known = [*tasks, *FIELDS]
    elif kind == "measured" and path and path.partition(".")[0] not in MEASURED:
        known = MEASURED
    elif kind == "sampling" and path not in SAMPLED:
        known = SAMPLED
    elif kind == "training" and path.startswith("eval_") and not command.flags.keys() & {"eval_name", "eval_share"}:
        return f"{path}: the step holds no records out; --eval_name or --eval_share does"
    elif kind in ("training", "other") and not path:
        return f"which of its facts is missing: {command.step}.NAME"
    return known and f"it has no fact {path or 'without a name'}{nearest(path, known)}; known: {', '.join(known)}"


def _tasks(command: Command, data: Callable[[str], Path]) -> list[str]:
    """The tasks of an evaluation's data; [] where these cannot be read yet."""
    with suppress(UserError, OSError):
        path = data(str(command.flags.get("name")))
        if is_all_test(path):
            return list(TASKS)
        return list(dict.fromkeys(item.task for item in store.read(path, questions_in(path))))
    return []


def _kind(command: Command) -> str:
    mode = command.flags.get("mode", "sampling")
    if command.script == INFER:
        return mode if mode in ("evaluation", "sampling") else "other"
    return {TRAIN: "training", MEASURE: "measured", **dict.fromkeys(PAIRS, "pairs")}.get(command.script, "other")


# Numbers --------------------------------------------------------------------------------------------------------------


def read(command: Command, path: str) -> Fact:
    """A fact of a step that has run. Raises UserError where it has no such fact."""
    kind, place = _kind(command), source(command)
    if kind == "pairs" and path == "below_half":
        return _below_half(command.output)
    if kind == "sampling" and path in SAMPLED:
        return _sampled(command.output, path)
    about = store.read_json(place)
    if not isinstance(about, dict):
        raise UserError(f"{place}: {DAMAGED}")
    if kind == "evaluation":
        try:
            found = _of_evaluation(about, path)
        except (AttributeError, KeyError, TypeError, StopIteration):
            raise UserError(f"{place}: {DAMAGED}") from None
    elif kind == "measured" and not path:
        found = next((_at(about, name) for name in ("score", "score_of_this_subset", "all") if name in about), None)
    else:
        inside = [about.get(name, {}) if name else about for name in INSIDE]
        found = next(filter(None, (_at(each, path or "out") for each in inside if isinstance(each, dict))), None)
    if found is None:
        parts = [each for name in INSIDE if isinstance(each := about.get(name, {}) if name else about, dict)]
        known = sorted({name for each in parts for name, value in each.items() if _number(value) is not None})
        if kind == "evaluation":
            known = [*(row["task"] for row in about["tasks"]), *FIELDS]
        raise UserError(f"{place} has no number {path!r}{nearest(path, known)}; it has {', '.join(known) or 'none'}")
    return found


def source(command: Command) -> Path:
    """The file that has a step's facts."""
    if (kind := _kind(command)) == "evaluation":
        return summary_path(command.output)
    if kind != "measured":
        return meta_path(command.output)
    found = sorted(command.output.glob("*.summary.json"))
    if len(found) != 1:
        raise UserError(f"{command.output}: expected one summary of evaluate_reward.py there, found {len(found)}")
    return found[0]


def difference(before: Command, now: Command, path: str) -> Fact | None:
    """How far a metric moved between two evaluations of the same items, with its paired interval; None of others."""
    task, _, field = path.rpartition(".") if path.rpartition(".")[2] in FIELDS else (path, "", "accuracy")
    if {_kind(before), _kind(now)} != {"evaluation"} or field != "accuracy":
        return None
    rows = compare(join(*(store.read(command.output, Answer) for command in (before, now))))
    rows = {row["task"]: row for row in rows}
    row = rows.get(task or "macro") or next(iter(rows.values()))
    return Fact(row["difference"], row["low"], row["high"], share=True)


def _of_evaluation(summary: Mapping, path: str) -> Fact | None:
    rows = {row["task"]: row for row in summary["tasks"]}
    task, _, field = path.rpartition(".") if path.rpartition(".")[2] in FIELDS else (path, "", "accuracy")
    row = rows.get(task) if task else rows.get("macro") or next(iter(rows.values()))
    value = None if row is None else _number(row["accuracy"] if field == "accuracy" else row.get(field))
    if value is None:
        return None
    low, high = (row["low"], row["high"]) if field == "accuracy" else (None, None)
    if field == "accuracy" and low is None:  # the mean over tasks
        low, high = interval_of_mean(summary["tasks"])
    return Fact(value, low, high, field.endswith(SHARES) and field not in COUNTS)


def _at(about: Mapping, path: str) -> Fact | None:
    """The number at a place in a file, its keys joined by dots; of a map of estimates the first."""
    value, name = about, path
    while name:
        key = max((key for key in value if name == key or name.startswith(f"{key}.")), key=len, default=None)
        if key is None:
            return None
        holder, value, name = value, value[key], name[len(key) + 1 :]
        if name and not isinstance(value, Mapping):
            return None
    while isinstance(value, Mapping) and "value" not in value and value:
        value = next(iter(value.values()))
    share = path.endswith(SHARES)
    if isinstance(value, Mapping):
        number = _number(value.get("value"))
        share |= path.partition(".")[0] in MEASURED[:6]
        return None if number is None else Fact(number, value.get("low"), value.get("high"), share)
    bounds = (_number(holder.get(f"{key}_{end}")) for end in ("low", "high"))
    return None if _number(value) is None else Fact(float(value), *bounds, share)


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _below_half(pairs: Path) -> Fact:
    known = [pair.consistency for pair in store.read(pairs, Pair) if pair.consistency is not None]
    if not known:
        raise UserError(f"{pairs}: no pair has a C, hence no share with C < 1/2")
    return Fact(sum(c < 0.5 for c in known) / len(known), share=True)


def _sampled(samples: Path, path: str) -> Fact:
    """By the samples themselves, whatever the version that drew them."""
    responses = tokens = distinct = truncated = 0
    for record in store.read(samples, Samples):
        responses += len(record.responses)
        distinct += len({*record.responses})
        tokens += sum(record.num_tokens or ())
        truncated += (record.finish_reason or []).count("length")
    sums = {"mean_tokens": tokens, "distinct": distinct, "truncated": truncated}
    return Fact(sums[path] / max(1, responses), share=path != "mean_tokens")
