"""RLOO: REINFORCE with the other responses to a prompt as baseline (arXiv 2402.14740; as trl 1.16's RLOOTrainer).

A response's advantage is its reward minus the mean reward of the others, A_i = R_i - mean_{j != i} R_j. The loss is
-min(w A, clip(w) A) of the whole response's ratio w = pi(y|x) / pi_behaviour(y|x), averaged over responses, not over
tokens. The KL term is part of the reward, R = r - kl_coef * KL (arXiv 2402.14740, eq. 2), by default as k1 = log
pi_behaviour(y|x) - log pi_ref(y|x), and so without a gradient of its own.
"""

from __future__ import annotations

from cream import advantages
from cream.records import Rewards
from cream.training import policy_options
from cream.training.policy_gradient import GroupStage

RECORDS = (Rewards,)
Options = policy_options.Options


class Stage(GroupStage):
    """Leave-one-out advantages, a ratio per response, KL in the reward."""

    DEFAULTS = {"ratio": "sequence", "kl_estimator": "k1", "divide_by_std": "no", "loss_norm": "constant"}
    KL_REFERENCE = None
    kl_in = "reward"
    baseline = staticmethod(advantages.leave_one_out)

    def sequence_log_ratio(self, log_ratio, lengths):
        """log w of whole responses, (R,): the sum over their tokens."""
        return log_ratio
