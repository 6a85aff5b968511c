"""The probabilities that a reward gives to preferences: p = sigma(d / T), with d = beta (r_chosen - r_rejected).

The label is always "chosen", so confidence max(p, 1 - p) is what is calibrated, against whether the pair is right
(p > 1/2; a tie is half right). Measures are of weighted pairs, (R, n) weights, as bootstrap.py draws them.
"""

import numpy as np

from cream.evaluation.bootstrap import Measure, mean_of, ratio
from cream.ranking import Array

BINS = 10  # of confidence, in [0.5, 1]
COVERAGES = (1.0, 0.8, 0.5)
LOG_T = (-3.0, 3.0)  # where the temperature is looked for


def measures(d: Array) -> dict[str, Measure]:
    """name -> measure of the pairs' log-odds (n,)."""
    p, conf, right = probability(d), probability(np.abs(d)), correct(d)
    equal_width = np.minimum(((conf - 0.5) * 2 * BINS).astype(int), BINS - 1)
    found = {
        "ece": lambda w: calibration_error(w, conf, right, equal_width),
        "ece_equal_mass": lambda w: calibration_error(w, conf, right, equal_mass(conf)),
        "mce": lambda w: calibration_error(w, conf, right, equal_width, largest=True),
        "brier": mean_of((1 - p) ** 2),
        "nll": mean_of(nll(d)),
        "auroc": lambda w: auroc(w, conf, right),
    }
    return found | {f"accuracy_at_{share:.0%}".replace("%", ""): _selective(conf, right, share) for share in COVERAGES}


def probability(d: Array) -> Array:
    """sigma(d)."""
    return np.exp(-np.logaddexp(0, -d))


def nll(d: Array) -> Array:
    """-log sigma(d), in nats."""
    return np.logaddexp(0, -d)


def correct(d: Array) -> Array:
    """1 where the chosen response has the higher reward, 1/2 in a tie, else 0."""
    return (1 + np.sign(d)) / 2


def equal_mass(conf: Array) -> Array:
    """(n,) bins that hold equally many pairs, equal confidences in one bin."""
    order = np.sort(conf)
    return np.searchsorted(order, conf) * BINS // max(1, len(conf))


def calibration_error(w: Array, conf: Array, right: Array, bins: Array, largest: bool = False) -> Array:
    """(R,) sum_b n_b / n |accuracy_b - mean confidence_b|; the largest of these gaps instead. Of a finite sample it is
    biased upward."""
    member = np.eye(BINS)[bins]
    mass, gap = w @ member, np.abs(w @ (member * (right - conf)[:, None]))
    return np.nanmax(ratio(gap, mass), axis=1) if largest else gap.sum(axis=1) / w.sum(axis=1)


def auroc(w: Array, score: Array, positive: Array) -> Array:
    """(R,) chance that a positive item has a higher score than a negative one, a tie counting half; `positive` may be
    1/2. NaN without one of both."""
    order, starts = groups(score)
    good = np.add.reduceat((w * positive)[:, order], starts, axis=1)
    bad = np.add.reduceat((w * (1 - positive))[:, order], starts, axis=1)
    below = np.cumsum(bad, axis=1) - bad / 2
    return ratio((good * below).sum(axis=1), good.sum(axis=1) * bad.sum(axis=1))


def groups(values: Array) -> tuple[np.ndarray, np.ndarray]:
    """(indices that sort the values, where each run of equal ones starts)."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    return order, np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(values)])


def _selective(conf: Array, right: Array, coverage: float) -> Measure:
    return lambda w: selective_accuracy(w, conf, right, coverage)


def selective_accuracy(w: Array, conf: Array, right: Array, coverage: float) -> Array:
    """(R,) accuracy of the share `coverage` of pairs with the highest confidence; of equal ones at its edge a part."""
    order, starts = groups(-conf)
    mass = np.add.reduceat(w[:, order], starts, axis=1)
    good = np.add.reduceat((w * right)[:, order], starts, axis=1)
    wanted = coverage * mass.sum(axis=1, keepdims=True)
    taken = np.clip(wanted - (np.cumsum(mass, axis=1) - mass), 0, mass)
    return ratio((np.nan_to_num(ratio(good, mass)) * taken).sum(axis=1), wanted[:, 0])


def fit_temperature(d: Array) -> float:
    """T in e^LOG_T with the smallest mean of -log sigma(d / T) (arXiv 1706.04599, section 4.2). It changes no order."""
    from scipy.optimize import minimize_scalar

    def loss(log_t: float) -> float:
        return float(nll(d * np.exp(-log_t)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=LOG_T, method="bounded", options={"xatol": 1e-6}).x))
