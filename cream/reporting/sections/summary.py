"""What a run comes to: the sentences in which its loop ends on the terminal, and the alarms of its stages."""

from collections.abc import Sequence
from html import escape

from cream import alarms
from cream.files.provenance import Fired
from cream.loops.alarmed import Alarms
from cream.loops.alarmed import alarms as alarms_of_loop
from cream.loops.made import main_file
from cream.loops.outcome import sentences, where_alarms_sounded
from cream.reporting.outputs import TRAINING, Output, Run
from cream.reporting.page import Section

TITLE = "Summary"


def alarms_of(run: Run) -> Alarms:
    """The alarms of a loop as the terminal has them, by the run's thresholds: those of iterate.py --alarm, of report.py
    the defaults; of other outputs those in their sidecars. Raises UserError where a sidecar or summary is damaged."""
    if run.course is not None:
        finished = {output.path for output in run.outputs if output.finished}
        return alarms_of_loop([each for each in run.course.ran if main_file(each) in finished], run.limits)
    makers = {output.about["output"]: output for output in run.outputs if "output" in output.about}
    fired = [(f"{output.kind or 'output'} {output.name}", each) for output in run.outputs for each in _own(output)]
    concerned = (each for each in run.of("evaluation") if any(map(_own, _made_from(each, makers))))
    return Alarms(fired, {output.name for output in concerned})


def _own(output: Output) -> list[Fired]:
    return output.about.get("alarms", [])


def _made_from(evaluation: Output, makers: dict[str, Output]) -> list[Output]:
    """The outputs that made an evaluation from the model before: its own, the training's, and what that was given,
    without other trainings (as in cream/loops/alarmed.py)."""
    found = [evaluation]
    for output in found:
        made = [makers[digest] for digest in output.about.get("inputs", {}).values() if digest in makers]
        found += [each for each in made if each not in found and (each.kind != TRAINING or output is evaluation)]
    return found


def collect(found: Alarms) -> dict:
    """The alarms of a run: `fired`, each with its stage, what it says and the page that explains it; the `models` that
    they concern."""
    fired = [
        {"stage": stage, **each, "text": alarms.describe(each), "page": alarms.page(each)}
        for stage, each in found.fired
    ]
    return {"fired": fired, "models": sorted(found.models)}


def say(runs: Sequence[Run], found: Sequence[Alarms]) -> list[str]:
    """The sentences: of finished loops as on the terminal; else which runs have not finished, and whether an alarm
    sounded."""
    titles = [run.title for run in runs]
    if all(run.course is not None and not run.left for run in runs):
        return [*sentences([run.course for run in runs], found)]
    left = [f"{len(run.left)} of {len(run.planned)} stages of {run.title}" for run in runs if run.left]
    return [*([f"Not finished: {', '.join(left)}."] if left else []), where_alarms_sounded(titles, found)]


def show(runs: Sequence[dict], said: Sequence[str]) -> Section:
    """The section: the sentences, and a list of alarms, those that several runs share once."""
    shared: dict[tuple[str, str, str], list[str]] = {}
    for run in runs:
        for each in run["alarms"]["fired"]:
            shared.setdefault((each["stage"], each["text"], each["page"]), []).append(run["title"])
    html = [f"<p>{escape(text)}</p>" for text in said]
    items = [
        f"<li><strong>{escape(', '.join([*titles, stage] if len(runs) > 1 else [stage]))}</strong>: {escape(text)}. "
        f'<span class="soft">See {escape(page)}</span></li>'
        for (stage, text, page), titles in shared.items()
    ]
    html += [f'<ul aria-label="Alarms">{"".join(items)}</ul>'] if items else []
    return Section("summary", TITLE, "\n".join(html))
