"""The gradient of a step does not depend on how its batch was cut over ranks and micro-batches."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fledge import distributed, sharding
from fledge.stream import rows_of, share
from fledge.train import backward, repeated_blocks, unwrap
from tests.objectives import BATCH, BUILDERS, build

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
WHOLE_ROWS_ONLY = {"clip"}
"""Objectives whose loss couples the rows of a batch: ranks are exact, micro-batches are refused."""

KEY_BIASES = ("key.bias", "k_proj.bias")
"""They move all logits of a softmax alike, so their gradient is zero: what is found is rounding, on both sides."""


def gradients(name: str, dtype: torch.dtype, micro_batches: int, engine: str = "ddp") -> dict[str, torch.Tensor]:
    """This rank's accumulated gradients, and the global means as ``mean/<name>``."""
    objective, batch = build(name, dtype)
    world = distributed.world_size()
    mine, pieces = share(BATCH, distributed.rank(), world, -(-BATCH // (world * micro_batches)))
    if engine == "fsdp2":
        model = sharding.shard(objective, torch.optim.SGD(objective.parameters(), lr=0.0), repeated_blocks)
    else:
        model = distributed.wrap(objective)
    means = backward(model, [rows_of(rows_of(batch, mine), piece) for piece in pieces], step=3)
    found = {n: p.grad for n, p in unwrap(model).named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in found.values()), [n for n, g in found.items() if g is None]
    found = {n: distributed.whole(grad) for n, grad in found.items()}
    return found | {f"mean/{n}": m.reshape(-1) for n, m in means.items()}


def assert_same(found: dict, truth: dict, tolerance: float) -> None:
    grads = torch.cat([g.flatten() for n, g in truth.items() if not n.startswith("mean/")])
    floor = 1e-6 * grads.norm()
    for name, true in truth.items():
        if name.endswith(KEY_BIASES):
            assert max(found[name].norm(), true.norm()) <= torch.finfo(true.dtype).eps * grads.norm(), name
            continue
        error = (found[name] - true).norm()
        assert error <= tolerance * max(true.norm(), floor), f"{name}: {error} of {true.norm()}"


def cases():
    for name in BUILDERS:
        for dtype in TOLERANCE:
            for micro_batches in (1,) if name in WHOLE_ROWS_ONLY else (1, 2, 4):
                yield name, dtype, micro_batches


ENGINES = {"ddp": (1, 2, 4), "fsdp2": (1, 2)}
"""Each engine, and into how many micro-batches its ranks cut their rows."""


def rank_cases():
    for engine, pieces in ENGINES.items():
        yield from ((*case, engine) for case in cases() if case[2] in pieces)


@pytest.mark.parametrize("name, dtype, micro_batches", [c for c in cases() if c[2] > 1])
def test_micro_batches(name, dtype, micro_batches):
    assert_same(gradients(name, dtype, micro_batches), gradients(name, dtype, 1), TOLERANCE[dtype])


def ranks(out: str) -> None:
    """Every case on this rank; rank 0 keeps the gradients."""
    distributed.setup("cpu")
    for name, dtype, micro_batches, engine in rank_cases():
        found = gradients(name, dtype, micro_batches, engine)
        if distributed.is_main():
            save_file(found, f"{out}/{name}-{dtype}-{micro_batches}-{engine}.safetensors")


def test_two_ranks(forks, tmp_path):
    forks.start("tests.fledge.test_gradients:ranks", {"out": str(tmp_path)}, world=2, folder=tmp_path).wait(timeout=240)
    for name, dtype, micro_batches, engine in rank_cases():
        found = load_file(tmp_path / f"{name}-{dtype}-{micro_batches}-{engine}.safetensors")
        assert_same(found, gradients(name, dtype, 1), TOLERANCE[dtype])


def test_rows_are_shared_evenly():
    """Brute force: every row once, equally many micro-batches a rank, sizes within one, none above the limit."""
    for n in range(1, 40):
        for world in (1, 2, 3, 4):
            for limit in (1, 2, 3, 5, 64):
                try:
                    shares = [share(n, rank, world, limit) for rank in range(world)]
                except ValueError:
                    continue
                rows = [i for mine, _ in shares for i in range(n)[mine]]
                sizes = [p.stop - p.start for _, pieces in shares for p in pieces]
                assert rows == list(range(n)) and sum(sizes) == n
                assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1 and max(sizes) <= limit
                assert len({len(pieces) for _, pieces in shares}) == 1
