"""What a rank of tests/fledge/test_resume.py does: one stage's main, as a command would call it.

    python tests/resume_driver.py STAGE CONFIG.json
"""

import importlib
import json
import os
import signal
import sys
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


def die_inside_a_save(save: int, sync: int) -> None:
    """SIGKILL this process at the ``sync``-th fsync of its ``save``-th checkpoint (both from 1)."""
    from fledge import checkpoint

    saves, syncs, inside = 0, 0, False
    plain_save, plain_sync = checkpoint.save, os.fsync

    def counted_sync(handle: int) -> None:
        nonlocal syncs
        plain_sync(handle)
        if inside and saves == save:
            syncs += 1
            if syncs == sync:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted_save(*args: Any) -> Path:
        nonlocal saves, inside
        saves, inside = saves + 1, True
        try:
            return plain_save(*args)
        finally:
            inside = False

    checkpoint.save, os.fsync = counted_save, counted_sync


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


if __name__ == "__main__":
    stage(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
