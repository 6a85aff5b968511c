"""GRPO: group relative policy optimisation (arXiv 2402.03300, §4.1; as trl 1.16's GRPOTrainer with loss_type "grpo").

A response's advantage is its reward minus the mean of its group, divided by the group's standard deviation (without
that division, and with --loss_norm constant, Dr. GRPO: arXiv 2503.20783). The loss is -min(w A, clip(w) A) of each
token's ratio w, averaged over a response's tokens, then over responses; with --ratio sequence that of the geometric
mean of the ratios of its tokens (GSPO: arXiv 2507.18071, eq. 7). The KL term is part of the loss, per token, by default
k3 to the policy that training starts from.
"""

from __future__ import annotations

from cream import advantages
from cream.records import Rewards
from cream.training import policy_options
from cream.training.policy_gradient import GroupStage
from cream.training.policy_options import START

RECORDS = (Rewards,)
Options = policy_options.Options


class Stage(GroupStage):
    """Advantages by the group's mean and deviation, a ratio per token, KL in the loss."""

    DEFAULTS = {"ratio": "token", "kl_estimator": "k3", "divide_by_std": "group", "loss_norm": "response"}
    KL_REFERENCE = START
    kl_in = "loss"
    baseline = staticmethod(advantages.group_relative)

    def sequence_log_ratio(self, log_ratio, lengths):
        """log w of whole responses, (R,): the mean over their tokens."""
        return log_ratio / lengths
