"""How well rewards agree with held-out preferences, and what else they may have learned from them.

N prompts of K answers each, P decided pairs: two answers to one prompt of which one is better. In ``ranks`` (N, K)
lower is better, equal is a tie, -1 is no answer.
"""

from typing import Any, NamedTuple

import numpy as np

from fledge.evals.calibration import reliability


class Pairs(NamedTuple):
    """Indices of pairs, (P,) each: the prompt, and the two answers to it, the better one first."""

    prompt: np.ndarray
    better: np.ndarray
    worse: np.ndarray

    def difference(self, values: Any) -> np.ndarray:
        """Of the better answer less that of the worse. (N, K) -> (P,)"""
        values = np.asarray(values, np.float64)
        return values[self.prompt, self.better] - values[self.prompt, self.worse]


def decided(ranks: Any) -> Pairs:
    """All pairs of one prompt's answers of which one is better."""
    i, j = np.asarray(ranks)[:, :, None], np.asarray(ranks)[:, None, :]
    return Pairs(*np.nonzero((i >= 0) & (j >= 0) & (i < j)))


def tied(ranks: Any) -> Pairs:
    """All pairs of one prompt's answers of which neither is better, each once."""
    i, j = np.asarray(ranks)[:, :, None], np.asarray(ranks)[:, None, :]
    K = i.shape[1]
    return Pairs(*np.nonzero((i >= 0) & (i == j) & (np.arange(K)[:, None] < np.arange(K))))


def figures(rewards: Any, ranks: Any, lengths: Any, probability: Any, margin: Any = None) -> dict[str, Any]:
    """What a reward model's manifest says beside its accuracy, as plain JSON.

    Args:
        rewards, ranks, lengths: (N, K).
        probability: (P,) that the model gives to what was decided, in the order of ``decided``.
        margin: (N,) by how much annotators found the better answer better, where they said so.
    """
    pairs = decided(ranks)
    gap, p = pairs.difference(rewards), np.asarray(probability, np.float64)
    bins, error = reliability(np.maximum(p, 1 - p), (p > 0.5) + 0.5 * (p == 0.5), low=0.5)
    found: dict[str, Any] = {"calibration": bins, "ece": error, "margins": by_size(gap, np.abs(gap))}
    if margin is not None:
        found["annotated_margins"] = by_size(gap, np.asarray(margin, np.float64)[pairs.prompt])
    found["length"] = length_bias(gap, pairs.difference(lengths))
    equal = tied(ranks)
    if equal.prompt.size:
        found["ties"] = ties(gap, equal.difference(rewards))
    return found


def right(gap: Any) -> np.ndarray:
    """Of rewards, the better answer's less the worse's: 1 where the choice is right, one half where they are equal."""
    return (1 + np.sign(gap)) / 2


def by_size(gap: np.ndarray, size: np.ndarray, bins: int = 5) -> list[dict[str, float]]:
    """Accuracy in quantiles of ``size``, (P,) like ``gap``: [{low, high, accuracy, n}, …], the smallest first."""
    edges = np.unique(np.quantile(size, np.linspace(0, 1, bins + 1)))
    place = np.clip(np.searchsorted(edges, size, side="right") - 1, 0, max(len(edges) - 2, 0))
    return [
        {
            "low": float(size[place == k].min()),
            "high": float(size[place == k].max()),
            "accuracy": float(right(gap[place == k]).mean()),
            "n": int((place == k).sum()),
        }
        for k in np.unique(place)
    ]


def length_bias(gap: np.ndarray, longer: np.ndarray) -> dict[str, float | int | None]:
    """Does it reward length? ``longer`` (P,): tokens of the better answer less those of the worse.

    Returns:
        ``correlation`` of the differences in reward and in length, through the origin (a pair has no order);
        ``longer_is_better``: how often the longer answer is the better one, and ``longer_is_preferred``: how often the
        model prefers it, both among pairs of different lengths; accuracy where the better answer is the longer and
        where it is the shorter.
    """
    differ = longer != 0
    up, down = longer > 0, longer < 0
    power = np.sqrt((gap**2).sum() * (longer**2).sum())
    return {
        "correlation": float((gap * longer).sum() / power) if power else None,
        "longer_is_better": _share(up[differ]),
        "longer_is_preferred": _share(right(gap * longer)[differ]),
        "accuracy_if_longer": _share(right(gap)[up]),
        "accuracy_if_shorter": _share(right(gap)[down]),
        "n_longer": int(up.sum()),
        "n_shorter": int(down.sum()),
    }


def ties(gap: np.ndarray, gap_of_ties: np.ndarray) -> dict[str, float | int | None]:
    """``agreement``: how often a tied pair lies closer together than a decided one; one half is chance."""
    if not gap.size:
        return {"n": int(gap_of_ties.size), "agreement": None}
    order = np.sort(np.abs(gap))
    above = [order.size - np.searchsorted(order, np.abs(gap_of_ties), side) for side in ("left", "right")]
    return {"n": int(gap_of_ties.size), "agreement": float(np.mean(above) / order.size)}


def _share(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def disagreement(spread: np.ndarray, right: np.ndarray) -> float | None:
    """How often an ensemble disagrees more about a pair that it gets wrong than about one that it gets right (AUROC).

    spread (P,) deviation of the members' gaps; right (P,) bool. One half is chance; None where there is only one kind.
    """
    if right.all() or not right.any():
        return None
    order = np.sort(spread[right])
    below = [np.searchsorted(order, spread[~right], side) for side in ("left", "right")]
    return float(np.mean(below) / order.size)


def agrees(records: list[dict], responses: list[str]) -> list[float]:
    """A judge for answers that are one of two: 1 where a response says what the record's ``chosen`` answer says."""
    chosen = [r["chosen"] if isinstance(r["chosen"], str) else r["chosen"][-1]["content"] for r in records]
    return [float(said.strip() == right.strip()) for said, right in zip(responses, chosen, strict=True)]
