"""log softmax of a language model's head at the tokens that count, without its logits in memory.

The head's matrix is taken in blocks of words: the logits of one block stay in the cache while they are made, summed and
(in the backward pass, which recomputes them where they are many) turned into gradients. Memory grows neither with the
vocabulary nor with the tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from cream.model.precision import product_dtype
from cream.model.products import MULTIPLE, add_product, cast, compiled, product

BLOCK = {"cpu": 1 << 20, "cuda": 1 << 27}  # logits made at a time: on a CPU what its cache holds
LEAST_WORDS = 512  # of a block, whatever the tokens: with fewer the matrix products are slow
KEEP = {"cpu": 1 << 25, "cuda": 1 << 29}  # logits that may wait for the backward pass; more of them are recomputed
LEAST_SHARE = -60.0  # log of a block's share in the softmax; smaller ones are raised to it
ROWS = 512  # tokens at a time through a head that is called as a module


def token_log_probs(head, config, hidden: torch.Tensor, target: torch.Tensor, in_place: bool = False) -> torch.Tensor:
    """log softmax(head(hidden))[target], (K,) float32, of hidden (K, D) and target (K,).

    A plain linear layer goes by blocks of its words; any other module (an adapter on it, say) is called on some tokens
    at a time. `in_place`: see HeadLogProb.
    """
    cap, scale = _shape_of_logits(config)
    if type(head) is torch.nn.Linear:
        count = len(target)
        dtype, cpu = product_dtype(hidden.dtype, hidden.device.type), hidden.device.type == "cpu"
        padding = -count % MULTIPLE if dtype == torch.bfloat16 or cpu and compiled(head.weight) else 0
        hidden, target = F.pad(hidden, (0, 0, 0, padding)), F.pad(target, (0, padding))
        keep = torch.is_grad_enabled() and len(target) * len(head.weight) <= KEEP[hidden.device.type]
        return HeadLogProb.apply(hidden, head.weight, head.bias, target, scale, cap, keep, in_place)[:count]

    def some(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return target_log_probs(_scaled(head(h), scale, cap), t)

    parts = zip(hidden.split(ROWS), target.split(ROWS), strict=True)
    return torch.cat([checkpoint(some, h, t, use_reentrant=False) for h, t in parts])


def word_logits(head, config, hidden: torch.Tensor, words: Sequence[int]) -> torch.Tensor:
    """The logits of some words alone, (K, len(words)) float32, of hidden (K, D)."""
    words = torch.tensor(words, device=hidden.device)
    cap, scale = _shape_of_logits(config)
    if type(head) is torch.nn.Linear:
        bias = None if head.bias is None else head.bias[words].float()
        logits = F.linear(hidden.float(), head.weight[words].float(), bias)
    else:
        logits = torch.cat([head(h)[:, words].float() for h in hidden.split(ROWS)])
    return _scaled(logits, scale, cap)


def target_log_probs(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[target], (K,) float32, of logits (K, V): over float32 logits whatever their dtype, for a
    bfloat16 one errs by 0.025 nat per token over 128 k words."""
    return -F.cross_entropy(logits.float(), target, reduction="none")


def _shape_of_logits(config) -> tuple[float | None, float]:
    """(what caps a model's logits, what scales them before)."""
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)  # Cohere, Granite
    return getattr(config, "final_logit_softcapping", None), scale  # Gemma 2


def _scaled(logits: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    logits = logits if scale == 1 else logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


class HeadLogProb(torch.autograd.Function):
    """hidden (K, D), weight (V, D), bias (V,) or None, target (K,) -> log softmax(logits)[target], (K,) float32.

    d log p_y / d logits = onehot(y) - softmax(logits). The softmax of a block over its own words is made in the forward
    pass, in the backward pass only scaled, row by row, to that over all. Under autocast the matrix products are in its
    dtype; sums over blocks are float32 always. `keep` holds the blocks' softmax for the backward pass. `in_place` adds
    the weight's gradient to `weight.grad` here and returns none, which saves a tensor of its size; wrong where anything
    waits for it on the way (other processes, hooks).
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, target, scale: float, cap: float | None, keep: bool, in_place: bool
    ) -> torch.Tensor:
        """(K,) float32."""
        kind = hidden.device.type
        ctx.dtype = product_dtype(hidden.dtype, kind)
        ctx.scale, ctx.cap, ctx.in_place = scale, cap, in_place
        ctx.kept = [] if keep else None
        norm = torch.full(target.shape, float("-inf"), device=hidden.device)
        at_target = torch.zeros_like(norm)
        h = hidden.to(ctx.dtype)
        for words in _blocks(hidden, weight):
            logits = _scaled(_logits(h, *_part(words, ctx.dtype, weight, bias)), scale, cap)
            place, inside = _place(target, words)
            at_target = torch.where(inside, logits.gather(1, place).squeeze(1), at_target)
            if keep:
                ctx.kept.append(_softmax(logits, cap))
                own = ctx.kept[-1][0]
            else:
                own = _norm(logits.float())
            norm = torch.logaddexp(norm, own)
        if bias is not None and cap is None:
            at_target = at_target.masked_fill(bias[target].isneginf(), float("-inf"))
        ctx.save_for_backward(hidden, weight, bias, target, norm, at_target)
        return at_target - norm

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        """Of hidden, weight and bias, in their dtypes."""
        hidden, weight, bias, target, norm, at_target = ctx.saved_tensors
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        h = hidden.to(ctx.dtype)
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if for_hidden else None
        d_weight = _sum_for(weight, ctx.in_place) if for_weight else None
        d_bias = _sum_for(bias, ctx.in_place) if for_bias else None
        missing = torch.expm1(at_target - norm)  # of the target: softmax - 1
        if ctx.cap is not None:
            missing *= 1 - (at_target / ctx.cap) ** 2
        for number, words in enumerate(_blocks(hidden, weight)):
            w, b = _part(words, ctx.dtype, weight, bias)
            if ctx.kept:
                own, d = ctx.kept[number]
            else:
                own, d = _softmax(_scaled(_logits(h, w, b), ctx.scale, ctx.cap), ctx.cap)
            share = (own - norm).clamp_(min=LEAST_SHARE).exp_()  # of the block's words in the softmax over all
            place, inside = _place(target, words)
            at = torch.where(inside, (missing / share).to(d.dtype), d.gather(1, place).squeeze(1))
            d.scatter_(1, place, at[:, None])
            rows = (share * -grad * ctx.scale)[:, None]  # what each row of d is still to be multiplied with
            if for_hidden:
                d_hidden += rows * product(d, w)
            if for_weight:
                add_product(d_weight[words], d.T, (h * rows).to(ctx.dtype))
            if for_bias:
                d_bias[words].add_((d.float() * rows).sum(0))
        ctx.kept = None
        if ctx.in_place:
            d_weight = d_bias = None
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias, *[None] * 5


def _norm(logits: torch.Tensor) -> torch.Tensor:
    """log of the sum of exp, (K,), of float32 logits (K, V): by log_softmax, on a CPU twice as fast as logsumexp."""
    return logits.amax(1) - logits.log_softmax(1).amax(1)


def _softmax(logits: torch.Tensor, cap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`_norm` of a block's logits, and their softmax x the derivative of the cap, in their dtype."""
    exact = logits.float()
    found = exact.softmax(1)
    norm = exact.amax(1) - found.amax(1).log()
    if cap is not None:
        found *= 1 - (exact / cap) ** 2
    return norm, found.to(logits.dtype)


def _logits(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A bias of -inf, of words that cannot be, is a large number here: a block of such words has a softmax as well."""
    logits = product(h, weight.T)
    return logits if bias is None else logits.add_(bias).clamp_(min=-1e30)


def _blocks(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    """The words in runs of about BLOCK logits."""
    words = max(LEAST_WORDS, BLOCK[hidden.device.type] // max(1, len(hidden)))
    return [slice(start, start + words) for start in range(0, len(weight), words)]


def _part(words: slice, dtype: torch.dtype, weight: torch.Tensor, bias: torch.Tensor | None):
    """Of the weight and the bias. A weight whose casts are kept is cast as a whole, unless it is much larger than the
    logits."""
    whole = getattr(weight, "cast", None) is not None and weight.numel() <= KEEP[weight.device.type]
    part = cast(weight, dtype)[words] if whole else weight[words].to(dtype)
    return part, None if bias is None else bias[words].to(dtype)


def _place(target: torch.Tensor, words: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of the targets in a block, (K, 1), and which of them are in it, (K,) bool; columns of others are 0."""
    inside = (target >= words.start) & (target < words.stop)
    return ((target - words.start) * inside)[:, None], inside


def _sum_for(tensor: torch.Tensor, in_place: bool) -> torch.Tensor:
    """Where its gradient is added up."""
    if not in_place:
        return torch.zeros_like(tensor)
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return tensor.grad
