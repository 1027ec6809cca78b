"""What a long run is watched for: numbers that are not finite, a rank that hangs, ranks that drift apart."""

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fledge import distributed
from fledge.errors import RunError

Policy = Literal["stop", "skip", "roll_back"]

PATIENCE = 10
"""Steps in a row that ``skip`` leaves out before it gives up."""
GRACE = 5.0
"""Seconds after which the interpreter's own watchdog ends a process whose Python threads cannot run."""
STDERR = 2  # the descriptor: sys.stderr may have been replaced by something that has none


# -------------------------------------------------------------------------------------------------------- not finite


class NotFinite(RunError):
    """A loss or the gradient of a step is not finite, on whichever rank: every rank raises it in the same step."""


@dataclass
class Nonfinite:
    """The steps of a run that were not finite. Part of its checkpoints, so that a resumed run decides alike."""

    policy: Policy
    total: int = 0
    in_a_row: int = 0
    left_out: range = range(0)
    """The steps that are counted but not trained on, after the last roll-back."""
    tried: set[int] = field(default_factory=set)
    """Positions that this process has gone back to."""

    def state(self) -> dict[str, Any]:
        return {
            "total": self.total,
            "in_a_row": self.in_a_row,
            "left_out": [self.left_out.start, self.left_out.stop],
        }

    def load(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row, self.left_out = state["total"], state["in_a_row"], range(*state["left_out"])

    def met(self) -> None:
        """One more. The same counts on every rank, so all go on, or none.

        Raises:
            RunError: the policy is to stop, or this is the last of too many in a row.
        """
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        if self.policy == "stop":
            raise RunError("train.on_nonfinite is stop")
        if self.policy == "skip" and self.in_a_row >= PATIENCE:
            raise RunError(f"that makes {self.in_a_row} such steps in a row, after which train.on_nonfinite: skip ends")

    def back(self, position: int | None, step: int) -> None:
        """The run goes back to ``position`` and leaves out all that led from there to ``step``.

        The same batches would lead to the same numbers once more, bit for bit; so they must not all come again.

        Raises:
            RunError: there is no checkpoint, or the run went back to this one before.
        """
        if position is None:
            raise RunError("there is no checkpoint yet that train.on_nonfinite: roll_back could go back to")
        if position in self.tried:
            raise RunError(f"the run had gone back to step {position} once already, and it came to this again")
        self.tried.add(position)
        self.left_out = range(position, step + 1)


# ---------------------------------------------------------------------------------------------------------- watchdog


class Watchdog:
    """Ends this process with exit code 1, stacks written, when ``beat`` is not called for ``seconds``; None: never.

    A collective waits for a rank that hangs until its own time-out, half an hour or for ever. A thread of Python looks
    at the clock; should no Python thread be able to run, because some library holds the interpreter's lock, the
    interpreter's own C thread ends the process ``GRACE`` seconds later.
    """

    def __init__(self, seconds: float | None, folder: Path) -> None:
        self.seconds, self.folder = seconds, folder
        self.what, self.last = "the first step", time.monotonic()
        self._over = threading.Event()

    def beat(self, what: str) -> None:
        """It is alive, and now at ``what``."""
        if self.seconds is not None:
            self.what, self.last = what, time.monotonic()
            faulthandler.dump_traceback_later(self.seconds + GRACE, exit=True, file=STDERR)

    def __enter__(self) -> "Watchdog":
        if self.seconds is not None:
            self.beat(self.what)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self.seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        assert self.seconds is not None
        while not self._over.wait(min(self.seconds / 10, 1.0)):
            if time.monotonic() - self.last > self.seconds:
                self._bark()

    def _bark(self) -> None:
        try:
            path = self.folder / f"stacks_rank{distributed.rank()}.txt"
            message = (
                f"fledge (rank {distributed.rank()}): {self.what} has not ended within train.watchdog "
                f"({self.seconds:g} s): this rank hangs, or waits for one that does. Stacks of all threads are in "
                f"{path}. The checkpoints are kept: start the run again\n"
            )
            os.write(STDERR, message.encode())
            faulthandler.dump_traceback(file=STDERR)
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(message)
                file.flush()
                faulthandler.dump_traceback(file=file)
        finally:
            os._exit(1)  # also where the disk is full: nothing may wait for anything now


# ------------------------------------------------------------------------------------------------------------- drift


def checksums(tensors: dict[str, Tensor]) -> dict[str, int]:
    """One integer a tensor: the sum of its elements' bit patterns, modulo 2^64.

    Exact in any order, and a change of any one element shows; changes that cancel out to the last bit do not.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [tensor.detach().view(integers[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors.values()]
    return dict(zip(tensors, torch.stack(sums).tolist() if sums else [], strict=True))


def same_everywhere(tensors: dict[str, Tensor], step: int) -> None:
    """Compare the ranks' copies of ``tensors``; they are replicated, so every bit should be the same.

    Of what is in shards no rank has what another has; that is left out.

    Raises:
        RunError: on every rank, with the step and the first tensor that differs.
    """
    if distributed.world_size() == 1:
        return
    copies = {name: tensor for name, tensor in tensors.items() if not distributed.is_sharded(tensor)}
    ranks = distributed.gather_objects(checksums(copies))
    differ = list(_differing(ranks))
    if differ:
        name, odd = differ[0]
        more = f" (and {len(differ) - 1} more tensors)" if len(differ) > 1 else ""
        raise RunError(
            f"after step {step} the ranks' parameters are not the same any more: {name} of rank "
            f"{', '.join(map(str, odd))} differs from that of rank 0{more}. Nothing of it was saved; the last "
            "checkpoints are kept. Look for a faulty device, or an objective that draws or changes something on one "
            "rank alone"
        )


def _differing(ranks: list[dict[str, int]]) -> Iterator[tuple[str, list[int]]]:
    for name, sum_ in ranks[0].items():
        odd = [rank for rank, sums in enumerate(ranks) if sums.get(name) != sum_]
        if odd:
            yield name, odd
