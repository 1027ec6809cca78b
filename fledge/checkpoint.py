"""Private resume state of a run: safetensors and JSON, written so that a checkpoint that exists is whole.

    checkpoints/step_00000042/{model.safetensors, optim.safetensors, …, state.json, manifest.json}
    checkpoints/step_00000042/{rank-00000.safetensors, rank-00001.safetensors, …, index.json, state.json, manifest.json}

The second form is that of parameters in shards: each rank writes the rows that it holds, and the index says which.
Either is read by any number of ranks, whole or in shards.

Written aside, flushed, fsynced, hashed, renamed, and only then are older ones pruned. Which one is the latest is never
stored: it is the newest whose every file verifies. What others should read is an artifact (`fledge/artifact.py`).
A run saves through a `Saver` (`fledge/saver.py`); every rank calls `newest` and `find`.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fledge import distributed, files
from fledge.errors import InputError, RunError

FORMATS = PLAIN, SHARDED = 1, 2  # of the two forms
STATE, INDEX = "state.json", "index.json"
Groups = Mapping[str, Mapping[str, Tensor]]


class Stored:
    """A tensor that lies in the files of several ranks; what is read of it is only what is asked for.

    Args:
        pieces: its rows in order, (first row, tensor). The tensors are views of files, read when they are used.
    """

    def __init__(self, shape: list[int], dtype: torch.dtype, pieces: list[tuple[int, Tensor]]) -> None:
        self.shape, self.dtype, self.pieces = torch.Size(shape), dtype, pieces

    def __getitem__(self, rows: Any) -> Tensor:
        """Some rows (a slice), or all of it (``...``)."""
        start, stop, _ = (slice(None) if rows is ... else rows).indices(self.shape[0])
        within = [
            piece[max(start - first, 0) : stop - first]
            for first, piece in self.pieces
            if first < stop and first + len(piece) > start
        ]
        return torch.cat(within) if within else torch.empty(0, *self.shape[1:], dtype=self.dtype)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    step: int
    path: Path
    state: dict[str, Any]

    def stored(self, name: str) -> Mapping[str, Tensor | Stored]:
        """One group of tensors; of each, only the rows that are asked for are read from the disk."""
        index = self._index()
        names = index["groups"] if index else [file.stem for file in self.path.glob("*.safetensors")]
        if name not in names:
            has = ", ".join(sorted(names))
            raise InputError(f"checkpoint {self.path} has no tensors named {name!r} (it has: {has}); run with --fresh")
        return _assembled(self.path, name, index) if index else load_file(self.path / f"{name}.safetensors")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """One group of tensors, whole and on the CPU."""
        return {key: stored[...] for key, stored in self.stored(name).items()}

    def _index(self) -> dict[str, Any] | None:
        path = self.path / INDEX
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# ---- find ------------------------------------------------------------------------------------------------------------


def newest(root: Path) -> Checkpoint | None:
    """The newest verified checkpoint under `root`, or None. A broken one is renamed `.bad-…`, with a warning.

    Raises:
        InputError: a checkpoint has another format.
        RunError: the folder cannot be read, or a broken checkpoint not be set aside.
    """
    root = Path(root)

    def find() -> int | None:
        if not root.is_dir():
            return None
        try:
            files.sweep(root)
            return next((step for step in reversed(_steps(root)) if _verified(root, step)), None)
        except OSError as reason:
            raise RunError(f"the checkpoints in {root} cannot be read or set aside: {reason}") from reason

    step = distributed.on_main(find)
    if step is None:
        return None
    return _read(root, step)


def find(root: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of `step`, or the newest that verifies. Nothing is renamed or removed.

    Raises:
        InputError: it is not there, or not whole.
    """
    root = Path(root)

    def look() -> int:
        there = _steps(root)
        faults = {one: _faults(root / name_of(one), one) for one in (reversed(there) if step is None else [step])}
        whole = next((one for one, found in faults.items() if not found), None)
        if whole is not None:
            return whole
        if step in there:
            raise InputError(f"checkpoint {root / name_of(step)} is broken: {'; '.join(faults[step])}")
        has = f"it has {', '.join(map(str, there))}" if there else "it has none"
        raise InputError(f"{root}: no {'whole checkpoint' if step is None else f'checkpoint of step {step}'}; {has}")

    return _read(root, distributed.on_main(look))


def _read(root: Path, step: int) -> Checkpoint:
    path = root / name_of(step)
    return Checkpoint(step, path, json.loads((path / STATE).read_text(encoding="utf-8")))


def _assembled(path: Path, name: str, index: dict[str, Any]) -> dict[str, Tensor | Stored]:
    """The tensors of a group in shards, as the index has them."""
    shards = [load_file(path / rank_file(rank)) for rank in range(index["ranks"])]
    found: dict[str, Tensor | Stored] = {}
    for key, entry in index["groups"][name].items():
        if entry["rows"] is None:
            found[key] = shards[0][f"{name}/{key}"]
        else:
            pieces = [(first, shards[rank][f"{name}/{key}"]) for rank, (first, _) in enumerate(entry["rows"])]
            found[key] = Stored(entry["shape"], getattr(torch, entry["dtype"]), pieces)
    return found


def name_of(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step_{step:08d}"


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _steps(root: Path) -> list[int]:
    """Steps that have a folder, ascending."""
    names = [path.name for path in root.glob("step_*") if path.is_dir()]
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_\d{8,}", name))


def _verified(root: Path, step: int) -> bool:
    """Is the checkpoint of this step whole? A broken one is set aside, with a warning that names the file."""
    path = root / name_of(step)
    found = _faults(path, step)
    if found:
        bad = files.aside(path, "bad")
        files.move(path, bad)
        message = f"checkpoint {path} is broken: {'; '.join(found)}. Set aside as {bad.name}; an older one is used"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return not found


def _faults(path: Path, step: int) -> list[str]:
    """What is wrong with the checkpoint of this step, one sentence a file."""
    try:
        manifest = files.read_manifest(path, FORMATS, "checkpoint")
        found = files.faults(path, manifest)
    except files.Broken as broken:
        return [str(broken)]
    if not found and manifest.get("step") != step:
        return [f"{files.MANIFEST} says step {manifest.get('step')}"]
    return found


# ---- write -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draft:
    """What is to be written of a checkpoint: by rank 0 alone, or, of parameters in shards, by every rank its own."""

    root: Path
    step: int
    files: dict[str, dict[str, Tensor]]
    """This rank's files and the tensors in each, which are on the CPU, contiguous, and nobody else's."""
    index: dict[str, Any] | None
    """Where each tensor lies, if each rank writes; None: each file holds a whole group."""
    state: str
    """JSON, as it is written."""

    @property
    def folder(self) -> Path:
        return self.root / name_of(self.step)


def publish(draft: Draft, keep: int, spare: Set[int], published: Callable[[], None], group: Any) -> None:
    """Write a checkpoint, call `published`, then prune all older ones but the newest `keep` - 1 and `spare`.

    A step that is already there and verifies stays as it is: a run is a pure function of its config, so that both are
    the same, and there is no moment at which neither exists. Every rank that writes calls this, with the group on which
    they agree, or rank 0 with ALONE.

    Raises:
        RunError: the disk does not take it, on every one of them. The older checkpoints are untouched.
    """

    def finish() -> None:
        with _told(draft):
            published()
            _prune(draft.root, draft.step, keep, spare)

    _write(draft, group)
    distributed.on_main(finish, group)


def _write(draft: Draft, group: Any) -> None:
    folder = distributed.on_main(lambda: _begun(draft), group)
    if folder is None:
        return
    try:
        parts = distributed.together(lambda: _part_written(draft, folder), group)
        distributed.on_main(lambda: _closed(draft, folder, parts), group)
    except Exception:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _told(draft: Draft) -> Iterator[None]:
    """What the disk says against it, as the error that the run ends with."""
    try:
        yield
    except (OSError, SafetensorError) as reason:
        raise RunError(
            f"checkpoint of step {draft.step} could not be written to {draft.root}: {reason}. The older checkpoints "
            "are untouched; make room or give write access and start the run again: it goes on from the last one"
        ) from reason


def _begun(draft: Draft) -> Path | None:
    """A new folder to write into; None where the checkpoint is there and whole."""
    with _told(draft):
        draft.root.mkdir(parents=True, exist_ok=True)
        if draft.folder.is_dir() and _verified(draft.root, draft.step):
            return None
        folder = files.aside(draft.folder, "tmp")
        folder.mkdir()
        return folder


def _part_written(draft: Draft, folder: Path) -> dict[str, dict]:
    """Write this rank's files, fsynced; their lines for the manifest."""
    with _told(draft):
        entries = {}
        for name, tensors in draft.files.items():
            if not files.plain(name) or "/" in name:
                raise ValueError(f"{name!r} cannot name a file of tensors")
            save_file(tensors, folder / name)
            entries[name] = files.entry(folder / name)
        return entries


def _closed(draft: Draft, folder: Path, parts: list[dict[str, dict]]) -> None:
    """Write what is written once, the manifest last, and give the folder its name."""
    with _told(draft):
        files.write_text(folder / STATE, draft.state)
        if draft.index is not None:
            files.write_text(folder / INDEX, files.canonical(draft.index))
        manifest = {
            "format": PLAIN if draft.index is None else SHARDED,
            "kind": "checkpoint",
            "step": draft.step,
            "versions": {"torch": str(torch.__version__)},
        }
        files.write_manifest(folder, manifest, {name: entry for part in parts for name, entry in part.items()})
        files.move(folder, draft.folder)


def _prune(root: Path, step: int, keep: int, spare: Set[int]) -> None:
    """Remove older checkpoints but `spare`. Never one from a later step: that is not ours to judge."""
    older = [other for other in _steps(root) if other < step]
    for other in older[: max(len(older) + 1 - keep, 0)]:
        if other not in spare:
            files.remove(root / name_of(other))


# ---- state of modules and optimizers ---------------------------------------------------------------------------------


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, live and each once: tied ones under their first name."""
    return dict(_named_tensors(module))


def changing_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a module: `module_tensors` without those that its own method `constant()` gives.

    They are what neither the optimiser nor `after_step` changes and the stage reads from its parents again, whose
    digests are part of the run: the frozen base of an adapter.
    """
    constant = {id(tensor) for tensor in module.constant()} if hasattr(module, "constant") else set()
    return {name: tensor for name, tensor in module_tensors(module).items() if id(tensor) not in constant}


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        passing = part._non_persistent_buffers_set
        for name, tensor in {**part._parameters, **part._buffers}.items():
            if tensor is not None and name not in passing and id(tensor) not in seen:
                seen.add(id(tensor))
                # torch.compile is a matter of hardware: the names are those of the module that it wraps
                yield f"{prefix}.{name}".removeprefix(".").replace("_orig_mod.", ""), tensor


@torch.no_grad()
def load_module(module: nn.Module, tensors: Mapping[str, Tensor | Stored]) -> None:
    """Copy `changing_tensors` back in place: every name, shape and type must be the same. Shards take their rows."""
    mine = changing_tensors(module)
    _same_names("the model", set(mine), set(tensors))
    _same_forms("the model", {name: (mine[name], tensors[name]) for name in mine})
    for name, tensor in mine.items():
        distributed.local(tensor).copy_(tensors[name][distributed.rows_held(tensor)])


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by name: `parameter/exp_avg`. Rates and decay are functions of the step and not in it."""
    names = {id(tensor): name for name, tensor in changing_tensors(module).items()}
    kept: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"optimizer state {key!r} of {name} is a {type(value).__name__}, not a tensor")
            kept[f"{name}/{key}"] = value
    return kept


@torch.no_grad()
def load_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor | Stored]) -> None:
    """Put `optimizer_tensors` back: same types, each beside its parameter and laid out like it.

    A parameter without state (its group has not started) stays without. The 0-d `step` lives on the CPU unless the
    group is fused or capturable: that is where the optimizer itself would have made it.
    """
    mine = changing_tensors(module)
    where = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    owned = {name for name, tensor in mine.items() if id(tensor) in where}
    saved = {key.rpartition("/")[0] for key in tensors}
    _same_names("the optimizer", owned, saved | owned)
    alike = {key: (mine[key.rpartition("/")[0]], value) for key, value in tensors.items() if not key.endswith("/step")}
    _same_forms("the optimizer", alike, types=False)
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        parameter = mine[name]
        if field == "step":
            group = where[id(parameter)]
            on_device = group.get("fused") or group.get("capturable")
            restored = value[...].to(parameter.device if on_device else "cpu", copy=True)
        else:
            restored = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            distributed.local(restored).copy_(value[distributed.rows_held(parameter)])
        optimizer.state[parameter][field] = restored


def _same_names(what: str, mine: set[str], saved: set[str]) -> None:
    parts = [f"{word} {_some(names)}" for word, names in (("lacks", mine - saved), ("has", saved - mine)) if names]
    if parts:
        raise InputError(f"the checkpoint does not fit {what}: it {' and it '.join(parts)}; run with --fresh")


def _same_forms(what: str, pairs: dict[str, tuple[Tensor, Tensor | Stored]], types: bool = True) -> None:
    wrong = [
        f"{name} is {_form(saved)}, expected {_form(own)}"
        for name, (own, saved) in pairs.items()
        if own.shape != saved.shape or types and own.dtype != saved.dtype
    ]
    if wrong:
        raise InputError(f"the checkpoint does not fit {what}: {_some(wrong)}; run with --fresh")


def _form(tensor: Tensor | Stored) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _some(names: set[str] | list[str], limit: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
