"""(Consistency-regularised) direct preference optimisation.

The reference is the policy that training starts from, its log-probabilities known before the first step (reference.py).
CREAM (arXiv 2410.12735, Algorithm 1): C·L_DPO + (1-C)·L_reversed, with C the set's mean consistency (`consistency_avg`)
or the prompt's own (`consistency_dyn`); `original` is C = 1 (arXiv 2305.18290, eq. 7).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import nan
from typing import TYPE_CHECKING

from cream.cli.flags import flag
from cream.errors import UserError
from cream.records import METHODS, Pair
from cream.text.chat import Chat, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from cream.model.batches import Batch

log = logging.getLogger("cream")
RECORDS = (Pair,)


@dataclass
class Options:
    """Preference training (DPO)"""

    method: str | None = flag(None, "none: as cal_consistency.py recorded, else original (C = 1)", choices=METHODS)
    beta: float = flag(0.1, "strength of the pull to the reference: h = beta x difference of log-ratios", above=0)
    fixed_consistency: float | None = flag(
        None, "one C for every pair, in place of the pairs' own (control)", low=0, high=1
    )


@dataclass(slots=True)
class Example:
    """A pair's two responses after their shared prompt, the C it is trained with, the reference's log π of both (nats,
    summed over the response), and the consistency that its record holds."""

    chosen: Tokens
    rejected: Tokens
    consistency: float = 1.0
    reference: Sequence[float] = (nan, nan)
    recorded: float | None = None


class Stage:
    """DPO: a step's loss is the mean over all pairs of the global batch."""

    model = "logprobs"
    unit = "pairs"
    made_for_policy = True
    references = ("reference",)

    def __init__(self, options: Options, about: dict):
        self.options = options
        recorded = about.get("method")
        if options.method and recorded and options.method != recorded:
            raise UserError(
                f"--method {options.method}: the pairs were made for {recorded}; leave --method out, or make the pairs "
                "again"
            )
        self.method = self.label = options.method or recorded or "original"
        self.settings = asdict(options) | {"method": self.method}
        self.summary = f"method {self.method}, beta {options.beta:g}, reference: the policy that training starts from"

    def prepare(
        self, records: Iterable[Pair], chat: Chat, limit: int, dropped: Counter[str]
    ) -> list[tuple[str, Example]]:
        """(uuid, example) of every pair whose two responses fit `limit` tokens; the others are counted in `dropped`.

        The examples' reference is what the pairs hold, NaN where they hold none.
        """
        kept = []
        for record in records:
            texts = [record.selected[-1].content, record.rejected[-1].content]
            complete = [not record.selected_truncated, not record.rejected_truncated]
            chosen, rejected = chat.fitting(record.prompt, texts, complete, limit)
            reasons = [row for row in (chosen, rejected) if isinstance(row, str)]
            if reasons:
                dropped[reasons[0]] += 1
            elif texts[0] == texts[1] or chosen.ids == rejected.ids:
                dropped["both answers are the same"] += 1
            else:
                logps = tuple(nan if v is None else v for v in (record.selected_logp, record.rejected_logp))
                kept.append((record.uuid, Example(chosen, rejected, 1.0, logps, record.consistency)))
        self._weigh([example for _, example in kept])
        return kept

    def _weigh(self, examples: Sequence[Example]) -> None:
        """Set every example's C. The mean is over the pairs that are trained on; a pair whose c is null takes it."""
        fixed, known = self.options.fixed_consistency, [e.recorded for e in examples if e.recorded is not None]
        if fixed is None and self.method != "original" and examples and not known:
            raise UserError(
                f"--method {self.method}: no pair has a consistency; cal_consistency.py --file2 gives them one"
            )
        mean = sum(known) / len(known) if known else None
        for example in examples:
            if fixed is not None:
                example.consistency = fixed
            elif self.method == "original":
                example.consistency = 1.0
            else:
                own = None if self.method == "consistency_avg" else example.recorded
                example.consistency = mean if own is None else own

    def facts(self, examples: Sequence[Example]) -> dict[str, object]:
        """How many pairs there are, and with which C they are trained."""
        known = [e.recorded for e in examples if e.recorded is not None]
        used = [example.consistency for example in examples]
        mean, reverse = sum(used) / len(used), sum(c < 0.5 for c in used)
        source = self.method if self.options.fixed_consistency is None else "--fixed_consistency"
        log.info(
            "%d pairs, C by %s: mean used %.3f; %d with C < 1/2 are trained in reverse",
            len(used),
            source,
            mean,
            reverse,
        )
        return {
            "pairs": len(used),
            "pairs_without_c": len(used) - len(known),
            "mean_c": sum(known) / len(known) if known else None,
            "mean_c_used": mean,
            "trained_in_reverse": reverse,
        }

    def group(self, example: Example) -> list[Tokens]:
        """The chosen response, then the rejected one."""
        return [example.chosen, example.rejected]

    def weight(self, example: Example) -> int:
        """One pair."""
        return 1

    def loss(self, model, batch: Batch, examples: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed over the pairs; log-probabilities are sums over response tokens, end-of-turn included."""
        import torch

        from cream.losses import preference_loss
        from cream.model.batches import send

        chosen, rejected = batch.answer_sums(model(batch)).view(-1, 2).unbind(1)
        known = torch.tensor([(*e.reference, e.consistency) for e in examples])
        reference_chosen, reference_rejected, consistency = send(known, chosen.device).unbind(1)
        losses, margins = preference_loss(
            chosen, rejected, reference_chosen, reference_rejected, self.options.beta, consistency
        )
        total = losses.sum()
        with torch.no_grad():
            ratio_chosen, ratio_rejected = chosen - reference_chosen, rejected - reference_rejected
            metrics = {
                "loss": total,
                "margin": margins.sum(),
                "accuracy": (margins > 0).float().sum(),
                "logp_chosen": chosen.sum(),
                "logp_rejected": rejected.sum(),
                "ratio_chosen": ratio_chosen.sum(),
                "ratio_rejected": ratio_rejected.sum(),
                "ratio_abs": (ratio_chosen.abs() + ratio_rejected.abs()).sum() / 2,
            }
        return total, {name: value.detach() for name, value in metrics.items()}

    def check_first(self, metrics: dict[str, float], tolerance: float) -> None:
        """At the first step policy == reference, so every log-ratio is 0 and the loss is ln 2."""
        if not metrics["ratio_abs"] <= tolerance:
            raise UserError(
                f"at the first step the policy differs from its own reference by {metrics['ratio_abs']:.3g} nats on "
                f"average (loss {metrics['loss']:.4f}, expected ln 2 = 0.6931): likely causes are dropout, another "
                "dtype or attention kernel, or weights that changed on disk; nothing was trained"
            )
