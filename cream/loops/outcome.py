"""What a loop says in words: what came of a step, in a line, and what the table of results shows."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

from cream.errors import UserError
from cream.files.provenance import read_meta
from cream.loops import facts
from cream.loops.alarmed import Alarms
from cream.loops.course import Course
from cream.loops.facts import Fact
from cream.loops.plan import INFER, MEASURE, PAIRS, PREPARE, TRAIN, Command
from cream.loops.results import evaluations, is_evaluation, model_name

METRICS = ("loss", "accuracy", "reward", "kl_reference", "eval_loss", "eval_accuracy")  # of a training's last step
SAID = {"accuracy": "training accuracy", "eval_accuracy": "held-out accuracy", "eval_loss": "held-out loss"}


def outcome(command: Command) -> str:
    """What came of a step that has run, by its files; "done" where they do not say it."""
    with suppress(UserError, OSError, LookupError, TypeError, ValueError, AttributeError):
        return ", ".join(_parts(command, read_meta(command.output) or {})) or "done"
    return "done"


def _parts(command: Command, about: dict) -> Iterator[str]:
    counts = about.get("counts", {})
    if is_evaluation(command) or command.script == MEASURE:
        fact = facts.read(command, "")
        yield f"accuracy {_with_interval(fact)}" if fact.share else f"score {_with_interval(fact)}"
    if is_evaluation(command):
        yield f"{counts['out']} questions"
        for name in ("unanswered", "truncated"):
            if share := facts.read(command, f"{name}_rate").value:
                yield f"{100 * share:.1f} % {name}"
    elif command.script == TRAIN:
        if "trained_on" in counts:
            yield f"trained on {counts['trained_on']} records"
        for name in (name for name in METRICS if name in about.get("last", {})):
            value = about["last"][name]
            number = f"{100 * value:.1f} %" if name.endswith("accuracy") else f"{value:.4g}"
            yield f"{SAID.get(name, name)} {number}"
    elif command.script in PAIRS:
        yield f"{counts['out']} pairs"
        if (mean := about.get("mean_consistency")) is not None:
            yield f"mean C {mean:.3f}"
        if none := sum(counts["dropped"].values()):
            yield f"without a pair: {none} prompt{'s' * (none > 1)}"
    elif sampled := about.get("sampled"):
        yield f"{sampled['responses']} responses to {counts['out']} prompts"
        yield f"{sampled['distinct']} distinct, {sampled['truncated']} truncated"
    elif rewarded := about.get("rewarded"):
        yield from _rewards(rewarded, about.get("reuse", {}), counts["out"])
    elif command.script != MEASURE:
        yield f"{counts['out']} {'records' if command.script == PREPARE else 'prompts'}"
        if dropped := sum(counts["dropped"].values()):
            yield f"{'dropped' if command.script in (INFER, PREPARE) else 'responses without a reward'}: {dropped}"


def _rewards(rewarded: dict, reuse: dict, prompts: int) -> Iterator[str]:
    yield f"{rewarded['responses']} responses to {prompts} prompts"
    if none := rewarded["responses"] - rewarded["rewarded"]:
        yield f"{none} without a reward"
    if (mean := rewarded["mean"]) is not None:
        yield f"mean reward {mean:.4g}"
    if tied := rewarded["tied"]:
        yield f"{100 * tied:.1f} % tied"
    if scores := sum(sum(each.values()) for each in reuse.values()):
        cached = sum(each.get("cached", 0) for each in reuse.values())
        yield f"{cached} of {scores} scores from the cache"


def _with_interval(fact: Fact) -> str:
    text = f"{fact.spell(fact.value)}{' %' * fact.share}"
    return text if fact.low is None else f"{text}, 95 % interval {fact.spell(fact.low)} to {fact.spell(fact.high)}"


def sentences(courses: Sequence[Course], found: Sequence[Alarms]) -> Iterator[str]:
    """What the table shows: where each loop ended, what C was, and whether an alarm sounded."""
    ends = [(course, end) for course in courses if (end := _end(course))]
    if len(ends) > 1 and all(_are_alike(ends[0][1], end) for _, end in ends):
        yield from _ranking(ends)
    else:
        for each in ends:
            yield from _gain(*each)
    means = [
        f"{course.loop.title} {' -> '.join(f'{c:.2f}' for _, c in known)}"
        for course in courses
        if (known := _means_of_c(course.results()))
    ]
    if means:
        yield f"Mean C, how far the two last models rank alike (1 fully, 0.5 by chance): {'; '.join(means)}."
    yield where_alarms_sounded([course.loop.title for course in courses], found)


def where_alarms_sounded(titles: Sequence[str], found: Sequence[Alarms]) -> str:
    """In a sentence, the stages with an alarm; of several loops with the title of each."""
    where = [
        f"{f'{title}, ' * (len(titles) > 1)}{stage}"
        for title, each in zip(titles, found, strict=True)
        for stage in dict.fromkeys(stage for stage, _ in each.fired)
    ]
    return f"Alarms (!): {'; '.join(where)}." if where else "No alarm sounded."


def _means_of_c(rows: Sequence[dict]) -> list[tuple[int | None, float]]:
    """The size and the mean C of each set of pairs in the table, once: a model that is measured twice, as the best one
    is, repeats them. Pseudo-labels have a probability in place of C."""
    known = ((row.get("pairs"), row.get("consistency")) for row in rows if "kept %" not in row.get("shown", {}))
    return [*dict.fromkeys(each for each in known if each[1] is not None)]


def _end(course: Course) -> Command | None:
    """The evaluation of a loop's result: of the best model where it keeps that, on a test set of its own if there is
    one; else of the last model."""
    if course.best and is_evaluation(course.best.command):
        return course.tested or course.best.command
    return next(reversed(evaluations(course.ran)), None)


def _ranking(ends: Sequence[tuple[Course, Command]]) -> Iterator[str]:
    """The loop that ended highest, against the one that ended lowest."""
    with suppress(UserError, OSError, ValueError):
        ranked = sorted(ends, key=lambda each: facts.read(each[1], "").value, reverse=True)
        (high, top), (low, bottom) = ranked[0], ranked[-1]
        rest = _against(low, bottom, top, low.loop.title)
        yield f"{high.loop.title} ended highest: {_named(high, top)}{rest}{_chosen_by(high)}."


def _gain(course: Course, end: Command) -> Iterator[str]:
    """What a loop gained on the first model that it evaluated on the same questions."""
    with suppress(UserError, OSError, ValueError):
        first = next(each for each in evaluations(course.ran) if _are_alike(each, end))
        rest = _against(course, first, end) if first is not end else ""
        yield f"{course.loop.title} ended with {_named(course, end)}{rest}{_chosen_by(course)}."


def _are_alike(one: Command, other: Command) -> bool:
    """Whether two evaluations are of the same questions, in the same way."""
    return all(one.flags.get(name) == other.flags.get(name) for name in ("name", "gen_n", "scoring", "few_shot"))


def _named(course: Course, evaluation: Command) -> str:
    fact, best = facts.read(evaluation, ""), course.best
    if best and evaluation is course.tested:
        return f"{model_name(best.command)} at {fact.spell(fact.value)} % on {evaluation.flags['name']}"
    return f"{model_name(evaluation)} at {fact.spell(fact.value)} %"


def _chosen_by(course: Course) -> str:
    """By which data the result was chosen, whose accuracy there is flattering; "" where nothing was."""
    if not course.best or not is_evaluation(course.best.command):
        return ""
    fact, data = course.best.fact, course.best.command.flags.get("name")
    if not course.tested:
        return f", chosen on the same questions ({data})"
    return f", chosen by {data} ({fact.spell(fact.value)} % there)"


def _against(course: Course, other: Command, one: Command, title: str = "") -> str:
    """How far one model is from another one, of `course`, with the paired interval; "" where that is not to be had."""
    if not _are_alike(one, other):
        return ""
    moved = facts.difference(other, one, "")
    low, high = moved.spell(moved.low, "+"), moved.spell(moved.high, "+")
    above = "above" if moved.value >= 0 else "below"
    unclear = ", which says nothing about which is better" * (moved.low <= 0 <= moved.high)
    text = f", {moved.spell(abs(moved.value))} points {above} {title} {_named(course, other)}".replace("  ", " ")
    return f"{text} (95 % interval of the difference {low} to {high}{unclear})"
