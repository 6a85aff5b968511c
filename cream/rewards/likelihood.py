"""The likelihood reward: log π(y|x) / |y| under the policy alone (CREAM's ranking by M0 in the first round)."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cream.rewards import Group, GroupReward

log = logging.getLogger("cream")
PASSES = ("policy",)
NORMALIZE = "mean"  # over the answer's tokens; the method's default for this reward


@dataclass(slots=True)
class Scored:
    """What one pass found for a group: per answer log π in nats, summed, or None; scored tokens; why it has none."""

    logprob: list[float | None]
    num_tokens: list[int]
    reason: list[str | None]


def scorer(folder, chat, *, dtype, device, limit: int, max_tokens: int) -> Callable[[Sequence[Group]], list[Scored]]:
    """Loads the model in `folder`; returns the function that scores groups under it, `max_tokens` a batch.

    An answer that does not fit `limit` tokens is not cut: it gets no score, with the reason.
    """
    from cream import models
    from cream.logprobs import score

    model = models.load_policy(folder, dtype, device)

    def score_groups(groups: Sequence[Group]) -> list[Scored]:
        encoded = [encode(group, chat, limit) for group in groups]
        rows = [tokens for tokens_of, _ in encoded for tokens in tokens_of if tokens is not None]
        values = iter(score(model, rows, max_tokens))
        found = []
        for tokens_of, reasons in encoded:
            logprobs = [None if tokens is None else next(values) for tokens in tokens_of]
            broken = [value is not None and not math.isfinite(value) for value in logprobs]
            found.append(
                Scored(
                    [None if bad else value for value, bad in zip(logprobs, broken, strict=True)],
                    [0 if tokens is None else tokens.num_answer_tokens for tokens in tokens_of],
                    ["not a finite number" if bad else why for why, bad in zip(reasons, broken, strict=True)],
                )
            )
        return found

    return score_groups


def encode(group: Group, chat, limit: int) -> tuple[list, list[str | None]]:
    """Per answer its Tokens or None, and the reason for None."""
    from cream.chat import NOT_A_PREFIX

    rows = chat.answers(group.prompt, group.answers, group.complete)
    reasons: list[str | None] = [None] * len(rows)
    texts: dict[tuple[int, ...], str] = {}
    for i, tokens in enumerate(rows):
        if tokens is None:
            reasons[i] = NOT_A_PREFIX
        elif texts.setdefault(tuple(tokens.ids), group.answers[i]) != group.answers[i]:
            reasons[i] = "the same tokens as another answer"  # a template that trims, say
        elif len(tokens) > limit:
            reasons[i] = f"longer than {limit} tokens"
        elif not tokens.num_answer_tokens:
            reasons[i] = "no token to score"
    return [None if why else tokens for tokens, why in zip(rows, reasons, strict=True)], reasons


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
