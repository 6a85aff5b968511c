"""Trees: the responses to one prompt as one sequence [prompt, response_1 … response_N] that computes the prompt once.

Neighbouring responses that begin alike may share more than the prompt: the scores that a judge may give to a response
grow out of that response, the responses out of the question. Many trees follow one another in a single row, without
padding. A token sees its own branch and those that it grows out of: token j is seen from j up to the end of what grows
out of it, so one number per token, `ends`, is the whole mask:

    i sees j  iff  j <= i < ends[j]     (and, in a layer with a sliding window W, position[i] - position[j] < W)

Attention runs over these pairs: on CUDA as a block mask of FlexAttention, elsewhere branch by branch through PyTorch's
scaled dot-product attention, or, where trees are so small that calls cost more than products, through a single call for
all trees under a mask. The cost grows with the trees and not with the square of the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import compress, groupby
from operator import ne
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from cream.model.batches import Batch, Group, Layout, Places, predicting, tokens_after

ATTENTION = "cream_trees"  # the name under which transformers finds `attend`
# A row's length is a multiple of this: on CUDA of FlexAttention's block; on a CPU, where oneDNN does the products, for
# lengths to recur, since oneDNN keeps some 20 MB of compiled products for each new one.
MULTIPLE = {"cpu": 32, "cuda": 128}
SAVED = 32  # tokens that a branch which forks again must save
# Pairs of tokens x width of all heads to which a CPU attends in the time that a call for one branch costs; measured for
# widths of 128 to 1024, where it is 0.7 to 2.9 times as many.
CALL = 1 << 19


class Branch(NamedTuple):
    """The tokens [start, end) of some rows of a group, which grow out of branch number `parent` (None: of nothing)."""

    rows: list[int]
    start: int
    end: int
    parent: int | None


def shared(group: Group, known: int = 0) -> int:
    """Tokens that all of a group's rows begin with, `known` of them at least; each keeps its last to itself."""
    first, last = min(row.ids for row in group), max(row.ids for row in group)
    most = min(map(len, group)) - 1
    apart = compress(range(known, most), map(ne, first[known:most], last[known:most]))
    return most if len(group) == 1 else next(apart, most)


def branches(group: Group) -> list[Branch]:
    """A group's tree: its prompt first, then what grows out of it, each branch followed by its own."""
    found: list[Branch] = []

    def grow(rows: list[int], start: int, parent: int | None) -> None:
        number, own = len(found), [group[i] for i in rows]
        whole = parent is not None and len(own) == 1
        end = len(own[0]) if whole else shared(own, start)
        found.append(Branch(rows, start, end, parent))
        for fork in () if whole else _forks(own, end):
            grow([rows[i] for i in fork], end, number)

    grow([*range(len(group))], 0, None)
    return found


def _forks(group: Group, at: int) -> Iterator[list[int]]:
    """The rows of a group by what grows out of their first `at` tokens: neighbours together that share what is worth a
    branch of their own, others each by itself."""
    for _, some in groupby(range(len(group)), key=lambda i: group[i].ids[at]):
        fork = [*some]
        saved = len(fork) > 1 and (len(fork) - 1) * (shared([group[i] for i in fork], at) - at)
        yield from [fork] if saved >= SAVED else ([i] for i in fork)


def multiple_of(kind: str, dtype: torch.dtype, compiled: bool = False) -> int:
    """What a row's length is rounded up to on this kind of device, with matrix products in `dtype`; `compiled`: those
    of float32 are oneDNN's as well."""
    return 1 if kind == "cpu" and dtype == torch.float32 and not compiled else MULTIPLE[kind]


def tree_shape(group: Group) -> tuple[int, int]:
    """(tokens, 1): what a group adds to a row, in the form that `batches.by_tokens` counts with."""
    return sum(branch.end - branch.start for branch in branches(group)), 1


def split(group: Group, max_tokens: int) -> list[list[int]]:
    """Indices of a group's responses, in runs that each fit a row with their prompt; a longer one is alone."""
    prompt = shared(group)
    runs: list[list[int]] = []
    size = max_tokens + 1  # of the last run, which is full
    for fork in _forks(group, prompt):
        own = [group[i] for i in fork]
        more = (tree_shape(own)[0] if len(own) > 1 else len(own[0])) - prompt
        if len(own) > 1 and prompt + more > max_tokens:
            runs += [[fork[i] for i in run] for run in split(own, max_tokens)]
            size = max_tokens + 1
            continue
        if size + more > max_tokens:
            runs.append([])
            size = prompt
        runs[-1] += fork
        size += more
    return runs


def pack(groups: Sequence[Group], multiple: int = 1, places: Places = predicting) -> Batch:
    """All groups as trees in one row, B = 1, its length rounded up to a `multiple`."""
    ids, positions, ends, lines = [], [], [], []
    source, target, owner = [], [], []
    responses = 0
    for group in groups:
        tree = branches(group)
        at, spans = [[] for _ in group], []  # where each row's tokens are; the spans that lead up to each branch's end
        for branch in tree:
            start, before = len(ids), () if branch.parent is None else spans[branch.parent]
            ids += group[branch.rows[0]].ids[branch.start : branch.end]
            positions += range(branch.start, branch.end)
            spans.append((*before, (start, len(ids))))
            for row in branch.rows:
                at[row] += range(start, len(ids))
        last = [line[-1][1] for line in spans]  # where what grows out of each branch ends
        for number, branch in reversed([*enumerate(tree)][1:]):
            last[branch.parent] = max(last[branch.parent], last[number])
        for branch, end in zip(tree, last, strict=True):
            ends += [end] * (branch.end - branch.start)
        until = []  # the last place in each row
        for row, own in zip(group, at, strict=True):
            read = places(row)
            source += [own[place] for place in read]
            target += tokens_after(row, read)
            owner += [responses] * len(read)
            until.append(max(read, default=-1))
            responses += 1
        for branch, line in zip(tree, spans, strict=True):
            if branch.start < branch.end and any(until[row] >= branch.start for row in branch.rows):
                lines.append(line)
    tokens = len(ids)
    for i in range(tokens, tokens + -tokens % multiple):  # each padding token sees itself alone
        ids.append(0)
        positions.append(0)
        ends.append(i + 1)
    ids, positions, ends, source, target, owner = (
        torch.from_numpy(np.array(x, dtype=np.int64)) for x in (ids, positions, ends, source, target, owner)
    )
    layout = Layout(ends, positions, lines)
    return Batch(ids[None], positions[None], source, target, owner, responses, tokens, layout=layout)


# Attention ------------------------------------------------------------------------------------------------------------


def register() -> None:
    """Make `attend` known to transformers, with sdpa's masks for calls without a layout."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def attend(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tree_layout: Layout | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """Attention in the form that transformers calls: query (1, H, T, D), key and value (1, H or fewer, T, D) ->
    (1, T, H, D). With a layout the mask argument is not looked at; the window is the layer's own."""
    if tree_layout is None:
        from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
        if attention_mask is None:
            attention_mask = _seen(query.shape[2], key.shape[2], None, query.device)
        return _capped(query, key, value, attention_mask, scaling, softcap).transpose(1, 2), None
    if query.device.type == "cuda":
        from transformers.integrations.flex_attention import flex_attention_forward

        mask = tree_layout.block_mask(sliding_window)
        return flex_attention_forward(module, query, key, value, mask, scaling=scaling, softcap=softcap)
    return _by_sdpa(query, key, value, tree_layout, scaling, sliding_window, softcap), None


@torch.compiler.disable  # shapes differ from tree to tree
def _by_sdpa(query, key, value, layout: Layout, scaling, window, softcap) -> torch.Tensor:
    """Branch by branch, or whole trees at once.

    In float32 whatever the dtype: PyTorch's bfloat16 attention on a CPU is slower, and keeps some MB of compiled code
    for every new pair of lengths.
    """
    dtype, repeats = query.dtype, query.shape[1] // key.shape[1]
    query, key, value = (x.float().transpose(1, 2) for x in (query, key, value))  # (1, T, heads, D), as they lie
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
    way = _at_once if at_once_is_faster(layout, query.shape[2:].numel()) else _by_branch
    with torch.autocast(query.device.type, enabled=False):
        return way(query, key, value, layout, scaling, window, softcap).to(dtype)


def at_once_is_faster(layout: Layout, width: int) -> bool:
    """Whether attention of a tree's tokens to all of its tokens takes less time than a call for each branch; `width` is
    that of all heads."""
    number, size = layout.stretches.tokens.shape
    return (number * size**2 - layout.pairs) * width <= len(layout.branches) * CALL


def _at_once(query, key, value, layout: Layout, scaling, window, softcap) -> torch.Tensor:
    """All stretches in one call, each over itself under a mask."""
    (tokens, places), mask = layout.stretches, layout.mask(window)
    query, key, value = (Rearrange.apply(x[0], tokens, places).transpose(1, 2) for x in (query, key, value))
    if softcap is None:
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    else:
        found = _capped(query, key, value, mask, scaling, softcap)
    return Rearrange.apply(found.transpose(1, 2).flatten(0, 1), places, tokens)[None]


class Rearrange(torch.autograd.Function):
    """x (N, H, D), picked (any shape, of M numbers below N), back (N,) or (S, T) -> x[picked], (*picked.shape, H, D).

    The gradient of x[i] is that of the row at place back[i]: of a token that is picked twice only one copy is read, and
    picking is many times as fast as adding up."""

    @staticmethod
    def forward(ctx, x, picked, back) -> torch.Tensor:
        """(*picked.shape, H, D)."""
        ctx.places = picked.ndim, back
        return _pick(x, picked)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        """(N, H, D), of x."""
        dimensions, back = ctx.places
        return _pick(grad.flatten(0, dimensions - 1), back.flatten()), None, None


def _pick(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """tokens[places]: a copy of whole rows, which indexing of more than two dimensions is not."""
    return tokens.flatten(1).index_select(0, places.flatten()).view(*places.shape, *tokens.shape[1:])


def _by_branch(query, key, value, layout: Layout, scaling, window, softcap) -> torch.Tensor:
    """Each branch over those that it grows out of and itself; 0 where nothing is read."""
    read = {spans[-1]: spans for spans in layout.branches}
    edges = sorted({0, query.shape[1], *(edge for spans in read.values() for span in spans for edge in span)})
    pieces = [*zip(edges, edges[1:], strict=False)]
    # By split and not by slices: the gradient of each slice is a tensor of the whole row.
    queries, keys, values = (x.split([end - start for start, end in pieces], dim=1) for x in (query, key, value))
    number, parts = {piece: i for i, piece in enumerate(pieces)}, []
    for piece, own in zip(pieces, queries, strict=True):
        if piece not in read:
            parts.append(own.new_zeros(1, own.shape[1], own.shape[2], value.shape[3]))
            continue
        seen = [number[a, b] for a, b in read[piece] if a < b]
        of_seen = (torch.cat([x[i] for i in seen], dim=1) if len(seen) > 1 else x[seen[0]] for x in (keys, values))
        part = _causal(*(x.transpose(1, 2) for x in (own, *of_seen)), scaling, window, softcap)
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1)


def _causal(query, key, value, scaling, window, softcap) -> torch.Tensor:
    """Attention of the last Q of K tokens over all K, each seeing those up to itself: (1, H, Q, D)."""
    q, k = query.shape[2], key.shape[2]
    window = None if window is None or window >= k else window
    if softcap is not None:
        return _capped(query, key, value, _seen(q, k, window, query.device), scaling, softcap)
    if q == k and window is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    mask = _seen(q, k, window, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def _capped(query, key, value, mask: torch.Tensor, scaling: float | None, softcap: float) -> torch.Tensor:
    """Attention with scores capped by tanh (Gemma 2, arXiv 2408.00118 §2), which PyTorch's kernels do not have."""
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.finfo(torch.float32).min  # finite: a padding token that sees nothing must not become NaN
    return scores.float().masked_fill(~mask, hidden).softmax(dim=3).to(value.dtype) @ value


@lru_cache(maxsize=16)
def _seen(q: int, k: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(Q, K) bool: token i of the last q sees token j of all k."""
    i, j = torch.arange(k - q, k, device=device)[:, None], torch.arange(k, device=device)
    return (j <= i) if window is None else (j <= i) & (i - j < window)
