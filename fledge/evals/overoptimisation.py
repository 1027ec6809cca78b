"""How far a reward can be followed that is not the goal itself (Gao et al. 2022, "Scaling Laws for Reward Model
Overoptimization", https://arxiv.org/abs/2210.10760).

d = sqrt(KL(policy || reference)), the KL in nats an answer. As a policy is optimised against a proxy reward, its gold
score above the reference's is well described by (their section 3.1)

    RL          R(d) = d (α - β log d)     highest at d* = exp(α/β - 1), where R = β d*
    best of n   R(d) = d (α - β d)         highest at d* = α / (2 β),     where R = α² / (4 β)

Both are linear in α and β, so the fit is one least-squares solution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fledge.evals.score import LEVEL

Form = Literal["rl", "best-of-n"]


@dataclass(frozen=True)
class Fit:
    """Gao et al.'s curve through points (KL, score). Intervals are 95 %, of a bootstrap over the residuals."""

    form: Form
    start: float
    """The score at KL 0; part of the fit where it was not given."""
    alpha: float
    beta: float
    r2: float
    """Share of the points' variance that the curve explains; NaN where they are all equal."""
    alpha_interval: tuple[float, float]
    beta_interval: tuple[float, float]
    peak_interval: tuple[float, float]
    """Of `peak`; inf where the resampled curve never turns."""

    @property
    def peak(self) -> float:
        """KL* = d*² at which the score is highest; inf where the curve never turns."""
        return float(peaks(self.form, np.array(self.alpha), np.array(self.beta)))

    def __call__(self, kl: Any) -> np.ndarray:
        """The curve's score at these KLs."""
        return self.start + columns(kl, self.form) @ np.array([self.alpha, self.beta])


def fit(kl: Any, score: Any, form: Form = "rl", start: float | None = None, n: int = 1000, seed: int = 0) -> Fit:
    """Least squares over points kl (P,), in nats an answer, and score (P,).

    The intervals resample the points' residuals, scaled up for the parameters that were fitted. Points that judge the
    same prompts err together, which such an interval does not see.

    Args:
        start: the score at KL 0; None: one more parameter of the fit.

    Raises:
        ValueError: fewer points than parameters and one, or too few different KLs to tell α from β.
    """
    kl, score = np.asarray(kl, np.float64).ravel(), np.asarray(score, np.float64).ravel()
    if kl.shape != score.shape or not (np.isfinite(kl).all() and np.isfinite(score).all()):
        raise ValueError("fit: expected as many finite scores as KLs")
    X = columns(kl, form)  # (P, 2)
    X = X if start is not None else np.column_stack([X, np.ones(len(kl))])  # (P, 2 or 3)
    y = score - (start or 0.0)
    if len(X) <= X.shape[1] or np.linalg.matrix_rank(X) < X.shape[1]:
        raise ValueError(f"fit: {len(X)} points with {len(np.unique(kl))} different KLs cannot tell α from β")
    solve = np.linalg.pinv(X)
    coefficients = solve @ y
    residuals = y - X @ coefficients
    scaled = residuals * math.sqrt(len(X) / (len(X) - X.shape[1]))
    scaled -= scaled.mean() if start is None else 0.0
    drawn = np.random.default_rng(seed).choice(scaled, size=(n, len(scaled)))
    alphas, betas, *_ = solve @ (X @ coefficients + drawn).T  # (n,) each
    spread = float(((score - score.mean()) ** 2).sum())
    return Fit(
        form=form,
        start=float(coefficients[2]) if start is None else start,
        alpha=float(coefficients[0]),
        beta=float(coefficients[1]),
        r2=1 - float((residuals**2).sum()) / spread if spread else math.nan,
        alpha_interval=_interval(alphas),
        beta_interval=_interval(betas),
        peak_interval=_interval(peaks(form, alphas, betas)),
    )


def columns(kl: Any, form: Form) -> np.ndarray:
    """What α and β multiply: (P,) -> (P, 2). An estimate of a KL may be below 0; it counts as 0."""
    d = np.sqrt(np.clip(np.asarray(kl, np.float64), 0, None))
    if form == "best-of-n":
        return np.stack([d, -(d**2)], axis=-1)
    return np.stack([d, -d * np.log(np.where(d > 0, d, 1.0))], axis=-1)


def peaks(form: Form, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """KL* of each (α, β): inf where β <= 0, so that the curve never turns down."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        highest = np.exp(2 * (alpha / beta - 1)) if form == "rl" else np.clip(alpha / (2 * beta), 0, None) ** 2
    return np.where(beta > 0, highest, np.inf)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    """Percentiles that are draws themselves, so that infinite ones may be among them."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------------- best of n


def best_of_n_kl(n: int) -> float:
    """KL(best of n || policy) = log n - (n-1)/n in nats (Stiennon et al. 2020), where no two answers tie; else less
    (Beirami et al. 2024, https://arxiv.org/abs/2401.01879)."""
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: Any, value: Any, n: int) -> float:
    """The expected `value` of the answer that `proxy` likes best among n of these N answers to one prompt, exact.

    The mean over all subsets of n (Nakano et al. 2021, https://arxiv.org/abs/2112.09332, appendix I), without drawing
    any: the best of a subset is the answer of rank i in C(i-1, n-1) of the C(N, n) subsets. Ties are broken at random.

    Raises:
        ValueError: n is not within 1..N, or proxy (N,) and value (N,) differ in length.
    """
    proxy, value = np.asarray(proxy, np.float64).ravel(), np.asarray(value, np.float64).ravel()
    N = len(proxy)
    if not 1 <= n <= N or len(value) != N:
        raise ValueError(f"best of {n} needs that many answers; got {N} proxies and {len(value)} values")
    levels, index, sizes = np.unique(proxy, return_inverse=True, return_counts=True)
    tied = np.bincount(index.ravel(), value, minlength=len(levels)) / sizes  # mean value of the answers that tie
    subsets = [math.comb(int(below), n) for below in np.concatenate([[0], sizes.cumsum()])]  # all of them this low
    weights = [(b - a) / subsets[-1] for a, b in zip(subsets, subsets[1:], strict=False)]
    return float(np.dot(weights, tied))
