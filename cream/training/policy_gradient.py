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
from cream.cli.flags import flag
from cream.errors import UserError
from cream.records import Rewards, ended_turn
from cream.text.chat import Chat, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from cream.model.batches import Batch

log = logging.getLogger("cream")
ESTIMATORS = ("k1", "k2", "k3")
START, BASE = "start", "base"  # of --kl_reference
PLAIN = {"gen_temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # samples pi itself
ALONE = "fewer than two of its responses have a reward"
NO_GRADIENT = "all rewards are equal (--drop_equal)"


@dataclass
class Options:
    """Policy gradients (rloo, grpo)"""

    ratio: str | None = flag(
        None,
        "what the clipped ratio to the behaviour policy is of: token, each by itself; sequence, the response as a "
        "whole (grpo: its mean per token, as in GSPO). none: sequence for rloo, token for grpo",
        choices=("token", "sequence"),
    )
    clip_low: float = flag(0.2, "the ratio is clipped below 1 minus this", low=0, high=1)
    clip_high: float = flag(0.2, "the ratio is clipped above 1 plus this", low=0)
    behaviour: str = flag(
        "recomputed",
        "log-probabilities of the policy that sampled: recomputed, those of the policy that training starts from, by "
        "the code that trains; sampler, the sampling engine's own, one sum per response (--ratio sequence)",
        choices=("recomputed", "sampler"),
    )
    kl_coef: float = flag(
        0.0, "weight of the KL divergence from --kl_reference: in the reward (rloo), or in the loss (grpo)", low=0
    )
    kl_estimator: str | None = flag(
        None, "how it is estimated; none: k1 for rloo, k3 for grpo, of which k1 has no gradient", choices=ESTIMATORS
    )
    kl_reference: str | None = flag(
        None,
        "the policy of the KL term, and, with or without one, of kl_reference in the log: a name in "
        "configs/checkpoint.json, a folder, base (M0), or start (the policy that training starts from). none: start "
        "for grpo with a KL term",
        decides=False,
    )
    reward_shape: str = flag(
        "raw",
        "rewards are used as they are (raw), minus the file's mean (centred), divided by its standard deviation, too "
        "(standard), or as sigma(reward) - --reward_baseline (sigmoid)",
        choices=advantages.SHAPES,
    )
    reward_baseline: float | None = flag(None, "of --reward_shape sigmoid; none: 0.5", low=0, high=1)
    reward_clip_low: float | None = flag(None, "shaped rewards are at least this; none: no limit")
    reward_clip_high: float | None = flag(None, "shaped rewards are at most this; none: no limit")
    null_reward: float | None = flag(
        None, "reward of a response that has none (no answer was found, say); none: it is left out of its group"
    )
    divide_by_std: str | None = flag(
        None,
        "divide advantages by the standard deviation of their group's rewards (group) or of all (file), or not (no); "
        "none: no for rloo, group for grpo",
        choices=("no", "group", "file"),
    )
    loss_norm: str | None = flag(
        None,
        "with --ratio token, a response's terms are averaged (response, GRPO), divided by the file's mean number of "
        "tokens (token, DAPO), or by --loss_constant (constant, Dr. GRPO). none: constant for rloo, response for grpo",
        choices=("response", "token", "constant"),
    )
    loss_constant: float = flag(1.0, "of --loss_norm constant; Dr. GRPO: the limit on a response's tokens", above=0)
    mask_truncated: bool = flag(
        False, "truncated responses count in their group's mean, and are not trained on themselves"
    )
    drop_equal: bool = flag(False, "skip groups whose rewards are all equal: they have no gradient, and take time")


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
        chosen = {name: getattr(o, name) for name in self.DEFAULTS}
        self._check()
        for name, value in chosen.items():
            setattr(self, name, self.DEFAULTS[name] if value is None else value)
        self._check_ratio()
        self.baseline_reward = 0.5 if o.reward_baseline is None else o.reward_baseline
        self.mean_tokens = 1.0  # of a response of the file
        self.kl_reference = o.kl_reference or (self.KL_REFERENCE if o.kl_coef else None)
        self._check_kl()
        recomputed, from_start = o.behaviour == "recomputed", self.kl_reference == START
        self.reference = "behaviour" if recomputed else "kl_reference" if from_start else None
        self._reference_values = "behaviour" if recomputed and from_start else "kl_reference"
        self.models = {} if from_start or not self.kl_reference else {"kl_reference": self._checkpoint()}
        # A run of one step has no other policy than the one that it starts from.
        self.first_step_free = recomputed and not (o.kl_coef and self.kl_in == "reward")
        self.settings = {name: getattr(o, name) for name in vars(o) if name != "kl_reference"}
        self.settings |= {name: getattr(self, name) for name in self.DEFAULTS}
        self.summary = self._describe()
        _warn_of_sampling(about.get("sampler") or {})

    # Flags ------------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        o = self.options
        if o.reward_baseline is not None and o.reward_shape != "sigmoid":
            raise UserError(f"--reward_baseline belongs to --reward_shape sigmoid, but it is {o.reward_shape}")
        low, high = o.reward_clip_low, o.reward_clip_high
        if low is not None and high is not None and low >= high:
            raise UserError(f"--reward_clip_low {low:g} is not below --reward_clip_high {high:g}")
        if o.clip_low == o.clip_high == 0:
            raise UserError("--clip_low 0 and --clip_high 0: only the first step would have a gradient; give a range")

    def _check_ratio(self) -> None:
        o = self.options
        if o.behaviour == "sampler" and self.ratio == "token":
            raise UserError(
                "--behaviour sampler: the samples hold one log-probability per response, and --ratio token needs one "
                "per token; give --ratio sequence, or --behaviour recomputed"
            )
        if self.ratio == "sequence" and (o.loss_norm is not None):
            raise UserError("--loss_norm belongs to --ratio token: with --ratio sequence a response is one term")
        if o.loss_constant != 1 and (self.ratio == "sequence" or self.loss_norm != "constant"):
            raise UserError("--loss_constant belongs to --ratio token with --loss_norm constant")

    def _check_kl(self) -> None:
        o = self.options
        if not o.kl_coef:
            if o.kl_estimator is not None:
                raise UserError(f"--kl_estimator {o.kl_estimator}: there is no KL term; --kl_coef gives its weight")
            return
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise UserError("--kl_estimator k1 in a loss: its gradient is 0 on average; give k2 or k3")
        if self.kl_in == "reward" and self.kl_reference is None:
            raise UserError("--kl_coef needs --kl_reference NAME|FOLDER|base: the policy to stay close to")
        if self.kl_in == "reward" and self.kl_reference == START:
            raise UserError(
                "--kl_reference start: the KL term is in the reward of responses that this very policy sampled, and so "
                "always 0; give the policy that the first round started from, or base"
            )
        if self.kl_in == "reward" and o.behaviour == "sampler" and self.kl_estimator != "k1":
            raise UserError(
                f"--kl_estimator {self.kl_estimator} needs log-probabilities per token, which --behaviour sampler has "
                "not; give k1, or --behaviour recomputed"
            )

    def _checkpoint(self) -> str | None:
        return None if self.kl_reference == BASE else self.kl_reference

    def _describe(self) -> str:
        o, kl = self.options, "no KL term" + (f" (the log has it to {self.kl_reference})" if self.kl_reference else "")
        if o.kl_coef:
            kl = f"KL {o.kl_coef:g} x {self.kl_estimator} to {self.kl_reference} in the {self.kl_in}"
        norm = f", loss norm {self.loss_norm}" if self.ratio == "token" else ""
        return (
            f"ratio per {self.ratio} in [{1 - o.clip_low:g}, {1 + o.clip_high:g}]{norm}, behaviour {o.behaviour}, "
            f"rewards {o.reward_shape}, advantages divided by std: {self.divide_by_std}, {kl}"
        )

    # Data -------------------------------------------------------------------------------------------------------------

    def prepare(
        self, records: Iterable[Rewards], chat: Chat, limit: int, dropped: Counter[str]
    ) -> list[tuple[str, Example]]:
        """(uuid, example) of every prompt of which a response can be trained on; others are counted in `dropped`.
        `skipped` has the responses that are not trained on, by reason."""
        records, o = list(records), self.options
        self.skipped: Counter[str] = Counter()
        filled = [[o.null_reward if r is None else r for r in record.reward] for record in records]
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
            to_reference = logps - _values(examples, self._reference_values, logps)[0]
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


def _warn_of_sampling(sampler: dict) -> None:
    """Samples of a changed distribution are not the policy's own."""
    other = [f"{name} {sampler[name]:g}" for name, plain in PLAIN.items() if sampler.get(name, plain) != plain]
    if other:
        log.warning(
            "the responses were sampled with %s: log-probabilities are of the model itself, and not of the "
            "distribution that was sampled, so that the gradient is biased; sample with --gen_temperature 1 --top_p 1",
            ", ".join(other),
        )
