"""What a run costs beside its arithmetic, measured on one machine: the messages of a step, and a save.

    python -m benchmarks.scale --ranks 2,4,8

docs/launching.md computes from these what limits a run on many machines.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from fledge import distributed, files
from fledge.checkpoint import save

PORT = "29533"


def seconds(work: Callable[[], object], rounds: int) -> float:
    """The fastest: the others waited for something else."""
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def step_messages() -> None:
    """What `fit` sends in every step beside the gradient: counts, sums, and whether somebody is to stop."""
    distributed.all_reduce_counts({"loss": 8})
    distributed.all_reduce_sum({"loss": torch.zeros(()), "accuracy": torch.zeros(())})
    distributed.any_rank(False)


def one_rank(rank: int, world: int, megabytes: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT, "RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    began = time.perf_counter()
    distributed.setup("cpu")
    distributed.barrier()
    joined = time.perf_counter() - began
    small = seconds(step_messages, 200)
    gradient = torch.ones(megabytes * 250_000)
    large = seconds(lambda: dist.all_reduce(gradient.zero_()), 5)
    if rank == 0:
        print(f"| {world} | {joined:.2f} s | {small * 1e3:.2f} ms | {megabytes / 1e3 / large:.2f} GB/s |", flush=True)


def saving(megabytes: int) -> None:
    """A checkpoint of so many bytes in float32, and its parts, in seconds a gigabyte."""
    tensors = {str(i): torch.randn(megabytes * 25_000) for i in range(10)}
    with tempfile.TemporaryDirectory() as folder:
        root, number = Path(folder), iter(range(100))
        whole = seconds(lambda: save(root, next(number), {"model": tensors}, {}, keep=1), 5)
        file = next(root.glob("*/model.safetensors"))
        hashing = seconds(lambda: files.sha256(file), 5)
    for name, value in (("save", whole), ("of it sha256", hashing)):
        print(f"| {name} | {value / megabytes * 1e3:.2f} s/GB |")


def main() -> None:
    top = argparse.ArgumentParser("python -m benchmarks.scale", description=(__doc__ or "").partition("\n")[0])
    top.add_argument("--ranks", default="2,4,8")
    top.add_argument("--megabytes", type=int, default=400)
    args = top.parse_args()
    print("| ranks | to join | messages of a step | all-reduce of the gradient |\n|---|---|---|---|")
    for world in map(int, args.ranks.split(",")):
        processes.spawn(one_rank, (world, args.megabytes // 10), nprocs=world)
    print("\n| work | cost |\n|---|---|")
    saving(args.megabytes)


if __name__ == "__main__":
    main()
