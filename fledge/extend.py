"""A run that begins where another one was, and is longer (`train.extend_from`).

Its rates are those of a run that was so long from its first step. Where the earlier run had the same ones until the
checkpoint that is gone on from (a constant rate, before its `optim.cooldown`), the two are the same run, bit for bit;
else the rate jumps there to what the longer schedule has, and that is said.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fledge import checkpoint, files
from fledge.errors import InputError

FREE = {("config", "train", "steps"), ("config", "optim", "cooldown")}
"""What may differ from the run that is prolonged."""


class Origin(NamedTuple):
    """The checkpoint that a longer run begins from."""

    step: int
    exact: bool
    """A longer run would have been the same until there."""


def origin(folder: str | Path) -> Origin:
    """The newest checkpoint until which a longer run would have been the same; if there is none, the newest.

    Raises:
        InputError: there is no checkpoint.
    """
    paths = sorted(Path(folder).glob(f"checkpoints/step_*/{checkpoint.STATE}"), reverse=True)
    if not paths:
        raise InputError(f"train.extend_from: {folder} has no checkpoints; expected the folder of a run that was saved")
    exact = [path for path in paths if json.loads(path.read_text(encoding="utf-8")).get("as_longer")]
    return Origin(int((exact or paths)[0].parent.name[5:]), bool(exact))


def fingerprint(folder: str | Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a longer run's identity says of the one that it begins from: the step, and what its checkpoint holds.

    Raises:
        InputError: it is no run, or differs in more than its length.
    """
    from fledge import recipe, track

    old = track.read_identity(Path(folder))
    if old is None:
        raise InputError(f"train.extend_from: {folder} is no run's folder: it has no identity.json")
    more = [text for key, text in recipe.differences(old, identity) if key not in FREE and key[0] != "extends"]
    if more:
        raise InputError(
            f"train.extend_from: {folder} was trained with something else ({'; '.join(more)}); only train.steps and "
            "optim.cooldown may differ. To start another run from its result, give its artifact as a parent"
        )
    step = origin(folder).step
    path = Path(folder) / "checkpoints" / checkpoint.name_of(step)
    try:
        return {"step": step, "digest": files.read_manifest(path, checkpoint.FORMATS, "checkpoint")["digest"]}
    except files.Broken as broken:
        raise InputError(f"train.extend_from: checkpoint {path} is broken: {broken}") from None
