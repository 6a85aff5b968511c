"""Padded batches under a token budget: the plain layout, and the reference that any other layout must equal.

Rows are padded on the right: positions then count from 0 in every row, so that rotary and learned positions are both
exact, and what stands after an answer cannot be seen by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cream.chat import Tokens


@dataclass(slots=True)
class Batch:
    """B rows of up to T tokens, padded on the right.

    input_ids (B, T) int64; attention_mask (B, T) int64, 0 on padding; answer_mask (B, T) bool, true on the tokens that
    are scored or trained on. Two rows [1, 7, 8, 2] (answer 8, 2) and [1, 9, 2] (answer 2), pad 0, give
    input_ids [[1, 7, 8, 2], [1, 9, 2, 0]], attention_mask [[1, 1, 1, 1], [1, 1, 1, 0]],
    answer_mask [[F, F, T, T], [F, F, T, F]].
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answer_mask: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        move = [t.to(device, non_blocking=True) for t in (self.input_ids, self.attention_mask, self.answer_mask)]
        return Batch(*move)


def pad(rows: Sequence[Tokens], pad_id: int = 0) -> Batch:
    """Rows into a Batch. `pad_id` decides nothing: padding is masked by position."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention = torch.zeros((len(rows), width), dtype=torch.int64)
    answer = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row.ids, dtype=torch.int64)
        attention[i, : len(row)] = 1
        for start, end in row.spans:
            answer[i, start:end] = True
    return Batch(ids, attention, answer)


def by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in batches of like length whose padded size, rows × longest row, stays within `max_tokens`.

    Longest first, so that a batch too large for the device fails at once. A row longer than the budget stands alone.
    """
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * width > max_tokens:
            batches.append([])
            width = max(1, lengths[index])
        batches[-1].append(index)
    return batches
