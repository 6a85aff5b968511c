"""The flags that all policy gradients have, of given samples (rloo, grpo) and of their own (online_rloo)."""

from dataclasses import dataclass

from cream.cli.flags import flag


@dataclass
class GradientOptions:
    """Policy gradients"""

    clip_low: float = flag(0.2, "the ratio to the behaviour policy is clipped below 1 minus this", low=0, high=1)
    clip_high: float = flag(0.2, "that ratio is clipped above 1 plus this", low=0)
    kl_coef: float | None = flag(
        None,
        "weight of the KL divergence from the reference: in the reward (rloo, online_rloo), or in the loss (grpo). The "
        "reference is --kl_reference, for online_rloo the policy that training starts from. none: 0, online_rloo: 0.05",
        low=0,
    )
    missing_reward: float | None = flag(
        None,
        "reward of a response that has none (no answer was extracted, say); none: it does not count in its group's "
        "mean and is not trained on",
    )
