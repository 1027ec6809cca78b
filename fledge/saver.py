"""Saving while the run trains on: the loop waits for a copy into the CPU's memory, a thread does the rest.

The thread serialises, fsyncs, hashes, renames and prunes (`fledge/checkpoint.py`). It draws from no global generator,
and what it must agree on with other ranks it says on a group of its own.
"""

import json
import warnings
from collections.abc import Callable, Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fledge import checkpoint, distributed, files
from fledge.checkpoint import Draft, Groups


class Saver:
    """Saves into one folder, one save at a time: the next one, the end, and whoever reads checkpoints wait for it.

    Every rank has one and calls each of its methods. The copy takes as much of the CPU's memory as a checkpoint does on
    the disk (of parameters in shards: this rank's part), and is used again by the next save.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._under_way: Future[None] | None = None
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._group: Any = None

    def save(
        self,
        step: int,
        groups: Groups,
        state: dict[str, Any],
        keep: int,
        spare: Set[int] = frozenset(),
        published: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the state of `step`, and begin to publish it; then all but the newest `keep` and `spare` are pruned.

        Args:
            groups: tensors, one group a file; or in shards, and then one file a rank.
            published: called on rank 0, by the thread, when the checkpoint is there and nothing is pruned yet.

        Raises:
            RunError: the save before this one failed, on whichever rank.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        text = files.canonical(state)
        if json.loads(text) != state:
            raise TypeError("state must be plain JSON that reads back equal: string keys, lists rather than tuples")
        self.wait()
        sharded = any(distributed.is_sharded(tensor) for group in groups.values() for tensor in group.values())
        if not sharded and not distributed.is_main():
            return
        if sharded and self._group is None:
            self._group = distributed.own_group()
        draft = Draft(self.root, step, *(self._parts(groups) if sharded else (self._files(groups), None)), text)
        group = self._group if sharded else distributed.ALONE
        self._under_way = self._thread.submit(checkpoint.publish, draft, keep, spare, published, group)

    @property
    def failed(self) -> bool:
        """Has this rank's part of the save under way ended in an error, which `wait` would raise?"""
        return self._under_way is not None and self._under_way.done() and self._under_way.exception() is not None

    def wait(self) -> None:
        """Until nothing is being saved.

        Raises:
            RunError: a save has failed, on every rank the same.
        """
        under_way, self._under_way = self._under_way, None
        distributed.together(lambda: under_way.result() if under_way is not None else None)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:
                self.wait()
            elif self._under_way is not None and (other := self._under_way.exception()) is not None:
                warnings.warn(f"and a save has failed: {other}", RuntimeWarning, stacklevel=2)
        finally:
            self._thread.shutdown()

    # ---- the copy

    def _files(self, groups: Groups) -> dict[str, dict[str, Tensor]]:
        """A file a group."""
        copies = self._copied({(name, key): tensor for name, group in groups.items() for key, tensor in group.items()})
        return {f"{name}.safetensors": {key: copies[name, key] for key in group} for name, group in groups.items()}

    def _parts(self, groups: Groups) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """This rank's file: its rows of what is sharded, and on rank 0 all that is not. And the index of all files."""
        ranks, index = range(distributed.world_size()), {}
        mine: dict[tuple[str, str], Tensor] = {}
        for name, group in groups.items():
            index[name] = {key: _entry(tensor, ranks) for key, tensor in group.items()}
            for key, tensor in group.items():
                if distributed.is_sharded(tensor) or distributed.is_main():
                    mine[name, key] = distributed.local(tensor)
        copies = {"/".join(at): tensor for at, tensor in self._copied(mine).items()}
        return {checkpoint.rank_file(distributed.rank()): copies}, {"ranks": len(ranks), "groups": index}

    @torch.no_grad()
    def _copied(self, tensors: dict[tuple[str, str], Tensor]) -> dict[tuple[str, str], Tensor]:
        """Copies that nobody else changes, in the memory of the last ones where their forms are the same."""
        self._copies = {
            at: _room(tensor, self._copies.get(at)).copy_(tensor, non_blocking=True) for at, tensor in tensors.items()
        }
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return self._copies


def _room(tensor: Tensor, before: Tensor | None) -> Tensor:
    if before is not None and before.shape == tensor.shape and before.dtype == tensor.dtype:
        return before
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _entry(tensor: Tensor, ranks: range) -> dict[str, Any]:
    """Its line in the index: the rows [first, end) of each rank, or null for what rank 0 has alone."""
    held = [distributed.rows_held(tensor, rank) for rank in ranks] if distributed.is_sharded(tensor) else None
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "rows": None if held is None else [[rows.start, rows.stop] for rows in held],
    }
