"""What reward sources share: the reward of a group, and the flags of those that compare log-probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cream.cli.flags import flag
from cream.errors import UserError
from cream.files.folders import head_outputs
from cream.files.provenance import REWARD_MODEL
from cream.preferences import NOT_JOINED, SCORES
from cream.scoring import heads, logprobs
from cream.scoring.driver import Pass
from cream.scoring.logprobs import Scored

UNFINISHED = "the response ends within its thought: there is nothing to judge"
ALONE = "no other response to compare with"
UNDECIDED = "no comparison with a choice in both orders"


@dataclass(slots=True)
class GroupReward:
    """The rewards of one prompt's N responses.

    reward: a number or None for each, reason: why it has none. score, ref_score: summed or mean log-probabilities in
    nats, num_tokens: the tokens they are over, only of sources that compute them. parts: anything else measured, name
    -> per response a number or a list of them; texts: name -> per response a text, a judge's words say; preferences:
    N x N, [i][j] the probability that i is better than j, of a source that presents two in an order with i first; None
    on the diagonal and where none is known.
    """

    reward: list[float | None]
    reason: list[str | None] = field(default_factory=list)
    score: list[float | None] | None = None
    ref_score: list[float | None] | None = None
    num_tokens: list[int] | None = None
    parts: dict[str, list] = field(default_factory=dict)
    texts: dict[str, list[str | None]] = field(default_factory=dict)
    preferences: list[list[float | None]] | None = None


@dataclass
class PreferenceOptions:
    """Rewards by pairwise comparisons"""

    preference_score: str = flag(
        "wins",
        "reward of a response that is compared with others: wins, its mean probability of being better; bradley_terry, "
        "its strength in nats, of which differences are log-odds",
        choices=tuple(SCORES),
    )


def reward_by_preferences(
    texts: Sequence[str | None], better: Mapping[tuple[str, str], float | None], score: str
) -> GroupReward:
    """The rewards of compared texts, by --preference_score; None with a reason where one cannot be compared, as a text
    that is None. `better`: (a, b) -> the probability that a is better than b, None or absent if unknown; equal texts
    are one."""
    different = list(dict.fromkeys(text for text in texts if text is not None))
    scores = SCORES[score]([[better.get((a, b)) for b in different] for a in different])
    of = dict(zip(different, scores, strict=True))
    reward = [of.get(text) for text in texts]
    reason = [NOT_JOINED if value is None else None for value in reward]
    return GroupReward(reward, reason, preferences=[[better.get((a, b)) for b in texts] for a in texts])


def reward_by_comparisons(
    texts: Sequence[str | None],
    first: Mapping[tuple[str, str], float | None],
    why: Mapping[tuple[str, str], str | None],
    score: str,
) -> GroupReward:
    """The rewards of texts that were presented in twos. `first`: (a, b) -> the probability that a is better than b by
    the request that had a first, None where it has no answer, `why`.

    Only comparisons with a choice in both orders count, whose mean has no preference for a place: a judge that always
    chooses the first finds all equal.
    """
    better = {(a, b): share if first[b, a] is not None else None for (a, b), share in first.items()}
    rewards = reward_by_preferences(texts, better, score)
    both = zip(texts, rewards.reward, strict=True)
    rewards.reason = [_why_none(text, better, why) if reward is None else None for text, reward in both]
    return rewards


def _why_none(
    text: str | None, better: Mapping[tuple[str, str], float | None], why: Mapping[tuple[str, str], str | None]
) -> str:
    """Why a text has no reward by comparisons; where all requests failed alike, the reason of these."""
    own = [pair for pair in better if text in pair]
    if not own:
        return UNFINISHED if text is None else ALONE
    if any(better[pair] is not None for pair in own):
        return NOT_JOINED
    reasons = {why[pair] for pair in own} - {None}
    return reasons.pop() if len(reasons) == 1 else UNDECIDED


@dataclass
class LogProbOptions(logprobs.Options):
    """Rewards by log-probabilities (likelihood, dpo)"""

    normalize: str | None = flag(
        None,
        "sum or mean of a response's log-probabilities; none: sum for dpo, mean for likelihood",
        choices=("sum", "mean"),
    )
    ref_model_ckpt: str | None = flag(
        None,
        "dpo: the reference model, a name in configs/checkpoint.json or a folder; none: the base model M0",
        decides=False,
    )
    score_from: str = flag(
        "model",
        "source of the policy's log-probabilities: model (computed, or cached from an earlier run), or sampling "
        "(the sampler's own where the tokens match, else as with model)",
        choices=("model", "sampling"),
    )


@dataclass
class RewardModelOptions(heads.Options):
    """Rewards by a reward model"""

    reward_model: str | None = flag(
        None,
        "the reward model: a name in configs/checkpoint.json, a folder, or a Hugging Face id",
        decides=False,
    )


def reward_model_pass(worker: str = "heads") -> Pass:
    """The pass of the model that --reward_model names; its role is in the output's name."""
    return Pass("rm", "reward_model", REWARD_MODEL, worker, external=True)


def check_reward_model(options: RewardModelOptions, reward: str) -> None:
    """Raises UserError where --reward_model is missing."""
    if options.reward_model is None:
        raise UserError(f"--reward {reward} needs --reward_model NAME|FOLDER|HUB ID: the model that gives the rewards")


def check_head(folder: Path, outputs: int, reward: str, other: str = "") -> None:
    """Raises UserError where the reward model in a folder has other than so many outputs; `other`: what it may be."""
    if (found := head_outputs(folder)) not in (None, outputs):
        raise UserError(
            f"{folder}: its head has {found} output{'s' * (found > 1)}, and --reward {reward} takes {outputs}{other}"
        )


def normalized(scored: Scored, normalize: str) -> list[float | None]:
    """Summed log-probabilities, or their mean over the response's tokens; None stays None."""
    if normalize == "sum":
        return scored.logprob
    return [None if v is None else v / n for v, n in zip(scored.logprob, scored.num_tokens, strict=True)]
