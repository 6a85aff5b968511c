"""What is done to a step's logits before a token is drawn: repetition penalty, temperature, min-p, top-k, top-p."""

import math

import numpy as np
import torch
from torch import Tensor

from cream.engines import Sampling


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) logits of the tokens that may be sampled, -inf for others: temperature, min-p, top-k and top-p, in the
    order of vLLM's sampler (transformers has min-p last)."""
    logits = keep_min_p(logits / sampling.temperature, sampling.min_p)
    return nucleus(keep_top_k(logits, sampling.top_k), sampling.top_p)


def penalize_repeated(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """(B, V) logits, of the tokens in `ids` (B, T) divided by the penalty, or multiplied where negative.

    Keskar et al. 2019, CTRL, arXiv 1909.05858, section 4.1; for negative logits as transformers and vLLM have it.
    """
    own = logits.gather(-1, ids)
    return logits.scatter(-1, ids, torch.where(own > 0, own / penalty, own * penalty))


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """(B, V) logits with -inf where the probability is less than min_p times the largest.

    Nguyen et al. 2024, arXiv 2407.01082.
    """
    if min_p <= 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """(B, V) logits with -inf outside the k largest, and those equal to the smallest of them; all of them if k is 0.

    Fan et al. 2018, arXiv 1805.04833.
    """
    if not 0 < k < logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """(B, V) logits with -inf outside the smallest set of most probable tokens whose mass reaches top_p.

    Holtzman et al. 2020, arXiv 1904.09751, section 3.1.
    """
    if top_p >= 1:
        return logits
    probs = logits.softmax(-1)
    falling = _sorted(probs).flip(-1)
    before = falling.cumsum(-1) - falling  # the mass before each of them
    count = (before < top_p).sum(-1, keepdim=True)
    last = falling.gather(-1, count - 1)
    outside = probs < last
    if bool(((~outside).sum(-1, keepdim=True) > count).any()):  # several like the last one: those with the lowest ids
        equal = probs == last
        outside |= equal & (equal.cumsum(-1) > count - (probs > last).sum(-1, keepdim=True))
    return logits.masked_fill(outside, -torch.inf)


def _sorted(values: Tensor) -> Tensor:
    """Each row's values in rising order. On a CPU by numpy, which sorts a row of a vocabulary's size 30 times as fast
    as torch: torch sorts their indices as well."""
    if values.device.type != "cpu":
        return values.sort(dim=-1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=-1))
