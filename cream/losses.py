"""Every loss as a pure function of tensors. B: pairs in the batch.

A pair's score is how much more likely the policy makes a response than the reference does, s = log pi - log pi_ref in
nats, or log pi alone where a loss has no reference; summed over the response, or its mean per token. Of a reward model
it is the reward itself, and beta is 1. The pair's margin

    h = beta * (s(y+) - s(y-))

changes its sign when chosen y+ and rejected y- change places: L(-h) is the loss of the pair turned round, the mirror
image of L, with which C mixes it (`mixture`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def log_ratio(policy: Tensor, reference: Tensor) -> Tensor:
    """log pi - log pi_ref, (B,) float32, of summed log-probabilities (B,) in nats."""
    return policy.float() - reference.float()


def sigmoid(h: Tensor) -> Tensor:
    """-log sigma(h), (B,): DPO (arXiv 2305.18290, eq. 7)."""
    return -F.logsigmoid(h)


def hinge(h: Tensor) -> Tensor:
    """max(0, 1 - h), (B,): SLiC's rank calibration (arXiv 2305.10425) of DPO's log-ratios, RSO's hinge-norm
    (arXiv 2309.06657); one of the losses that SPIN allows (arXiv 2401.01335)."""
    return torch.relu(1 - h)


def ipo(h: Tensor, beta: float) -> Tensor:
    """(h / beta - 1 / (2 beta))^2, (B,): IPO (arXiv 2310.12036, eq. 17, whose tau is beta). Mixed with its mirror
    image it would be the same loss with the target (2C - 1) / (2 beta), no longer IPO's."""
    return (h / beta - 1 / (2 * beta)) ** 2


def simpo(h: Tensor, gamma: float) -> Tensor:
    """-log sigma(h - gamma), (B,): SimPO (arXiv 2405.14734, eq. 6), for margins of mean log-probabilities without a
    reference. Its mirror image asks for the target margin gamma > 0 the other way, too; trl's label smoothing, which
    keeps gamma, is another loss."""
    return -F.logsigmoid(h - gamma)


def mixture(loss: Callable[[Tensor], Tensor], h: Tensor, consistency: Tensor | float) -> Tensor:
    """C*L(h) + (1 - C)*L(-h), (B,): CREAM's regularisation (arXiv 2410.12735, Algorithm 1) of a loss of the margin.

    C in [0, 1], (B,) or one number, is the confidence that y+ is the better response; a constant C is label smoothing
    by 1 - C. Of `sigmoid`, dL/dh = sigma(h) - C: the optimum is h = logit(C), finite for C < 1, negative for C < 1/2.
    """
    c = torch.as_tensor(consistency, dtype=torch.float32, device=h.device)
    return c * loss(h) + (1 - c) * loss(-h)


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    consistency: Tensor | float | None = None,
    loss: Callable[[Tensor], Tensor] = sigmoid,
) -> tuple[Tensor, Tensor]:
    """A preference loss of scores, by default consistency-regularised DPO (CREAM); plain DPO without `consistency`.

    Arguments: scores s(y+), s(y-), (B,) each; beta > 0; consistency C in [0, 1], (B,) or one number, None meaning 1.
    Returns losses (B,) and margins h (B,), both float32; no reduction: the caller takes the mean over the global batch.
    """
    margins = beta * (chosen - rejected)
    return (loss(margins) if consistency is None else mixture(loss, margins, consistency)), margins


def likelihood_loss(chosen: Tensor, rejected: Tensor, consistency: Tensor | float | None = None) -> Tensor:
    """Mean negative log-likelihood per token of the chosen response, (B,): the term that RPO adds to DPO, alpha times
    (arXiv 2404.19733, eq. 1). With C the pair turned round counts 1 - C, as in `mixture`.

    Arguments: mean log-probabilities per token of both responses, (B,) each, in nats.
    """
    if consistency is None:
        return -chosen
    c = torch.as_tensor(consistency, dtype=torch.float32, device=chosen.device)
    return -c * chosen - (1 - c) * rejected


# Reward models --------------------------------------------------------------------------------------------------------


def with_margin(h: Tensor, margin: Tensor | float, loss: Callable[[Tensor], Tensor] = sigmoid) -> Tensor:
    """L(h - m), (B,), which asks for a difference beyond m >= 0, (B,) or one number: of `sigmoid` Llama 2's
    -log sigma(r+ - r- - m) (arXiv 2307.09288, eq. 2). Its mirror image, L(-h - m), asks for m the other way."""
    return loss(h - margin)


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r+ + r-)^2, (B,), of rewards (B,) each: which a small weight of this keeps near 0 on average (arXiv 2312.09244,
    §3.2); differences of rewards, all that preferences say anything about, leave a prompt's level open."""
    return (chosen + rejected) ** 2


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of two vectors (n,); 0 where one of them is constant."""
    return F.cosine_similarity(x - x.mean(), y - y.mean(), dim=0, eps=1e-6)


def length_separation(quality: Tensor, length: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ODIN's |rho(r_Q, len)| - rho(r_L, len) (arXiv 2402.07319, §3), and both correlations: the quality head's rewards
    are to say nothing of the length, the length head's all. r_Q, r_L and the lengths in tokens, (n,) each."""
    of_quality, of_length = pearson(quality, tokens), pearson(length, tokens)
    return of_quality.abs() - of_length, of_quality, of_length


# Policy gradients -----------------------------------------------------------------------------------------------------


def clipped(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(w A, clip(w, 1 - low, 1 + high) A) of w = pi / pi_behaviour = exp(log_ratio), and whether the clip decides
    it, so that it has no gradient: PPO (arXiv 1707.06347, eq. 7), with DAPO's two bounds (arXiv 2503.14476, eq. 10).

    log_ratio in nats, of tokens or of whole responses, and A in the same shape. At w = 1 the gradient is that of
    REINFORCE, -A grad log pi.
    """
    ratio = log_ratio.exp()
    plain, bounded = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    return -torch.minimum(plain, bounded), bounded < plain


def k1(log_ratio: Tensor) -> Tensor:
    """log p(x) - log q(x): the unbiased estimate of KL(p || q) by one x drawn from p, which may be negative (J.
    Schulman, Approximating KL divergence, 2020). Its own gradient has the mean 0: it is a term of rewards alone."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """(log p(x) - log q(x))^2 / 2: at least 0, biased as an estimate; its gradient is unbiased where x is drawn from
    p."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """q(x) / p(x) - 1 - (log q(x) - log p(x)): at least 0 and unbiased; GRPO's (arXiv 2402.03300, eq. 4). Its gradient
    is that of KL(q || p) where x is drawn from p."""
    return torch.expm1(-log_ratio) + log_ratio
