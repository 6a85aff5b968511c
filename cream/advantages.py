"""Advantages of scored groups: how much better a response is than the others to its prompt. Pure functions of numbers.

A group's rewards are those of the N responses to one prompt. A reward that is None says nothing of its response: it is
in no mean, and its advantage is None. A baseline changes the variance of the policy gradient E[A grad log pi], and not
its expectation where it does not depend on the response itself (R. J. Williams, Machine Learning 8, 1992).
"""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

Values = Sequence[float | None]
EPSILON = 1e-4  # added to a standard deviation before it divides (trl's; verl has 1e-6)
SHAPES = ("raw", "centred", "standard", "sigmoid")


def leave_one_out(rewards: Values) -> list[float | None]:
    """A_i = r_i - mean of the other rewards of the group: RLOO (arXiv 2402.14740, §3.2; Kool et al. 2019).

    It is N / (N - 1) times r_i minus the group's mean, and unbiased: the baseline does not depend on response i. Raises
    ValueError where fewer than two rewards are known.
    """
    mean, count = _mean(rewards)
    return [None if r is None else (r - mean) * count / (count - 1) for r in rewards]


def group_relative(rewards: Values) -> list[float | None]:
    """A_i = r_i - mean of the group's rewards, i included: Dr. GRPO (arXiv 2503.20783, §3.2), and GRPO (arXiv
    2402.03300, §4.1.2) before it divides by their standard deviation (`divided`). Raises as leave_one_out does."""
    mean, _ = _mean(rewards)
    return [None if r is None else r - mean for r in rewards]


def divided(advantages: Values, deviation: float) -> list[float | None]:
    """A_i / (deviation + 1e-4), of rewards whose standard deviation this is: of the group, GRPO; of all groups, trl's
    `scale_rewards="batch"`."""
    return [None if a is None else a / (deviation + EPSILON) for a in advantages]


def deviation(rewards: Values) -> float:
    """The standard deviation of the rewards that are known, with N - 1 in the denominator, as in trl and verl; 0 of
    fewer than two."""
    known = [r for r in rewards if r is not None]
    return stdev(known) if len(known) > 1 else 0.0


def all_equal(rewards: Values) -> bool:
    """Whether all known rewards of a group are one number: every advantage is 0, and the group has no gradient."""
    return len({r for r in rewards if r is not None}) < 2


def shaped(
    groups: Sequence[Values],
    shape: str = "raw",
    baseline: float = 0.0,
    low: float = -math.inf,
    high: float = math.inf,
) -> list[list[float | None]]:
    """The rewards of a file's groups, as they are (`raw`), or

        centred    r - mean of the file
        standard   (r - mean of the file) / standard deviation of the file
        sigmoid    1 / (1 + exp(-r)) - baseline: SER's reward for PPO (arXiv 2411.00418, its released ppo.py)

    and then clipped to [low, high]. The mean of a group, which every advantage is relative to, takes a constant away
    again: where nothing is clipped, `centred` and a baseline decide no advantage.
    """
    known = [r for group in groups for r in group if r is not None]
    mean, scale = (fmean(known) if known else 0.0), 1.0
    if shape == "standard":
        scale = deviation(known) or 1.0

    def one(r: float | None) -> float | None:
        if r is None:
            return None
        if shape in ("centred", "standard"):
            r = (r - mean) / scale
        elif shape == "sigmoid":
            r = _sigmoid(r) - baseline
        return min(max(r, low), high)

    return [[one(r) for r in group] for group in groups]


def _mean(rewards: Values) -> tuple[float, int]:
    """The mean of the known rewards, exactly theirs where all are equal, and their number."""
    known = [r for r in rewards if r is not None]
    if len(known) < 2:
        raise ValueError(f"{len(known)} of {len(rewards)} responses have a reward, and an advantage compares two")
    return (known[0] if all_equal(known) else fmean(known)), len(known)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
