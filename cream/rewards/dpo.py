"""The DPO reward: r = log π(y|x) - log π_ref(y|x), summed over the answer's tokens (2305.18290, eq. 5, without β and
the partition function: neither changes a prompt's ranking). CREAM's reference is M0 in every round."""

from cream.rewards import GroupReward
from cream.rewards.likelihood import normalized
from cream.scoring.logprobs import Scored

PASSES = ("policy", "reference")
NORMALIZE = "sum"


def combine(passes: dict[str, Scored], normalize: str) -> GroupReward:
    """score: the policy's, ref_score: the reference's, reward: their difference."""
    policy, reference = passes["policy"], passes["reference"]
    score, ref_score = normalized(policy, normalize), normalized(reference, normalize)
    reward = [None if p is None or r is None else p - r for p, r in zip(score, ref_score, strict=True)]
    reason = [a or b for a, b in zip(policy.reason, reference.reason, strict=True)]
    return GroupReward(reward, {"score": score, "ref_score": ref_score, "num_tokens": policy.num_tokens}, reason)
