"""Batches of token rows under a token budget, and the plain layout: one padded row per response.

A batch holds groups: responses that share a prompt. trees.py lays a group out with its prompt once; `pad` here, which
any model takes, is the reference that trees must equal. Rows are padded on the right: positions count from 0 in every
row, so that rotary and learned positions are both exact, and padding cannot be seen by the response before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch

from cream.text.chat import Tokens

Group = Sequence[Tokens]  # responses to one prompt, each as a whole conversation
Places = Callable[[Tokens], list[int]]  # indices of a row's tokens whose hidden states a head reads


def predicting(row: Tokens) -> list[int]:
    """The places that predict the row's scored tokens: each one before them."""
    return [t - 1 for t in row.predicted()]


class Stretches(NamedTuple):
    """A row of N tokens as S stretches of T tokens, all as long as the longest tree; each tree is whole in one of them.

    tokens (S, T) int64: the tokens of each; a stretch may also hold some of a neighbour's. places (N,) int64: where
    each token is with its tree, as stretch x T + column. Trees of 2, 2 and 3 tokens: tokens [[0, 1, 2], [2, 3, 4],
    [4, 5, 6]], places [0, 1, 3, 4, 6, 7, 8].
    """

    tokens: torch.Tensor
    places: torch.Tensor


@dataclass
class Layout:
    """The trees of a row of T tokens: who sees whom.

    ends, positions (T,) int64; branches: of each that leads up to a place that is read, in their order, the spans
    (start, end) of the branches that it grows out of, then its own. For the rows [1, 7, 8, 2] and [1, 9, 2]: ids
    [1, 7, 8, 2, 9, 2], ends [6, 4, 4, 4, 6, 6], branches [((0, 1),), ((0, 1), (1, 4)), ((0, 1), (4, 6))].
    """

    ends: torch.Tensor
    positions: torch.Tensor
    branches: list[tuple[tuple[int, int], ...]]
    masks: dict = field(default_factory=dict)  # sliding window or None -> mask of the stretches
    block_masks: dict = field(default_factory=dict)  # sliding window or None -> BlockMask

    def to(self, device: torch.device) -> Layout:
        """The same layout on another device."""
        return Layout(send(self.ends, device), send(self.positions, device), self.branches)

    def sees(self, window: int | None = None):
        """The mask as a function of (batch, head, i, j), as FlexAttention takes it."""

        def mask(_batch, _head, i, j):
            seen = (j <= i) & (i < self.ends[j])
            return seen if window is None else seen & (self.positions[i] - self.positions[j] < window)

        return mask

    @cached_property
    def pairs(self) -> int:
        """Pairs of tokens that attention computes branch by branch: of one that grows out of nothing, half a square."""
        sizes = ((spans[-1][1] - spans[-1][0], sum(b - a for a, b in spans)) for spans in self.branches)
        return sum(own * seen // (2 if own == seen else 1) for own, seen in sizes)

    @cached_property
    def stretches(self) -> Stretches:
        """As few as hold the trees in their order."""
        size, index = len(self.ends), torch.arange(len(self.ends))
        open_ended = self.ends.cummax(0).values[:-1] > index[1:]  # each token but the first: in the tree before it
        edges = [0, *(1 + (~open_ended).nonzero().flatten()).tolist(), size]
        longest = max(end - start for start, end in pairwise(edges))
        first = [0]
        for start, end in pairwise(edges):
            if end - first[-1] > longest:
                first.append(start)
        first = torch.tensor(first)
        starts = first.clamp(max=size - longest)
        own = torch.searchsorted(first, index, right=True) - 1
        return Stretches(starts[:, None] + index[:longest], own * longest + index - starts[own])

    def mask(self, window: int | None) -> torch.Tensor:
        """Who sees whom in the stretches, (S, 1, T, T) bool, made once per window."""
        if window not in self.masks:
            tokens = self.stretches.tokens
            self.masks[window] = self.sees(window)(0, 0, tokens[:, :, None], tokens[:, None, :])[:, None]
        return self.masks[window]

    def block_mask(self, window: int | None):
        """The mask by blocks, made once per window."""
        from torch.nn.attention.flex_attention import create_block_mask

        if window not in self.block_masks:
            size, device = len(self.ends), self.ends.device
            self.block_masks[window] = create_block_mask(self.sees(window), 1, None, size, size, device, _compile=True)
        return self.block_masks[window]


@dataclass(slots=True)
class Batch:
    """B rows of T tokens, and the K places in them that a head reads, of R responses.

    input_ids, position_ids (B, T) int64; source (K,) int64: each place as row x T + column; target (K,) int64: the
    token after it in its conversation, -1 after the last; owner (K,) int64: its response in [0, R), counted through the
    groups. Padded rows have an attention_mask (B, T) int64, 0 on padding; rows of trees a `layout`.
    The rows [1, 7, 8, 2] (response 8, 2) and [1, 9, 2] (response 2), padded with 0, where they predict: input_ids
    [[1, 7, 8, 2], [1, 9, 2, 0]], source [1, 2, 5], target [8, 2, 2], owner [0, 0, 1].
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    owner: torch.Tensor
    responses: int
    tokens: int  # padding not counted
    attention_mask: torch.Tensor | None = None
    layout: Layout | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, part in parts.items():
            if isinstance(part, torch.Tensor):
                parts[name] = send(part, device)
        return Batch(**parts | {"layout": self.layout and self.layout.to(device)})

    def response_sums(self, values: torch.Tensor) -> torch.Tensor:
        """(K,) float32 values at the places -> (R,) their sums over each response. On a CPU index_add sums in the
        tensor's dtype: a thousand ones in bfloat16 give 256."""
        assert values.dtype == torch.float32, f"sums of {values.dtype}"
        return torch.zeros(self.responses, dtype=values.dtype, device=values.device).index_add(0, self.owner, values)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; towards a GPU the copy runs beside this process."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def pad(groups: Iterable[Group], pad_id: int = 0, places: Places = predicting) -> Batch:
    """One row per response. `pad_id` decides nothing: padding is masked by position."""
    rows = [tokens for group in groups for tokens in group]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    source, target, owner = [], [], []
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row.ids, dtype=torch.int64)
        mask[i, : len(row)] = 1
        read = places(row)
        source += [i * width + place for place in read]
        target += tokens_after(row, read)
        owner += [i] * len(read)
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(width).expand(len(rows), -1),
        source=torch.tensor(source, dtype=torch.int64),
        target=torch.tensor(target, dtype=torch.int64),
        owner=torch.tensor(owner, dtype=torch.int64),
        responses=len(rows),
        tokens=int(mask.sum()),
        attention_mask=mask,
    )


def tokens_after(row: Tokens, places: list[int]) -> list[int]:
    """The token after each place, -1 after the row's last."""
    end = len(row) - 1
    return [row.ids[place + 1] if place < end else -1 for place in places]


def padded_shape(group: Group) -> tuple[int, int]:
    """(rows, width) of a group in `pad`'s layout."""
    return len(group), max(map(len, group))


def by_tokens(shapes: Sequence[tuple[int, int]], max_tokens: int) -> list[list[int]]:
    """Indices of (rows, width) shapes in batches whose size, all rows x the widest, stays within `max_tokens`.

    Largest first, so that rows are alike and a batch too large for the device fails at once. A shape larger than the
    budget is a batch by itself.
    """
    batches: list[list[int]] = []
    rows = width = 0
    for index in sorted(range(len(shapes)), key=lambda i: (-shapes[i][1], -shapes[i][0], i)):
        if not batches or (rows + shapes[index][0]) * width > max_tokens:
            batches.append([])
            rows, width = 0, max(1, shapes[index][1])
        batches[-1].append(index)
        rows += shapes[index][0]
    return batches
