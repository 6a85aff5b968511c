"""What a language model says where a step's sign stands: the log-odds of + against -, all of a row's in one pass."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from cream.errors import UserError
from cream.model.backbone import run
from cream.model.batches import Batch, Group
from cream.model.hardware import Budget
from cream.model.head import word_logits
from cream.model.logprobs import LogProbs

LEAST = 0.01  # of the probability that the signs have together where one is due, by a model that was trained to sign


def both_signs(batch: Batch, signs: Sequence[int]) -> Batch:
    """The batch with each of its K places twice: with + as the token to predict, then with -."""
    target = batch.target.new_tensor(signs).repeat_interleave(len(batch.target))
    return replace(batch, source=batch.source.repeat(2), target=target, owner=batch.owner.repeat(2))


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

    @torch.no_grad()
    def check(self, probe: Group) -> None:
        """Raises UserError where the model would write something else than a sign at the signs of a probe: its odds are
        then those of two words that it does not mean."""
        batch = self.pack([probe]).to(self.device)
        mass = self(both_signs(batch, self.signs)).exp().view(2, -1).sum(0).mean().item()
        if not mass >= LEAST:
            raise UserError(
                f"{self.plain.name_or_path}: where the sign of a step is due, + and - have {100 * mass:.2g} % of its "
                "probability: it was not trained to sign steps in this form, or too little; "
                "train one with --train_stage prm or orm"
            )

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
