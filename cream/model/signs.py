"""What a language model says where a step's sign stands: the log-odds of + against -, all of a row's in one pass."""

from collections.abc import Callable, Sequence

import torch

from cream.model.backbone import run
from cream.model.batches import Batch, Group
from cream.model.hardware import Budget
from cream.model.head import word_logits
from cream.model.logprobs import LogProbs


class SignOdds(LogProbs):
    """A causal language model that gives log π(+) - log π(-) at the tokens that are spans of a batch's rows. Of the
    vocabulary only the two `signs` are looked at."""

    def __init__(self, model, signs: tuple[int, int], share: bool = True):
        super().__init__(model, share)
        self.signs = signs

    def odds(self, batch: Batch) -> torch.Tensor:
        """(K,) float32, in nats."""
        if self.share:
            plain = self.plain
            logits = word_logits(plain.get_output_embeddings(), plain.config, self.hidden(batch), self.signs)
        else:
            logits = self._padded_logits(batch)[:, list(self.signs)].float()
        return logits[:, 0] - logits[:, 1]

    def per_response(self, batch: Batch) -> Sequence[torch.Tensor]:
        """Each row's log-odds, (its signs,)."""
        return self.odds(batch).split(torch.bincount(batch.owner, minlength=batch.responses).tolist())


def sign_odds(
    model: SignOdds, groups: Sequence[Group], budget: Budget, progress: Callable[[int], object] = lambda responses: None
) -> list[list[list[float]]]:
    """The log-odds of the signs of each row of each group, in the groups' order. A batch holds at most `budget`
    tokens."""
    odds = run(model, groups, budget, progress)
    rows = [row for group in odds for row in group]
    values = iter(torch.cat(rows).tolist() if rows else [])
    return [[[next(values) for _ in row] for row in group] for group in odds]
