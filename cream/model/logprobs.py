"""Log-probabilities of responses: log π(y|x) = Σ_i log softmax(logits_{i-1})[y_i] over a response's tokens, in float32.

The one place where log-probabilities are computed: rewarding and training both call it.
"""

from collections.abc import Callable, Sequence

import torch

from cream.model.backbone import Backbone, run
from cream.model.batches import Batch, Group
from cream.model.hardware import Budget
from cream.model.head import target_log_probs, token_log_probs


class LogProbs(Backbone):
    """A causal language model that gives log-probabilities of a batch's scored tokens instead of logits.

    Over trees the head runs only where a scored token is predicted, its logits never all in memory. Padded rows go
    through the model's own forward pass.
    """

    def head_parameters(self) -> list[torch.nn.Parameter]:
        """Of the output embeddings."""
        return list(self.plain.get_output_embeddings().parameters())

    def forward(self, batch: Batch) -> torch.Tensor:
        """log π of the batch's scored tokens, (K,) float32."""
        if not self.share:
            return self._padded(batch)
        plain = self.plain
        return token_log_probs(
            plain.get_output_embeddings(), plain.config, self.hidden(batch), batch.target, self.in_place
        )

    def _padded(self, batch: Batch) -> torch.Tensor:
        """The plain way: the library's own masks and head."""
        return target_log_probs(self._padded_logits(batch), batch.target)

    def _padded_logits(self, batch: Batch) -> torch.Tensor:
        """(K, V) at the batch's places, computed at every column that predicts in some row."""
        width = batch.input_ids.shape[1]
        columns, place = (batch.source % width).unique(return_inverse=True)
        output = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=columns, use_cache=False
        )
        return output.logits[batch.source // width, place]

    def per_response(self, batch: Batch) -> Sequence[torch.Tensor]:
        """Each response's summed log π, nats."""
        return batch.response_sums(self(batch)).unbind()


def score(
    model: LogProbs, groups: Sequence[Group], budget: Budget, progress: Callable[[int], object] = lambda responses: None
) -> list[list[float]]:
    """log π of each response of each group, in the groups' order. A batch holds at most `budget` tokens."""
    sums = run(model, groups, budget, progress)
    values = iter(torch.stack([value for group in sums for value in group]).tolist() if any(sums) else [])
    return [[next(values) for _ in group] for group in sums]
