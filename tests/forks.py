"""Processes that start in milliseconds: a server that has imported the heavy libraries forks one for each rank.

    with Forks() as forks:
        job = forks.start("tests.resume_driver:stage", {"stage": …}, world=2, folder=tmp_path)
        job.kill(0)
        job.wait()

A forked rank is a process of its own: it can be killed, joins a process group, starts data workers. The server has run
nothing but imports, and every rank scrambles the global generators first, so that nothing can lean on their state.
"""

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HEAVY = ("torch", "torch.distributed", "accelerate", "transformers", "timm", "safetensors.torch", "numpy", "PIL.Image")
HEAVY += ("torch.utils.data", "torch.nn.parallel", "transformers.models.llama.modeling_llama", "timm.models")
HEAVY += ("transformers.models.bert.modeling_bert", "transformers.models.gpt2.modeling_gpt2")
HEAVY += ("pretrain.mae", "pretrain.dino", "pretrain.mlm", "pretrain.clm", "finetune.classify", "finetune.sft")
HEAVY += ("align.clip", "align.reward", "align.ppo", "fledge.cli", "fledge.report")
HEAVY += ("torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo")
STACKS = signal.SIGUSR1


class Job:
    """The ranks of one job; rank i writes its output to FOLDER/rank<i>.log."""

    def __init__(self, forks: "Forks", pids: list[int], folder: Path) -> None:
        self.forks, self.pids, self.folder = forks, pids, folder
        self.codes: list[int | None] = [None] * len(pids)

    def poll(self) -> bool:
        """Has every rank ended?"""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                self.codes[rank] = self.forks.ask({"poll": pid})["code"]
        return all(code is not None for code in self.codes)

    def failed(self) -> bool:
        """Has some rank ended in another way than well?"""
        self.poll()
        return any(code for code in self.codes)

    def kill(self, rank: int) -> None:
        """SIGKILL one rank; its data workers are left to find out by themselves."""
        if self.codes[rank] is None:
            os.kill(self.pids[rank], signal.SIGKILL)

    def end(self) -> None:
        """SIGKILL whatever is left of every rank, workers too, as a launcher would."""
        for rank, pid in enumerate(self.pids):
            self.kill(rank)  # by itself, too: right after the fork it may not yet lead a group
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.wait(timeout=30, check=False)

    def stacks(self) -> None:
        """Have every process that still runs write the stacks of its threads into its output."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, STACKS)
        time.sleep(1)

    def wait(self, timeout: float = 120, check: bool = True) -> "Job":
        """Until every rank has ended; if asked to check, all of them well."""
        until = time.monotonic() + timeout
        while not self.poll():
            if time.monotonic() > until or (check and self.failed() and time.monotonic() > until - timeout + 60):
                self.stacks()
                self.end()
                raise AssertionError(f"ranks ended with {self.codes}, or not within {timeout} s:\n{self.output()}")
            time.sleep(0.005)
        assert not check or not any(self.codes), f"ranks ended with {self.codes}:\n{self.output()}"
        return self

    def output(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in sorted(self.folder.glob("rank*.log")))


class Forks:
    """The server, as seen by the tests. ``hash_seed``: of its Python, and so of all that it forks."""

    def __init__(self, hash_seed: int = 0) -> None:
        from tests.launch import environment

        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment(PYTHONHASHSEED=str(hash_seed), TOKENIZERS_PARALLELISM="false"),
        )  # fmt: skip

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, call: str, args: dict[str, Any], *, world: int = 1, folder: Path) -> Job:
        """Fork ``world`` ranks that call MODULE:FUNCTION(**args) in ``folder``."""
        from tests.launch import free_port

        folder.mkdir(parents=True, exist_ok=True)
        port, ranks = str(free_port()), []
        for rank in range(world):
            group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": port}
            group |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
            ranks.append(group if world > 1 else {})
        pids = self.ask({"call": call, "args": args, "ranks": ranks, "folder": str(folder)})["pids"]
        return Job(self, pids, folder)

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *error: object) -> None:
        self.server.kill()
        self.server.communicate()


# ------------------------------------------------------------------------------------------------------ in the server


def serve() -> None:
    for name in HEAVY:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or every rank would visit, and so copy, all that was imported: 2 of its 3 CPU-seconds
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            answer = {"pids": [fork(request, rank) for rank in range(len(request["ranks"]))]}
        print(json.dumps(answer), flush=True)


def fork(request: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        log = os.open(f"{request['folder']}/rank{rank}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        faulthandler.register(STACKS)
        os.environ.update(request["ranks"][rank])
        os.chdir(request["folder"])
        scramble()
        module, _, function = request["call"].partition(":")
        getattr(importlib.import_module(module), function)(**request["args"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.exit(code)  # as every Python ends, so that a faulty end shows


def scramble() -> None:
    """Nobody may draw from the global generators and expect anything."""
    import numpy as np
    import torch

    noise = int.from_bytes(os.urandom(4), "little")
    random.seed(noise)
    np.random.seed(noise)
    torch.manual_seed(noise)


if __name__ == "__main__":
    serve()
