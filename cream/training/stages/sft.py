"""Supervised fine-tuning on the responses of conversations. Their spans are the loss mask: no gradient on prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cream.records import Conversation, Pair
from cream.text.chat import NOT_A_PREFIX, Chat, Tokens, describe_length

if TYPE_CHECKING:
    from torch import Tensor

    from cream.model.batches import Batch

RECORDS = (Conversation, Pair)  # of a pair, its chosen response


@dataclass
class Options:
    """SFT"""


class Stage:
    """SFT: a step's loss is the mean negative log-likelihood over all response tokens of the global batch."""

    model = "logprobs"
    unit = "answer_tokens"
    made_for_policy = False
    reference = None
    label, summary = None, ""

    def __init__(self, options: Options, about: dict):
        self.settings: dict[str, object] = {}

    def prepare(
        self, records: Iterable[Conversation | Pair], chat: Chat, limit: int, dropped: Counter[str]
    ) -> list[tuple[str, Tokens]]:
        """(uuid, tokens) of every conversation of at most `limit` tokens; the others are counted in `dropped`."""
        kept = []
        for record in records:
            messages = record.selected if isinstance(record, Pair) else record.messages
            exceeds = chat.exceeds(messages, limit)
            tokens = None if exceeds else chat.encode_conversation(messages)
            if exceeds or len(tokens or ()) > limit:
                dropped[describe_length(limit)] += 1
            elif tokens is None:
                dropped[NOT_A_PREFIX] += 1
            else:
                kept.append((record.uuid, tokens))
        return kept

    def facts(self, examples: Sequence[Tokens]) -> dict[str, object]:
        """Nothing beyond what every run's sidecar counts."""
        return {}

    def group(self, example: Tokens) -> list[Tokens]:
        """The conversation alone: packed with others, it sees none of them."""
        return [example]

    def weight(self, example: Tokens) -> int:
        """Response tokens."""
        return example.num_response_tokens

    def loss(self, model, batch: Batch, examples: Sequence[Tokens]) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed over the examples' response tokens: -Σ log π(y_i | y_<i)."""
        total = -model(batch).sum()
        return total, {"loss": total.detach()}

    def check_first(self, metrics: dict[str, float], tolerance: float) -> None:
        """Nothing is known of an SFT's first loss."""
