"""The formulas of ArmoRM (2406.12845) on the features of a frozen reward model: ridge regression for each attribute,
debiasing, and the gate. Pure functions of arrays.

N rows, D features, K attributes. Three faults of the released stage 2 are not repeated: the gate's softmax is over
attributes, not over chosen and rejected; it is trained on debiased rewards; and all that a score needs is saved.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from cream.model.armo import Gate
from cream.ranking import Array

log = logging.getLogger("cream")
ALPHAS = tuple(10.0**power for power in range(-4, 5))
LAMBDAS = (0, 0.01, 0.025, 0.05, 0.075, *(n / 1000 for n in range(100, 151, 25)), *(n / 100 for n in range(20, 96, 5)))
ROWS = 8192  # that are cast to float64 at a time


# Attributes -----------------------------------------------------------------------------------------------------------


@dataclass
class Fit:
    """An attribute's weights (D,), the alpha that was chosen, its mean squared error on the rows held out, and how many
    rows were fitted and held out."""

    weight: Array
    alpha: float
    error: float
    fitted: int
    held_out: int


def ridge(gram: Array, moment: Array, alphas: Sequence[float] = ALPHAS) -> Array:
    """(A, D) w = argmin |X w - y|^2 + alpha |w|^2 for each alpha, without an intercept, given X'X (D, D), X'y (D,)."""
    return _Ridge(gram).solve(moment, alphas)


class _Ridge:
    """X'X, decomposed once for all alphas and attributes."""

    def __init__(self, gram: Array):
        values, self.vectors = np.linalg.eigh(gram)
        self.values = np.maximum(values, 0)

    def solve(self, moment: Array, alphas: Sequence[float]) -> Array:
        inside = self.vectors.T @ moment
        return np.stack([self.vectors @ (inside / (self.values + alpha)) for alpha in alphas])


def fit_attributes(x: Array, y: Array, seed: int, alphas: Sequence[float] = ALPHAS) -> list[Fit]:
    """The fit of each column of y (N, K), NaN where a row has no rating, on x (N, D).

    A fifth of an attribute's rows, drawn by the seed, is held out; the alpha with the least error there is taken, and
    the weights are those of the other four fifths. Raises ValueError for an attribute with fewer than two rows.
    """
    fits: list[Fit | None] = [None] * y.shape[1]
    known = ~np.isnan(y)
    for mask in {column.tobytes(): column for column in known.T}.values():  # attributes of one data set share theirs
        columns = [k for k in range(y.shape[1]) if (known[:, k] == mask).all()]
        rows = np.random.default_rng(seed).permutation(np.flatnonzero(mask))
        if len(rows) < 2:
            raise ValueError(f"attribute {columns[0]} has {len(rows)} ratings")
        held, fitted = np.split(rows, [max(1, len(rows) // 5)])
        solver = _Ridge(_sum(x, fitted, lambda part, _: part.T @ part))
        for k in columns:
            target = y[:, k]
            weights = solver.solve(_sum(x, fitted, lambda part, own, y=target: part.T @ y[own]), alphas)
            errors = _sum(x, held, lambda part, own, w=weights, y=target: ((part @ w.T - y[own, None]) ** 2).sum(0))
            best = int(errors.argmin())
            fits[k] = Fit(weights[best], alphas[best], float(errors[best] / len(held)), len(fitted), len(held))
    return fits


def _sum(x: Array, rows: Array, function: Callable) -> Array:
    """function(X of some rows in float64, these rows), summed over all of them."""
    parts = (rows[start : start + ROWS] for start in range(0, len(rows), ROWS))
    return sum(function(x[part].astype(np.float64), part) for part in parts)


# What goes with length ------------------------------------------------------------------------------------------------


def spearman(a: Array, b: Array) -> float:
    """Rank correlation of (N,) and (N,), ties with their mean rank; 0 where one is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(a), rankdata(b)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else 0.0


def penalties(rewards: Array, verbosity: int, most: float) -> Array:
    """(K,) lambda, of a reference set's rewards (N, K): the smallest of LAMBDAS with which r_i - lambda_i r_v has a
    rank correlation with r_v of at most `most`, 1 where none has; lambda_v = 1. A negative correlation passes at 0."""
    v = rewards[:, verbosity]
    found = np.ones(rewards.shape[1])
    for i in range(rewards.shape[1]):
        if i != verbosity:
            found[i] = next((each for each in LAMBDAS if spearman(rewards[:, i] - each * v, v) <= most), 1.0)
    return found


def transformation(lambdas: Array, verbosity: int) -> Array:
    """(K, K) T with r T = r': r'_i = r_i - lambda_i r_v, and r'_v = 0."""
    matrix = np.eye(len(lambdas))
    matrix[verbosity] -= lambdas
    return matrix


# The gate -------------------------------------------------------------------------------------------------------------


def gate_loss(weights: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, scale) -> torch.Tensor:
    """(B,) -log sigmoid(s_c - s_r), s = scale * sum_k g_k r'_k, of the gate's weights and debiased rewards (B, K). Both
    responses have the prompt's weights, for the gate reads nothing after it."""
    return F.softplus(-scale * (weights * (chosen - rejected)).sum(dim=-1))


@dataclass
class GateTraining:
    """How a gate is trained: AdamW, a cosine schedule to 0, batches drawn with replacement."""

    steps: int = 2000
    batch: int = 1024
    lr: float = 1e-3
    weight_decay: float = 0.0


def train_gate(
    gate: Gate, prompts: torch.Tensor, rewards: torch.Tensor, held_out: torch.Tensor, how: GateTraining, seed: int
) -> dict:
    """Train on the features of prompts (N, D) and the debiased rewards (N, 2, K) of their chosen and rejected response,
    but those that are `held_out`, (N,) bool: whole prompts, which are all that the gate sees. Returns the loss and the
    accuracy on both parts."""
    generator = torch.Generator().manual_seed(seed)
    held, fitted = held_out.nonzero()[:, 0], (~held_out).nonzero()[:, 0]
    optimizer = torch.optim.AdamW(gate.parameters(), lr=how.lr, weight_decay=how.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return gate_loss(gate(prompts[rows]), rewards[rows, 0], rewards[rows, 1], gate.logit_scale)

    with torch.random.fork_rng():  # dropout
        torch.manual_seed(seed)
        gate.train()
        for _ in range(how.steps):
            optimizer.zero_grad()
            rows = fitted[torch.randint(len(fitted), (how.batch,), generator=generator)]
            loss(rows).mean().backward()
            optimizer.step()
            schedule.step()
    gate.eval()
    with torch.no_grad():
        parts = {"fitted": loss(fitted), "held_out": loss(held)}
    half = np.log(2)
    return {
        name: {"pairs": len(part), "loss": part.mean().item(), "accuracy": (part < half).double().mean().item()}
        for name, part in parts.items()
    }
