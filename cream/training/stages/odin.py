"""ODIN (arXiv 2402.07319): a reward model with two outputs, one that takes the length upon itself and one without it.

Both are trained together by Bradley-Terry on their sum; the correlation of the length output with the length is pulled
up, that of the quality output to 0, and the heads are kept orthogonal:

    L = L_R + lambda_L (|rho(r_Q, len)| - rho(r_L, len)) + lambda_O |cos(w_Q, w_L)|

The reward is r_Q alone. rho is Pearson's over all responses of the global batch, whatever the micro-batches and
processes; lengths are those of the responses in tokens. The released code (RLHFlow) has one loss for a batch's summed
rewards and no orthogonality; as there, the outputs are length and quality, in this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cream.cli.flags import flag
from cream.training.stages import bradley_terry
from cream.training.stages.bradley_terry import Example, PairOptions, PairStage, pair_loss, right, summed

if TYPE_CHECKING:
    from torch import Tensor

    from cream.model.batches import Batch

RECORDS = bradley_terry.RECORDS
LEAST = 16  # responses of a global batch, over fewer of which no correlation is taken


@dataclass
class Options(PairOptions):
    """ODIN reward model (odin)"""

    length_weight: float = flag(1.0, "lambda_L, of the correlations with the length", low=0)
    ortho_weight: float = flag(1.0, "lambda_O, of the heads' orthogonality", low=0)


class Stage(PairStage):
    """ODIN: two outputs, length and quality."""

    head = {"outputs": 2, "reads": "last_token"}
    labels = ("length", "quality")
    label = None

    def __init__(self, options: Options, about: dict):
        super().__init__(options, length_weight=options.length_weight, ortho_weight=options.ortho_weight)
        self.least_batch = LEAST // 2 if options.length_weight else 1  # pairs
        weights = f"lambda_L {options.length_weight:g}, lambda_O {options.ortho_weight:g}"
        self.summary = f"ODIN, {weights}{self.summary}; accuracy is the quality output's"

    def loss(
        self, model, batch: Batch, examples: Sequence[Example], slopes: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L_R and the orthogonality, summed over the pairs; with the gradient of `of_all` by its slopes (B, 2, 2)."""
        from cream import losses

        outputs, cosines = model(batch, cosines=True)
        length, quality = outputs.view(-1, 2, 2).unbind(2)  # each (B, chosen and rejected)
        both, apart = length + quality, cosines[0, 1].abs() * len(examples)
        values, _ = pair_loss(*both.unbind(1), examples, losses.sigmoid)
        total = values.sum() + self.options.ortho_weight * apart
        difference = quality[:, 0] - quality[:, 1]
        metrics = {"loss": total, "loss_rank": values, "cosine": apart, "margin": difference}
        if slopes is not None:
            total = total + (slopes * outputs.view(-1, 2, 2)).sum()
        return total, summed(metrics | right(difference, examples))

    def of_all(self, outputs: Tensor, examples: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        """lambda_L L_L of all responses of a global batch, given their outputs (B, 2, 2); 0 where they are too few, or
        all of one length."""
        import torch

        from cream import losses

        tokens = [[row.num_response_tokens for row in self.group(example)] for example in examples]
        lengths = torch.tensor(tokens, dtype=torch.float32, device=outputs.device).flatten()
        length, quality = outputs.flatten(0, 1).unbind(1)
        value, of_quality, of_length = losses.length_separation(quality, length, lengths)
        if len(lengths) < LEAST or lengths.min() == lengths.max():
            value = 0 * value
        term = self.options.length_weight * value
        return term, {"loss": term, "rho_quality": of_quality, "rho_length": of_length}
