"""What saving costs the loop, and resuming the start, on a language model of 25M parameters (a checkpoint of 300 MB).

    python -m benchmarks.saving
    torchrun --nproc-per-node 2 -m benchmarks.saving --engine fsdp2

The loop's stall is what `fit` logs as time/save; a save goes on beside the steps, and its whole time is that of the
thread. Start and resume are timed from the birth of a process to the end of its first step (one process only).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Literal

import torch

from fledge import checkpoint, distributed, files
from fledge.config import StageConfig
from fledge.models.language import CausalConfig, build_causal
from fledge.optim import OptimConfig, adamw
from fledge.stream import Batch, DataStream
from fledge.track import Run, read_metrics
from fledge.train import TrainConfig, fit
from pretrain.clm import CLM

DEFAULT_CADENCE = TrainConfig.model_fields["save_every"].default
EVERY, ROWS, LENGTH = 6, 4, 128


class Config(StageConfig):
    stage: Literal["pretrain.saving"] = "pretrain.saving"
    train: TrainConfig


def rows(ids: list[int], seeds: list[int]) -> Batch:
    """Random tokens, each row one document."""
    tokens = torch.stack([torch.randint(3, 1000, (LENGTH,), generator=torch.Generator().manual_seed(s)) for s in seeds])
    position = torch.arange(LENGTH).expand(len(ids), LENGTH)
    return {"input_ids": tokens, "document": torch.ones_like(tokens), "position": position, "labels": tokens}


def train(out: str, steps: int, engine: Literal["ddp", "fsdp2"]) -> Path:
    """Train, or go on training; the run's folder."""
    torch.set_num_threads(1)
    distributed.setup("cpu")
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tokenizer = type("Tokenizer", (types.SimpleNamespace,), {"__len__": lambda self: 1024})(**ids)
    sizes = CausalConfig(embed_dim=512, depth=8, num_heads=8, context_length=LENGTH)
    torch.manual_seed(0)
    objective = CLM(build_causal(sizes, tokenizer))
    config = Config(out=out, train=TrainConfig(batch=ROWS, steps=1, engine=engine, save_every=EVERY, precision="fp32"))
    groups = [{"params": list(objective.parameters())}]
    optim = adamw(groups, OptimConfig(lr=1e-4), batch=ROWS, steps=steps, steps_per_epoch=10)
    with Run.open(config) as run:
        fit(objective, DataStream(40, rows, batch=ROWS, seed=1), optim, config.train, run, steps=steps, seed=1)
        return run.dir


def stall(out: str, engine: Literal["ddp", "fsdp2"], saves: int = 5) -> None:
    """The loop's part of a save, the thread's, and hashing."""
    spent: list[float] = []
    publish = checkpoint.publish

    def timed(*args: object) -> None:
        began = time.perf_counter()
        publish(*args)  # type: ignore[arg-type]
        spent.append(time.perf_counter() - began)

    checkpoint.publish = timed
    folder = train(out, EVERY * saves + 2, engine)
    if not distributed.is_main():
        return
    records = read_metrics(folder / "metrics.jsonl")[2:]
    stalls = [r["time/save"] for r in records if "time/save" in r]
    beside = statistics.median(r["time/step"] for r in records if "time/save" in r)
    step = statistics.median(r["time/step"] for r in records if "time/save" not in r)
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    size = sum(path.stat().st_size for path in newest.iterdir()) / 1e9
    began = time.perf_counter()
    digests = [files.sha256(path) for path in newest.iterdir()]
    hashing = time.perf_counter() - began
    usual = statistics.median(stalls)
    print(f"{engine} on {distributed.world_size()}: {size:.3f} GB in {len(digests)} files; a step takes {step:.3f} s")
    print(f"  the loop stalls {usual:.4f} s a save (first {stalls[0]:.4f}, most {max(stalls):.4f})")
    print(f"  = {100 * usual / (DEFAULT_CADENCE * step):.2f} % of a step, amortised over {DEFAULT_CADENCE} steps")
    print(f"  the thread works {statistics.median(spent):.2f} s; the step beside its start takes {beside:.3f} s")
    print(f"  hashing: {hashing / size:.2f} s/GB")


def first_step(out: Path, steps: int) -> float:
    """Seconds from the birth of a process to the end of its first step."""
    command = [sys.executable, "-m", "benchmarks.saving", "--out", str(out), "--steps", str(steps)]
    began = time.time()
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(said.split()[-1]) - began


def resume(rounds: int = 3) -> None:
    fresh, resumed = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as out:
            fresh.append(first_step(Path(out), EVERY))
            resumed.append(first_step(Path(out), EVERY + 1))
    a, b = statistics.median(fresh), statistics.median(resumed)
    print(f"first step: {a:.2f} s after a fresh start, {b:.2f} s after a resume ({b / a:.2f}x, {rounds} rounds)")


def main() -> None:
    top = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    top.add_argument("--engine", choices=["ddp", "fsdp2"], default="ddp")
    top.add_argument("--out", help=argparse.SUPPRESS)
    top.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    args = top.parse_args()
    if args.out is not None:  # one start, timed by `first_step`
        times: list[float] = []
        log, Run.log = Run.log, lambda self, step, values: (times.append(time.time()), log(self, step, values))[-1]
        train(args.out, args.steps, args.engine)
        print(times[0])
        return
    distributed.setup("cpu")
    with tempfile.TemporaryDirectory() as out:
        stall(distributed.broadcast_object(out), args.engine)
        distributed.barrier()
    if distributed.world_size() == 1:
        resume()


if __name__ == "__main__":
    main()
