"""Policy gradients over scored groups: what their stages (rloo, grpo) share.

The data are reward files: N responses to each prompt, sampled by the behaviour policy, and their rewards. A step raises
the likelihood of the responses that are better than the others to their prompt (cream/advantages.py), by a clipped
ratio to the behaviour policy (losses.clipped), so that the samples serve several steps. Its loss is the mean over all
responses of the global batch. A prompt's responses are one tree; equal ones with equal rewards are computed once, and
count as often as they were sampled.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, nan
from typing import TYPE_CHECKING

from cream import advantages
from cream.errors import UserError
from cream.records import Rewards, ended_turn
from cream.text.chat import Chat, Tokens
from cream.training import policy_options
from cream.training.policy_options import BASE, START, Options

if TYPE_CHECKING:
    from torch import Tensor

    from cream.model.batches import Batch

log = logging.getLogger("cream")
ALONE = "fewer than two of its responses have a reward"
NO_GRADIENT = "all rewards are equal (--drop_equal)"


@dataclass(slots=True)
class Example:
    """A prompt's responses that are trained on, in a list each: tokens, how often it was sampled, shaped reward, and
    what the log has of it: the file's reward, whether it is truncated.

    others: shaped rewards of the group's responses that are not trained on. advantages: see `settle`. behaviour,
    kl_reference: log π under the behaviour and the reference policy, nats, per response one sum or a list of its
    tokens'; NaN where unknown.
    """

    rows: list[Tokens]
    counts: list[int]
    rewards: list[float]
    raw: list[float]
    truncated: list[bool]
    others: list[float]
    behaviour: list = field(default_factory=list)
    kl_reference: list = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.behaviour = self.behaviour or [nan] * len(self.rows)
        self.kl_reference = [nan] * len(self.rows)


class GroupStage:
    """A subclass has DEFAULTS, of the flags that are None; `baseline` (a group's rewards -> advantages), `kl_in`
    ("reward" or "loss"), and `sequence_log_ratio`."""

    model = "logprobs"
    unit = "responses"
    made_for_policy = True
    per_token = True  # of log-probabilities under other policies
    label = None

    def __init__(self, options: Options, about: dict):
        self.options = o = options
        given = {name: getattr(o, name) for name in self.DEFAULTS}
        chosen = {name: self.DEFAULTS[name] if value is None else value for name, value in given.items()}
        vars(self).update(chosen)
        self.kl_reference = o.kl_reference or (self.KL_REFERENCE if o.kl_coef else None)
        policy_options.check(o, self)
        self.baseline_reward = 0.5 if o.reward_baseline is None else o.reward_baseline
        self.mean_tokens = 1.0  # of a response of the file
        recomputed, from_start = o.behaviour == "recomputed", self.kl_reference == START
        self.reference = "behaviour" if recomputed else "kl_reference" if from_start else None
        self.reference_values = "behaviour" if recomputed and from_start else "kl_reference"
        other = None if self.kl_reference == BASE else self.kl_reference
        self.models = {} if from_start or not self.kl_reference else {"kl_reference": other}
        # A run of one step has no other policy than the one that it starts from.
        self.first_step_free = recomputed and not (o.kl_coef and self.kl_in == "reward")
        self.settings = {name: value for name, value in vars(o).items() if name != "kl_reference"} | chosen
        self.summary = policy_options.describe(o, self)
        policy_options.warn_of_sampling(about.get("sampler") or {})

    # Data -------------------------------------------------------------------------------------------------------------

    def prepare(
        self, records: Iterable[Rewards], chat: Chat, limit: int, dropped: Counter[str]
    ) -> list[tuple[str, Example]]:
        """(uuid, example) of every prompt of which a response can be trained on; others are counted in `dropped`.
        `skipped` has the responses that are not trained on, by reason."""
        records, o = list(records), self.options
        self.skipped: Counter[str] = Counter()
        filled = [[o.missing_reward if r is None else r for r in record.reward] for record in records]
        limits = (o.reward_clip_low, o.reward_clip_high)
        low, high = (default if given is None else given for given, default in zip(limits, (-inf, inf), strict=True))
        groups = advantages.shaped(filled, o.reward_shape, self.baseline_reward, low, high)
        kept = []
        for record, raw, rewards in zip(records, filled, groups, strict=True):
            made = self._example(record, raw, rewards, chat, limit)
            if isinstance(made, str):
                dropped[made] += 1
            else:
                kept.append((record.uuid, made))
        examples = [example for _, example in kept]
        self.settle(examples)
        sizes = [n * row.num_response_tokens for e in examples for n, row in zip(e.counts, e.rows, strict=True)]
        self.mean_tokens = sum(sizes) / max(1, sum(map(self.weight, examples)))
        return kept

    def _example(self, record: Rewards, raw: list, rewards: list, chat: Chat, limit: int) -> Example | str:
        if len(record.response) < 2:
            raise UserError(
                f"record {record.uuid!r} has one response: its advantage is over the others to the same prompt; sample "
                "with --gen_n 2 or more"
            )
        finish = record.finish_reason or [None] * len(raw)
        complete = [ended_turn(reason) for reason in finish]
        tokens = chat.encode_within_limit(record.prompt, record.responses(), complete, limit, sampled=True)
        behaviour = self._recorded(record, tokens)
        rows: dict[tuple, list] = {}
        others = []
        for i, reward in enumerate(rewards):
            why = self._not_trained(reward, finish[i], tokens[i], behaviour[i])
            if why:
                self.skipped[why] += 1
                others += [] if reward is None else [reward]
                continue
            key = (*tokens[i].ids, raw[i])
            rows.setdefault(key, [tokens[i], 0, reward, raw[i], finish[i] == "length", behaviour[i]])[1] += 1
        if sum(reward is not None for reward in rewards) < 2:
            return ALONE
        if not rows:
            return "none of its responses can be trained on"
        if self.options.drop_equal and advantages.all_equal(rewards):
            return NO_GRADIENT
        *columns, logprobs = map(list, zip(*rows.values(), strict=True))
        return Example(*columns, others, logprobs)

    def _recorded(self, record: Rewards, tokens: list) -> list[float]:
        """The sampler's log-probabilities; NaN where its tokens are others than are trained on."""
        if self.options.behaviour != "sampler":
            return [nan] * len(tokens)
        if record.logprob is None:
            raise UserError(
                f"record {record.uuid!r} has no `logprob`: --behaviour sampler needs the sampler's log-probabilities, "
                "which infer.py records; give --behaviour recomputed"
            )
        sizes = record.num_tokens or [None] * len(tokens)
        pairs = zip(record.logprob, sizes, tokens, strict=True)
        own = [isinstance(t, Tokens) and n in (None, t.num_response_tokens) and v is not None for v, n, t in pairs]
        return [value if same else nan for value, same in zip(record.logprob, own, strict=True)]

    def _not_trained(self, reward: float | None, finish: str | None, tokens, behaviour: float) -> str | None:
        """Why a response is not trained on; None: it is."""
        if reward is None:
            return "no reward"
        if isinstance(tokens, str):
            return tokens
        if not tokens.num_response_tokens:
            return "no token to train on"
        if finish == "length" and self.options.mask_truncated:
            return "truncated (--mask_truncated)"
        if self.options.behaviour == "sampler" and not isfinite(behaviour):
            return "no log-probability of the sampler's for these tokens"
        return None

    def settle(self, examples: Sequence[Example]) -> None:
        """Set the advantages, of rewards minus the KL term if that is part of them and known. Then the group is that of
        the responses that are trained on: of the others it is not known."""
        o = self.options
        rewards = [example.rewards for example in examples]
        if with_kl := bool(o.kl_coef and self.kl_in == "reward" and examples and _known(examples[0].kl_reference)):
            rewards = [self._with_kl(example) for example in examples]
        groups = []
        for own, example in zip(rewards, examples, strict=True):
            sampled = [r for r, n in zip(own, example.counts, strict=True) for _ in range(n)]
            groups.append(sampled if with_kl else sampled + example.others)
        whole = advantages.deviation([r for group in groups for r in group])
        for example, own, group in zip(examples, rewards, groups, strict=True):
            values = self.baseline(group) if len(group) > 1 else [0.0]
            if self.divide_by_std != "no":
                spread = whole if self.divide_by_std == "file" else advantages.deviation(group)
                values = advantages.divided(values, spread)
            of = dict(zip(group, values, strict=True))
            example.advantages = [of[r] for r in own]

    def _with_kl(self, example: Example) -> list[float]:
        """Rewards minus --kl_coef times the estimated KL of the behaviour policy to the reference, of all tokens."""
        import torch

        from cream import losses

        estimate = getattr(losses, self.kl_estimator)
        found = []
        for reward, own, other in zip(example.rewards, example.behaviour, example.kl_reference, strict=True):
            if isinstance(own, float):
                ratio = torch.tensor([own - sum(other)], dtype=torch.float64)
            else:
                ratio = torch.tensor(own, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
            found.append(reward - self.options.kl_coef * estimate(ratio).sum().item())
        return found

    def facts(self, examples: Sequence[Example]) -> dict[str, object]:
        """How many groups and responses there are, and how many of them have no gradient."""
        equal = sum(not any(e.advantages) for e in examples)
        counts = {
            "groups": len(examples),
            "responses": sum(map(self.weight, examples)),
            "distinct_responses": sum(len(e.rows) for e in examples),
            "truncated": sum(n for e in examples for n, cut in zip(e.counts, e.truncated, strict=True) if cut),
            "groups_without_gradient": equal,
            "responses_skipped": dict(self.skipped),
        }
        line = "%(groups)d groups of %(responses)d responses, %(distinct_responses)d distinct, %(truncated)d truncated"
        log.info(line + "; in %(groups_without_gradient)d groups all rewards are equal: no gradient", counts)
        for reason, count in self.skipped.items():
            log.info("  %d responses are not trained on: %s", count, reason)
        if equal == len(examples) and not (self.options.kl_coef and self.kl_in == "loss"):
            log.warning("all rewards of every group are equal: nothing can be learned from them")
        return counts

    def group(self, example: Example) -> list[Tokens]:
        """The distinct responses."""
        return example.rows

    def weight(self, example: Example) -> int:
        """Its responses, equal ones each."""
        return sum(example.counts)

    # Loss -------------------------------------------------------------------------------------------------------------

    def loss(self, model, batch: Batch, examples: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed over the responses."""
        import torch

        from cream import losses
        from cream.model.batches import send

        o, total, logps = self.options, batch.response_sums, model(batch)
        rows = [row for example in examples for row in zip(*_columns(example), strict=True)]
        counts, advantage, *facts = send(torch.tensor(rows), logps.device).unbind(1)
        lengths, logp = total(torch.ones_like(logps)), total(logps)
        old, by_token = _values(examples, "behaviour", logps)
        difference = (logps if by_token else logp) - old
        whole = total(difference) if by_token else difference
        if self.ratio == "token":
            terms, cut = losses.clipped(difference, advantage[batch.owner], o.clip_low, o.clip_high)
            values, clipped = total(terms) / self._norm(lengths), total(cut.float()) / lengths
            ratio, largest = total(difference.exp()) / lengths, difference.max()
        else:
            log_ratio = self.sequence_log_ratio(whole, lengths)
            values, clipped = losses.clipped(log_ratio, advantage, o.clip_low, o.clip_high)
            ratio, largest = log_ratio.exp(), log_ratio.max()
        metrics = dict(zip(("reward", "truncated", "no_gradient"), facts, strict=True)) | {
            "advantage_rms": advantage.square(),
            "ratio": ratio,
            "clipped": clipped.float(),
            "log_ratio_abs": whole.abs(),
            "kl_behaviour": total(losses.k3(-difference)) if by_token else losses.k3(-difference),
            "entropy_sampled": -logp / lengths,
            "response_tokens": lengths,
        }
        if self.kl_reference:
            to_reference = logps - _values(examples, self.reference_values, logps)[0]
            if o.kl_coef and self.kl_in == "loss":
                estimates = total(getattr(losses, self.kl_estimator)(to_reference))
                values = values + o.kl_coef * estimates / (self._norm(lengths) if self.ratio == "token" else lengths)
            metrics |= {"kl_reference": total(losses.k3(to_reference)), "kl_reference_k1": total(to_reference)}
        loss = (counts * values).sum()
        metrics = {name: (counts * value.detach()).sum() for name, value in metrics.items()}
        return loss, {"loss": loss.detach()} | metrics | {"ratio_max": largest.detach().exp()}

    def _norm(self, lengths: Tensor) -> Tensor | float:
        """What a response's sum over its tokens is divided by; with a ratio per token."""
        return {"response": lengths, "token": self.mean_tokens, "constant": self.options.loss_constant}[self.loss_norm]

    def check_first(self, metrics: dict[str, float], tolerance: float) -> None:
        """At the first step the policy is the one whose log-probabilities were recomputed."""
        if self.options.behaviour == "sampler" or metrics["log_ratio_abs"] <= tolerance:
            return
        raise UserError(
            f"at the first step a response's log-probability differs from the starting policy's by "
            f"{metrics['log_ratio_abs']:.3g} nats on average: likely causes are dropout, another dtype or attention "
            "kernel, or weights that changed on disk; nothing was trained"
        )


def _known(values: Sequence) -> bool:
    """Whether log-probabilities were computed, or came with the data."""
    return not isinstance(values[0], float) or isfinite(values[0])


def _values(examples: Sequence[Example], name: str, logps: Tensor) -> tuple[Tensor, bool]:
    """log π under another policy, and whether it is (K,) of the tokens or (R,) of the responses. Where it was not
    computed it is this policy's own, which then has not moved yet."""
    import torch

    from cream.model.batches import send

    rows = [value for example in examples for value in getattr(example, name)]
    if not _known(rows):
        return logps.detach(), True
    by_token = not isinstance(rows[0], float)
    flat = [value for row in rows for value in row] if by_token else rows
    return send(torch.tensor(flat), logps.device), by_token


def _columns(example: Example) -> tuple[Sequence, ...]:
    """Per response: how often it counts, its advantage, its reward, whether it is truncated, and whether its group has
    no gradient."""
    idle = [not any(example.advantages)] * len(example.rows)
    return example.counts, example.advantages, example.raw, example.truncated, idle
