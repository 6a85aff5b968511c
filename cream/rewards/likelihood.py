"""The likelihood reward: log π(y|x) / |y| under the policy alone (CREAM's ranking by M0 in the first round)."""

from cream.records import Samples
from cream.rewards.base import GroupReward, LogProbOptions, normalized
from cream.scoring.driver import Pass

Options = LogProbOptions
DEFAULTS = {"normalize": "mean"}  # over the response's tokens; CREAM's default for this reward


def passes(options: Options) -> list[Pass]:
    return [Pass("policy")]


def combine(sample: Samples, results: dict[str, list], options: Options) -> GroupReward:
    """score = reward, ref_score = 0, as in the released code's files."""
    (policy,) = results["policy"]
    reward = normalized(policy, options.normalize)
    reference = [None if r is None else 0.0 for r in reward]
    return GroupReward(reward, policy.reason, score=reward, ref_score=reference, num_tokens=policy.num_tokens)
