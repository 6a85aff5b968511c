"""Answer log-likelihoods: log π(y|x) = Σ_i log softmax(logits_{i-1})[y_i] over the answer's tokens, in float32.

The one place where log-probabilities are computed: rewarding and training both call it.
"""

from collections.abc import Callable, Sequence

import torch

from cream.batches import Batch, by_tokens, pad
from cream.chat import Tokens


def token_logprobs(model, batch: Batch) -> torch.Tensor:
    """log π of every answer token, (B, T-1) float32: entry t belongs to token t + 1; 0 where it is not an answer token.

    The head runs only at columns that predict some row's answer token. The softmax is over float32 logits whatever the
    weights' dtype: a bfloat16 one errs by 0.025 nat per token over 128 k words.
    """
    predicts = batch.answer_mask[:, 1:]
    columns = predicts.any(dim=0).nonzero().squeeze(1)
    output = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=columns, use_cache=False
    )
    logits = output.logits.float()
    targets = batch.input_ids[:, columns + 1]
    picked = logits.gather(2, targets[..., None]).squeeze(2) - logits.logsumexp(dim=2)
    kept = torch.where(predicts[:, columns], picked, 0.0)
    return torch.zeros(predicts.shape, device=kept.device).index_copy(1, columns, kept)


def answer_logprobs(model, batch: Batch) -> torch.Tensor:
    """log π(answer | prompt) of every row, (B,) float32, summed over the row's answer tokens."""
    return token_logprobs(model, batch).sum(dim=1)


@torch.no_grad()
def score(
    model, rows: Sequence[Tokens], max_tokens: int, progress: Callable[[int], object] = lambda rows_done: None
) -> list[float]:
    """log π of each row's answer tokens, in the rows' order. `max_tokens` bounds rows × longest row of a batch."""
    device = next(model.parameters()).device
    scores = [float("nan")] * len(rows)
    for indices in by_tokens([len(row) for row in rows], max_tokens):
        batch = pad([rows[i] for i in indices]).to(device)
        for index, value in zip(indices, answer_logprobs(model, batch).tolist(), strict=True):
            scores[index] = value
        progress(len(indices))
    return scores
