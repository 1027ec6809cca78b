"""Order, seeds and batches as functions of (seed, step)."""

import hashlib
import json
import pickle
import tracemalloc

import pytest
import torch

from fledge.errors import InputError
from fledge.stream import DataStream, Mixed, Permutation, derive, generator, longest_first


def rows(ids, seeds):
    return {"id": torch.tensor(ids), "noise": torch.stack([torch.rand((), generator=generator(s)) for s in seeds])}


@pytest.mark.parametrize("key", [("order", 0), (3, "x", 1)])
def test_a_permutation_is_one(key):
    for n in range(1, 301):
        order = Permutation(n, *key)
        assert sorted(order[i] for i in range(n)) == list(range(n)) and len(order) == n
        for outside in (-1, n):
            with pytest.raises(IndexError):
                order[outside]


def test_permutations_differ_by_key_and_look_random():
    n = 1000
    orders = [[order[i] for i in range(n)] for order in (Permutation(n, "order", 0, epoch) for epoch in range(20))]
    assert len({tuple(order) for order in orders}) == 20
    assert orders[0] == [Permutation(n, "order", 0, 0)[i] for i in range(n)]
    for one, other in zip(orders, orders[1:], strict=False):  # fixed points of a random permutation: 1 on average
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 10
    x = torch.arange(n, dtype=torch.float64)
    for order in orders:
        rank_correlation = torch.corrcoef(torch.stack([x, torch.tensor(order, dtype=torch.float64)]))[0, 1]
        assert abs(rank_correlation) < 5 / n**0.5  # five standard deviations


def test_every_order_of_four_comes_up():
    """All 24, none far from its share, over many keys."""
    seen: dict[tuple, int] = {}
    for key in range(2400):
        order = Permutation(4, key)
        row = tuple(order[i] for i in range(4))
        seen[row] = seen.get(row, 0) + 1
    assert len(seen) == 24 and min(seen.values()) > 50 and max(seen.values()) < 200


def test_a_permutation_needs_no_memory():
    tracemalloc.start()
    order = Permutation(10**15, "order")
    assert len({order[i] for i in range(10**15 - 1000, 10**15)}) == 1000
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_derive_is_blake2b_of_the_json():
    assert derive("order", 0) == 161434087686267617  # these stand in people's runs: they may never change
    assert derive("sample", 1, 2, 3) == 5220847290991468754 and derive("init", 5) == 6671359882750565849
    for key in [("order", 0), ("sample", 1, 2, 3), ("é", -1), (), ("1",), (1,)]:
        text = json.dumps(list(key)).encode("ascii")
        digest = hashlib.blake2b(text, digest_size=8).digest()
        assert derive(*key) == sum(byte << (8 * i) for i, byte in enumerate(digest)) // 2
        assert 0 <= derive(*key) < 2**63
    assert derive("1") != derive(1) and derive("a", 1) != derive("a1") and derive(1, 11) != derive(11, 1)
    a, b = (torch.rand(5, generator=generator("x", 4)) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, torch.rand(5, generator=generator("x", 5)))


def test_an_epoch_sees_each_sample_at_most_once():
    stream = DataStream(23, rows, batch=5, seed=1)
    assert stream.steps_per_epoch == 4 and not stream.on_policy
    epochs = []
    for epoch in range(3):
        ids = [i for step in range(4 * epoch, 4 * epoch + 4) for i in stream.ids(step)]
        assert len(ids) == len(set(ids)) == 20 and set(ids) <= set(range(23))
        epochs.append(ids)
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream.ids(7) == DataStream(23, rows, batch=5, seed=1).ids(7)
    assert stream.ids(0) != DataStream(23, rows, batch=5, seed=2).ids(0)


def test_a_samples_seed_depends_on_seed_epoch_and_id_only():
    """Not on the batch that it comes in, on its neighbours, or on the steps before."""
    small, large = DataStream(12, rows, batch=3, seed=1), DataStream(12, rows, batch=6, seed=1)

    def noise(stream, epoch):
        steps = range(epoch * stream.steps_per_epoch, (epoch + 1) * stream.steps_per_epoch)
        batches = [stream.fetch(stream.ids(step), step) for step in steps]
        return {i: x for b in batches for i, x in zip(b["id"].tolist(), b["noise"].tolist(), strict=True)}

    assert noise(small, 0) == noise(large, 0) and noise(small, 1) == noise(large, 1)
    assert not set(noise(small, 0).values()) & set(noise(small, 1).values())
    alone = large.fetch([large.ids(1)[4]], 1)
    assert alone["noise"][0] == large.fetch(large.ids(1), 1)["noise"][4]


def test_a_stream_has_no_state_and_travels_to_workers():
    stream = DataStream(12, rows, batch=3, seed=1)
    stream.begin(0)
    stream.observe(0, {})
    assert stream.state() == ({}, {})
    again = pickle.loads(pickle.dumps(stream))
    assert again.ids(9) == stream.ids(9)


def test_fewer_samples_than_a_batch_are_refused():
    with pytest.raises(InputError, match="pictures: 4 samples, but train.batch is 5"):
        DataStream(4, rows, batch=5, seed=0, what="pictures")


@pytest.mark.parametrize("K", [None, 2])
def test_the_longest_rows_come_first(K):
    """By real tokens wherever padding stands; of several sequences, by the longest; equal ones in their order."""
    lengths = [3, 5, 1, 5, 2]
    mask = torch.tensor([[0] * (5 - n) + [1] * n for n in lengths])
    if K is not None:
        mask = torch.stack([mask, torch.tensor([1, 0, 0, 0, 0]).expand(5, 5)], dim=1)  # (B, K, T)
    assert longest_first(mask).tolist() == [1, 3, 0, 4, 2]


def test_rows_of_two_streams_are_spread_evenly_and_stay_in_order():
    """Each row is of the sample that its id names, wherever the batch is cut; epochs are the first stream's."""

    def stream(n: int, batch: int, offset: int) -> DataStream:
        return DataStream(n, lambda ids, seeds: {"x": torch.tensor(ids) + offset}, batch=batch, seed=3)

    def join(parts):
        assert [which for which, _ in parts] == sorted(which for which, _ in parts)
        return {"x": torch.cat([rows["x"] for _, rows in parts])}

    first, second = stream(40, 6, 0), stream(7, 2, 100)
    both = Mixed([first, second], join)
    assert (both.batch, both.steps_per_epoch) == (8, 6)
    for step in range(9):
        ids = both.ids(step)
        named = [i + 100 * which for which, i in ids]
        assert both.fetch(ids, step)["x"].tolist() == named
        assert [i for which, i in ids if which == 0] == first.ids(step)
        assert [i for which, i in ids if which == 1] == second.ids(step)
        assert all([which for which, _ in half].count(1) == 1 for half in (ids[:4], ids[4:]))
        cut = [both.fetch(ids[a:b], step)["x"] for a, b in ((0, 1), (1, 2), (2, 8))]  # a part may have none of one
        assert torch.cat(cut).tolist() == named
