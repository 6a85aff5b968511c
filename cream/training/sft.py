"""Supervised fine-tuning on the answers of conversations: no gradient on prompts or padding."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from cream.model.batches import Batch
from cream.records import Conversation, Pair
from cream.text.chat import NOT_A_PREFIX, Chat, Tokens, longer


def examples(
    records: Iterable[Conversation | Pair], chat: Chat, limit: int, dropped: Counter[str]
) -> list[tuple[str, Tokens]]:
    """(uuid, tokens) of every conversation of at most `limit` tokens; what does not fit is counted in `dropped`."""
    kept = []
    for record in records:
        messages = record.selected if isinstance(record, Pair) else record.messages
        exceeds = chat.exceeds(messages, limit)
        tokens = None if exceeds else chat.conversation(messages)
        if exceeds or len(tokens or ()) > limit:
            dropped[longer(limit)] += 1
        elif tokens is None:
            dropped[NOT_A_PREFIX] += 1
        else:
            kept.append((record.uuid, tokens))
    return kept


class Stage:
    """SFT: the step's loss is the mean negative log-likelihood over all answer tokens of the global batch."""

    unit = "answer_tokens"  # what the mean is over

    def group(self, example: Tokens) -> list[Tokens]:
        """The conversation alone: packed with others, it sees none of them."""
        return [example]

    def weight(self, example: Tokens) -> int:
        """Answer tokens."""
        return example.num_answer_tokens

    def loss(self, model, batch: Batch, chunk: Sequence[Tokens]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Summed over the chunk's answer tokens: -Σ log π(y_i | y_<i)."""
        total = -model(batch).sum()
        return total, {"loss": total.detach()}

    def check_first(self, metrics: dict[str, float]) -> None:
        """Nothing is known of an SFT's first loss."""
