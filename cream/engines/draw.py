"""Drawing tokens from a nucleus (top-p) that nobody computes: no vocabulary is sorted.

A token is drawn from the whole distribution. It lies in the nucleus if the tokens before it, by falling probability,
have less than top-p together, which is one sum. If it does not, neither does any token after it, and it is drawn again
from those before it, 1 + log(1 / top-p) times at most on average. So the tokens of the nucleus keep their shares, as in
FlashInfer's kernels for GPUs (https://flashinfer.ai/2025/03/10/sampling.html).
"""

from collections.abc import Callable, Iterator
from itertools import count

import torch
from torch import Tensor

from cream.engines.noise import uniform

CELLS = 1 << 19  # logits taken together: 2 MB, about what stays in a processor's cache


def draw(logits: Tensor, top_p: float, seeds: Tensor) -> Tensor:
    """(B,) int64: a token of each row of logits (B, V) on a CPU, drawn from softmax(logits) within its nucleus.

    seeds: (B,) int64; a row's token is a function of its own seed and logits. The nucleus is the smallest set of most
    probable tokens whose mass reaches top_p, of equal ones those with the lowest ids (as `warp.nucleus`).
    """
    return torch.cat([_draw(*part, top_p) for part in in_cache(logits, seeds)])


def in_cache(logits: Tensor, seeds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, V) and seeds (B,) by parts of rows that stay in a processor's cache; on other devices all together."""
    rows = max(1, CELLS // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    return zip(logits.split(rows), seeds.split(rows), strict=True)


def _draw(logits: Tensor, seeds: Tensor, top_p: float) -> Tensor:
    probs = logits.softmax(-1)
    tokens, left = torch.empty_like(seeds), torch.arange(len(seeds))
    for attempt in count():
        tokens[left] = drawn = pick(probs, uniform(seeds[left], torch.tensor(attempt)))
        if top_p >= 1:
            return tokens
        before = masses_before(probs, drawn)
        outside = before.sum(-1) >= top_p
        if not outside.any():
            return tokens
        left, probs = left[outside], before[outside]


def pick(masses: Tensor, quantile: Tensor) -> Tensor:
    """(B,) int64: where a row of masses (B, V), summed from the left, reaches this share (B,) of its sum."""
    sums = masses.cumsum(-1, dtype=torch.float64)
    found = torch.searchsorted(sums, quantile[:, None] * sums[:, -1:], right=True)  # never a mass of zero
    return found.squeeze(1).clamp(max=masses.shape[-1] - 1)  # of NaN


def masses_before(probs: Tensor, tokens: Tensor) -> Tensor:
    """(B, V) probabilities, with 0 for each row's token (B,) and those after it, by falling probability and rising
    id."""
    own, ids = probs.gather(-1, tokens[:, None]), torch.arange(probs.shape[-1], dtype=torch.float32)

    def mask(compare: Callable, one: Tensor, other: Tensor) -> Tensor:
        return compare(one, other, out=torch.empty_like(probs))  # floats: bools would take most of the time

    equal = mask(torch.eq, probs, own).mul_(mask(torch.lt, ids, tokens[:, None]))
    return mask(torch.gt, probs, own).add_(equal).mul_(probs)
