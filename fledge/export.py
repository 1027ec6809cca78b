"""An artifact from a checkpoint of a run, finished or not: the stage itself, with what was trained put into its model.

The stage works in a folder that is thrown away and trains and measures nothing; of the run's own folder only the
checkpoint is read.
"""

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fledge import artifact, checkpoint, recipe, track
from fledge import config as configs
from fledge.artifact import Artifact
from fledge.errors import InputError


def export(run: str, folder: str | Path, overrides: Sequence[str] = ()) -> Artifact:
    """Write the artifact `folder` from the run's newest verified checkpoint, or from the one behind an @.

    Args:
        run: a run's folder, `RUN@40` for its step 40, or `RUN@best` for the one that best.json names.
        overrides: where data and parents lie now, or the device; whatever would make it another run is refused.

    Raises:
        InputError: no run, no such checkpoint, or data, parents or config are not those that it was trained with.
    """
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        raise InputError("fledge export is one process; run it without a launcher")
    source, step = locate(run)
    target = Path(folder)
    if target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{target} lies inside the run {source}, which an export leaves alone; give another folder")
    old = track.read_identity(source)
    if old is None:
        raise InputError(f"{source} is no run's folder: it has no identity.json; expected one such as runs/NAME")
    tree = configs.read(source / "config.yaml")
    module = recipe.import_stage(tree.data.get("stage"), tree.place(("stage",)))
    config = configs.load(module.Config, tree, overrides)
    parents = {role: parent.digest for role, parent in artifact.open_parents(config).items()}
    if changed := [text for _, text in recipe.differences(old, recipe.identity(config, parents))]:
        raise InputError(
            f"{source} was trained with something else ({'; '.join(changed)}). Put that back, or say where it lies "
            "now: data.path=DIR, parents.ROLE=DIR"
        )
    found = checkpoint.find(source / "checkpoints", step)
    with tempfile.TemporaryDirectory(prefix="fledge-export-") as scratch:
        apart = {"out": scratch, "name": config.run_name}
        if hasattr(config, "track"):
            apart["track"] = config.track.model_copy(update={"wandb": "off"})
        with track.exporting(track.Export(found, target, config)):
            return module.main(config.model_copy(update=apart))


def locate(run: str) -> tuple[Path, int | None]:
    """The folder and the step of `RUN`, `RUN@40` or `RUN@best`; None: the newest."""
    if Path(run).is_dir():
        return Path(run), None
    folder, at, which = run.rpartition("@")
    if not at or not Path(folder).is_dir():
        raise InputError(f"{folder if at else run} is no folder; expected a run's, such as runs/NAME or runs/NAME@STEP")
    if which == "best":
        best = track.read_json(Path(folder) / "best.json", None)
        if best is None:
            raise InputError(f"{folder} has no best.json: it was not trained with train.select; give a step")
        return Path(folder), int(best["step"])
    if not re.fullmatch("[0-9]+", which):
        raise InputError(f"{run}: {which!r} is no step; expected a whole number or best")
    return Path(folder), int(which)
