"""The DPO reward: r = log π(y|x) - log π_ref(y|x), summed over the response's tokens (2305.18290, eq. 5, without β and
the partition function: neither changes a prompt's ranking). CREAM's reference is M0 in every round."""

from cream.records import Samples
from cream.rewards.base import GroupReward, LogProbOptions, normalized
from cream.scoring.driver import Pass

Options = LogProbOptions
DEFAULTS = {"normalize": "sum"}


def passes(options: Options) -> list[Pass]:
    return [Pass("policy"), Pass("reference", model="ref_model_ckpt")]


def combine(sample: Samples, results: dict[str, list], options: Options) -> GroupReward:
    """score: the policy's, ref_score: the reference's, reward: their difference."""
    (policy,), (reference,) = results["policy"], results["reference"]
    score, ref_score = normalized(policy, options.normalize), normalized(reference, options.normalize)
    reward = [None if p is None or r is None else p - r for p, r in zip(score, ref_score, strict=True)]
    reason = [a or b for a, b in zip(policy.reason, reference.reason, strict=True)]
    return GroupReward(reward, reason, score=score, ref_score=ref_score, num_tokens=policy.num_tokens)
