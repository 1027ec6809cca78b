"""A storm of kills, of any length: every restart verifies, no step is lost twice, and the end is the same bits.

    python -m tests.faults --kills 30 --stage mae,ppo --ranks 2 --inside-saves 0.34 --json storm.json

A stage at the toy size of tests/fledge/test_resume.py trains once in peace. Then it trains in rounds: started, killed
(SIGKILL) at a random moment or at a random fsync of a save, started again, until it ends; and another round, until so
many kills are done. After each kill the newest checkpoint must verify and may not be of an earlier step than before.
At the end of each round every tensor of the last checkpoint, every number of metrics.jsonl but times and memory, and
the artifact with all its scores must be those of the run in peace.
"""

import argparse
import json
import os
import platform
import random
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.fledge.test_resume import CASES, World, assert_same_run, kill_somewhere, logged, run_of
from tests.forks import Forks

SYNCS = 9
"""fsyncs of a save that prunes: four files, state and manifest once more, the folder, and its parent twice."""

PATIENCE = 600.0
"""Seconds in which a start of a toy stage ends, also on a machine that is busy with something else."""


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


def newest_step(run: Path, row: Row) -> int:
    """The step that a restart will go on with; broken checkpoints are counted."""
    from fledge import checkpoint

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = checkpoint.newest(run / "checkpoints")
    row.unloadable += any(issubclass(one.category, RuntimeWarning) for one in told)
    return found.step if found else 0


def killed(world: World, row: Row, folder: Path, rng: random.Random, inside: bool, changes: dict[str, Any]) -> bool:
    """Start the stage and kill it; False where it came to its end before."""
    run = run_of(row.stage, folder)
    more = {"die": {"save": rng.randint(1, 2), "sync": rng.randint(1, SYNCS)}} if inside else {}
    before = logged(run)
    job = world.start(world.stormy, row.stage, folder, world=row.ranks, changes=changes, **more)
    if not inside:
        lines = before + rng.randint(0, 2 * changes["save_every"])
        return kill_somewhere(job, run, lines, rng.uniform(0, 0.1), rng.randrange(row.ranks))
    until = time.monotonic() + PATIENCE
    while not job.poll() and job.codes[0] is None and time.monotonic() < until:
        time.sleep(0.01)
    if job.codes[0] == 0:  # it had no such save left
        job.wait(PATIENCE)
        return False
    assert job.codes[0] == -9, job.output()
    job.end()
    row.forced_inside += 1
    return True


def storm(world: World, row: Row, kills: int, share: float, seed: int, changes: dict[str, Any]) -> Row:
    """Rounds of a stage until it was killed so often."""
    rng, root = random.Random(f"{seed}/{row.stage}/{row.ranks}"), world.root / f"storm-{row.stage}-{row.ranks}"
    world.start(world.calm, row.stage, root / "calm", world=row.ranks, changes=changes).wait(PATIENCE)
    began = time.monotonic()
    while row.kills < kills:
        folder, reached = root / f"round-{row.rounds}", 0
        run = run_of(row.stage, folder)
        while row.kills < kills and killed(world, row, folder, rng, rng.random() < share, changes):
            row.kills += 1
            row.found_inside += any((run / "checkpoints").glob(".[td][me][pl]-*"))
            step = newest_step(run, row)
            row.regressions += step < reached
            reached = step
        if not (run / "artifact" / "manifest.json").exists():
            world.start(world.stormy, row.stage, folder, world=row.ranks, changes=changes).wait(PATIENCE)
        row.rounds += 1
        try:
            assert_same_run(run, run_of(row.stage, root / "calm"))
        except AssertionError as error:
            row.unequal += 1
            row.differences.append(str(error)[:2000])
    row.seconds = round(time.monotonic() - began, 1)
    return row


COLUMNS = ("stage", "ranks", "kills", "forced_inside", "found_inside", "rounds", "unloadable", "regressions", "unequal")


def table(rows: list[Row]) -> str:
    heads = [*COLUMNS, "s/kill"]
    cells = [[str(getattr(row, name)) for name in COLUMNS] + [f"{row.seconds / row.kills:.1f}"] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *cells])


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 where all targets are met."""
    top = argparse.ArgumentParser("python -m tests.faults", description=(__doc__ or "").partition("\n")[0])
    trained = [name for name, case in CASES.items() if case.steps]
    top.add_argument("--stage", default="mae", help=f"all, or some of {', '.join(trained)}, with commas")
    top.add_argument("--kills", type=int, default=30, help="of each stage")
    top.add_argument("--ranks", type=int, help="as in tests/fledge/test_resume.py if not given")
    top.add_argument("--inside-saves", type=float, default=0.34, help="the share of kills that are forced into a save")
    top.add_argument("--steps", type=int, default=24)
    top.add_argument("--save-every", type=int, default=3)
    top.add_argument("--seed", type=int, default=0)
    top.add_argument("--json", type=Path, help="a file for all that was counted")
    args = top.parse_args(argv)
    names = trained if args.stage == "all" else args.stage.split(",")
    if unknown := sorted(set(names) - set(trained)):
        top.error(f"unknown stage {', '.join(unknown)}; expected some of {', '.join(trained)}")
    rows = []
    with tempfile.TemporaryDirectory() as root, Forks(hash_seed=1) as calm, Forks(hash_seed=2) as stormy:
        world = World(Path(root), calm, stormy)
        for name in names:
            row = Row(name, args.ranks or CASES[name].world)
            changes = {"steps": args.steps, "save_every": args.save_every}
            rows.append(storm(world, row, args.kills, args.inside_saves, args.seed, changes))
            print(table(rows[-1:]), flush=True)
            if args.json:
                args.json.write_text(
                    json.dumps({"settings": settings(args), "rows": [asdict(r) for r in rows]}, indent=1)
                )
    print(table(rows), flush=True)
    return 0 if all(row.clean() for row in rows) else 1


def settings(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    made = {"python": platform.python_version(), "torch": str(torch.__version__), "cores": os.cpu_count()}
    return made | {name: value for name, value in vars(args).items() if name != "json"}


if __name__ == "__main__":
    raise SystemExit(main())
