"""Run a script of the tests on several ranks: gloo on loopback, one thread each."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(**extra: str) -> dict[str, str]:
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    return os.environ | quiet | extra


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(world: int, args: list[str]) -> list[subprocess.Popen]:
    """Start ``python ARGS`` on ``world`` ranks of one loopback job."""
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, *args],
            env=environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo",
            )
            if world > 1
            else environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen], timeout: float = 180) -> list[str]:
    """Every rank's output; fails the test with it if a rank failed."""
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def run(world: int, args: list[str], timeout: float = 180) -> list[str]:
    return finish(start(world, args), timeout)
