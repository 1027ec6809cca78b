"""Which of two models answers better: win rate with its interval, an exact test, and what length has to do with it.

N prompts, each answered by a first and a second model. A preference (N,) is 1 where the second answer wins, -1 where
the first does, 0 for a tie, and may lie between.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fledge.evals.score import bootstrap, paired, wilson

SIMILAR = 0.1
"""Answers are of similar length where they differ by at most this share of the longer one."""


def win_rate(preference: Any, clusters: Any = None) -> dict[str, Any]:
    """How often the second model wins, a tie being half a win.

    Returns:
        rate; low, high: 95 %, a bootstrap over the clusters, or Wilson's for that many clusters where all say the same
        and a bootstrap would have no width; wins, ties, losses; p of the exact sign test, which leaves ties out and
        takes prompts for independent.
    """
    preference = np.asarray(preference, np.float64).ravel()
    worth = (1 + preference) / 2
    wins, losses = int((preference > 0).sum()), int((preference < 0).sum())
    units = len(worth) if clusters is None else len(np.unique(np.asarray(clusters)))
    same = bool((worth == worth[0]).all())
    low, high = wilson(float(worth[0]), units) if same else bootstrap(worth, clusters)
    counts = {"wins": wins, "ties": len(worth) - wins - losses, "losses": losses}
    return {"rate": float(worth.mean()), "low": low, "high": high, **counts, "p": sign_test(wins, losses)}


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of `wins` against `losses` if either were as likely, exact (binomial)."""
    n, fewer = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def mean_difference(first: Any, second: Any, clusters: Any = None) -> dict[str, float]:
    """Mean score of both models, and the 95 % interval of their paired difference, second less first."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    low, high = paired(first, second, clusters)
    means = {"a": float(first.mean()), "b": float(second.mean())}
    return {**means, "difference": float((second - first).mean()), "low": low, "high": high}


def by_length(preference: Any, first: Any, second: Any, clusters: Any = None) -> dict[str, Any]:
    """What length has to do with it; first, second (N,): how long the answers are.

    Returns:
        a, b: mean lengths; longer_wins: how often the longer of two answers wins, a tie being half a win (None where no
        two differ in length); similar: `win_rate` among answers of similar length (None where there are none), and
        its n.
    """
    preference = np.asarray(preference, np.float64)
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    side = np.sign(second - first)
    differ = side != 0
    longer = float((1 + preference[differ] * side[differ]).mean() / 2) if differ.any() else None
    near = np.abs(second - first) <= SIMILAR * np.maximum(first, second)
    rate = None
    if near.any():
        rate = win_rate(preference[near], None if clusters is None else np.asarray(clusters)[near])
        rate["n"] = int(near.sum())
    return {"a": float(first.mean()), "b": float(second.mean()), "longer_wins": longer, "similar": rate}
