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


@dataclass
class Options(PairOptions):
    """Reward models on preference pairs (bradley_terry, odin)"""

    center_rewards: float = flag(
        0.0,
        "bradley_terry: weight of the mean of (r+ + r-)^2, which keeps rewards near 0 (trl's "
        "center_rewards_coefficient)",
        low=0,
    )
    rm_loss: str = flag(
        "logistic",
        "bradley_terry: loss of the reward difference d: logistic, -log sigma(d); hinge, max(0, 1 - d)",
        choices=tuple(LOSSES),
    )


@dataclass(slots=True)
class Example:
    """A pair's two responses after their shared prompt, its label C, and its margin."""

    chosen: Tokens
    rejected: Tokens
    consistency: float = 1.0
    margin: float = 0.0


class PairStage:
    """What stages on preference pairs share: a step's loss is the mean over all pairs of the global batch."""

    model = "heads"
    unit = "pairs"
    made_for_policy = False
    reference = None

    def __init__(self, options: PairOptions, **settings: object):
        self.options = self.held_out = o = options
        o.check()
        self.margin = margin_of(o.reward_margin)
        shared = {"soft_labels": o.soft_labels, "reward_margin": o.reward_margin} | o.settings()
        self.settings = shared | settings
        labels = "" if o.soft_labels else ", every label C = 1"
        self.summary = labels + (f", margin {o.reward_margin}" if self.margin else "")

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

    def check_first(self, metrics: dict[str, float], tolerance: float) -> None:
        """Nothing is known of a new head's first loss."""


class Stage(PairStage):
    """Bradley-Terry: one output, the reward."""

    head = {"outputs": 1, "reads": "last_token"}

    def __init__(self, options: Options, about: dict):
        super().__init__(options, rm_loss=options.rm_loss, center_rewards=options.center_rewards)
        self.label = None if options.rm_loss == "logistic" else options.rm_loss
        centring = f", centring {options.center_rewards:g}" if options.center_rewards else ""
        self.summary = f"loss {options.rm_loss} of reward differences{centring}{self.summary}"

    def loss(self, model, batch: Batch, examples: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed over the pairs."""
        from cream import losses

        chosen, rejected = model(batch).view(-1, 2).unbind(1)
        values, metrics = pair_loss(chosen, rejected, examples, getattr(losses, LOSSES[self.options.rm_loss]))
        if self.options.center_rewards:
            values = values + self.options.center_rewards * losses.centring(chosen, rejected)
        metrics |= right(chosen - rejected, examples) | {"reward_chosen": chosen, "reward_rejected": rejected}
        return values.sum(), summed({"loss": values} | metrics)


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


def pair_loss(
    chosen: Tensor, rejected: Tensor, examples: Sequence[Example], loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair's rewards, (B,), by its label and margin; its difference as metric."""
    from cream import losses

    c, margin = _column(examples, "consistency", chosen), _column(examples, "margin", chosen)
    with_margin = partial(losses.with_margin, margin=margin, loss=loss)
    values, differences = losses.preference_loss(chosen, rejected, 1.0, c, with_margin)
    return values, {"margin": differences}


def right(differences: Tensor, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Whether the sign of each pair's reward difference, (B,), is that of C - 1/2; a pair with C = 1/2 counts half."""
    import torch

    sign = _column(examples, "consistency", differences) - 0.5
    return {"accuracy": torch.where(sign == 0, 0.5, (differences * sign > 0).float())}


def summed(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their sums over the pairs, without gradients."""
    return {name: value.detach().sum() for name, value in metrics.items()}


def _column(examples: Sequence[Example], name: str, like: Tensor) -> Tensor:
    """An attribute of the examples, (B,) float32, on the device of `like`."""
    import torch

    from cream.model.batches import send

    return send(torch.tensor([getattr(example, name) for example in examples]), like.device)
