"""Aligning beside its peers: PPO, SFT and reward models in CPU-seconds (see paired.py), PPO's modes in memory.

    python -m benchmarks.align                  (all, each in a process of its own; --rounds N, --only NAME)

PPO beside TRL 1.12 needs that version, the last with a PPOTrainer, in a folder beside what is installed:

    pip install trl==1.12.0 --no-deps --target trl112
    python -m benchmarks.align --trl112 trl112

All on one thread in fp32.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import memory

Pair = tuple[Callable, Callable]
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TRL_EXPERIMENTAL_SILENCE": "1"}


def ppo(folder: Path | None) -> Pair:
    from benchmarks.ppo import Setting, beside_plain

    return beside_plain(Setting())


def ppo_small(folder: Path | None) -> Pair:
    """Where less can be saved: a small vocabulary, and generation a larger share."""
    from benchmarks.ppo import SMALL, beside_plain

    return beside_plain(SMALL)


def ppo_trl(folder: Path | None, stop: bool = False) -> Pair:
    """As TRL 1.12 has it by default: no answer of its own ends before its last token."""
    from benchmarks.ppo import Setting, beside_trl

    assert folder is not None
    return beside_trl(Setting(), folder, stop)


def ppo_trl_eos(folder: Path | None) -> Pair:
    return ppo_trl(folder, stop=True)


def sft(folder: Path | None) -> Pair:
    from benchmarks import sft, steps

    return sft.pair(steps.small_llama, steps.ours, steps.adamw)


def reward(folder: Path | None) -> Pair:
    from benchmarks import reward, steps

    return reward.pair(steps.small_llama, steps.ours, steps.adamw)


def ranking(answers: int) -> Pair:
    from benchmarks import reward, steps

    return reward.ranking(answers, steps.small_llama, steps.ours, steps.adamw)


PAIRS: dict[str, tuple[str, Callable[[Path | None], Pair], int]] = {
    "ppo": ("PPO iteration / plain padded loop", ppo, 1),
    "ppo_small": ("PPO iteration, small / plain padded loop", ppo_small, 1),
    "ppo_trl": ("PPO iteration / TRL 1.12 PPOTrainer", ppo_trl, 1),
    "ppo_trl_eos": ("PPO iteration / the same, stop_token=eos", ppo_trl_eos, 1),
    "sft": ("SFT step / TRL SFTTrainer step", sft, 3),
    "reward": ("reward step of pairs / TRL RewardTrainer step", reward, 3),
    "ranking4": ("reward step, 4 answers / their pairs apart", lambda folder: ranking(4), 2),
    "ranking9": ("reward step, 9 answers / their pairs apart", lambda folder: ranking(9), 1),
}
"""Name: title, what builds (ours, theirs), steps of a round."""


def measure(name: str, rounds: int, folder: Path | None) -> None:
    import torch

    from benchmarks.paired import compare

    title, build, steps = PAIRS[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(compare(title, *build(folder), rounds=rounds, steps=steps, warmup=steps), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.align", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=[*PAIRS, "memory"])
    parser.add_argument("--trl112", type=Path, metavar="FOLDER", help="where TRL 1.12 lies")
    args = parser.parse_args()
    if args.only == "memory":
        return memory.main()
    if args.only is not None and (args.trl112 or "trl" not in args.only):
        return measure(args.only, args.rounds, args.trl112)
    if args.only is not None:
        return print(f"{PAIRS[args.only][0]}: skipped; give --trl112 FOLDER")
    print(f"{'':<46} {'ours':>8} {'theirs':>11}   ratio (median, quartiles); CPU-seconds, one thread, fp32", flush=True)
    for name in [*PAIRS, "memory"]:  # each alone: TRL 1.12 and the TRL that is installed do not fit into one process
        command = [sys.executable, "-m", "benchmarks.align", "--only", name, "--rounds", str(args.rounds)]
        command += ["--trl112", str(args.trl112)] if args.trl112 else []
        subprocess.run(command, check=True, env=os.environ | QUIET)


if __name__ == "__main__":
    main()
