"""The flags of policy gradients (rloo, grpo), and what is wrong with them."""

import logging
from dataclasses import dataclass

from cream.advantages import SHAPES
from cream.cli.flags import flag
from cream.errors import UserError

log = logging.getLogger("cream")
ESTIMATORS = ("k1", "k2", "k3")
START, BASE = "start", "base"  # of --kl_reference
PLAIN = {"gen_temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # samples pi itself


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
        choices=SHAPES,
    )
    reward_baseline: float | None = flag(None, "of --reward_shape sigmoid; none: 0.5", low=0, high=1)
    reward_clip_low: float | None = flag(None, "shaped rewards are at least this; none: no limit")
    reward_clip_high: float | None = flag(None, "shaped rewards are at most this; none: no limit")
    null_reward: float | None = flag(
        None, "reward of a response that has none (no answer was found, say); none: it is skipped"
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


def check(options: Options, stage) -> None:
    """Raises UserError where flags contradict each other; `stage` has what those that are None stand for."""
    _check_rewards(options)
    _check_ratio(options, stage)
    _check_kl(options, stage)


def _check_rewards(options: Options) -> None:
    if options.reward_baseline is not None and options.reward_shape != "sigmoid":
        raise UserError(f"--reward_baseline belongs to --reward_shape sigmoid, but it is {options.reward_shape}")
    low, high = options.reward_clip_low, options.reward_clip_high
    if low is not None and high is not None and low >= high:
        raise UserError(f"--reward_clip_low {low:g} is not below --reward_clip_high {high:g}")
    if options.clip_low == options.clip_high == 0:
        raise UserError("--clip_low 0 and --clip_high 0: only the first step would have a gradient; give a range")


def _check_ratio(options: Options, stage) -> None:
    if options.behaviour == "sampler" and stage.ratio == "token":
        raise UserError(
            "--behaviour sampler: the samples hold one log-probability per response, and --ratio token needs one "
            "per token; give --ratio sequence, or --behaviour recomputed"
        )
    if stage.ratio == "sequence" and (options.loss_norm is not None):
        raise UserError("--loss_norm belongs to --ratio token: with --ratio sequence a response is one term")
    if options.loss_constant != 1 and (stage.ratio == "sequence" or stage.loss_norm != "constant"):
        raise UserError("--loss_constant belongs to --ratio token with --loss_norm constant")


def _check_kl(options: Options, stage) -> None:
    if not options.kl_coef:
        if options.kl_estimator is not None:
            raise UserError(f"--kl_estimator {options.kl_estimator}: there is no KL term; --kl_coef gives its weight")
        return
    if stage.kl_in == "loss" and stage.kl_estimator == "k1":
        raise UserError("--kl_estimator k1 in a loss: its gradient is 0 on average; give k2 or k3")
    if stage.kl_in == "reward" and stage.kl_reference is None:
        raise UserError("--kl_coef needs --kl_reference NAME|FOLDER|base: the policy to stay close to")
    if stage.kl_in == "reward" and stage.kl_reference == START:
        raise UserError(
            "--kl_reference start: the KL term is in the reward of responses that this very policy sampled, and so "
            "always 0; give the policy that the first round started from, or base"
        )
    if stage.kl_in == "reward" and options.behaviour == "sampler" and stage.kl_estimator != "k1":
        raise UserError(
            f"--kl_estimator {stage.kl_estimator} needs log-probabilities per token, which --behaviour sampler has "
            "not; give k1, or --behaviour recomputed"
        )


def describe(options: Options, stage) -> str:
    """The flags, for the log."""
    kl = "no KL term" + (f" (the log has it to {stage.kl_reference})" if stage.kl_reference else "")
    if options.kl_coef:
        kl = f"KL {options.kl_coef:g} x {stage.kl_estimator} to {stage.kl_reference} in the {stage.kl_in}"
    norm = f", loss norm {stage.loss_norm}" if stage.ratio == "token" else ""
    return (
        f"ratio per {stage.ratio} in [{1 - options.clip_low:g}, {1 + options.clip_high:g}]{norm}, "
        f"behaviour {options.behaviour}, rewards {options.reward_shape}, advantages divided by std: "
        f"{stage.divide_by_std}, {kl}"
    )


def warn_of_sampling(sampler: dict) -> None:
    """Samples of a changed distribution are not the policy's own."""
    other = [f"{name} {sampler[name]:g}" for name, plain in PLAIN.items() if sampler.get(name, plain) != plain]
    if other:
        log.warning(
            "the responses were sampled with %s: log-probabilities are of the model itself, and not of the "
            "distribution that was sampled, so that the gradient is biased; sample with --gen_temperature 1 --top_p 1",
            ", ".join(other),
        )
