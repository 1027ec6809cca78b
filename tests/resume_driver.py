"""What a rank of tests/fledge/test_resume.py does: one stage's main, as a command would call it.

python tests/resume_driver.py STAGE CONFIG.json
"""

import importlib
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def stage(stage: str, config: dict[str, Any], die: dict[str, int] | None = None, trace: str | None = None) -> None:
    """Run a stage. ``die``: see ``die_inside_a_save``. ``trace``: a file to which fetched ids are appended."""
    from fledge.config import load

    if die is not None:
        die_inside_a_save(**die)
    if trace is not None:
        trace_ids(Path(trace))
    module = importlib.import_module(stage)
    module.main(load(module.Config, config))


def command(argv: list[str], stop: str | None = None, at: int = 0, number: str = "SIGUSR2") -> None:
    """The command `fledge`, ending in its exit code. ``stop``: send this process SIGUSR2 "in training" at step ``at``
    (only to the last rank), "inside a save" of step ``at``, or in the "evaluation" after training."""
    from fledge import cli, distributed, saver, track

    def first(work, where):
        def signalled(*args: Any, **more: Any) -> Any:
            last = distributed.rank() == distributed.world_size() - 1
            if stop == where and (where == "evaluation" or args[1] == at) and (where != "in training" or last):
                os.kill(os.getpid(), getattr(signal, number))
            return work(*args, **more)

        return signalled

    track.Run.log = first(track.Run.log, "in training")  # type: ignore[method-assign]
    saver.Saver.save = first(saver.Saver.save, "inside a save")  # type: ignore[method-assign]
    track.Run.publish = first(track.Run.publish, "evaluation")  # type: ignore[method-assign]
    raise SystemExit(cli.main(argv))


def die_inside_a_save(save: int, sync: int, rank: int = 0) -> None:
    """SIGKILL this process, if it is that rank, at the ``sync``-th fsync of its ``save``-th checkpoint (from 1)."""
    from fledge import checkpoint

    if int(os.environ.get("RANK", 0)) != rank:
        return
    saves, syncs = 0, 0
    plain_publish, plain_sync = checkpoint.publish, os.fsync
    thread: threading.Thread | None = None

    def counted_sync(handle: int) -> None:
        nonlocal syncs
        plain_sync(handle)
        if threading.current_thread() is thread and saves == save:
            syncs += 1
            if syncs == sync:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted_publish(*args: Any) -> None:
        nonlocal saves, thread
        saves, thread = saves + 1, threading.current_thread()
        try:
            plain_publish(*args)
        finally:
            thread = None

    checkpoint.publish, os.fsync = counted_publish, counted_sync


def trace_ids(path: Path) -> None:
    """Append {"step", "ids"} for every fetch, in whatever process it happens."""
    from fledge.stream import DataStream

    plain = DataStream.fetch

    def fetch(self, ids, step):
        handle = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(handle, (json.dumps({"step": step, "ids": list(ids)}) + "\n").encode())
        os.close(handle)
        return plain(self, ids, step)

    DataStream.fetch = fetch  # type: ignore[method-assign]


def out_of_order(steps: int, settle: bool = True, save_every: int = 100, die: dict[str, int] | None = None) -> None:
    """Train, or go on training, a network whose layers are registered in another order than they run in."""
    from typing import Literal

    import torch
    import torch.nn.functional as F

    from fledge import distributed
    from fledge import train as loop
    from fledge.config import StageConfig
    from fledge.optim import OptimConfig, adamw
    from fledge.stream import DataStream
    from fledge.track import Run

    class Toy(StageConfig):
        stage: Literal["pretrain.toy"] = "pretrain.toy"
        train: loop.TrainConfig

    class Network(torch.nn.Module):
        weights = {"loss": 1.0}

        def __init__(self) -> None:
            super().__init__()
            self.third, self.first, self.second = (torch.nn.Linear(13, 13) for _ in range(3))

        def counts(self, batch):
            return {"loss": len(batch["x"])}

        def forward(self, batch, step):
            hidden = F.dropout(self.first(batch["x"]).tanh(), 0.1)
            return {"loss": (self.third(self.second(hidden).tanh()) - batch["x"].flip(1)).square().sum()}

    def rows(ids, seeds):
        return {"x": torch.stack([torch.randn(13, generator=torch.Generator().manual_seed(s)) for s in seeds])}

    if die is not None:
        die_inside_a_save(**die)
    if not settle:
        loop.settle_buckets = lambda *args: True
    distributed.setup("cpu")
    config = Toy(train=loop.TrainConfig(batch=16, steps=steps, precision="fp32", save_every=save_every))
    torch.manual_seed(1)
    network = Network()
    optim = adamw(
        [{"params": list(network.parameters())}],
        OptimConfig(lr=0.01, decay="constant"),
        batch=16,
        steps=steps,
        steps_per_epoch=2,
    )
    with Run.open(config.model_copy(update={"train": config.train.model_copy(update={"steps": 0})})) as run:
        loop.fit(network, DataStream(40, rows, batch=16, seed=2), optim, config.train, run, steps=steps, seed=3)


if __name__ == "__main__":
    stage(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
