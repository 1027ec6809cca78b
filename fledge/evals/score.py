"""One figure as it is published: its value, what stands beside it, and how far chance could have moved it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

LEVEL = 0.95  # of every interval in fledge
Z = 1.959964  # the normal distribution's 97.5 % point
_BLOCK = 4_000_000  # counts held at once while resampling: 32 MB, however many clusters there are


@dataclass
class Score:
    """`after` is the figure; `low`, `high` its 95 % bootstrap interval over `n` resampled units.

    `before` is the same measure without this stage's training (the parent, the untrained network); `baseline` is what
    knows nothing of networks (raw pixels, the most frequent token, a trigram). Either may be missing. Where both were
    measured on the same examples, `gain` and `lead` are the paired 95 % intervals of after - before and of after -
    baseline (`paired`); they decide more sharply than `low` and `high` can.
    """

    metric: str
    after: float
    n: int
    low: float
    high: float
    before: float | None = None
    baseline: float | None = None
    baseline_name: str = ""
    higher_is_better: bool = True
    unit: str = "examples"
    note: str = ""
    gain: tuple[float, float] | None = None
    lead: tuple[float, float] | None = None

    def beyond_chance(self, other: float, difference: tuple[float, float] | None = None) -> bool:
        """Is the figure better than `other` by more than its interval, or than the paired one where that is known?"""
        low, high = difference or (self.low - other, self.high - other)
        return low > 0 if self.higher_is_better else high < 0

    def shortfall(self) -> str:
        """What this figure does not beat, in words; empty where it beats all that stands beside it."""
        named = f"its baseline ({self.baseline_name})" if self.baseline_name else "its baseline"
        rivals = [("its start", self.before, self.gain), (named, self.baseline, self.lead)]
        there = [(name, value, interval) for name, value, interval in rivals if value is not None]
        sign = 1 if self.higher_is_better else -1
        lost = [name for name, value, _ in there if not sign * self.after > sign * value]
        if lost:
            return f"does not beat {' or '.join(lost)}"
        unsure = [name for name, value, interval in there if not self.beyond_chance(value, interval)]
        return f"within chance of {' and '.join(unsure)}" if unsure else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; a figure that is not finite becomes null, because JSON knows no NaN."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Score:
        """Reads `to_dict`; fields that a later version adds are ignored."""
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        for name in ("after", "low", "high"):
            values[name] = math.nan if values.get(name) is None else float(values[name])
        for name in ("gain", "lead"):  # JSON has lists only
            values[name] = tuple(values[name]) if values.get(name) else None
        return cls(**values)


def bootstrap(
    values: Any, clusters: Any = None, n: int = 1000, seed: int = 0, weights: Any = None
) -> tuple[float, float]:
    """95 % percentile interval of the (weighted) mean of `values`, resampling whole clusters.

    values (N,) one figure per example; clusters (N,) any labels: examples that share one (a character drawn in many
    fonts, the tokens of one document) rise and fall together and are drawn together. weights (N,): what each value
    counts for, e.g. bytes where values are bits per byte. Clusters of different size make the mean a ratio of two
    sums, and both are resampled.
    """
    values, weights, index, k = _prepare(values, clusters, weights)
    top = np.bincount(index, values * weights, minlength=k)  # (K,)
    bottom = np.bincount(index, weights, minlength=k)  # (K,)
    return _percentiles(_ratios(top, bottom, n, seed))


def paired(
    before: Any, after: Any, clusters: Any = None, n: int = 1000, seed: int = 0, weights: Any = None
) -> tuple[float, float]:
    """95 % interval of mean(after) - mean(before) over the same examples: each draw keeps the pairs together."""
    before, after = np.asarray(before, np.float64).ravel(), np.asarray(after, np.float64).ravel()
    if before.shape != after.shape:
        raise ValueError(f"paired: {before.size} figures before and {after.size} after; they must be the same examples")
    return bootstrap(after - before, clusters, n=n, seed=seed, weights=weights)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n (Wilson 1927)."""
    centre, room = (share + Z * Z / (2 * n)), Z * (share * (1 - share) / n + Z * Z / (4 * n * n)) ** 0.5
    scale = 1 + Z * Z / n
    return (centre - room) / scale, (centre + room) / scale


def _prepare(values: Any, clusters: Any, weights: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Values and weights (N,) as float64, the cluster of each (N,) as 0..K-1, and K."""
    values = np.asarray(values, np.float64).ravel()
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64).ravel()
    if values.size == 0:
        raise ValueError("bootstrap: no values")
    if clusters is None:
        index = np.arange(values.size)
    else:
        index = np.unique(np.asarray(clusters).ravel(), return_inverse=True)[1].ravel()
    if not values.size == weights.size == index.size:
        raise ValueError(f"bootstrap: {values.size} values, {weights.size} weights, {index.size} cluster labels")
    return values, weights, index, int(index.max()) + 1


def _ratios(top: np.ndarray, bottom: np.ndarray, n: int, seed: int) -> np.ndarray:
    """(n,) resampled ratios of sums. How often each cluster is drawn is multinomial; counts beat lists of indices."""
    rng, k = np.random.default_rng(seed), top.size
    rows, out = max(1, _BLOCK // k), np.empty(n)
    for start in range(0, n, rows):
        counts = rng.multinomial(k, np.full(k, 1 / k), size=min(rows, n - start))  # (rows, K)
        out[start : start + rows] = (counts @ top) / (counts @ bottom)
    return out


def _percentiles(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
