"""Bradley-Terry reward models: a scalar head at the end of the conversation, trained on preference pairs.

The reward difference of a pair's responses is the log-odds of the preference, P(y+ > y-) = sigma(r(y+) - r(y-))
(R. A. Bradley and M. E. Terry, Biometrika 39, 1952), so that the loss is -log sigma(r(y+) - r(y-)) (arXiv 2203.02155,
eq. 1). Both responses are read as the chat template writes them, over their shared prompt; the head computes in
float32. What is saved is a folder for transformers' AutoModelForSequenceClassification.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cream.cli.flags import flag
from cream.errors import UserError
from cream.records import Pair
from cream.text.chat import Chat, Tokens
from cream.training.heldout import HeldOutOptions

if TYPE_CHECKING:
    from torch import Tensor

    from cream.model.batches import Batch

log = logging.getLogger("cream")
RECORDS = (Pair,)
LOSSES = {"logistic": "sigmoid", "hinge": "hinge"}  # --rm_loss -> its name in cream.losses
SCORES = "scores"
NO_MARGIN = "has no margin (--reward_margin scores)"


@dataclass
class PairOptions(HeldOutOptions):
    """Reward models on preference pairs (bradley_terry, odin)"""

    soft_labels: bool = flag(
        True,
        "a pair's consistency C is the probability that its selected response is the better one, 1/2 for equally good "
        "ones: C L(d) + (1 - C) L(-d) of the reward difference d; no: C = 1 for every pair",
    )
    reward_margin: str | None = flag(
        None,
        "margin m in the loss of d - m: scores (each pair's own, the difference of its scores), or a number for all",
    )
    center_rewards: float = flag(
        0.0, "weight of the mean of (r+ + r-)^2, which keeps rewards near 0 (trl's center_rewards_coefficient)", low=0
    )


@dataclass
class Options(PairOptions):
    """Bradley-Terry reward model (bradley_terry)"""

    rm_loss: str = flag("logistic", "loss of d: logistic, -log sigma(d); hinge, max(0, 1 - d)", choices=tuple(LOSSES))


@dataclass(slots=True)
class Example:
    """A pair's two responses after their shared prompt, its label C, and its margin."""

    chosen: Tokens
    rejected: Tokens
    consistency: float = 1.0
    margin: float = 0.0


class Stage:
    """Bradley-Terry: a step's loss is the mean over all pairs of the global batch."""

    model = "heads"
    unit = "pairs"
    made_for_policy = False
    reference = None
    head = {"outputs": 1, "reads": "last_token"}

    def __init__(self, options: Options, about: dict):
        self.options = self.held_out = o = options
        o.check()
        self.margin = margin_of(o.reward_margin)
        self.label = None if o.rm_loss == "logistic" else o.rm_loss
        self.settings = pair_settings(o) | {"rm_loss": o.rm_loss}
        self.summary = f"loss {o.rm_loss} of reward differences{describe_pairs(o)}"

    def prepare(
        self, records: Iterable[Pair], chat: Chat, limit: int, dropped: Counter[str]
    ) -> list[tuple[str, Example]]:
        """(uuid, example) of every pair whose two conversations fit `limit` tokens; the others are counted in
        `dropped`."""
        kept = []
        for record in records:
            example = self._example(record, chat, limit)
            if isinstance(example, str):
                dropped[example] += 1
            else:
                kept.append((record.uuid, example))
        return kept

    def _example(self, record: Pair, chat: Chat, limit: int) -> Example | str:
        texts = [record.selected[-1].content, record.rejected[-1].content]
        rows = chat.encode_written(record.prompt, texts, limit)
        margin = pair_margin(record) if self.margin == SCORES else self.margin
        if refused := [row for row in rows if isinstance(row, str)]:
            return refused[0]
        if rows[0].ids == rows[1].ids:
            return "both responses are the same"
        if margin is None:
            return NO_MARGIN
        c = 1.0 if record.consistency is None or not self.options.soft_labels else record.consistency
        return Example(*rows, c, margin)

    def facts(self, examples: Sequence[Example]) -> dict[str, object]:
        """How many pairs there are, and with which labels they are trained."""
        used = [example.consistency for example in examples]
        soft, reverse = sum(0 < c < 1 for c in used), sum(c < 0.5 for c in used)
        log.info("%d pairs: %d with a soft label, %d of them below 1/2, in reverse", len(used), soft, reverse)
        return {"pairs": len(used), "soft_labels": soft, "trained_in_reverse": reverse}

    def group(self, example: Example) -> list[Tokens]:
        """The chosen response, then the rejected one."""
        return [example.chosen, example.rejected]

    def weight(self, example: Example) -> int:
        """One pair."""
        return 1

    def loss(self, model, batch: Batch, examples: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed over the pairs."""
        chosen, rejected = model(batch).view(-1, 2).unbind(1)
        return pair_loss(chosen, rejected, examples, self.options, self._loss())

    def _loss(self) -> Callable[[Tensor], Tensor]:
        from cream import losses

        return getattr(losses, LOSSES[self.options.rm_loss])

    def check_first(self, metrics: dict[str, float], tolerance: float) -> None:
        """Nothing is known of a new head's first loss."""


def margin_of(text: str | None) -> str | float:
    """--reward_margin: SCORES or a number. Raises UserError for anything else."""
    if text is None or text == SCORES:
        return text or 0.0
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UserError(f"--reward_margin {text}: expected scores (each pair's own margin) or a number of at least 0")
    return value


def pair_margin(record: Pair) -> float | None:
    """The margin of a pair: its own, or the difference of the scores beside it; None where it has neither."""
    if record.margin is not None:
        return record.margin
    scores = [record.extra.get(f"{name}_score") for name in ("chosen", "rejected")]
    return None if any(not isinstance(score, int | float) for score in scores) else float(scores[0] - scores[1])


def pair_settings(options: PairOptions) -> dict[str, object]:
    """The part of a run's identity that stages on preference pairs share."""
    names = ("soft_labels", "reward_margin", "center_rewards")
    return {name: getattr(options, name) for name in names} | options.settings()


def describe_pairs(options: PairOptions) -> str:
    """The same for the log."""
    parts = [] if options.soft_labels else ["every label C = 1"]
    parts += [] if options.reward_margin is None else [f"margin {options.reward_margin}"]
    parts += [f"centring {options.center_rewards:g}"] if options.center_rewards else []
    return "".join(f", {part}" for part in parts)


def pair_loss(
    chosen: Tensor,
    rejected: Tensor,
    examples: Sequence[Example],
    options: PairOptions,
    loss: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of rewards (B,) each, and metrics, summed over the pairs. A pair counts as right where the sign of its
    reward difference is that of C - 1/2; one with C = 1/2 counts half."""
    import torch

    from cream import losses
    from cream.model.batches import send

    c, margin = send(torch.tensor([(e.consistency, e.margin) for e in examples]), chosen.device).unbind(1)
    values, d = losses.preference_loss(chosen, rejected, 1.0, c, partial(losses.with_margin, margin=margin, loss=loss))
    if options.center_rewards:
        values = values + options.center_rewards * losses.centring(chosen, rejected)
    right = torch.where(c == 0.5, 0.5, (d * (c - 0.5) > 0).float())
    metrics = {"accuracy": right, "margin": d, "reward_chosen": chosen, "reward_rejected": rejected}
    total = values.sum()
    return total, {"loss": total.detach()} | {name: value.detach().sum() for name, value in metrics.items()}
