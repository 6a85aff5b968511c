"""The likelihood reward: log π(y|x) / |y| under the policy alone (CREAM's ranking by M0 in the first round)."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cream.rewards import Group, GroupReward
from cream.scores import Scores

PASSES = ("policy",)
NORMALIZE = "mean"  # over the answer's tokens; the method's default for this reward


@dataclass(slots=True)
class Scored:
    """What one pass found for a group: per answer log π in nats, summed, or None; scored tokens; why it has none."""

    logprob: list[float | None]
    num_tokens: list[int]
    reason: list[str | None]


class Scorer:
    """Scores groups under the model in `folder`, which is loaded when the first answer is not among the `kept` ones.

    An answer that does not fit `limit` tokens is not cut: it gets no score, with the reason. `max_tokens` bounds a
    batch; None: what the memory carries. `counts` says where scores came from.
    """

    def __init__(self, folder, chat, *, dtype, device, limit: int, max_tokens: int | None, kept: Scores | None = None):
        self.folder, self.chat, self.dtype, self.device = folder, chat, dtype, device
        self.limit, self.max_tokens, self.kept = limit, max_tokens, kept
        self.counts: Counter[str] = Counter()
        self._loaded = None

    def __call__(self, groups: Sequence[Group]) -> list[Scored]:
        """What is found for each group; equal answers to a prompt are computed once."""
        encoded = [encode(group, self.chat, self.limit) for group in groups]
        digests = [[row and row.digest() for row in rows] for rows, _ in encoded]
        known = [self._known(group, ids, rows) for group, ids, (rows, _) in zip(groups, digests, encoded, strict=True)]
        missing = [
            {digest: row for digest, row in zip(ids, rows, strict=True) if row and digest not in values}
            for ids, (rows, _), values in zip(digests, encoded, known, strict=True)
        ]
        self._compute(groups, missing, known)
        return [
            _scored(rows, reasons, [values.get(digest) for digest in ids])
            for (rows, reasons), ids, values in zip(encoded, digests, known, strict=True)
        ]

    def _known(self, group: Group, digests: list[str | None], rows: list) -> dict[str, float]:
        """digest -> log π of the answers that need no pass."""
        kept = self.kept.find(group.uuid) if self.kept else {}
        found = {digest: kept[digest] for digest in digests if digest in kept}
        self.counts["kept"] += len(found)
        for digest, row, sampled in zip(digests, rows, group.sampled or [None] * len(rows), strict=True):
            if row and digest not in found and sampled and sampled[1] == row.num_answer_tokens:
                found[digest] = sampled[0]
                self.counts["sampler"] += 1
        return found

    def _compute(self, groups: Sequence[Group], missing: list[dict], known: list[dict[str, float]]) -> None:
        """Score the missing rows, add them to what is known, and keep them."""
        from cream import hardware, logprobs, models

        work = [i for i, rows in enumerate(missing) if rows]
        if not work:
            return
        if self._loaded is None:  # a pass whose scores are all kept needs no model
            model = logprobs.LogProbs(models.load_policy(self.folder, self.dtype, self.device))
            self._loaded = model, hardware.budget(self.max_tokens, model.policy, self.device, training=False)
        values = logprobs.score(self._loaded[0], [list(missing[i].values()) for i in work], self._loaded[1])
        for i, found in zip(work, values, strict=True):
            known[i] |= zip(missing[i], found, strict=True)
            self.counts["computed"] += len(found)
        if self.kept:
            self.kept.keep(
                (groups[i].uuid, {d: v for d, v in zip(missing[i], found, strict=True) if math.isfinite(v)})
                for i, found in zip(work, values, strict=True)
            )


def _scored(rows: list, reasons: list[str | None], values: list[float | None]) -> Scored:
    broken = [value is not None and not math.isfinite(value) for value in values]
    return Scored(
        [None if bad else value for value, bad in zip(values, broken, strict=True)],
        [0 if tokens is None else tokens.num_answer_tokens for tokens in rows],
        ["not a finite number" if bad else why for why, bad in zip(reasons, broken, strict=True)],
    )


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
