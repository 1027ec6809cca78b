"""A storm of kills, of any length: every restart verifies, no step is lost twice, and the end is the same bits.

    python -m tests.faults --kills 30 --stage mae,ppo --ranks 2 --inside-saves 0.34 --json storm.json
    python -m tests.faults --matrix --jobs 2 --json matrix.json --markdown matrix.md

A stage at the toy size of tests/fledge/test_resume.py trains once in peace. Then it trains in rounds: started, killed
(SIGKILL) at a random moment or at a random fsync of a save, started again, until it ends; and another round, until so
many kills are done. After each kill the newest checkpoint must verify and may not be of an earlier step than before.
At the end of each round every tensor of the last checkpoint, every number of metrics.jsonl but times and memory, and
the artifact with all its scores must be those of the run in peace.

`out-of-order` is no stage: a network whose modules are registered in another order than they run in, for DDP.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.fledge.test_resume import CASES, PATIENCE, World, assert_same_run, kill_somewhere, logged, run_of
from tests.forks import Forks, Job

SYNCS = 9
"""fsyncs of a save that prunes: four files, state and manifest once more, the folder, and its parent twice."""

OUT_OF_ORDER = "out-of-order"
MATRIX = dict.fromkeys((("mae", 1), ("dino", 1), ("ppo", 1), ("dino", 2), ("ppo", 2)), 100)
MATRIX |= {(name, case.world): 20 for name, case in CASES.items() if name not in ("mae", "dino", "ppo")}
MATRIX |= {(OUT_OF_ORDER, 4): 20}
"""(stage, ranks) -> kills."""


@dataclass
class Row:
    """What was counted in the storm of one stage."""

    stage: str
    ranks: int
    kills: int = 0
    forced_inside: int = 0
    """Kills at an fsync of a save."""
    found_inside: int = 0
    """Kills after which a folder that was being written, or removed, was left behind."""
    after_training: int = 0
    """Kills between the last step and the end: evaluation, the artifact."""
    rounds: int = 0
    unloadable: int = 0
    """Kills after which the newest checkpoint did not verify; target 0."""
    regressions: int = 0
    """Kills after which the newest checkpoint was of an earlier step than before; target 0."""
    unequal: int = 0
    """Rounds that did not end in the same bits; target 0."""
    seconds: float = 0.0
    differences: list[str] = field(default_factory=list)

    def clean(self) -> bool:
        return not (self.unloadable or self.regressions or self.unequal)


class Storm:
    """The storm of one stage, below ``root``."""

    def __init__(self, row: Row, root: Path, calm: Forks, stormy: Forks, args: argparse.Namespace) -> None:
        self.row, self.root, self.calm, self.stormy = row, root, calm, stormy
        self.world = World(root / "world", calm, stormy)
        self.rng = random.Random(f"{args.seed}/{row.stage}/{row.ranks}")
        self.share: float = args.inside_saves
        self.changes = {"steps": args.steps, "save_every": args.save_every}
        self.trains = row.stage == OUT_OF_ORDER or CASES[row.stage].steps > 0
        self.lines, self.whole, self.tail = 0, 0.0, 0.0  # of the run in peace: numbers, seconds, those after the last

    def start(self, forks: Forks, folder: Path, **more: Any) -> Job:
        if self.row.stage == OUT_OF_ORDER:
            args = {**self.changes, **more}
            return forks.start("tests.resume_driver:out_of_order", args, world=self.row.ranks, folder=folder)
        return self.world.start(forks, self.row.stage, folder, world=self.row.ranks, changes=self.changes, **more)

    def run_in(self, folder: Path) -> Path:
        return folder / "runs" / "toy" if self.row.stage == OUT_OF_ORDER else run_of(self.row.stage, folder)

    def blow(self, kills: int) -> Row:
        """Rounds until it was killed so often."""
        row, truth = self.row, self.peace()
        began = time.monotonic()
        while row.kills < kills:
            folder = self.root / f"round-{row.rounds}"
            self.round(folder, kills)
            row.rounds += 1
            try:
                assert_same_run(self.run_in(folder), truth)
                shutil.rmtree(folder)
            except AssertionError as error:
                row.unequal += 1
                row.differences.append(str(error)[:2000])
        row.seconds = round(time.monotonic() - began, 1)
        return row

    def peace(self) -> Path:
        """The run that nothing happens to."""
        truth = self.run_in(self.root / "calm")
        if self.row.stage in CASES:
            self.world.config(self.row.stage)  # its parents come first
        began = time.time()
        self.start(self.calm, self.root / "calm").wait(PATIENCE)
        ended, last = time.time(), (truth / "metrics.jsonl").stat().st_mtime
        self.lines, self.whole, self.tail = logged(truth), ended - began, ended - last
        return truth

    def round(self, folder: Path, kills: int) -> None:
        """Start and kill it until it has come to its end."""
        row, run, reached = self.row, self.run_in(folder), 0
        while self.killed(folder, reached):
            row.kills += 1
            row.found_inside += any((run / "checkpoints").glob(".[td][me][pl]-*"))
            step = newest_step(run, row)
            row.regressions += step < reached
            reached = step
            if row.kills == kills:
                self.start(self.stormy, folder).wait(PATIENCE)
                return

    def killed(self, folder: Path, reached: int) -> bool:
        """Start the stage, which goes on at step ``reached``, and kill it; False where it came to its end before."""
        saves = -(-(self.changes["steps"] - reached) // self.changes["save_every"]) if self.trains else 0
        few = self.row.forced_inside < self.share * self.row.kills
        if saves and (self.rng.random() < self.share or few):
            return self.killed_inside_a_save(folder, min(saves, 2))
        run = self.run_in(folder)
        before = logged(run)
        lines = min(before + self.rng.randint(0, 2 * self.changes["save_every"]), self.lines)
        longest = 0.1 if lines < self.lines else 1.3 * (self.tail if before < self.lines else self.whole)
        job = self.start(self.stormy, folder)
        struck = kill_somewhere(job, run, lines, self.rng.uniform(0, longest), self.rng.randrange(self.row.ranks))
        self.row.after_training += struck and self.trains and logged(run) >= self.lines
        return struck

    def killed_inside_a_save(self, folder: Path, saves: int) -> bool:
        die = {"save": self.rng.randint(1, saves), "sync": self.rng.randint(1, SYNCS)}
        job = self.start(self.stormy, folder, die=die)
        until = time.monotonic() + PATIENCE
        while not job.poll() and job.codes[0] is None and time.monotonic() < until:
            time.sleep(0.005)
        if job.codes[0] is None:
            job.stacks()
        if job.codes[0] != 0:
            job.end()
            assert job.codes[0] == -9, f"rank 0 was to die at {die}:\n{job.output()}"
            self.row.forced_inside += 1
            return True
        job.wait(PATIENCE)  # it had no such save left
        return False


def newest_step(run: Path, row: Row) -> int:
    """The step that a restart will go on with; broken checkpoints are counted."""
    from fledge import checkpoint

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = checkpoint.newest(run / "checkpoints")
    row.unloadable += any(issubclass(one.category, RuntimeWarning) for one in told)
    return found.step if found else 0


def storm(row: Row, kills: int, args: argparse.Namespace) -> Row:
    with tempfile.TemporaryDirectory() as root, Forks(hash_seed=1) as calm, Forks(hash_seed=2) as stormy:
        return Storm(row, Path(root), calm, stormy, args).blow(kills)


def storms(plan: dict[tuple[str, int], int], args: argparse.Namespace) -> Iterator[Row]:
    """Each storm's row as it ends; as many at a time as asked for, each in a process of its own."""
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = [pool.submit(storm, Row(*which), kills, args) for which, kills in plan.items()]
        for one in as_completed(made):
            yield one.result()


COLUMNS = {
    "stage": "stage",
    "ranks": "ranks",
    "kills": "kills",
    "forced_inside": "forced into a save",
    "found_inside": "found inside one",
    "after_training": "after the last step",
    "rounds": "rounds",
    "unloadable": "newest not loadable",
    "regressions": "steps lost twice",
    "unequal": "rounds not equal",
}


def table(rows: list[Row]) -> str:
    heads = [*COLUMNS.values(), "s/kill"]
    cells = [[str(getattr(row, name)) for name in COLUMNS] + [f"{row.seconds / row.kills:.1f}"] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *cells])


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("python -m tests.faults", description=(__doc__ or "").partition("\n")[0])
    names = [*CASES, OUT_OF_ORDER]
    top.add_argument("--matrix", action="store_true", help="all stages, with the ranks and kills of the targets")
    top.add_argument("--stage", default="mae", help=f"all, or some of {', '.join(names)}, with commas")
    top.add_argument("--kills", type=int, default=30, help="of each stage")
    top.add_argument("--ranks", type=int, help="as in tests/fledge/test_resume.py if not given")
    top.add_argument("--inside-saves", type=float, default=0.34, help="the share of kills that are forced into a save")
    top.add_argument("--steps", type=int, default=24)
    top.add_argument("--save-every", type=int, default=3)
    top.add_argument("--seed", type=int, default=0)
    top.add_argument("--jobs", type=int, default=1, help="storms at a time")
    top.add_argument("--json", type=Path, help="a file for all that was counted")
    top.add_argument("--markdown", type=Path, help="a file for the table")
    return top


def plan(args: argparse.Namespace) -> dict[tuple[str, int], int]:
    """(stage, ranks) -> kills."""
    if args.matrix:
        return MATRIX
    worlds = {name: case.world for name, case in CASES.items()} | {OUT_OF_ORDER: 4}
    names = list(worlds) if args.stage == "all" else args.stage.split(",")
    if unknown := sorted(set(names) - set(worlds)):
        raise SystemExit(f"unknown stage {', '.join(unknown)}; expected some of {', '.join(worlds)}")
    return {(name, args.ranks or worlds[name]): args.kills for name in names}


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 where all targets are met."""
    args = parser().parse_args(argv)
    asked, rows = plan(args), []
    for row in storms(asked, args):
        rows = sorted([*rows, row], key=lambda one: list(asked).index((one.stage, one.ranks)))
        print(table([row]), flush=True)
        if args.json:
            counted = {"settings": settings(args), "rows": [asdict(one) for one in rows]}
            args.json.write_text(json.dumps(counted, indent=1))
        if args.markdown:
            args.markdown.write_text(table(rows) + "\n")
    print(table(rows), flush=True)
    return 0 if all(row.clean() for row in rows) else 1


def settings(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    made = {"python": platform.python_version(), "torch": str(torch.__version__), "cores": os.cpu_count()}
    return made | {name: value for name, value in vars(args).items() if name not in ("json", "markdown")}


if __name__ == "__main__":
    raise SystemExit(main())
