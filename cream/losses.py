"""Every loss as a pure function of tensors. B: examples in the batch, T: tokens of the longest answer."""

import torch
import torch.nn.functional as F
from torch import Tensor


def preference_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    consistency: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Consistency-regularised DPO (CREAM, arXiv 2410.12735, Algorithm 1); plain DPO without `consistency`.

        h = beta * [(log pi(y+|x) - log pi_ref(y+|x)) - (log pi(y-|x) - log pi_ref(y-|x))]
        L = -C log sigma(h) - (1 - C) log sigma(-h)

    dL/dh = sigma(h) - C: the optimum is h = logit(C), finite for C < 1 and negative for C < 1/2. C = 1 is DPO
    (arXiv 2305.18290, eq. 7); a constant C is conservative DPO with label smoothing 1 - C.

    Arguments: four (B,) summed log-probabilities of whole answers in nats, y+ chosen and y- rejected; beta > 0;
    consistency C in [0, 1], (B,) or one number, None meaning 1.
    Returns losses (B,) and margins h (B,), both float32; no reduction: the caller takes the mean over the global batch.
    """
    chosen_logratio = policy_chosen.float() - reference_chosen.float()
    rejected_logratio = policy_rejected.float() - reference_rejected.float()
    margins = beta * (chosen_logratio - rejected_logratio)
    losses = -F.logsigmoid(margins)
    if consistency is not None:
        c = torch.as_tensor(consistency, dtype=torch.float32, device=margins.device)
        losses = c * losses - (1 - c) * F.logsigmoid(-margins)
    return losses, margins
