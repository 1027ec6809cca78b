"""What reward models make of held-out preferences: accuracy with an interval, calibration, length bias, a few pairs.

N prompts of K answers each; P decided pairs. ``align/reward.py`` measures one model, ``align/ensemble.py`` several.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fledge import distributed
from fledge.data.preferences import Preferences
from fledge.evals import ranking
from fledge.evals.score import Score, bootstrap
from fledge.models import reward_model
from fledge.stream import Permutation
from fledge.train import autocast

ROWS = 64
"""Prompts of one forward."""


class Sample(NamedTuple):
    """Some prompts of a split with their answers."""

    data: Preferences
    ids: list[int]

    @property
    def records(self) -> list[dict]:
        return [self.data.records[i] for i in self.ids]

    def ranks(self) -> Tensor:
        """(N, K), -1 where there is no answer."""
        return self._padded([torch.tensor(self.data.ranks[i]) for i in self.ids], -1)

    def lengths(self) -> Tensor:
        """Tokens of the answers, (N, K)."""
        return self._padded([torch.tensor([len(said) for said in self.data.answers[i]]) for i in self.ids], 0)

    def margins(self) -> list[float] | None:
        """(N,) where the data has them."""
        return [record["margin"] for record in self.records] if self.data.config.margin is not None else None

    @torch.no_grad()
    def rewards(self, model: Any, precision: str) -> Tensor:
        """Raw rewards (N, K), on the CPU."""
        model.eval()
        found = []
        for start in range(0, len(self.ids), ROWS):
            rows = self.data.rows(self.ids[start : start + ROWS])
            with autocast(precision):
                found += reward_model.of_answers(model, {k: x.to(distributed.device()) for k, x in rows.items()}).cpu()
        return self._padded(found, 0.0)

    def _padded(self, rows: list[Tensor], value: float) -> Tensor:
        K = max(len(self.data.answers[i]) for i in self.ids)
        return torch.stack([F.pad(row, (0, K - len(row)), value=value) for row in rows])


def sample(data: Preferences, limit: int) -> Sample:
    """At most ``limit`` prompts, always the same ones."""
    order = Permutation(len(data), "evaluation")
    return Sample(data, [order[i] for i in range(min(len(data), limit))])


def probability(gap: Any, tie_threshold: float | None) -> np.ndarray:
    """Of raw gaps r_better - r_worse (P,): the probability of what was decided, given that it was not a tie."""
    eta, gap = tie_threshold or 0.0, torch.as_tensor(gap)
    won, lost = (gap - eta).sigmoid(), (-gap - eta).sigmoid()
    return (won / (won + lost)).numpy()


def accuracy(asked: Sample, given: Tensor, before: Tensor | None) -> Score:
    """Held-out pairs of which the better answer has the higher reward; of equal rewards one half. (N, K), (N, K)"""
    pairs = ranking.decided(asked.ranks())
    right, longer = ranking.right(pairs.difference(given)), pairs.difference(asked.lengths())
    records = asked.records
    known = all("codepoint" in record for record in records)
    names = [r["codepoint"] if known else "\0".join(m["content"] for m in r["prompt"]) for r in records]
    _, clusters = np.unique(names, return_inverse=True)  # answers to one prompt rise and fall together
    low, high = bootstrap(right, clusters[pairs.prompt])
    n = len(np.unique(clusters[pairs.prompt]))
    return Score(
        metric="accuracy on pairs",
        after=float(right.mean()),
        before=None if before is None else float(ranking.right(pairs.difference(before)).mean()),
        baseline=0.5,
        baseline_name="chance",
        low=low,
        high=high,
        n=n,
        unit="characters" if known else "pairs" if n == right.size else "prompts",
        note=f"{right.size} pairs; the longer answer is right in {(longer > 0).mean():.3f}",
    )


def figures(asked: Sample, given: Tensor, likely: np.ndarray) -> dict[str, Any]:
    """Calibration, margins, length and ties; ``likely`` (P,) as ``probability`` gives it."""
    return ranking.figures(given, asked.ranks(), asked.lengths(), likely, asked.margins())


def table(asked: Sample, given: Tensor, limit: int = 12) -> list[dict[str, str]]:
    """A few prompts with their best and their worst answer and calibrated rewards (N, K)."""
    rows = []
    for record, rewarded in list(zip(asked.records, given.tolist(), strict=True))[:limit]:
        ranks = record["ranks"]
        best, worst = ranks.index(min(ranks)), len(ranks) - 1 - ranks[::-1].index(max(ranks))
        rows.append(
            {
                "prompt": record["prompt"][-1]["content"] if record["prompt"] else "",
                "chosen": record["answers"][best][-1]["content"],
                "rejected": record["answers"][worst][-1]["content"],
                "reward": f"{rewarded[best]:+.2f}",
                "reward of rejected": f"{rewarded[worst]:+.2f}",
            }
        )
    return rows
