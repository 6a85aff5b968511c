"""Supervised fine-tuning on the responses of conversations. Their spans are the loss mask: no gradient on prompts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cream.records import Conversation, Pair
from cream.text.chat import Chat, Tokens, describe_length
from cream.training.heldout import HeldOutOptions

if TYPE_CHECKING:
    from torch import Tensor

    from cream.model.batches import Batch

log = logging.getLogger("cream")
RECORDS = (Conversation, Pair)  # of a pair, its chosen response


@dataclass
class Options(HeldOutOptions):
    """Held-out records (all stages; SFT has no other flags)"""


class Stage:
    """SFT: a step's loss is the mean negative log-likelihood over all response tokens of the global batch."""

    model = "logprobs"
    unit = "answer_tokens"
    made_for_policy = False
    reference = None
    label, summary = None, ""

    def __init__(self, options: Options, about: dict):
        self.held_out = options
        options.check()
        self.settings: dict[str, object] = options.settings()

    def prepare(
        self, records: Iterable[Conversation | Pair], chat: Chat, limit: int, dropped: Counter[str]
    ) -> list[tuple[str, list[Tokens]]]:
        """(uuid, rows) of every conversation of at most `limit` tokens; the others are counted in `dropped`. A row for
        each conversation, or for each of its turns, as `Chat.encode_conversation` says."""
        kept = []
        for record in records:
            if isinstance(record, Pair):
                messages, last = record.selected, (not record.selected_truncated, record.sampled[0])
            else:
                messages, last = record.messages, (True, False)
            rows = [] if chat.exceeds(messages, limit) else chat.encode_conversation(messages, *last)
            if getattr(record, "only_last", False) and not isinstance(rows, str):
                rows = [Tokens(row.ids, row.spans[-1:]) for row in rows[-1:]]
            if isinstance(rows, str):
                dropped[rows] += 1
            elif not rows or max(map(len, rows)) > limit:
                dropped[describe_length(limit)] += 1
            else:
                kept.append((record.uuid, rows))
        return kept

    def facts(self, examples: Sequence[list[Tokens]]) -> dict[str, object]:
        """How many conversations are trained on turn by turn, if any are."""
        several = [rows for rows in examples if len(rows) > 1]
        if not several:
            return {}
        log.info(
            "%d of %d conversations are trained on turn by turn, as %d rows: the chat template writes a turn otherwise "
            "once another follows",
            *(len(several), len(examples), sum(map(len, several))),
        )
        return {"turn_by_turn": len(several)}

    def group(self, example: list[Tokens]) -> list[Tokens]:
        """The conversation alone: packed with others, it sees none of them. Its turns, where each has a row, share
        what they have in common."""
        return example

    def weight(self, example: list[Tokens]) -> int:
        """Response tokens."""
        return sum(tokens.num_response_tokens for tokens in example)

    def loss(self, model, batch: Batch, examples: Sequence[list[Tokens]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed over the examples' response tokens: -Σ log π(y_i | y_<i)."""
        total = -model(batch).sum()
        return total, {"loss": total.detach()}

    def check_first(self, metrics: dict[str, float], tolerance: float) -> None:
        """Nothing is known of an SFT's first loss."""
