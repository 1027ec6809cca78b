"""What an objective makes of the validation split while it learns: numbers that `train.select` can choose by."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fledge import distributed
from fledge.errors import InputError
from fledge.stream import Rows, derive, rows_of, share
from fledge.train import TrainConfig, autocast, scalars

ROWS = 1024
"""The most rows of an evaluation, where a batch has no more."""


def validation(
    objective: Any, config: TrainConfig, held_out: Callable[[], tuple[int, Rows]]
) -> Callable[[int], dict[str, float]] | None:
    """`evaluate` of `fit`: the objective's own means in eval mode; None where `config` wants no evaluation.

    Args:
        held_out: opens the validation split: how many samples it has, and its rows. Masks and crops are drawn by the
            sample's number, the same in every evaluation.

    Raises:
        InputError: there are fewer samples than ranks.
    """
    if not config.eval_every:
        return None
    n, rows = held_out()
    rank, world = distributed.rank(), distributed.world_size()
    batch = min(config.batch, n - n % world)
    if batch == 0:
        raise InputError(f"data: the validation split has {n} samples, too few for {world} processes to evaluate on")
    starts = range(0, max(min(n, ROWS) // batch, 1) * batch, batch)

    @torch.no_grad()
    def measure(step: int) -> dict[str, float]:
        objective.eval()
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for start in starts:
            mine, micro = share(batch, rank, world, config.most_rows)
            ids = list(range(start, start + batch))[mine]
            held = {k: x.to(distributed.device()) for k, x in rows(ids, [derive("validation", i) for i in ids]).items()}
            for piece in (rows_of(held, part) for part in micro):
                with autocast(config.precision):
                    outputs = objective(piece, step)
                sums = {name: value.detach() + sums.get(name, 0) for name, value in outputs.items()}
                counts = {name: count + counts.get(name, 0) for name, count in objective.counts(piece).items()}
        counts, sums = distributed.all_reduce_counts(counts), distributed.all_reduce_sum(sums)
        return scalars({name: value / max(counts[name], 1) for name, value in sums.items()}, objective.weights)

    return measure
