"""Alarms: facts of a stage by which something is probably wrong, each with a threshold and a page that explains it.

A stage calls `sound` once, at its end, with facts that it has anyway; training watches its logged lines (`Watch`). An
alarm is one line on the terminal and an entry under `alarms` in the output's sidecar; it stops nothing. Which alarms
a stage has follows from the names of its facts, so that a new metric of a known name has its alarm already.
"""

import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

from cream.cli.flags import flag
from cream.errors import UserError, nearest
from cream.files.provenance import Fired

log = logging.getLogger("cream")
PAGE = "docs/troubleshooting.md"
WINDOW = 5  # logged lines over which a noisy metric is averaged
MOST = sys.float_info.max  # stands for infinity, which JSON does not have


class Alarm(NamedTuple):
    """Sounds where the fact of its name is above (or else below) `limit`. `text`: one sentence on {value} and {limit};
    `anchor`: its heading in docs/troubleshooting.md."""

    above: bool
    limit: float
    text: str
    anchor: str


UP, DOWN = True, False
SAME = {  # metrics of policy gradients -> what alarms know them as
    "kl_reference_k1": "kl",
    "entropy_sampled": "entropy",
}
ALARMS = {
    # sampling, and training on samples
    "truncated": Alarm(UP, 0.1, "{percent:.0f} % of responses are truncated (threshold {limit_percent:g} %); truncated responses enter no pair", "truncated-responses"),
    "distinct": Alarm(DOWN, 0.5, "only {percent:.0f} % of responses are distinct (threshold {limit_percent:g} %); equal responses say nothing about preference", "few-distinct-responses"),
    "length_drift": Alarm(UP, 1.5, "mean response length changed by a factor of {value:.2f} (threshold {limit:g}); rewards may follow length", "response-lengths-drift"),
    # rewards and pairs
    "no_reward": Alarm(UP, 0.1, "{percent:.0f} % of responses have no reward (threshold {limit_percent:g} %); the reasons are above", "responses-without-a-reward"),
    "flat_rewards": Alarm(UP, 0.3, "all rewards are equal for {percent:.0f} % of prompts (threshold {limit_percent:g} %), which give no pair", "equal-rewards"),
    "tied_rewards": Alarm(UP, 0.5, "{percent:.0f} % of distinct responses have the reward of another one (threshold {limit_percent:g} %); ties blur the ranking", "equal-rewards"),
    "no_pair": Alarm(UP, 0.5, "{percent:.0f} % of prompts have no pair (threshold {limit_percent:g} %); the reasons are above", "few-pairs"),
    "length_bias": Alarm(UP, 0.9, "rewards and lengths correlate by {value:.2f} in size (threshold {limit:g}); training may learn length alone", "rewards-follow-length"),
    "c_contradicts": Alarm(DOWN, 0.5, "mean C is below 1/2 (95 % upper bound {value:.3f}, threshold {limit:g}): the two rankings contradict each other; a reward may have the wrong sign, or a file belong to another model", "mean-c-near-or-below-one-half"),
    "c_undecided": Alarm(DOWN, 0.55, "mean C is not clearly above 1/2 (95 % lower bound {value:.3f}, threshold {limit:g}): the two rankings say little about which response is better", "mean-c-near-or-below-one-half"),
    "c_below_half": Alarm(UP, 0.3, "C is below 1/2 for {percent:.0f} % of prompts (threshold {limit_percent:g} %); with their own C (consistency_dyn) training prefers the rejected response", "pairs-trained-in-reverse"),
    # training
    "kl": Alarm(UP, 20, "the KL to the reference is {value:.3g} nats per response (threshold {limit:g}); far from the reference rewards lose their meaning", "far-from-the-reference"),
    "kl_per_token": Alarm(UP, 0.5, "the KL to the reference is {value:.3g} nats per token (threshold {limit:g}); far from the reference rewards lose their meaning", "far-from-the-reference"),
    "entropy_left": Alarm(DOWN, 0.3, "entropy fell to {percent:.0f} % of its first value (threshold {limit_percent:g} %); samples become alike", "entropy-collapses"),
    "grad_spike": Alarm(UP, 10, "the gradient norm is {value:.3g} times its median so far (threshold {limit:g})", "gradient-norm-spikes"),
    "saturated": Alarm(UP, 10, "every pair is ranked right, with a mean margin of {value:.3g} (threshold {limit:g}); there is nothing left to learn from these pairs", "margins-explode"),
    "margin_of_cap": Alarm(UP, 1.2, "the mean margin is {value:.2f} times logit(C) (threshold {limit:g}), at which the loss is least", "margins-beyond-their-cap"),
    "overfit": Alarm(UP, 0.1, "the held-out loss is {percent:.0f} % above its minimum (threshold {limit_percent:g} %); an earlier checkpoint is better", "held-out-loss-rises"),
    "over_optimised": Alarm(UP, 0.05, "gold accuracy fell by {value:.3f} while the reward rose (threshold {limit:g}): the policy exploits the reward", "reward-up-gold-accuracy-down"),
    # evaluation
    "unanswered": Alarm(UP, 0.1, "no answer was found in {percent:.0f} % of responses (threshold {limit_percent:g} %); they count as wrong", "answers-not-found"),
    "over_optimised_round": Alarm(UP, 0.0, "accuracy is {percent:.1f} points below the 95 % interval of the model before (threshold {limit_percent:g}) while the mean reward of its responses, by the same model, rose: training probably exploits that reward", "reward-up-gold-accuracy-down"),
    "accuracy_drop": Alarm(UP, 0.0, "accuracy is {percent:.1f} points below the 95 % interval of the model before (threshold {limit_percent:g})", "worse-than-the-model-before"),
}  # fmt: skip

Limits = Mapping[str, float]  # thresholds by name, without the alarms that are off
LIMITS: Limits = {name: alarm.limit for name, alarm in ALARMS.items()}


@dataclass
class AlarmFlags:
    """Alarms"""

    alarm: str | None = flag(
        None,
        f"thresholds of alarms, NAME=VALUE,… (NAME=off: never); the names are in {PAGE}; none: the defaults there",
        decides=False,
    )

    def __post_init__(self):
        self.limits()

    def limits(self) -> Limits:
        """The thresholds. Raises UserError for an unknown alarm, or a threshold that is not a number."""
        limits = dict(LIMITS)
        for part in filter(None, (self.alarm or "").split(",")):
            name, _, text = (word.strip() for word in part.partition("="))
            if name not in ALARMS:
                raise UserError(f"--alarm {part}: there is no alarm {name!r}{nearest(name, ALARMS)}; {PAGE} lists them")
            try:
                limits[name] = math.nan if text.lower() in ("off", "none") else float(text)
            except ValueError:
                raise UserError(f"--alarm {part}: expected {name}=NUMBER or {name}=off") from None
        return {name: limit for name, limit in limits.items() if not math.isnan(limit)}


def check(facts: Mapping[str, float | None], limits: Limits = LIMITS) -> list[Fired]:
    """The alarms that these facts set off; facts without an alarm, and unknown values (None, NaN), set off none."""
    return [
        Fired(alarm=name, value=max(-MOST, min(value, MOST)), threshold=limits[name])
        for name, value in facts.items()
        if name in limits and value is not None
        if (value > limits[name] if ALARMS[name].above else value < limits[name])
    ]


def sound(facts: Mapping[str, float | None], limits: Limits = LIMITS) -> list[Fired]:
    """The same, each with a line in the log."""
    fired = check(facts, limits)
    for each in fired:
        log.warning("%s", line(each))
    return fired


def describe(fired: Fired) -> str:
    """What happened, in a sentence; of an alarm that this version does not know its name and value."""
    if (alarm := ALARMS.get(fired["alarm"])) is None:
        return f"{fired['alarm']} is {fired['value']:.3g}"
    step = f", after step {fired['step']}" if "step" in fired else ""
    value, limit = fired["value"], fired["threshold"]
    return alarm.text.format(value=value, limit=limit, percent=100 * value, limit_percent=100 * limit) + step


def page(fired: Fired) -> str:
    """The file that explains it, and the heading there."""
    alarm = ALARMS.get(fired["alarm"])
    return f"{PAGE}#{alarm.anchor}" if alarm else PAGE


def line(fired: Fired) -> str:
    """The line on the terminal."""
    return f"alarm: {describe(fired)}; see {page(fired)}"


def share(part: float, whole: float) -> float | None:
    """part / whole; None of nothing."""
    return part / whole if whole else None


class Watch:
    """The alarms of a training, by its logged lines; each alarm sounds once, and `fired` has them all.

    Metrics that are an alarm's fact are looked at under their own names: kl, kl_per_token, truncated (or those of
    `SAME`). Others are compared with earlier lines: entropy and length with the first, grad_norm with its median,
    eval_loss with its minimum, gold (a share that is right) with its best while reward rises. A preference stage's
    margin is compared with `cap`, logit of its mean C, where training should stop; None where there is no such.
    """

    def __init__(self, limits: Limits = LIMITS, cap: float | None = None):
        self.limits, self.cap = limits, cap
        self.seen: dict[str, list[float]] = {}
        self.fired: list[Fired] = []

    def __call__(self, step: int, metrics: Mapping[str, float], quiet: bool = False) -> None:
        """Look at a logged line; `quiet`: one from before the training was resumed."""
        metrics = {SAME.get(name, name): value for name, value in metrics.items()}
        for name in ("entropy", "length", "grad_norm", "eval_loss", "gold", "reward"):
            if name in metrics:
                self.seen.setdefault(name, []).append(metrics[name])
        known = {each["alarm"] for each in self.fired}
        for each in check(self._facts(metrics), self.limits):
            if each["alarm"] not in known:
                self.fired.append(each | {"step": step})
                if not quiet:
                    log.warning("%s", line(self.fired[-1]))

    def _facts(self, now: Mapping[str, float]) -> dict[str, float | None]:
        first = {name: values[0] for name, values in self.seen.items()}
        facts: dict[str, float | None] = dict(now)
        if "entropy" in now:
            facts["entropy_left"] = share(now["entropy"], first["entropy"])
        if "length" in now:
            facts["length_drift"] = drift(now["length"], first["length"])
        if "grad_norm" in now and len(norms := self.seen["grad_norm"]) > WINDOW:
            facts["grad_spike"] = share(now["grad_norm"], median(norms[:-1]))
        if "margin" in now and self.cap:
            facts["margin_of_cap"] = now["margin"] / self.cap
        if now.get("accuracy", 0) >= 1:
            facts["saturated"] = now.get("margin")
        if "eval_loss" in now and (least := min(self.seen["eval_loss"])) > 0:
            facts["overfit"] = now["eval_loss"] / least - 1
        if {"gold", "reward"} <= now.keys():
            facts["over_optimised"] = over_optimised(self.seen["gold"], self.seen["reward"])
        return facts


def drift(now: float | None, before: float | None) -> float | None:
    """The factor, at least 1, between two lengths; None where one is unknown or 0."""
    return max(now / before, before / now) if now and before else None


def over_optimised(gold: list[float], reward: list[float]) -> float | None:
    """How far gold accuracy is below its best while the reward is above what it was then, both averaged over WINDOW
    lines; 0 where the reward did not rise, None before there are two windows."""
    if len(gold) < 2 * WINDOW or len(gold) != len(reward):
        return None
    means = [(fmean(gold[i : i + WINDOW]), fmean(reward[i : i + WINDOW])) for i in range(len(gold) - WINDOW + 1)]
    best, then = max(means)
    now, rewarded = means[-1]
    return max(0.0, best - now) if rewarded > then else 0.0
