"""(Consistency-regularised) direct preference optimisation.

The reference is the starting policy, its log-probabilities known before the first step (reference.py). CREAM (arXiv
2410.12735, Algorithm 1): C·L_DPO + (1-C)·L_reversed, with C the set's mean consistency (`consistency_avg`) or the
prompt's own (`consistency_dyn`); `original` is C = 1 (arXiv 2305.18290, eq. 7).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nan

import torch

from cream.errors import UserError
from cream.losses import preference_loss
from cream.model.batches import Batch, send
from cream.records import Pair
from cream.text.chat import Chat, Tokens


@dataclass(slots=True)
class Example:
    """A pair's two answers after their shared prompt, C, and the reference's log π of both (nats, summed)."""

    chosen: Tokens
    rejected: Tokens
    consistency: float = 1.0
    reference_chosen: float = nan
    reference_rejected: float = nan


def examples(
    records: Iterable[Pair], chat: Chat, limit: int, dropped: Counter[str]
) -> list[tuple[str, float | None, Example]]:
    """(uuid, c, example) of every pair whose two answers fit `limit` tokens; the others are counted in `dropped`.

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
            logps = (nan if v is None else v for v in (record.selected_logp, record.rejected_logp))
            kept.append((record.uuid, record.consistency, Example(chosen, rejected, 1.0, *logps)))
    return kept


def weigh(rows: Sequence[tuple[str, float | None, Example]], method: str, fixed: float | None) -> dict[str, float]:
    """Set every example's C by the method; returns what the log should say of them.

    The mean is over the pairs that are trained on; a pair whose c is null takes it. `fixed` overrides all of them.
    """
    known = [c for _, c, _ in rows if c is not None]
    if fixed is None and method != "original" and not known:
        raise UserError(f"--method {method}: no pair has a consistency; cal_consistency.py --file2 gives them one")
    mean = sum(known) / len(known) if known else None
    for _, c, example in rows:
        if fixed is not None:
            example.consistency = fixed
        elif method == "original":
            example.consistency = 1.0
        else:
            example.consistency = mean if method == "consistency_avg" or c is None else c
    used = [example.consistency for _, _, example in rows]
    return {
        "pairs": len(rows),
        "pairs_without_c": len(rows) - len(known),
        "mean_c": mean,
        "mean_c_used": sum(used) / len(used),
        "trained_in_reverse": sum(c < 0.5 for c in used),
    }


class Stage:
    """DPO: the step's loss is the mean over all pairs of the global batch."""

    unit = "pairs"  # what the mean is over

    def __init__(self, beta: float, tolerance: float):
        self.beta = beta
        self.tolerance = tolerance  # nats of |log-ratio| that rounding explains at the first step

    def group(self, example: Example) -> list[Tokens]:
        """The chosen answer, then the rejected one."""
        return [example.chosen, example.rejected]

    def weight(self, example: Example) -> int:
        """One pair."""
        return 1

    def loss(self, model, batch: Batch, chunk: Sequence[Example]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Summed over the chunk's pairs; log-probabilities are sums over answer tokens, end-of-turn included."""
        chosen, rejected = batch.response_sums(model(batch)).view(-1, 2).unbind(1)
        known = torch.tensor([(e.reference_chosen, e.reference_rejected, e.consistency) for e in chunk])
        reference_chosen, reference_rejected, consistency = send(known, chosen.device).unbind(1)
        losses, margins = preference_loss(
            chosen, rejected, reference_chosen, reference_rejected, self.beta, consistency
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

    def check_first(self, metrics: dict[str, float]) -> None:
        """At the first step policy == reference, so every log-ratio is 0 and the loss is ln 2.

        Raises UserError when they are off by more than the dtype explains (`tolerance`).
        """
        if not metrics["ratio_abs"] <= self.tolerance:
            raise UserError(
                f"at the first step the policy differs from its own reference by {metrics['ratio_abs']:.3g} nats on "
                f"average (loss {metrics['loss']:.4f}, expected ln 2 = 0.6931): likely causes are dropout, another "
                "dtype or attention kernel, or weights that changed on disk; nothing was trained"
            )
