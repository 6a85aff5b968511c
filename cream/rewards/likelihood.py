"""The likelihood reward: log π(y|x) / |y| under the policy alone (CREAM's ranking by M0 in the first round)."""

from cream.rewards import GroupReward
from cream.scoring.logprobs import Scored

PASSES = ("policy",)
NORMALIZE = "mean"  # over the answer's tokens; the method's default for this reward


def normalized(scored: Scored, normalize: str) -> list[float | None]:
    """Summed log-probabilities, or their mean over the answer's tokens; None stays None."""
    if normalize == "sum":
        return scored.logprob
    return [None if v is None else v / n for v, n in zip(scored.logprob, scored.num_tokens, strict=True)]


def combine(passes: dict[str, Scored], normalize: str) -> GroupReward:
    """score = reward, ref_score = 0, as the method's files have it."""
    policy = passes["policy"]
    reward = normalized(policy, normalize)
    parts = {
        "score": reward,
        "ref_score": [None if r is None else 0.0 for r in reward],
        "num_tokens": policy.num_tokens,
    }
    return GroupReward(reward, parts, policy.reason)
