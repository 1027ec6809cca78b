"""Does what is said to be right with probability p come out right in a share of p?"""

from typing import Any

import numpy as np


def reliability(predicted: Any, observed: Any, *, low: float = 0.0, bins: int = 10) -> tuple[list[dict], float]:
    """Bins of a reliability diagram, and the expected calibration error (Guo et al. 2017).

    Args:
        predicted: (N,) probabilities in [low, 1].
        observed: (N,) what came out, 1 = right; a tie may count one half.
        low: where the first of the equally wide bins begins.

    Returns:
        For every bin that holds something its edges ``low`` and ``high``, the means ``predicted`` and ``observed``, and
        ``n``; and Σ n/N · |observed - predicted|.
    """
    predicted, observed = np.asarray(predicted, np.float64).ravel(), np.asarray(observed, np.float64).ravel()
    if predicted.size != observed.size or predicted.size == 0:
        raise ValueError(f"reliability: {predicted.size} predictions of {observed.size} outcomes")
    edges = np.linspace(low, 1.0, bins + 1)
    place = np.clip(np.digitize(predicted, edges) - 1, 0, bins - 1)
    table, error = [], 0.0
    for i in np.unique(place):
        p, q, n = predicted[place == i].mean(), observed[place == i].mean(), int((place == i).sum())
        table.append(
            {"low": float(edges[i]), "high": float(edges[i + 1]), "predicted": float(p), "observed": float(q), "n": n}
        )
        error += n / predicted.size * abs(q - p)
    return table, float(error)
