"""Two ways of doing the same step, timed in turn: the ratio of their CPU-seconds, round by round.

    python -m benchmarks.steps            (all pairs; --rounds N, --only NAME)

A round runs ours and theirs, in alternating order, the same number of steps at the same shapes, dtype and threads. The
figure is the median over rounds of ours / theirs in CPU-seconds of this process, which a busy machine disturbs less
than wall time. Below 1: ours needs less.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Step = Callable[[int], object]


class Ratio(NamedTuple):
    """CPU-seconds a step: medians of both, and quartiles of the ratio over rounds."""

    name: str
    ours: float
    theirs: float
    low: float
    median: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return (
            f"{self.name:<44} {1000 * self.ours:8.1f} ms {1000 * self.theirs:8.1f} ms   "
            f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]  {self.rounds} rounds"
        )


def cpu_seconds(step: Step, first: int, steps: int) -> float:
    began = time.process_time()
    for i in range(first, first + steps):
        step(i)
    return (time.process_time() - began) / steps


def compare(name: str, ours: Step, theirs: Step, *, rounds: int = 15, steps: int = 3, warmup: int = 2) -> Ratio:
    """Time both in turn, after ``warmup`` steps of each that do not count."""
    torch.set_num_threads(1)
    pair = {"ours": ours, "theirs": theirs}
    for step in pair.values():
        cpu_seconds(step, 0, warmup)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for i in range(rounds):
        for who in ("ours", "theirs") if i % 2 == 0 else ("theirs", "ours"):
            times[who].append(cpu_seconds(pair[who], warmup + i * steps, steps))
    ratios = [a / b for a, b in zip(times["ours"], times["theirs"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(name, statistics.median(times["ours"]), statistics.median(times["theirs"]), low, median, high, rounds)
