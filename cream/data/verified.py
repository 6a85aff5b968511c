"""Responses in steps with labels, of a model's own samples: what process and outcome reward models are trained on.

What is known of a response is its outcome, the reward of gold labels: the label of its last step, and of the whole. In
the tiny world each step can be checked (cream/tiny/problems.py). Steps that others labelled are imported instead.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cream.cli.flags import flag
from cream.cli.screen import say_result
from cream.errors import UserError
from cream.files import journal, store
from cream.records import Record, Rewards, Samples, Steps, encode, nouns
from cream.text.steps import NO_STEPS, SPLIT_HELP, split_steps
from cream.text.thoughts import final_text
from cream.tiny import problems

log = logging.getLogger("cream")
REPEATED = "equals another response to its prompt"
NO_REWARD = "has no reward"
Labels = Callable[[Record, Sequence[str], float | None], list[float | None]]


@dataclass
class VerifiedFlags:
    """Steps of samples (steps)"""

    step_split: str = flag("lines", f"steps: {SPLIT_HELP}")
    step_labeller: str = flag(
        "outcome",
        "steps: outcome, the reward of a response (--reward labels) as the label of its last step, the others have "
        "none; tiny, each step of a solution to a problem of the tiny world is checked",
        choices=("outcome", "tiny"),
    )


def by_outcome(record: Record, steps: Sequence[str], reward: float | None) -> list[float | None]:
    """The reward for the last step. Raises UserError where it is no probability of being right."""
    if not 0 <= reward <= 1:
        raise UserError(
            f"record {record.uuid!r}: the reward {reward:g} is no probability that a response is right, from 0 to 1; "
            "reward the samples with rewarding.py --reward labels"
        )
    return [None] * (len(steps) - 1) + [reward]


def by_problem(record: Record, steps: Sequence[str], reward: float | None) -> list[float | None]:
    """1 for each right step, 0 for each wrong one, of a problem of the tiny world. Raises UserError for others."""
    labels = problems.check_steps(record.prompt[-1].content, steps)
    if labels is None:
        raise UserError(f"record {record.uuid!r}: --step_labeller tiny knows the problems of the tiny world alone")
    return labels


LABELLERS: dict[str, Labels] = {"outcome": by_outcome, "tiny": by_problem}


def label_responses(record: Samples | Rewards, split: str, labeller: str, dropped: Counter[str]) -> Iterator[Steps]:
    """Each different response of a record that has a label, its final text in steps; the others are counted."""
    texts = record.responses() if isinstance(record, Rewards) else record.responses
    rewards = record.reward if isinstance(record, Rewards) else [None] * len(texts)
    opened, seen = getattr(record, "thought_opened", False), set()
    for i, (text, reward) in enumerate(zip(texts, rewards, strict=True)):
        steps = tuple(split_steps(final_text(text, opened=opened) or "", split))
        why = NO_STEPS if not steps else REPEATED if steps in seen else None
        if why is None and labeller == "outcome" and reward is None:
            why = NO_REWARD
        seen.add(steps)
        if why:
            dropped[why] += 1
            continue
        labels = LABELLERS[labeller](record, steps, reward)
        prompt = record.source_prompt or record.prompt
        yield Steps(uuid=f"{record.uuid}#{i}", prompt=prompt, steps=list(steps), labels=labels)


def make(path: Path, flags: VerifiedFlags, output: Path, run) -> None:
    """Write the steps of the responses in `path` to `output`. `run`: the script's flags of that name.

    Raises UserError where there are no responses, or nothing by which to label them.
    """
    kind = store.detect(path, skip=run.skip)
    if kind not in (Rewards, Samples) or (kind is Samples and flags.step_labeller == "outcome"):
        more = ", or with --step_labeller tiny its input" if kind is Samples else ""
        raise UserError(f"steps: {path} holds {nouns(kind)}; give what rewarding.py --reward labels writes{more}")
    provenance = run.provenance()
    provenance.output("responses", path)
    settings = {"step_split": flags.step_split, "step_labeller": flags.step_labeller}
    settings |= {"on_bad_record": run.on_bad_record}
    written = journal.Output(output, settings, provenance, overwrite=run.overwrite)
    if written.up_to_date:
        say_result("%s is up to date (same settings and inputs); skipping", output)
        return
    dropped: Counter[str] = Counter()
    made = [
        steps
        for record in store.read(path, kind, skip=run.skip)
        for steps in label_responses(record, flags.step_split, flags.step_labeller, dropped)
    ]
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not made:
        raise UserError(f"{path}: no response is left to label ({reasons})")
    _describe(made, reasons)
    if run.dry_run:
        log.info("dry run: would write %s; nothing was written", output)
        return
    with written:
        if run.skip:
            written.reject(store.rejected(path, kind))
        written.dropped += dropped
        written.finish(map(encode, made), steps={"split": flags.step_split})
    say_result("%s: %d responses", output, len(made))
    log.info("next, train a model on it, prm for each step, orm for whole responses:")
    log.info("  python train.py --train_stage prm --checkpoint SFT --name %s", output)


def _describe(made: Sequence[Steps], reasons: str) -> None:
    labels = [label for each in made for label in each.labels if label is not None]
    share = 100 * sum(labels) / len(labels)
    log.info("%d responses in %d steps, %d labelled", len(made), sum(len(each.steps) for each in made), len(labels))
    log.info("%.1f %% of the labelled are right%s", share, f"; dropped: {reasons}" if reasons else "")
