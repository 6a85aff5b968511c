"""A process reward model by next-token prediction: at each step's sign a language model learns "+" or "-" (RLHFlow,
math-rm). Nothing but the signs is trained on, and all steps of a response are one row.

Departures from the released code: every sign that a later step sees is "+", as in scoring, so that no label is
given away (cream/text/steps.py); a label between 0 and 1, a share of completions that succeed, may be trained as it is;
the ends of turns, which say nothing, are no part of the loss.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cream.cli.flags import flag
from cream.errors import UserError
from cream.records import Steps
from cream.text.chat import Chat
from cream.text.steps import MINUS, PLUS, Signs
from cream.text.tokens import Tokens
from cream.training.heldout import HeldOutOptions

if TYPE_CHECKING:
    from torch import Tensor

    from cream.model.batches import Batch

log = logging.getLogger("cream")
RECORDS = (Steps,)
NO_LABEL = "its last step, the whole response's label, has none"


STEP_SPLIT_HELP = (
    "how the responses were split into steps, which orm joins again: as --step_split of rewarding.py; none: as "
    "recorded with the data, else unknown (orm: lines); online_rloo: as recorded with the reward model, else lines"
)


@dataclass
class Options(HeldOutOptions):
    """Signs of steps (prm, orm)"""

    step_labels: str = flag(
        "soft",
        "a label between 0 and 1: soft, both signs by their share; hard, + where it is above 0, as Math-Shepherd's",
        choices=("soft", "hard"),
    )
    step_split: str | None = flag(None, STEP_SPLIT_HELP)


@dataclass(slots=True)
class Example:
    """A response's rows, whose spans are the signs of its labelled steps, and the labels in their order: P(+)."""

    rows: list[Tokens]
    labels: list[float]


class Stage:
    """PRM: a step's loss is the mean over all labelled steps of the global batch."""

    model = "logprobs"
    unit = "signs"
    made_for_policy = False
    reference = None
    label = None

    def __init__(self, options: Options, about: dict):
        self.held_out = options
        options.check()
        recorded = about.get("steps", {}).get("split")
        if options.step_split is not None and recorded not in (None, options.step_split):
            raise UserError(
                f"--step_split {options.step_split}: the data's responses were split by {recorded}; leave the flag out"
            )
        self.hard, self.split = options.step_labels == "hard", options.step_split or recorded
        self.settings: dict[str, object] = {"step_labels": options.step_labels, "step_split": self.split}
        self.settings |= options.settings()
        self.summary = f"steps split by {self.split}" if self.split else ""
        self.about = {"steps": {"split": self.split}}

    def steps(self, record: Steps) -> tuple[list[str], list[float | None]]:
        """What is signed, and its labels."""
        return record.steps, record.labels

    def prepare(
        self, records: Iterable[Steps], chat: Chat, limit: int, dropped: Counter[str]
    ) -> list[tuple[str, Example]]:
        """(uuid, example) of every response of at most `limit` tokens; the others are counted in `dropped`. Raises
        UserError where the model's signs have several tokens."""
        signs, kept = Signs(chat), []
        self.signs = signs.ids
        for record in records:
            steps, labels = self.steps(record)
            rows = signs.encode(record.prompt, steps, limit)
            if isinstance(rows, str) or set(labels) == {None}:
                dropped[rows if isinstance(rows, str) else NO_LABEL] += 1
                continue
            targets = [float(v > 0) if self.hard else v for v in labels if v is not None]
            kept.append((record.uuid, Example(_labelled(rows, labels), targets)))
        return kept

    def facts(self, examples: Sequence[Example]) -> dict[str, object]:
        """How many steps are trained on, and the share of + among them."""
        labels = [label for example in examples for label in example.labels]
        mean, first = sum(labels) / len(labels), examples[0].labels
        log.info("%d signs of %d responses, %.1f %% of them %s", len(labels), len(examples), 100 * mean, PLUS)
        signs = ", ".join(PLUS if label == 1 else MINUS if label == 0 else f"{label:g} {PLUS}" for label in first)
        log.info("each row has %s at all of its signs; the first response is trained to say %s", PLUS, signs)
        return {"signs": len(labels), "mean_label": mean}

    def group(self, example: Example) -> list[Tokens]:
        """The response's rows: one, but for templates that write a turn otherwise once another follows."""
        return example.rows

    def weight(self, example: Example) -> int:
        """Labelled steps."""
        return len(example.labels)

    def loss(self, model, batch: Batch, examples: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed over the labelled steps: -y log π(+) - (1 - y) log π(-), over the whole vocabulary. `accuracy`: steps
        whose likelier sign is the label's; one of 1/2 counts half."""
        import torch

        from cream.model.batches import send
        from cream.model.signs import both_signs

        labels = send(torch.tensor([v for example in examples for v in example.labels]), batch.source.device)
        plus, minus = model(both_signs(batch, self.signs)).view(2, -1).unbind()
        total = -(labels * plus + (1 - labels) * minus).sum()
        right = torch.where(labels == 0.5, 0.5, ((plus > minus) == (labels > 0.5)).float())
        return total, {"loss": total.detach(), "accuracy": right.sum()}

    def check_first(self, metrics: dict[str, float], tolerance: float) -> None:
        """Nothing is known of the first loss."""


def _labelled(rows: Sequence[Tokens], labels: Iterable[float | None]) -> list[Tokens]:
    """The rows of a response with the signs of labelled steps as their spans, up to the last of these."""
    found, kept = iter(labels), []
    for row in rows:
        if spans := [span for span in row.spans if next(found) is not None]:
            kept.append(Tokens(row.ids[: spans[-1][1]], spans))
    return kept
