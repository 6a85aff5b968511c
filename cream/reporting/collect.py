"""All numbers of runs as plain JSON values, and the page that shows them."""

from collections.abc import Sequence

from cream.reporting import page
from cream.reporting.outputs import Run, read_labels, share_outputs
from cream.reporting.sections import accuracy, consistency, lineage, rewards, steering, summary, training

FORMAT = 1  # of the numbers; increased when a key changes its meaning


def collect(runs: Sequence[Run], seed: int = 0) -> dict:
    """The numbers of runs: `summary`, sentences; `runs`, each with its title and a part for each section; `between`,
    paired differences in accuracy between the first run and each other one. `seed`: of the bootstrap intervals."""
    runs = share_outputs(runs)
    labels, alarms = read_labels(runs), [*map(summary.alarms_of, runs)]
    return {
        "report": FORMAT,
        "summary": summary.say(runs, alarms),
        "runs": [
            {
                "title": run.title,
                "alarms": summary.collect(found),
                "accuracy": accuracy.collect(run, seed),
                "steering": steering.collect(run),
                "consistency": consistency.collect(run, labels),
                "rewards": rewards.collect(run, seed),
                "training": training.collect(run, [other for other in runs if other is not run]),
                "lineage": lineage.collect(run),
            }
            for run, found in zip(runs, alarms, strict=True)
        ],
        "between": accuracy.between(runs, seed),
    }


def sections(numbers: dict, preferences: page.Section | None = None) -> list[page.Section]:
    """The sections that have something to show; `preferences` is the only one that is not made of numbers."""
    runs = numbers["runs"]
    found = [summary.show(runs, numbers["summary"]), accuracy.show(runs, numbers["between"])]
    found += [each.show(runs) for each in (steering, consistency, rewards, training)]
    found += [preferences, lineage.show(runs)]
    return [each for each in found if each is not None]
