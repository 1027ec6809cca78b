"""(seed, step) -> global batch. Nothing here remembers anything, so ``step`` is the whole position of a run.

A batch is a dict of tensors whose first axis is the row. Order is a keyed permutation of each epoch; augmentation and
masks are functions of (seed, epoch, sample id). The number of workers and of ranks changes neither.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fledge.errors import InputError

Batch = dict[str, Tensor]
Rows = Callable[[list[int], list[int]], Batch]


def derive(*key: int | str) -> int:
    """A 63-bit seed from a tuple of names and numbers (BLAKE2b of its JSON)."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator of its own, seeded by ``derive(*key)``."""
    return torch.Generator().manual_seed(derive(*key))


def rng(seed: int) -> random.Random:
    """Python's generator for one sample's augmentation."""
    return random.Random(seed)


class Permutation:
    """A keyed permutation of range(n) with O(1) memory.

    A balanced Feistel network of four rounds over the next even number of bits, walked until it lands inside range(n)
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002: cycle walking).
    """

    def __init__(self, n: int, *key: int | str) -> None:
        self.n = n
        self.half = max(1, ((max(n, 2) - 1).bit_length() + 1) // 2)
        self.mask = (1 << self.half) - 1
        self.keys = [derive("feistel", i, *key) for i in range(4)]

    def _round(self, value: int, key: int) -> int:
        x = (value ^ key) & 0xFFFFFFFFFFFFFFFF  # splitmix64's finaliser
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return (x ^ (x >> 31)) & self.mask

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        if not 0 <= i < self.n:
            raise IndexError(i)
        while True:
            left, right = i >> self.half, i & self.mask
            for key in self.keys:
                left, right = right, left ^ self._round(right, key)
            i = (left << self.half) | right
            if i < self.n:
                return i


class DataStream:
    """The stream of a data set: an epoch has floor(n / batch) steps and its remainder is dropped.

    Args:
        n: number of samples.
        rows: ``rows(ids, seeds) -> Batch``; pure: sample i may draw only from ``seeds[i]``. Runs in workers.
        batch: rows of the global batch.
        what: the name of the data in messages.

    Raises:
        InputError: fewer samples than one batch.
    """

    on_policy = False

    def __init__(self, n: int, rows: Rows, *, batch: int, seed: int, what: str = "data") -> None:
        if n < batch:
            raise InputError(f"{what}: {n} samples, but train.batch is {batch}; use a smaller batch or more data")
        self.n, self.rows, self.batch, self.seed = n, rows, batch, seed
        self.steps_per_epoch = n // batch

    def begin(self, step: int) -> None:
        """Nothing to prepare: data does not look at the model."""

    def ids(self, step: int) -> list[Any]:
        epoch, k = divmod(step, self.steps_per_epoch)
        order = Permutation(self.n, "order", self.seed, epoch)
        return [order[i] for i in range(k * self.batch, (k + 1) * self.batch)]

    def fetch(self, ids: Sequence[Any], step: int) -> Batch:
        epoch = step // self.steps_per_epoch
        return self.rows(list(ids), [derive("sample", self.seed, epoch, i) for i in ids])

    def observe(self, step: int, means: dict[str, Tensor]) -> None:
        """Data takes no feedback."""

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, JSON): nothing, since ``step`` is the position."""
        return {}, {}

    def load(self, tensors: dict[str, Tensor], state: dict) -> None:
        """Nothing to restore."""


class Mixed(DataStream):
    """Rows of several streams in each global batch, each one's spread evenly over it. Epochs are those of the first.

    Args:
        join: one batch out of the parts, [(which stream, its rows)]: those rows, one part behind the other.
    """

    def __init__(self, streams: Sequence[DataStream], join: Callable[[list[tuple[int, Batch]]], Batch]) -> None:
        self.streams, self.join = streams, join
        self.batch = sum(stream.batch for stream in streams)
        self.steps_per_epoch = streams[0].steps_per_epoch

    def ids(self, step: int) -> list[tuple[int, int]]:
        """(which stream, its sample) of each row."""
        places = [
            ((k + 0.5) / stream.batch, which, i)
            for which, stream in enumerate(self.streams)
            for k, i in enumerate(stream.ids(step))
        ]
        return [(which, i) for _, which, i in sorted(places)]

    def fetch(self, ids: Sequence[tuple[int, int]], step: int) -> Batch:
        own = [[i for source, i in ids if source == which] for which in range(len(self.streams))]
        parts = [(which, self.streams[which].fetch(some, step)) for which, some in enumerate(own) if some]
        joined = self.join(parts)
        order = torch.tensor([which for which, _ in ids]).argsort(stable=True)  # joined row r stands at order[r]
        return rows_of(joined, order.argsort())


def cut(n: int, parts: int) -> list[slice]:
    """Cut n rows into ``parts`` runs whose sizes differ by at most one, the longer ones first."""
    size, longer = divmod(n, parts)
    starts = [i * size + min(i, longer) for i in range(parts + 1)]
    return [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def share(n: int, rank: int, world: int, micro_batch: int | None) -> tuple[slice, list[slice]]:
    """The rows of a global batch of n that belong to ``rank``, and its micro-batches relative to them.

    Every rank gets equally many micro-batches of at most ``micro_batch`` rows, sizes differing by at most one row.

    Raises:
        InputError: the rows do not suffice for one each.
    """
    per_rank = -(-n // world)
    count = -(-per_rank // (micro_batch or per_rank))
    if n < world * count:
        raise InputError(
            f"a batch of {n} rows cannot be cut into {count} micro-batches on each of {world} ranks; "
            "use a larger train.micro_batch or train.batch"
        )
    pieces = cut(n, world * count)[rank * count : (rank + 1) * count]
    first = pieces[0].start
    return slice(first, pieces[-1].stop), [slice(p.start - first, p.stop - first) for p in pieces]


def longest_first(mask: Tensor) -> Tensor:
    """The order of rows by their real tokens: micro-batches, cut to their longest row, then carry little padding, and
    the first needs the most memory. (B, T), or (B, K, T) of K sequences a row -> (B,)"""
    lengths = mask.sum(dim=-1).view(len(mask), -1).amax(dim=1)
    return lengths.argsort(descending=True, stable=True)


def rows_of(batch: Batch, piece: slice | Tensor) -> Batch:
    return {name: tensor[piece] for name, tensor in batch.items()}
